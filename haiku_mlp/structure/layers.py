"""The layers of a multi-layer perceptron as plain arrays and functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from haiku_mlp.arguments import Activation
from haiku_mlp.linear import affine

# Entries of the largest array that stays in the cache of a CPU core (2 MB of float64).
_BLOCK_ENTRIES = 2**18


class Layer(NamedTuple):
    """One layer: ``activation(x @ w + b)``.

    Attributes:
      w: Weights ``(inputs, outputs)``.
      b: Bias ``(outputs,)``, or None.
      activation: Function of the last axis, or None.
      precision: As for :func:`jax.lax.dot_general`.
    """

    w: jax.Array
    b: jax.Array | None = None
    activation: Activation | None = None
    precision: Any = None

    def affine(self, x: jax.Array) -> jax.Array:
        """Returns ``x @ w + b``, promoted as in :class:`haiku_mlp.Linear`."""
        return affine(x, self.w, self.b, self.precision)

    def activate(self, z: jax.Array) -> jax.Array:
        """Returns ``activation(z)``."""
        return self.activation(z) if callable(self.activation) else z


def forward(layers: tuple[Layer, ...], x: jax.Array) -> jax.Array:
    """Returns the outputs ``(..., O)`` for inputs ``(..., N)``."""
    for layer in layers:
        x = layer.activate(layer.affine(x))
    return x


def map_samples(function: Callable[..., Any], samples: tuple[jax.Array, ...], entries: int) -> Any:
    """Returns ``jax.vmap(function)(*samples)``, on a CPU one block of samples at a time.

    What a function of many rows per sample computes on the way is larger than a CPU's
    cache, and moving it to memory and back costs more than the arithmetic.

    Args:
      function: Function of one sample.
      samples: Its arguments, each ``(B, ...)``.
      entries: Entries of the largest array that it computes on the way.
    """
    num_samples = len(samples[0])
    block = max(1, _BLOCK_ENTRIES // max(1, entries))
    if jax.default_backend() != "cpu" or num_samples <= block:
        return jax.vmap(function)(*samples)
    return jax.lax.map(lambda sample: function(*sample), samples, batch_size=block)
