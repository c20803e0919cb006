"""NetKet's kinetic energy by the forward Laplacian."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import netket as nk


class KineticEnergy(nk.operator.KineticEnergy):
    r"""``netket.operator.KineticEnergy``; of a model that knows its Laplacian, in one pass.

    The local value is :math:`-\frac{1}{2m} (\Delta \log\psi + (\nabla \log\psi)^2)`.  NetKet
    takes it from the full matrix of second derivatives.  A model with a method
    ``laplacian(x)``, which returns value, gradient ``(B, N)`` and Laplacian ``(B,)`` as
    :meth:`compat.MLP.laplacian` does, gives it by one forward pass.  NetKet's own path runs,
    with the same result, for other models and for unequal masses.

    Args:
      hilbert: The Hilbert space, a continuous one.
      mass: A number, or one for each coordinate.
      dtype: dtype of the mass.

    Source: `KineticEnergy of NetKet
    <https://netket.readthedocs.io/en/latest/api/_generated/operator/netket.operator.KineticEnergy.html>`_.

    Example::

      >>> import jax.numpy as jnp, netket as nk, netket.experimental as nkx
      >>> from compat.netket import KineticEnergy
      >>> hilbert = nkx.hilbert.Particle(N=2, geometry=nkx.geometry.FreeSpace(d=1))
      >>> trap = nk.operator.PotentialEnergy(hilbert, lambda x: 0.5 * jnp.sum(x**2))
      >>> hamiltonian = KineticEnergy(hilbert, mass=1.0) + trap
      >>> hamiltonian.is_hermitian
      True
    """

    # NetKet asks operators of continuous spaces for their local values here; a dispatch by
    # type of state would not reach an operator that stands in a sum with a potential.
    def _expect_kernel(self, logpsi: Callable, params: Any, x: jax.Array) -> jax.Array:
        if self.mass.ndim == 0 and _takes_method(logpsi, params, x):
            try:
                return logpsi(params, x, method=self._local_values)
            except _NoLaplacianError:
                pass
        return super()._expect_kernel(logpsi, params, x)

    def _local_values(self, model: Any, x: jax.Array) -> jax.Array:
        if not hasattr(model, "laplacian"):
            raise _NoLaplacianError
        _, gradient, laplacian = model.laplacian(x)
        return -0.5 / self.mass * (laplacian + jnp.sum(gradient**2, -1))


class _NoLaplacianError(Exception):
    """The model has no method ``laplacian``."""


def _takes_method(logpsi: Callable, params: Any, x: jax.Array) -> bool:
    """Returns whether a method can be asked for: NetKet passes some functions without it."""
    try:
        inspect.signature(logpsi).bind(params, x, method=None)
    except TypeError:
        return False
    return True
