"""NetKet's kinetic energy by the forward Laplacian."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import netket as nk

from haiku_mlp.arguments import OtherCallError, is_of_its_call
from haiku_mlp.structure import MixedEntriesError


class KineticEnergy(nk.operator.KineticEnergy):
    r"""``netket.operator.KineticEnergy``; of a model that knows its Laplacian, in one pass.

    The local value is
    :math:`-\sum_d \frac{1}{2m_d} (\partial_d^2 \log\psi + (\partial_d \log\psi)^2)`.  NetKet
    takes it from the full matrix of second derivatives.  A model with a method
    ``laplacian(x)``, which returns value, gradient ``(B, N)`` and Laplacian ``(B,)`` as
    :meth:`compat.MLP.laplacian` does, gives it by one forward pass.  For masses that differ
    the method is called as ``laplacian(x, weights=inverse_masses)``.  NetKet's own path runs,
    with the same result, for models without the method or, there, without ``weights``, where it
    returns something else, where a class with a ``__call__`` of its own inherits it
    (``nn.remat`` and the like make such classes), for models
    that are not of Linen, for complex masses, and for activations that mix entries.

    Args:
      hilbert: The Hilbert space, a continuous one.
      mass: A number, or one for each coordinate.
      dtype: dtype of the mass.

    Source: `KineticEnergy of NetKet
    <https://netket.readthedocs.io/en/latest/api/_generated/operator/netket.operator.KineticEnergy.html>`_.

    Example, an envelope times a network of periodic features::

      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import netket as nk, netket.experimental as nkx
      >>> import compat
      >>> from compat.netket import KineticEnergy
      >>> from haiku_mlp.structure import derivatives
      >>> def envelope(x):
      ...     return -jnp.sum(x**2, -1) / 4
      >>> def waves(x):
      ...     return jnp.concatenate([jnp.sin(x), jnp.cos(x)], -1)
      >>> class LogPsi(nn.Module):
      ...     def setup(self):
      ...         self.mlp = compat.MLP(hidden_dims=(8,))
      ...     def __call__(self, x):
      ...         return envelope(x) + self.mlp(waves(x))
      ...     def laplacian(self, x, weights=None):
      ...         of_mlp = self.mlp.laplacian(x, features=waves, weights=weights)
      ...         return jax.tree.map(jnp.add, of_mlp, derivatives(envelope, x, weights=weights))
      >>> hilbert = nkx.hilbert.Particle(N=2, geometry=nkx.geometry.FreeSpace(d=1))
      >>> trap = nk.operator.PotentialEnergy(hilbert, lambda x: 0.5 * jnp.sum(x**2))
      >>> hamiltonian = KineticEnergy(hilbert, mass=[1.0, 2.0]) + trap
      >>> x = jnp.ones((5, 2))
      >>> variables = LogPsi().init(jax.random.key(0), x)
      >>> LogPsi().apply(variables, x, method="laplacian").gradient.shape
      (5, 2)
    """

    # NetKet asks operators of continuous spaces for their local values here; a dispatch by
    # type of state would not reach an operator that stands in a sum with a potential.
    def _expect_kernel(self, logpsi: Callable, params: Any, x: jax.Array) -> jax.Array:
        values = self.by_laplacian(logpsi, params, x)
        return super()._expect_kernel(logpsi, params, x) if values is None else values

    def by_laplacian(self, logpsi: Callable, params: Any, x: jax.Array) -> jax.Array | None:
        """Returns the local values ``(B,)`` at ``x (B, N)``; None where NetKet's path runs."""
        reached: list[Any] = []

        def method(model: Any, x: jax.Array) -> jax.Array:
            reached.append(None)
            reached[0] = self._local_values(model, x)
            return reached[0]

        if jnp.iscomplexobj(self.mass):
            return None
        try:
            values = logpsi(params, x, method=method)
        except (_NoLaplacianError, MixedEntriesError, OtherCallError):
            return None
        except Exception:  # of a model that takes no method, its own call says what is wrong
            if reached:
                raise
            return None
        # Some functions take no notice of method, others do more than to call the model.
        return values if reached and values is reached[0] else None

    def _local_values(self, model: Any, x: jax.Array) -> jax.Array:
        weights = 1 / self.mass
        options = {"weights": jnp.broadcast_to(weights, x.shape[-1:])} if self.mass.ndim else {}
        laplacian = getattr(model, "laplacian", None)
        # Lifts wrap the call alone: of nn.map_variables the laplacian is another function's.
        classes = type(model), getattr(model, "_haiku_class", type(model))  # of compat.wrap
        if laplacian is None or not all(is_of_its_call(cls, "laplacian") for cls in classes):
            raise _NoLaplacianError
        if not _takes(laplacian, x, **options):
            raise _NoLaplacianError
        found = jax.tree.leaves(laplacian(x, **options))
        if [*map(jnp.shape, found)] != [x.shape[:1], x.shape, x.shape[:1]]:
            raise _NoLaplacianError
        _, gradient, second = found
        first = jnp.sum(jnp.atleast_2d(weights) * gradient**2, -1)
        return -0.5 * (first + (second if options else weights * second))


class _NoLaplacianError(Exception):
    """The model has no method ``laplacian`` that takes and returns what it should."""


def _takes(function: Callable, *args: Any, **kwargs: Any) -> bool:
    """Returns whether a function takes these arguments."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return False
    return True
