"""What a NetKet user plugs in.

The only package that imports NetKet, which turns x64 on.  ``import compat`` does not import
it: ``from compat.netket import MinSR``.

Its import alone lets NetKet compute the local energies of a :class:`compat.MLP` by the
structure of the model: in ``expect``, ``expect_and_grad``, ``VMC``, ``VMC_SR`` and the variance
they are the same up to rounding, in less time.
"""

from . import local_energies as _local_energies  # noqa: F401  (registers with NetKet's dispatch)
from .kinetic_energy import KineticEnergy
from .min_sr import MinSR
from .paths import Plan, plan
from .sampler import structured
from .step import natural_gradient

__all__ = [
    "KineticEnergy",
    "MinSR",
    "Plan",
    "natural_gradient",
    "plan",
    "structured",
]
