"""The tangent kernel of any network, without a Jacobian where products do without."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from haiku_mlp.structure.network import Derivatives, Factors, Network, Part


def tangent_kernel(
    function: Callable[[Any, Any], jax.Array],
    params: Any,
    x: Any,
    y: Any = None,
    *,
    chunk_size: int | None = None,
) -> jax.Array:
    r"""DOC"""
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be positive or None, got {chunk_size!r}")
    if 0 in (len(leaf) for leaf in jax.tree.leaves((x, y))):
        chunk_size = None  # lax.map takes no empty batch
    network = Network(function, params, x)
    kernel = jnp.moveaxis(_real_kernel(network, x, y, chunk_size), -1, 1)
    if jnp.iscomplexobj(network.output):
        real_rows, imag_rows = jnp.split(kernel, 2, 2)
        aa, ab = jnp.split(real_rows, 2, 3)
        ba, bb = jnp.split(imag_rows, 2, 3)
        kernel = jax.lax.complex(aa + bb, ba - ab)
    return kernel.reshape(kernel.shape[:2] + network.output.shape * 2)


def _real_kernel(network: Network, x: Any, y: Any, chunk_size: int | None) -> jax.Array:
    """Returns the kernel of the real outputs, ``(B, O, O, B')``."""
    # Jacobians are as large as the parameters: in chunks each is made where it is needed.
    kept = [part for part in network.parts if chunk_size is None or part.products]
    remade = [part for part in network.parts if part not in kept]
    rows = _derivatives(network, kept, x, chunk_size)
    columns = rows if y is None else _derivatives(network, kept, y, chunk_size)
    halved = [part for part in kept if y is None and part.products and part.positions > 1]
    whole = [part for part in kept if part not in halved]
    kernel = _kernel_of(network, whole, rows, columns, chunk_size)
    if halved:
        half = _kernel_of(network, halved, rows, columns, chunk_size, half=True)
        kernel += half + jnp.transpose(half, (3, 2, 1, 0))
    if remade:
        kernel += _remade_kernel(network, remade, x, x if y is None else y, chunk_size)
    return kernel


def _derivatives(
    network: Network, parts: list[Part], samples: Any, chunk_size: int | None
) -> Derivatives:
    return _map(lambda sample: network.derivatives(sample, parts), samples, chunk_size)


def _kernel_of(
    network: Network,
    parts: list[Part],
    rows: Derivatives,
    columns: Derivatives,
    chunk_size: int | None,
    *,
    half: bool = False,
) -> jax.Array:
    """Returns some parameters' part of the kernel; with its transpose if it is ``half``."""
    columns = jax.tree.map(lambda a: jnp.moveaxis(a, 0, -2), columns)
    return _map(lambda row: _product(network, parts, row, columns, half), rows, chunk_size)


def _remade_kernel(
    network: Network, parts: list[Part], x: Any, y: Any, chunk_size: int | None
) -> jax.Array:
    """Returns some parameters' part of the kernel with few derivatives at a time."""

    def kernel_row(sample: Any) -> jax.Array:
        row = network.derivatives(sample, parts)

        def entry(other: Any) -> jax.Array:
            column = network.derivatives(other, parts)
            column = jax.tree.map(lambda a: jnp.expand_dims(a, -2), column)
            return _product(network, parts, row, column)[..., 0]

        return jnp.moveaxis(_map(entry, y, chunk_size), 0, -1)

    return _map(kernel_row, x, chunk_size)


def _map(function: Callable[[Any], Any], samples: Any, chunk_size: int | None) -> Any:
    """Returns ``jax.vmap(function)(samples)``, a chunk at a time."""
    if chunk_size is None:
        return jax.vmap(function)(samples)
    return jax.lax.map(function, samples, batch_size=chunk_size)


def _product(
    network: Network, parts: list[Part], row: Derivatives, columns: Derivatives, half: bool = False
) -> jax.Array:
    """Returns the sum of products of derivatives, ``(O, O, B')``.

    Args:
      network: The network.
      parts: The parts that are summed.
      row: The derivatives at one sample.
      columns: Those at ``B'`` samples, along the last axis but one.
      half: Whether a pair of positions stands for both orders, and one with itself for half.
    """
    num_columns, num_outputs = columns.outputs.shape
    kernel = jnp.zeros((num_outputs, num_outputs, num_columns), columns.outputs.dtype)
    with jax.numpy_dtype_promotion("standard"):
        for part in parts:
            if part.products:
                term = _gram(part, row.factors[part.leaf], columns.factors[part.leaf], half)
            else:
                term = _inner(row.jacobians[part.leaf], columns.jacobians[part.leaf])
            # What a complex parameter adds to a complex output is half that of two real ones.
            is_half = jnp.iscomplexobj(network.output) and jnp.iscomplexobj(
                network.leaves[part.leaf]
            )
            kernel += term / 2 if is_half else term
    return kernel


def _gram(part: Part, row: Factors, columns: Factors, half: bool) -> jax.Array:
    """Returns ``sum over t, s of (h_t . h_s) (d_t . d_s)``, ``(O, O, B')``."""
    h, d = row.h, jnp.moveaxis(row.d, 1, 0)
    hs, ds = columns.h, jnp.moveaxis(columns.d, 1, 0)

    def term(t: Any, s: Any) -> jax.Array:
        signals = _inner(d[t], ds[s], part.precision)
        if h is None or hs is None:
            return signals.real
        inputs = _inner(h[t], hs[s], part.precision)
        return (jnp.reshape(inputs, (1, 1, -1)) * signals).real

    if len(d) == 1:
        return term(0, 0)
    every = np.arange(len(d))
    diagonal = _sum(term, every, every)
    if half:
        return diagonal / 2 + _sum(term, *np.triu_indices(len(d), 1))
    return diagonal + _sum(term, *np.nonzero(~np.eye(len(d), dtype=bool)))


def _sum(term: Callable[..., jax.Array], ts: np.ndarray, ss: np.ndarray) -> jax.Array:
    """Returns the sum of ``term(t, s)`` over pairs, one after the other."""
    first = term(ts[0], ss[0])

    def add(total: jax.Array, pair: tuple[Any, Any]) -> tuple[jax.Array, None]:
        return total + term(*pair), None

    return jax.lax.scan(add, first, (ts[1:], ss[1:]))[0]


def _inner(a: jax.Array, b: jax.Array, precision: Any = None) -> jax.Array:
    """Returns ``a . conj(b)`` over the last axes: ``(..., n), (..., n) -> (..., ...)``."""
    contract_last = (((a.ndim - 1,), (b.ndim - 1,)), ((), ()))
    return jax.lax.dot_general(a, b.conj(), contract_last, precision=precision)
