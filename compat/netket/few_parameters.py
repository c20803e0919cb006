"""The step of stochastic reconfiguration from a system as large as the parameters are many."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from haiku_mlp import semidefinite


def are_few(params: Any, num_outputs: int) -> bool:
    """Returns whether there are so few parameters that their system takes less time.

    It needs their derivatives, which the kernel may do without.
    """
    return 2 * sum(leaf.size for leaf in jax.tree.leaves(_real_parts(params))) < num_outputs


def parameter_step(
    outputs: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    samples: jax.Array,
    residuals: jax.Array,
    damping: float | jax.Array,
    *,
    momentum: float | jax.Array,
    previous: Any,
    chunk_size: int | None,
) -> Any:
    """Returns what :func:`haiku_mlp.natural_gradient` does, from the derivatives themselves.

    Args:
      outputs: Of parameters and samples, real, ``(B,)`` or ``(B, O)``.
      params: The parameters.
      samples: ``(B, N)``.
      residuals: Shaped as the outputs.
      damping: As there.
      momentum: As there.
      previous: As there.
      chunk_size: Samples whose derivatives are formed at a time; None: all.
    """
    point, unravel = ravel_pytree(_real_parts(params))

    def output(point: jax.Array, sample: jax.Array) -> jax.Array:
        return outputs(_whole(unravel(point), params), sample[None])[0]

    def derivatives(sample: jax.Array) -> jax.Array:
        return jax.jacrev(output)(point, sample)

    if chunk_size is None:
        jacobian = jax.vmap(derivatives)(samples)
    else:
        jacobian = jax.lax.map(derivatives, samples, batch_size=chunk_size)
    is_half = jnp.finfo(point.dtype).bits < 32
    jacobian = jacobian.astype(jnp.float32 if is_half else point.dtype)
    jacobian -= jnp.mean(jacobian, 0, keepdims=True)
    rows = jacobian.reshape(-1, point.size)
    product = functools.partial(jnp.matmul, precision="highest")
    residuals = residuals.astype(rows.dtype).reshape(-1)
    before = jnp.zeros_like(rows[0])
    if previous is not None:
        before += momentum * ravel_pytree(_real_parts(previous))[0].astype(rows.dtype)
        residuals -= product(rows, before)
    metric = product(rows.T, rows) / len(samples)
    gradient = product(rows.T, residuals) / len(samples)
    rounding = 4 * jnp.finfo(rows.dtype).eps * jnp.linalg.norm(metric)
    damping = jnp.asarray(damping, rows.dtype)
    metric += damping * jnp.eye(point.size, dtype=rows.dtype)
    step, _ = semidefinite.solve(metric, gradient, rounding, damping)
    return _whole(unravel((before + step).astype(point.dtype)), params)


def _real_parts(tree: Any) -> list[jax.Array]:
    """Returns the real numbers of a tree: those of a complex array along a new axis."""
    return [
        jnp.stack([leaf.real, leaf.imag]) if jnp.iscomplexobj(leaf) else leaf
        for leaf in jax.tree.leaves(tree)
    ]


def _whole(parts: list[jax.Array], like: Any) -> Any:
    """Returns the tree of the numbers: the inverse of ``_real_parts``."""
    leaves, structure = jax.tree.flatten(like)
    whole = [
        jax.lax.complex(*part) if jnp.iscomplexobj(leaf) else part
        for part, leaf in zip(parts, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, whole)
