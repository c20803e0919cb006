"""How the parameters of a multi-layer perceptron are laid out over devices."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

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

    The mesh may have Auto or Explicit axes.  On Explicit ones, the default of
    :func:`jax.make_mesh` since JAX 0.9, JAX wants all but :func:`jax.device_put` done
    ``with jax.set_mesh(mesh):``.

    An MLP is what has layers ``linear_0``, ``linear_1``, ...: :class:`haiku_mlp.MLP`, its
    block, ``hk.nets.MLP``.  All else, a single layer too, is whole on each device.

    Args:
      params: Haiku parameters, as arrays or ``ShapeDtypeStruct``.  Axes in front of those
        that a layer has (an ensemble made by ``jax.vmap``) are not split.
      axis: Name of the mesh axis.

    Returns:
      A ``PartitionSpec`` for each parameter, in the same tree.  ``compat.to_flax`` makes
      it that of the Flax face.  The state of an optimiser that is made of placed
      parameters lies where they do.

    Raises:
      ValueError: The tree is not one of Haiku's.

    Example::

      >>> import haiku as hk, jax, jax.numpy as jnp, optax
      >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec
      >>> import haiku_mlp
      >>> net = hk.without_apply_rng(hk.transform(lambda x: haiku_mlp.MLP(hidden_dims=8)(x)))
      >>> x = jnp.linspace(-1., 1., 40)[:, None]
      >>> params = net.init(jax.random.key(0), x)
      >>> specs = haiku_mlp.partition_specs(params)
      >>> tuple(specs["mlp/block/linear_0"]["w"]), tuple(specs["mlp/block/linear_1"]["w"])
      ((None, 'model'), ('model', None))

      A training step with the samples over one axis of a mesh, the hidden units over
      the other::

      >>> mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
      >>> def place(tree, specs):
      ...     return jax.device_put(tree, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))
      >>> params, x = place(params, specs), place(x, PartitionSpec("data"))
      >>> optimiser = optax.adam(1e-2)
      >>> state = optimiser.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     def loss(params):
      ...         return jnp.mean((net.apply(params, x) - jnp.sin(3 * x[:, 0])) ** 2)
      ...     updates, state = optimiser.update(jax.grad(loss)(params), state)
      ...     return optax.apply_updates(params, updates), state
      >>> params, state = step(params, state)
      >>> params["mlp/block/linear_0"]["w"].shape
      (1, 8)
    """
    if not isinstance(params, Mapping):
        raise ValueError(
            f"params must be Haiku's, a dict of modules, got {type(params).__name__}; the state "
            "of an optimiser lies where its parameters do: make it by optimiser.init(params)"
        )
    splits = _splits(params)
    return {
        name: {
            key: _spec(f"{name}/{key}", splits.get((name, key), ()), value, axis)
            for key, value in values.items()
        }
        for name, values in params.items()
    }


def is_explicit(a: jax.Array) -> bool:
    """Returns whether an array is on a mesh with Explicit axes, where results need a sharding."""
    return AxisType.Explicit in jax.typeof(a).sharding.mesh.axis_types


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
