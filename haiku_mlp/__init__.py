"""NetKet's multi-layer perceptron as a Haiku module that knows its own structure."""

from haiku_mlp import blocks as blocks
from haiku_mlp.initializers import JaxInitializer as JaxInitializer
from haiku_mlp.linear import Linear as Linear
from haiku_mlp.mlp import MLP as MLP

__version__ = "0.1.0"
