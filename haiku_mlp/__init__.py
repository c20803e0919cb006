"""NetKet's multi-layer perceptron as a Haiku module that knows its own structure."""

from haiku_mlp import blocks as blocks
from haiku_mlp.initializers import JaxInitializer as JaxInitializer
from haiku_mlp.linear import Linear as Linear
from haiku_mlp.mlp import MLP as MLP
from haiku_mlp.natural_gradient import min_sr as min_sr
from haiku_mlp.natural_gradient import natural_gradient as natural_gradient
from haiku_mlp.sharding import partition_specs as partition_specs
from haiku_mlp.structure import Derivatives as Derivatives

__version__ = "0.1.0"
