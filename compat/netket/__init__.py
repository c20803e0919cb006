"""What a NetKet user plugs in.

The only package that imports NetKet, which turns x64 on.  ``import compat`` does not import
it: ``from compat.netket import MinSR``.
"""

from .kinetic_energy import KineticEnergy as KineticEnergy
from .min_sr import MinSR as MinSR
from .min_sr import natural_gradient as natural_gradient
from .sampler import structured as structured
