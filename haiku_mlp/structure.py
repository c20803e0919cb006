"""What a multi-layer perceptron can compute because it is one: functions of its layers."""

from haiku_mlp.connected import connected as connected
from haiku_mlp.laplacian import Derivatives as Derivatives
from haiku_mlp.laplacian import laplacian as laplacian
from haiku_mlp.layers import Layer as Layer
from haiku_mlp.layers import forward as forward
from haiku_mlp.tangent_kernel import tangent_kernel as tangent_kernel
