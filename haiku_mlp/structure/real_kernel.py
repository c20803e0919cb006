"""The kernel of a network's real outputs, all at once or in chunks."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from haiku_mlp.sequence import after
from haiku_mlp.structure.contraction import contract, equal_parts, of_blocks, transposed
from haiku_mlp.structure.network import Network, ParameterDerivatives, Part, multiplied

# From this number of multiply-adds of Jacobians on a kernel is made in so many blocks of rows.
_LARGE, _MAX_BLOCKS = 2**28, 4


def real_kernel(
    network: Network, x: Any, y: Any, chunk_size: int | None, differences: bool
) -> jax.Array:
    """Returns the kernel of the real outputs, ``(B, O, B', O)``.

    Args:
      network: The network.
      x: Inputs ``(B, ...)``, or a tree of them.
      y: Other inputs ``(B', ...)`` for the columns; None: ``x``.
      chunk_size: Rows of the kernel, and samples whose derivatives are formed, at a time;
        None: all.
      differences: Whether one derivative, the same for all samples, is subtracted from each.
    """
    if y is None and chunk_size is None and _has_large_jacobians(network, x):
        return _kernel_by_blocks(network, x, differences)
    # Jacobians are as large as the parameters: in chunks each is made where it is needed.
    kept = [part for part in network.parts if chunk_size is None or part.is_gram]
    remade = [part for part in network.parts if part not in kept]
    rows = _derivatives(network, kept, x, chunk_size)
    columns = rows
    if y is not None:
        y = after(y, (rows.factors, rows.jacobians))
        columns = _derivatives(network, kept, y, chunk_size)
    means = _means(columns) if differences else None
    rows, columns = _less(rows, means), _less(columns, means)
    if y is None:
        kernel = _own_kernel(network, kept, rows, means, chunk_size)
    else:
        kernel = _kernel_of(network, kept, rows, columns, means, chunk_size)
    if remade:
        x = after(x, kernel)
        others = x if y is None else after(y, kernel)
        kernel += _remade_kernel(network, remade, x, others, chunk_size, differences)
    return kernel


def _has_large_jacobians(network: Network, x: Any) -> bool:
    """Returns whether products of Jacobians are worth a larger program with fewer of them."""
    num_samples = jax.tree.leaves(x)[0].shape[0]
    is_one_cpu = jax.default_backend() == "cpu" and jax.device_count() == 1
    if not is_one_cpu or not isinstance(num_samples, int):  # jax.export has symbolic sizes
        return False
    return num_samples**2 * sum(part.cost for part in network.parts if not part.is_gram) >= _LARGE


def _kernel_by_blocks(network: Network, x: Any, differences: bool) -> jax.Array:
    """Returns the kernel of samples with themselves; that of one block with another is made once.

    Each block has Jacobians of its own, since parts of large arrays would be copied.
    """
    parts, num_samples = network.parts, jax.tree.leaves(x)[0].shape[0]
    number = min(_MAX_BLOCKS, num_samples)
    at = jax.vmap(lambda sample: network.factors(sample, parts))(x)
    cuts = map(operator.itemgetter, equal_parts(num_samples, number))
    factors = [jax.tree.map(cut, at) for cut in cuts]
    blocks = [jax.vmap(lambda one: multiplied(one, parts))(block) for block in factors]
    means = _means(blocks[0]) if differences else None
    blocks = [_less(block, means) for block in blocks]

    def block(i: int, j: int) -> jax.Array:
        if i == j:
            return _own_kernel(network, parts, blocks[i], means, None)
        return contract(network, parts, blocks[i], blocks[j], means)

    return of_blocks(block, number)


def _derivatives(
    network: Network, parts: list[Part], samples: Any, chunk_size: int | None
) -> ParameterDerivatives:
    return _map(lambda sample: network.derivatives(sample, parts), samples, chunk_size)


def _kernel_of(
    network: Network,
    parts: list[Part],
    rows: ParameterDerivatives,
    columns: ParameterDerivatives,
    means: ParameterDerivatives | None,
    chunk_size: int | None,
    *,
    half: bool = False,
) -> jax.Array:
    """Returns some parameters' part of the kernel; with its transpose if it is ``half``."""
    if chunk_size is None:
        return contract(network, parts, rows, columns, means, half=half)

    def kernel_row(row: ParameterDerivatives) -> jax.Array:
        return contract(network, parts, _batch(row), columns, means, half=half)[0]

    return _map(kernel_row, rows, chunk_size)


def _own_kernel(
    network: Network,
    parts: list[Part],
    at: ParameterDerivatives,
    means: ParameterDerivatives | None,
    chunk_size: int | None,
) -> jax.Array:
    """Returns some parameters' part of the kernel of samples with themselves."""
    halved = [part for part in parts if part.is_gram and part.positions > 1]
    whole = [part for part in parts if part not in halved]
    kernel = _kernel_of(network, whole, at, at, means, chunk_size)
    if halved:
        half = _kernel_of(network, halved, at, at, means, chunk_size, half=True)
        kernel += half + transposed(half)
    return kernel


def _remade_kernel(
    network: Network, parts: list[Part], x: Any, y: Any, chunk_size: int | None, differences: bool
) -> jax.Array:
    """Returns some parameters' part of the kernel with few derivatives at a time."""
    first = jax.tree.map(lambda a: a[:chunk_size], y)
    means = _means(_derivatives(network, parts, first, None)) if differences else None

    def at(sample: Any) -> ParameterDerivatives:
        return _less(_batch(network.derivatives(sample, parts)), means)

    def kernel_row(sample: Any) -> jax.Array:
        row = at(sample)

        def entry(other: Any) -> jax.Array:
            return contract(network, parts, row, at(other), means)[0, :, 0]

        return jnp.moveaxis(_map(entry, y, chunk_size), 0, 1)

    return _map(kernel_row, x, chunk_size)


def _means(at: ParameterDerivatives) -> ParameterDerivatives:
    return jax.tree.map(lambda a: jnp.mean(a, 0, keepdims=True), at)


def _less(at: ParameterDerivatives, means: ParameterDerivatives | None) -> ParameterDerivatives:
    return at if means is None else jax.tree.map(jnp.subtract, at, means)


def _batch(tree: Any) -> Any:
    """Returns the arrays of one sample as those of a batch."""
    return jax.tree.map(lambda a: a[None], tree)


def _map(function: Callable[[Any], Any], samples: Any, chunk_size: int | None) -> Any:
    """Returns ``jax.vmap(function)(samples)``, a chunk at a time."""
    if chunk_size is None:
        return jax.vmap(function)(samples)
    return jax.lax.map(function, samples, batch_size=chunk_size)
