"""What can be computed from the structure of a network."""

from haiku_mlp.structure.configurations import at_configurations
from haiku_mlp.structure.connected import connected
from haiku_mlp.structure.derivatives import Derivatives, derivatives
from haiku_mlp.structure.first_layer import Features
from haiku_mlp.structure.kernel_plan import KernelPlan, kernel_plan
from haiku_mlp.structure.laplacian import MixedEntriesError, laplacian
from haiku_mlp.structure.layers import Layer, forward
from haiku_mlp.structure.linearized import Linearized
from haiku_mlp.structure.tangent_kernel import tangent_kernel

__all__ = [
    "Derivatives",
    "Features",
    "KernelPlan",
    "Layer",
    "Linearized",
    "MixedEntriesError",
    "at_configurations",
    "connected",
    "derivatives",
    "forward",
    "kernel_plan",
    "laplacian",
    "tangent_kernel",
]
