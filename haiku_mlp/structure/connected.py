"""Outputs of a multi-layer perceptron at inputs that differ in a few entries."""

import jax
import jax.numpy as jnp

from haiku_mlp.linear import common_dtype
from haiku_mlp.structure.layers import Layer, forward, map_samples


def connected(
    layers: tuple[Layer, ...], x: jax.Array, sites: jax.Array, values: jax.Array
) -> jax.Array:
    r"""Outputs at the ``K`` inputs that differ from each ``x`` in at most ``m`` entries.

    The first layer is linear, so a change of ``m`` entries changes it by ``m`` rows of its
    weights instead of all ``N``:

    .. math:: z' = z(x) + \sum_{k=1}^m (v_k - x_{s_k}) \, w_{s_k}

    The other layers are evaluated in full, since one entry of ``x`` reaches all units of
    the first (for one hidden layer this is the update of the angles of a restricted
    Boltzmann machine: Carleo and Troyer 2017, arXiv:1606.02318).

    Args:
      layers: The layers.
      x: Inputs ``(..., N)``.
      sites: Entries that change ``(..., K, m)``, integers in ``[-N, N)``.  Leading axes
        broadcast against those of ``x``, and may be left out.
      values: What they become ``(..., K, m)``.  A value equal to the present one changes
        nothing, whatever its site: a change of fewer entries is padded so.  Other sites
        of one change must differ, or their changes add up.

    Returns:
      ``(..., K, O)`` for ``O`` outputs, of the dtype of a call with ``x``, weights and
      ``values`` promoted together.  NaN for a site out of range, and where an entry of ``x``
      that is not finite is not replaced.

    Raises:
      ValueError: The shapes do not fit.
      TypeError: ``sites`` are not integers.

    Example::

      >>> import jax.numpy as jnp
      >>> from haiku_mlp.structure import Layer, connected
      >>> linear = Layer(w=jnp.array([[1.], [10.], [100.]]))
      >>> spins = jnp.array([1, 1, -1], jnp.int8)
      >>> flips = jnp.array([[0], [2]])
      >>> connected((linear,), spins, flips, -spins[flips]).tolist()
      [[-91.0], [111.0]]
    """
    x, sites, values = jnp.asarray(x), jnp.asarray(sites), jnp.asarray(values)
    _check(x, sites, values)
    batch, changes = x.shape[:-1], sites.shape[-2:]
    samples = (x, *(jnp.broadcast_to(a, batch + changes) for a in (sites, values)))
    widths = [layer.w.shape[-1] for layer in layers]
    return map_samples(_connected, layers, samples, len(batch), entries=changes[0] * max(widths))


def _check(x: jax.Array, sites: jax.Array, values: jax.Array) -> None:
    if not jnp.issubdtype(sites.dtype, jnp.integer):
        raise TypeError(f"sites must be integers, got {sites.dtype}")
    shapes = f"x {x.shape}, sites {sites.shape}, values {values.shape}"
    if x.ndim < 1 or sites.ndim < 2 or values.ndim < 2 or sites.shape[-2:] != values.shape[-2:]:
        raise ValueError(f"x must be (..., N), sites and values (..., K, m), got {shapes}")
    try:
        leading = jnp.broadcast_shapes(x.shape[:-1], sites.shape[:-2], values.shape[:-2])
    except ValueError:
        leading = None
    if leading != x.shape[:-1]:
        raise ValueError(f"the leading axes of sites and values must fit those of x, got {shapes}")


def _connected(
    layers: tuple[Layer, ...], x: jax.Array, sites: jax.Array, values: jax.Array
) -> jax.Array:
    """Returns ``(K, O)`` for one input ``(N,)``."""
    first, *rest = layers
    dtype = common_dtype(x, values, first.w, first.b)
    left = _left_over(x, sites).astype(dtype)
    # Integers overflow where a difference does not fit: int8 spins, unsigned occupations.
    x, values, w = _finite(x).astype(dtype), values.astype(dtype), first.w.astype(dtype)
    changes = values - x[sites]
    z = jnp.expand_dims(first.affine(x), 0) + jnp.expand_dims(left, 1)
    for k in range(sites.shape[1]):
        rows = w.at[sites[:, k]].get(mode="fill", fill_value=jnp.nan)
        z += jnp.expand_dims(changes[:, k], 1) * rows
    return forward(tuple(rest), first.activate(z))


def _finite(x: jax.Array) -> jax.Array:
    """Returns ``x`` with zero for what is not finite: no sum gets rid of that again."""
    return jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x)) if _is_inexact(x) else x


def _left_over(x: jax.Array, sites: jax.Array) -> jax.Array:
    """Returns NaN ``(K,)`` for each change that leaves entries which are not finite, else 0."""
    if not _is_inexact(x):
        return jnp.zeros(len(sites))
    is_bad = ~jnp.isfinite(x)
    return jnp.where(jnp.sum(is_bad) > jnp.sum(is_bad[sites], axis=1), jnp.nan, 0.0)


def _is_inexact(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)
