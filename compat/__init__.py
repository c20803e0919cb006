"""Haiku modules as Flax modules: same parameters, same numbers, same tables."""

from . import blocks
from .flax_adapter import MLP
from .functions import HaikuFunction
from .intermediates import perturb, perturb_outputs, sow
from .kernels import kernel_plan, tangent_kernel
from .trees import to_flax, to_haiku
from .wrapping import haiku_method, wrap

__all__ = [
    "MLP",
    "HaikuFunction",
    "blocks",
    "haiku_method",
    "kernel_plan",
    "perturb",
    "perturb_outputs",
    "sow",
    "tangent_kernel",
    "to_flax",
    "to_haiku",
    "wrap",
]
