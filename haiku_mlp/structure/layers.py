"""The layers of a multi-layer perceptron as plain arrays and functions."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from haiku_mlp.arguments import Activation
from haiku_mlp.linear import affine
from haiku_mlp.sharding import is_explicit

# Entries of the largest array (1 MB of float64): a few in use at once fit a CPU core's cache, and
# each operation is worth the cores that share it.
_BLOCK_ENTRIES = 2**17


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


def with_weights(layers: tuple[Layer, ...], weights: list[tuple[Any, Any]]) -> tuple[Layer, ...]:
    """Returns the layers with other ``(w, b)``."""
    pairs = zip(layers, weights, strict=True)
    return tuple(layer._replace(w=w, b=b) for layer, (w, b) in pairs)


def forward(layers: tuple[Layer, ...], x: jax.Array) -> jax.Array:
    """Returns the outputs ``(..., O)`` for inputs ``(..., N)``."""
    for layer in layers:
        x = layer.activate(layer.affine(x))
    return x


def map_samples(
    function: Callable[..., Any],
    layers: Any,
    samples: tuple[jax.Array, ...],
    num_axes: int,
    entries: int,
) -> Any:
    """Returns ``function(layers, *sample)`` of each sample, on a CPU one block at a time.

    What a function of many rows per sample computes on the way is larger than a CPU's
    cache, and moving it to memory and back costs more than the arithmetic.

    Args:
      function: Function of the layers and one sample.
      layers: The layers, or a tree of them and what else all samples share.
      samples: Arrays of samples, each ``(*batch, ...)``.
      num_axes: Number of axes of ``batch``.
      entries: Entries of the largest array that the function computes on the way.
    """
    mesh = jax.typeof(samples[0]).sharding.mesh
    if is_explicit(samples[0]):
        over_devices = functools.partial(_map_shards, function, layers, num_axes, entries)
        return jax.jit(over_devices)(*samples)
    batch = samples[0].shape[:num_axes]
    num_samples = math.prod(batch)
    flat = tuple(a.reshape(num_samples, *a.shape[num_axes:]) for a in samples)
    of_one = functools.partial(function, layers)
    is_known = isinstance(num_samples * entries, int)  # jax.export has symbolic sizes
    block = max(1, _BLOCK_ENTRIES // max(1, entries)) if is_known else 1
    is_spread = AxisType.Auto in mesh.axis_types and mesh.size > 1  # a loop would gather them
    if jax.default_backend() != "cpu" or is_spread or not is_known or num_samples <= block:
        results = jax.vmap(of_one)(*flat)
    else:
        results = jax.lax.map(lambda sample: of_one(*sample), flat, batch_size=block)
    return jax.tree.map(lambda a: a.reshape(*batch, *a.shape[1:]), results)


def _map_shards(
    function: Callable[..., Any],
    layers: Any,
    num_axes: int,
    entries: int,
    *samples: jax.Array,
) -> Any:
    """Maps on each device over its own samples, where an Explicit mesh forbids a loop over all."""
    sharding = jax.typeof(samples[0]).sharding
    mesh, batch = sharding.mesh, PartitionSpec(*sharding.spec[:num_axes])
    # A shard_map takes arrays of such a mesh as arguments only, activations not at all.
    leaves, structure = jax.tree.flatten(layers)
    arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)}

    def map_own(arrays: dict[int, jax.Array], *own: jax.Array) -> Any:
        replaced = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
        return map_samples(
            function, jax.tree.unflatten(structure, replaced), own, num_axes, entries
        )

    specs = (PartitionSpec(), *[batch] * len(samples))
    placed = jax.sharding.reshard(
        (arrays, *samples), tuple(NamedSharding(mesh, spec) for spec in specs)
    )
    return jax.shard_map(map_own, mesh=mesh, in_specs=specs, out_specs=batch)(*placed)
