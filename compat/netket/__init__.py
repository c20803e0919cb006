"""What a NetKet user plugs in.

The only package that imports NetKet, which turns x64 on.  ``import compat`` does not import
it: ``from compat.netket import MinSR``.
"""

from .kinetic_energy import KineticEnergy
from .min_sr import MinSR, natural_gradient
from .sampler import structured

__all__ = [
    "KineticEnergy",
    "MinSR",
    "natural_gradient",
    "structured",
]
