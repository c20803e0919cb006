"""Outputs of a multi-layer perceptron at inputs that differ in a few entries."""

import math

import jax
import jax.numpy as jnp

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
      ``(..., K, O)`` for ``O`` outputs; NaN for a site out of range.

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
    num_samples = math.prod(batch)
    sites = jnp.broadcast_to(sites, batch + changes).reshape(num_samples, *changes)
    values = jnp.broadcast_to(values, batch + changes).reshape(num_samples, *changes)
    samples = (x.reshape(num_samples, x.shape[-1]), sites, values)
    widths = [layer.w.shape[-1] for layer in layers]
    outputs = map_samples(
        lambda *sample: _connected(layers, *sample), samples, entries=changes[0] * max(widths)
    )
    return outputs.reshape(*batch, *outputs.shape[1:])


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
    w, z = first.w, first.affine(x)
    dtype = jnp.result_type(z, values)
    # Integers overflow where a difference does not fit: int8 spins, unsigned occupations.
    changes = values.astype(dtype) - x[sites].astype(dtype)
    z = jnp.broadcast_to(z, (len(sites), *z.shape))
    for k in range(sites.shape[1]):
        rows = w.at[sites[:, k]].get(mode="fill", fill_value=jnp.nan)
        z += jnp.expand_dims(changes[:, k], 1) * rows
    return forward(tuple(rest), first.activate(z))
