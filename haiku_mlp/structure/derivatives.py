"""Derivatives by the inputs of any function, one direction at a time."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from haiku_mlp.linear import common_dtype
from haiku_mlp.structure.layers import map_samples


class Derivatives(NamedTuple):
    """A function and its derivatives by its inputs.

    Attributes:
      value: ``(...)``, for a block with ``O`` outputs ``(..., O)``.
      gradient: ``(..., N)``, for a block ``(..., O, N)``.
      laplacian: ``(...)``, for a block ``(..., O)``.
    """

    value: jax.Array
    gradient: jax.Array
    laplacian: jax.Array


def derivatives(
    function: Callable[[jax.Array], jax.Array], x: jax.Array, *, weights: jax.Array | None = None
) -> Derivatives:
    """Value, gradient and Laplacian of a function, by differentiating it twice in ``N`` directions.

    For what stands beside a multi-layer perceptron, such as an envelope, so that the sum of
    both, ``jax.tree.map(jnp.add, ...)``, has the derivatives of the whole.

    Args:
      function: Of one input, from ``(N,)`` to a number or ``(F,)``.
      x: Inputs ``(..., N)``, real.
      weights: ``(N,)``, of the second derivatives in the Laplacian; None: all 1.

    Returns:
      :class:`Derivatives`: ``value (...)``, ``gradient (..., N)`` and ``laplacian (...)``,
      with an axis of ``F`` behind the first where the function has one.

    Example::

      >>> import jax.numpy as jnp
      >>> from haiku_mlp.structure import derivatives
      >>> at = derivatives(lambda x: -jnp.sum(x**2) / 2, jnp.array([[1., 2., 3.]]))
      >>> at.value.tolist(), at.gradient.tolist(), at.laplacian.tolist()
      ([-7.0], [[-1.0, -2.0, -3.0]], [-3.0])
    """
    x = jnp.asarray(x)
    x = x.astype(common_dtype(x))
    if weights is not None:
        weights = jnp.asarray(weights, x.dtype)

    def of_one(weights: jax.Array | None, x: jax.Array) -> Derivatives:
        slopes, curvatures = jax.vmap(functools.partial(along, function, x))(directions(x))
        if weights is not None:
            each = weights.reshape(-1, *(1,) * (curvatures.ndim - 1))
            curvatures *= each.astype(curvatures.dtype)
        return Derivatives(function(x), jnp.moveaxis(slopes, 0, -1), jnp.sum(curvatures, 0))

    return map_samples(of_one, weights, (x,), x.ndim - 1, entries=x.shape[-1] ** 2)


def directions(x: jax.Array) -> jax.Array:
    """Returns the unit vectors ``(N, N)`` of a space, spread over devices as ``x (N,)`` is."""
    return jnp.diag(jnp.ones_like(x))


def along(
    function: Callable[[jax.Array], jax.Array], x: jax.Array, direction: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the first and the second derivative of ``function`` at ``x`` along a direction."""

    def slope(x: jax.Array) -> jax.Array:
        return jax.jvp(function, (x,), (direction,))[1]

    return jax.jvp(slope, (x,), (direction,))
