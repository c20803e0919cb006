"""Products of a network's derivatives at samples with those at others."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from haiku_mlp.structure.network import Factors, Network, ParameterDerivatives, Part

# Derivatives of a sample that are worth a product of their own.
_SMALL = 2**10


def contract(
    network: Network,
    parts: list[Part],
    rows: ParameterDerivatives,
    columns: ParameterDerivatives,
    means: ParameterDerivatives | None = None,
    *,
    half: bool = False,
) -> jax.Array:
    """Returns the sum of products of derivatives, ``(B, O, B', O)``.

    With ``means``, those of the derivatives less ``mean(h) mean(d)``, the same for all samples.
    Rows and columns hold the differences of the factors from their means, so that no large numbers
    are subtracted from each other where the derivatives hardly vary.

    Args:
      network: The network.
      parts: The parts that are summed.
      rows: The derivatives at ``B`` samples, along the first axis.
      columns: Those at ``B'`` samples.
      means: Of the factors and derivatives, along an axis of size one.  What is given for rows
        and columns are differences from these.
      half: Whether a pair of positions stands for both orders, and one with itself for half.
    """
    shape = rows.outputs.shape + columns.outputs.shape
    kernel = jnp.zeros(shape, columns.outputs.dtype)
    with jax.numpy_dtype_promotion("standard"):
        for part in parts:
            if part.is_gram:
                leaf = part.leaf
                of_means = None if means is None else means.factors[leaf]
                term = _gram(part, rows.factors[leaf], columns.factors[leaf], of_means, half)
                kernel += _share(network, part) * term
        for group in _groups(parts):
            # Of a power of two the share is exact, here as well as there.
            of_rows = [_share(network, part) * rows.jacobians[part.leaf] for part in group]
            of_columns = [columns.jacobians[part.leaf] for part in group]
            kernel += _inner(*(jnp.concatenate(a, -1) for a in (of_rows, of_columns)))
    return kernel


def _share(network: Network, part: Part) -> float:
    """Returns a half for what a complex parameter adds to a complex output, else one."""
    is_half = jnp.iscomplexobj(network.output) and jnp.iscomplexobj(network.leaves[part.leaf])
    return 0.5 if is_half else 1.0


def _groups(parts: list[Part]) -> list[list[Part]]:
    """Returns the parts with a Jacobian: the small ones together, which is one product."""
    parts = [part for part in parts if not part.is_gram]
    small = [part for part in parts if part.cost <= _SMALL]
    return [[part] for part in parts if part not in small] + [small] * bool(small)


def _gram(
    part: Part, rows: Factors, columns: Factors, means: Factors | None, half: bool
) -> jax.Array:
    """Returns ``sum over t, s of (h_t . h_s) (d_t . d_s)``, ``(B, O, B', O)``."""
    (h, d), (hs, ds) = map(_by_positions, (rows, columns))
    h_mean, d_mean = (None, None) if means is None else _by_positions(means)

    def term(t: Any, s: Any) -> jax.Array:
        def product(left: Any, right: Any) -> jax.Array:
            return _inner(left[t], right[s], part.precision)

        signals = product(d, ds)
        if h is None:
            return signals.real
        inputs = product(h, hs)[:, None, :, None]
        if means is None:
            return (inputs * signals).real
        with_means = (product(h, h_mean), product(h_mean, hs), product(h_mean, h_mean))
        of_inputs = (inputs, *(of_means[:, None, :, None] for of_means in with_means))
        of_signals = (signals, product(d, d_mean), product(d_mean, ds), product(d_mean, d_mean))
        return without_means(of_inputs, of_signals).real

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


def transposed(kernel: jax.Array) -> jax.Array:
    """Returns the kernel of the columns with the rows, ``(B', O, B, O)`` or ``(B', B)``."""
    half = kernel.ndim // 2
    return jnp.transpose(kernel, (*range(half, kernel.ndim), *range(half)))


def equal_parts(size: int, number: int) -> list[slice]:
    """Returns ``range(size)`` in parts of equal length, give or take one."""
    ends = [size * i // number for i in range(number + 1)]
    return list(itertools.starmap(slice, itertools.pairwise(ends)))


def of_blocks(block: Callable[[int, int], jax.Array], number: int) -> jax.Array:
    """Returns the kernel of samples with themselves from that of block ``i`` with ``j >= i``."""
    found: dict[tuple[int, int], jax.Array] = {}
    for i, j in itertools.combinations_with_replacement(range(number), 2):
        found[i, j] = block(i, j)
        if i != j:
            found[j, i] = transposed(found[i, j])
    rows = [[found[i, j] for j in range(number)] for i in range(number)]
    return jnp.concatenate([jnp.concatenate(row, row[0].ndim // 2) for row in rows])


def without_means(inputs: tuple[jax.Array, ...], signals: tuple[jax.Array, ...]) -> jax.Array:
    """Returns the products of ``h d - mean(h) mean(d)`` at two samples, of small numbers only.

    Args:
      inputs: Of the differences from the mean of ``h`` the products with each other, with the
        mean on the right, with the mean on the left; the product of the mean with itself.
      signals: Likewise of ``d``.
    """
    hh, hm, mh, mm = inputs
    dd, dn, nd, nn = signals
    return hh * (dd + dn + nd + nn) + (hm + mh + mm) * dd + hm * nd + mh * dn


def is_coarse(numbers: Any) -> bool:
    """Returns whether a kernel of such numbers loses digits that matter when it is centred."""
    return jnp.finfo(numbers.dtype).bits <= 32


def centered_kernel(kernel: jax.Array) -> jax.Array:
    """Returns the kernel, which is Hermitian, without the means over its rows and columns."""
    of_rows = jnp.mean(kernel, 0, keepdims=True)
    of_columns = jnp.transpose(of_rows.conj(), (1, 0, 3, 2)[: kernel.ndim])
    return kernel - of_rows - (of_columns - jnp.mean(of_rows, 1, keepdims=True))
