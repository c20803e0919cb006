"""How the parameters of a multi-layer perceptron are laid out over devices."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from jax.sharding import PartitionSpec

_LAYER = re.compile(r"(.*/)?linear_(\d+)$")


def partition_specs(
    params: Mapping[str, Mapping[str, Any]], axis: str = "model"
) -> dict[str, dict[str, PartitionSpec]]:
    """Partition specs that split the hidden units of an MLP over a mesh axis.

    Layers work in pairs: the first computes a part of its outputs on each device, the
    second multiplies them with the rows that they meet, and one sum over the devices
    ends the pair (Shoeybi et al. 2019, arXiv:1909.08053).  The last layer has its rows
    split in any case, since its outputs may be one.  The hidden sizes that are split must
    be multiples of the size of the axis; JAX says so where the specs are used.

    An MLP is what has layers ``linear_0``, ``linear_1``, ...: :class:`haiku_mlp.MLP`, its
    block, ``hk.nets.MLP``.  All else, a single layer too, is whole on each device.

    Args:
      params: Haiku parameters, as arrays or ``ShapeDtypeStruct``.  Axes in front of those
        that a layer has (an ensemble made by ``jax.vmap``) are not split.
      axis: Name of the mesh axis.

    Returns:
      A ``PartitionSpec`` for each parameter, in the same tree.  ``compat.to_flax`` makes
      it that of the Flax face.

    Raises:
      ValueError: The tree is not one of Haiku's.

    Example::

      >>> import haiku as hk, jax, jax.numpy as jnp
      >>> import haiku_mlp
      >>> net = hk.transform(lambda x: haiku_mlp.MLP(hidden_dims=(8,))(x))
      >>> params = net.init(jax.random.key(0), jnp.ones((5, 3)))
      >>> specs = haiku_mlp.partition_specs(params)
      >>> tuple(specs["mlp/block/linear_0"]["w"]), tuple(specs["mlp/block/linear_0"]["b"])
      ((None, 'model'), ('model',))
      >>> tuple(specs["mlp/block/linear_1"]["w"])
      ('model', None)
    """
    splits = _splits(params)
    return {
        name: {
            key: _spec(f"{name}/{key}", splits.get((name, key), ()), value, axis)
            for key, value in values.items()
        }
        for name, values in params.items()
    }


def _splits(names: Iterable[str]) -> dict[tuple[str, str], tuple[bool, ...]]:
    """Returns which of its axes are split for each weight and bias of an MLP."""
    layers: defaultdict[str, dict[int, str]] = defaultdict(dict)
    for name in names:
        if match := _LAYER.match(name):
            layers[match[1]][int(match[2])] = name
    splits: dict[tuple[str, str], tuple[bool, ...]] = {}
    for numbered in layers.values():
        last = len(numbered) - 1
        if last > 0 and set(numbered) == set(range(last + 1)):
            for number, name in numbered.items():
                outputs = number % 2 == 0 and number != last
                splits[name, "w"] = (not outputs, outputs)
                splits[name, "b"] = (outputs,)
    return splits


def _spec(name: str, split: tuple[bool, ...], value: Any, axis: str) -> PartitionSpec:
    if not hasattr(value, "ndim"):
        raise ValueError(
            f"{name} must be an array, got {type(value).__name__}: give Haiku's params "
            "(of Flax variables compat.to_haiku(variables)[0])"
        )
    if not any(split):
        return PartitionSpec()
    in_front = value.ndim - len(split)
    return PartitionSpec(*[None] * in_front, *[axis if is_split else None for is_split in split])
