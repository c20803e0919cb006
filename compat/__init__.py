"""Haiku modules as Flax modules: same parameters, same numbers, same tables."""

from . import blocks as blocks
from .flax_adapter import MLP as MLP
from .functions import HaikuFunction as HaikuFunction
from .intermediates import perturb as perturb
from .intermediates import perturb_outputs as perturb_outputs
from .intermediates import sow as sow
from .trees import to_flax as to_flax
from .trees import to_haiku as to_haiku
from .wrapping import haiku_method as haiku_method
from .wrapping import wrap as wrap
