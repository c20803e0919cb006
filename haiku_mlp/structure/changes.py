"""Where configurations differ, and what that changes in a first layer.

Sums and maxima of small unsigned integers, which compilers turn into vector instructions:
a sum of booleans as int64 and an ``argmax`` cost more than a network.
"""

import jax
import jax.numpy as jnp

from haiku_mlp.structure.layers import Layer

_GROUP = 128  # entries whose number, and whose places, a uint8 holds


def count(mask: jax.Array) -> jax.Array:
    """Returns how many entries of the last axis are true: int32 ``(...)``."""
    counts = [
        jnp.sum(mask[..., at : at + _GROUP], -1, dtype=jnp.uint8).astype(jnp.int32)
        for at in range(0, mask.shape[-1], _GROUP)
    ]
    return sum(counts, start=jnp.zeros(mask.shape[:-1], jnp.int32))


def differences(
    x: jax.Array, y: jax.Array, max_changes: int, dtype: jax.typing.DTypeLike
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Returns at most ``max_changes`` entries in which ``y`` differs from ``x``, last first.

    Args:
      x: Configurations ``(B, N)``.
      y: Configurations ``(B, N)``.
      max_changes: Entries looked for; where a row has more, its first ones are missing.
      dtype: dtype of the differences.

    Returns:
      Sites and differences ``y - x``, each ``(B,)`` and one for each change; the
      difference is 0 where no change is left.

    Example::

      >>> import jax.numpy as jnp
      >>> from haiku_mlp.structure.changes import differences
      >>> x, y = jnp.array([[1, 1, -1]], jnp.int8), jnp.array([[1, -1, 1]], jnp.int8)
      >>> sites, changes = differences(x, y, 2, float)
      >>> [int(s[0]) for s in sites], [float(d[0]) for d in changes]
      ([2, 1], [2.0, -2.0])
    """
    changed = x != y
    places = jnp.arange(x.shape[-1], dtype=jnp.int32).reshape(1, -1)
    sites, changes = [], []
    for k in range(max_changes):
        place = last(changed)
        site = jnp.maximum(place - 1, 0)
        old, new = (entry(values, site).astype(dtype) for values in (x, y))
        sites.append(site)
        changes.append(jnp.where(place > 0, new - old, 0))
        if k + 1 < max_changes:
            changed &= places != site[:, None]
    return sites, changes


def entry(x: jax.Array, site: jax.Array) -> jax.Array:
    """Returns one entry of each row: ``x[i, site[i]]``."""
    # Not x[rows, site]: on several devices that gathers all rows.
    return jnp.take_along_axis(x, site[:, None], 1, mode="clip")[:, 0]


def shift(
    first: Layer, z: jax.Array, sites: list[jax.Array], changes: list[jax.Array]
) -> jax.Array:
    """Returns the first layer's ``z (B, H)`` after changes of its inputs, each ``(B,)``."""
    for site, change in zip(sites, changes, strict=True):
        rows = first.w.at[site].get(mode="clip").astype(z.dtype)
        dtype = z.dtype if jnp.iscomplexobj(change) else z.real.dtype
        z = z + change.astype(dtype)[:, None] * rows
    return z


def last(mask: jax.Array) -> jax.Array:
    """Returns the place of the last true entry, from 1; 0 if there is none."""
    found = jnp.zeros(mask.shape[:-1], jnp.int32)
    for at in range(0, mask.shape[-1], _GROUP):
        part = mask[..., at : at + _GROUP]
        places = jnp.arange(1, part.shape[-1] + 1, dtype=jnp.uint8)
        places = places.reshape((1,) * (part.ndim - 1) + (-1,))
        place = jnp.max(jnp.where(part, places, jnp.uint8(0)), -1).astype(jnp.int32)
        found = jnp.where(place > 0, place + at, found)
    return found
