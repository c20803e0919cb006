"""The step of stochastic reconfiguration from the linear system of the parameters."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import netket as nk
from jax.flatten_util import ravel_pytree

from haiku_mlp import semidefinite


def are_few(params: Any, num_outputs: int) -> bool:
    """Returns whether there are so few parameters that their system takes less time.

    It needs their derivatives, which the kernel may do without.
    """
    numbers, _ = nk.jax.tree_to_real(params)
    return 2 * nk.jax.tree_size(numbers) < num_outputs


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
    numbers, restore = nk.jax.tree_to_real(params)
    point, unravel = ravel_pytree(numbers)

    def output(point: jax.Array, sample: jax.Array) -> jax.Array:
        return outputs(restore(unravel(point)), sample[None])[0]

    derivatives = nk.jax.vmap_chunked(jax.jacrev(output), (None, 0), chunk_size=chunk_size)
    jacobian = derivatives(point, samples)
    is_half = jnp.finfo(point.dtype).bits < 32
    jacobian = jacobian.astype(jnp.float32 if is_half else point.dtype)
    jacobian -= jnp.mean(jacobian, 0, keepdims=True)
    rows = jacobian.reshape(-1, point.size)
    product = functools.partial(jnp.matmul, precision="highest")
    residuals = residuals.astype(rows.dtype).reshape(-1)
    before = jnp.zeros_like(rows[0])
    if previous is not None:
        last, _ = ravel_pytree(nk.jax.tree_to_real(previous)[0])
        before += momentum * last.astype(rows.dtype)
        residuals -= product(rows, before)
    metric = product(rows.T, rows) / len(samples)
    gradient = product(rows.T, residuals) / len(samples)
    rounding = 4 * jnp.finfo(rows.dtype).eps * jnp.linalg.norm(metric)
    damping = jnp.asarray(damping, rows.dtype)
    metric += damping * jnp.eye(point.size, dtype=rows.dtype)
    step, _ = semidefinite.solve(metric, gradient, rounding, damping)
    return restore(unravel((before + step).astype(point.dtype)))
