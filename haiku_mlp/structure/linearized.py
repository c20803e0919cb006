"""A multi-layer perceptron as a linear function of its parameters, about their values."""

import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from haiku_mlp.linear import promote
from haiku_mlp.structure.contraction import centered_kernel, is_coarse, without_means
from haiku_mlp.structure.layers import Layer

# A block of rows of a kernel is worth its overhead from this number on.
_BLOCK_ROWS, _MAX_BLOCKS = 256, 8


class Linearized:
    """The derivatives of a real network with one output, each a product of two factors.

    By the weights of a layer they are ``inputs^T signals``, by its bias ``signals``, where the
    signals are the derivatives by ``z = inputs @ w + b``.  One forward and one backward pass
    give all that a step of stochastic reconfiguration needs.

    Args:
      layers: The layers.
      x: Inputs ``(B, N)``.

    Example::

      >>> import jax.numpy as jnp
      >>> from haiku_mlp.structure import Layer, Linearized
      >>> linear = Layer(w=jnp.ones((3, 1)), b=jnp.zeros(1))
      >>> at = Linearized((linear,), jnp.array([[1., 0., 0.], [0., 2., 0.]]))
      >>> at.centered_kernel().tolist(), at((linear,)).tolist()
      ([[1.25, -1.25], [-1.25, 1.25]], [1.0, 2.0])
    """

    def __init__(self, layers: Sequence[Layer], x: jax.Array):
        self.layers = layers
        self.inputs: list[jax.Array] = []
        pulls = []
        for layer in layers:
            x, *_ = promote(x, layer.w, None)
            self.inputs.append(x)
            x, pull = jax.vjp(layer.activate, layer.affine(x))
            pulls.append(pull)
        self.signals: list[jax.Array] = []
        slope = jnp.ones_like(x)
        for layer, pull in zip(reversed(layers), reversed(pulls), strict=True):
            (signal,) = pull(slope)
            self.signals.insert(0, signal)
            slope = jnp.matmul(signal, layer.w.T, precision=layer.precision)

    def __call__(self, layers: Sequence[Layer]) -> jax.Array:
        """Returns the derivatives times other parameters, those of ``layers``: ``(B,)``."""
        terms = [
            jnp.sum(signal * layer.affine(h), -1)
            for layer, h, signal in zip(layers, self.inputs, self.signals, strict=True)
        ]
        return functools.reduce(operator.add, terms)

    def centered_kernel(self) -> jax.Array:
        """Returns the kernel ``(B, B)`` of the derivatives less their mean over the samples.

        The upper half by blocks, and its transpose.
        """
        pairs = [
            (_Differences.of(h, layer.precision), _Differences.of(signal, layer.precision))
            for layer, h, signal in zip(self.layers, self.inputs, self.signals, strict=True)
        ]
        size = len(self.inputs[0])
        num_blocks = max(1, min(size // _BLOCK_ROWS, _MAX_BLOCKS))
        ends = [size * i // num_blocks for i in range(num_blocks + 1)]
        kernel = jnp.zeros((size, size), self.signals[0].dtype)
        for start, end in itertools.pairwise(ends):
            rows = self._rows(pairs, slice(start, end), slice(start, None))
            kernel = kernel.at[start:end, start:].set(rows)
            kernel = kernel.at[end:, start:end].set(rows[:, end - start :].T)
        return centered_kernel(kernel)

    def _rows(
        self, pairs: list[tuple["_Differences", "_Differences"]], rows: slice, columns: slice
    ) -> jax.Array:
        terms = []
        for layer, (h, signal) in zip(self.layers, pairs, strict=True):
            inputs, signals = h.products(rows, columns), signal.products(rows, columns)
            terms.append(without_means(inputs, signals))
            if layer.b is not None:
                terms.append(signals[0])
        return functools.reduce(operator.add, terms)


class _Differences(NamedTuple):
    """Factors at samples less their mean, or less zero where the digits suffice."""

    values: jax.Array
    mean: jax.Array
    with_mean: jax.Array
    precision: Any

    @classmethod
    def of(cls, factors: jax.Array, precision: Any) -> "_Differences":
        mean = jnp.mean(factors, 0) if is_coarse(factors) else jnp.zeros_like(factors[0])
        values = factors - mean[None]
        return cls(values, mean, jnp.matmul(values, mean, precision=precision), precision)

    def products(self, rows: slice, columns: slice) -> tuple[jax.Array, ...]:
        """Returns what :func:`without_means` takes."""
        values = self.values[rows], self.values[columns].T
        return (
            jnp.matmul(*values, precision=self.precision),
            self.with_mean[rows, None],
            self.with_mean[None, columns],
            jnp.vdot(self.mean, self.mean)[None, None],
        )
