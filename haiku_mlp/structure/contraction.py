"""Products of a network's derivatives at samples with those at others."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from haiku_mlp.structure.network import Factors, Network, ParameterDerivatives, Part


def contract(
    network: Network,
    parts: list[Part],
    rows: ParameterDerivatives,
    columns: ParameterDerivatives,
    half: bool = False,
) -> jax.Array:
    """Returns the sum of products of derivatives, ``(B, O, B', O)``.

    Args:
      network: The network.
      parts: The parts that are summed.
      rows: The derivatives at ``B`` samples, along the first axis.
      columns: Those at ``B'`` samples.
      half: Whether a pair of positions stands for both orders, and one with itself for half.
    """
    shape = rows.outputs.shape + columns.outputs.shape
    kernel = jnp.zeros(shape, columns.outputs.dtype)
    with jax.numpy_dtype_promotion("standard"):
        for part in parts:
            if part.is_gram:
                term = _gram(part, rows.factors[part.leaf], columns.factors[part.leaf], half)
            else:
                term = _inner(rows.jacobians[part.leaf], columns.jacobians[part.leaf])
            # What a complex parameter adds to a complex output is half that of two real ones.
            is_half = jnp.iscomplexobj(network.output) and jnp.iscomplexobj(
                network.leaves[part.leaf]
            )
            kernel += term / 2 if is_half else term
    return kernel


def _gram(part: Part, rows: Factors, columns: Factors, half: bool) -> jax.Array:
    """Returns ``sum over t, s of (h_t . h_s) (d_t . d_s)``, ``(B, O, B', O)``."""
    (h, d), (hs, ds) = map(_by_positions, (rows, columns))

    def term(t: Any, s: Any) -> jax.Array:
        signals = _inner(d[t], ds[s], part.precision)
        if h is None or hs is None:
            return signals.real
        inputs = _inner(h[t], hs[s], part.precision)
        return (inputs[:, None, :, None] * signals).real

    if len(d) == 1:
        return term(0, 0)
    every = np.arange(len(d))
    diagonal = _sum(term, every, every)
    if half:
        return diagonal / 2 + _sum(term, *np.triu_indices(len(d), 1))
    return diagonal + _sum(term, *np.nonzero(~np.eye(len(d), dtype=bool)))


def _by_positions(factors: Factors) -> Factors:
    """Returns the factors at many samples with the axis of positions in front."""
    h = None if factors.h is None else jnp.moveaxis(factors.h, 1, 0)
    return Factors(h, jnp.moveaxis(factors.d, 2, 0))


def _sum(term: Callable[..., jax.Array], ts: np.ndarray, ss: np.ndarray) -> jax.Array:
    """Returns the sum of ``term(t, s)`` over pairs, one after the other."""
    first = term(ts[0], ss[0])

    def add(total: jax.Array, pair: tuple[Any, Any]) -> tuple[jax.Array, None]:
        return total + term(*pair), None

    return jax.lax.scan(add, first, (ts[1:], ss[1:]))[0]


def _inner(a: jax.Array, b: jax.Array, precision: Any = None) -> jax.Array:
    """Returns ``a . conj(b)`` over the last axes: ``(..., n), (..., n) -> (..., ...)``."""
    # As matrices: of more axes XLA makes transposed copies, even where they have size one.
    rows, columns = (c.reshape(math.prod(c.shape[:-1]), c.shape[-1]) for c in (a, b.conj()))
    contract_last = (((1,), (1,)), ((), ()))
    products = jax.lax.dot_general(rows, columns, contract_last, precision=precision)
    return products.reshape(a.shape[:-1] + b.shape[:-1])
