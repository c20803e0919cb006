"""NetKet's multi-layer perceptron as a Haiku module that knows its own structure."""

from haiku_mlp import blocks
from haiku_mlp.initializers import JaxInitializer
from haiku_mlp.linear import Linear
from haiku_mlp.mlp import MLP
from haiku_mlp.natural_gradient import min_sr, natural_gradient
from haiku_mlp.sharding import partition_specs
from haiku_mlp.structure import Derivatives, kernel_plan, tangent_kernel

__all__ = [
    "MLP",
    "Derivatives",
    "JaxInitializer",
    "Linear",
    "blocks",
    "kernel_plan",
    "min_sr",
    "natural_gradient",
    "partition_specs",
    "tangent_kernel",
]

__version__ = "0.2.0.dev0"
