"""A multi-layer perceptron as a linear function of its parameters, about their values."""

import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from haiku_mlp.linear import promote
from haiku_mlp.structure.contraction import (
    centered_kernel,
    equal_parts,
    is_coarse,
    of_blocks,
    without_means,
)
from haiku_mlp.structure.layers import Layer

# A block of rows of a kernel is worth its overhead from this number on.
_BLOCK_ROWS, _MAX_BLOCKS = 256, 4


class Linearized:
    """The derivatives of a real network with one output, each a product of two factors.

    By the weights of a layer they are ``inputs^T signals``, by its bias ``signals``, where the
    signals are the derivatives by ``z = inputs @ w + b``.  One forward and one backward pass
    give all that a step of stochastic reconfiguration needs.  For samples on one device: JAX
    refuses the product of a batch that is spread over an Explicit mesh with itself.

    Args:
      layers: The layers.
      x: Inputs ``(B, N)``.

    Example::

      >>> import jax.numpy as jnp
      >>> from haiku_mlp.structure import Layer, Linearized
      >>> linear = Layer(w=jnp.ones((3, 1)), b=jnp.zeros(1))
      >>> at = Linearized((linear,), jnp.array([[1., 0., 0.], [0., 2., 0.]]))
      >>> at.kernel(centered=True).tolist(), at((linear,)).tolist()
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

    def kernel(self, *, centered: bool = False) -> jax.Array:
        """Returns the kernel ``(B, B)`` of the derivatives, ``centered`` of all but their mean."""
        means_first = centered and is_coarse(self.signals[0])
        factors = [
            (_Factor.of(h, layer, means_first), _Factor.of(signal, layer, means_first))
            for layer, h, signal in zip(self.layers, self.inputs, self.signals, strict=True)
        ]
        size = len(self.inputs[0])
        number = max(1, min(size // _BLOCK_ROWS, _MAX_BLOCKS))
        blocks = equal_parts(size, number)
        kernel = of_blocks(lambda i, j: self._block(factors, blocks[i], blocks[j]), number)
        return centered_kernel(kernel) if centered else kernel

    def _block(
        self, factors: list[tuple["_Factor", "_Factor"]], rows: slice, columns: slice
    ) -> jax.Array:
        terms = []
        for layer, (h, signal) in zip(self.layers, factors, strict=True):
            inputs, signals = h.products(rows, columns), signal.products(rows, columns)
            whole = inputs[0] * signals[0]
            terms.append(whole if h.mean is None else without_means(inputs, signals))
            if layer.b is not None:
                terms.append(signals[0])
        return functools.reduce(operator.add, terms)


class _Factor(NamedTuple):
    """A factor of the derivatives at all samples, perhaps less its mean ``(1, n)``."""

    values: jax.Array
    mean: jax.Array | None
    precision: Any

    @classmethod
    def of(cls, values: jax.Array, layer: Layer, is_less_mean: bool) -> "_Factor":
        if not is_less_mean:
            return cls(values, None, layer.precision)
        mean = jnp.mean(values, 0, keepdims=True)
        return cls(values - mean, mean, layer.precision)

    def products(self, rows: slice, columns: slice) -> tuple[jax.Array, ...]:
        """Returns the products of samples, with a mean all that :func:`without_means` takes."""
        left, right = [self.values[rows]], [self.values[columns]]
        if self.mean is not None:
            left.append(self.mean)
            right.append(self.mean)
        return tuple(
            jnp.matmul(a, b.T, precision=self.precision) for a, b in itertools.product(left, right)
        )
