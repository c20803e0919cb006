"""What a multi-layer perceptron can compute because it is one: functions of its layers."""

from haiku_mlp.structure.connected import connected as connected
from haiku_mlp.structure.laplacian import Derivatives as Derivatives
from haiku_mlp.structure.laplacian import laplacian as laplacian
from haiku_mlp.structure.layers import Layer as Layer
from haiku_mlp.structure.layers import forward as forward
from haiku_mlp.structure.tangent_kernel import tangent_kernel as tangent_kernel
