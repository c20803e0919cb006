"""Copies of Haiku modules and of values that hold modules."""

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
from flax.core import FrozenDict


def snapshot(value: Any, tracers: list[Any] | None = None) -> Any:
    """Copies a Haiku module as it is now, with zeros for the tracers that it keeps.

    These are added to ``tracers``.
    """
    copies: dict[int, hk.Module] = {}

    def replace(node: Any) -> Any:
        if isinstance(node, hk.Module):
            if id(node) not in copies:
                copies[id(node)] = copy.copy(node)
                vars(copies[id(node)]).update(copied(vars(node), replace))
            return copies[id(node)]
        if not jax.tree_util.all_leaves([node]):
            return jax.tree.map(replace, node)
        if not isinstance(node, jax.core.Tracer):
            return node
        if tracers is not None:
            tracers.append(node)
        if jnp.issubdtype(node.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.key(0), node.shape)
        return jnp.zeros(node.shape, node.dtype)

    return replace(value)


# Of classes that do nothing else than to iterate.
_OF_ITERATORS = "builtins", "itertools", "_collections", "collections"


def copied(value: Any, replace: Callable[[Any], Any]) -> Any:
    """Copies the containers in which Flax looks for modules, with ``replace`` of all else."""
    if type(value) in (list, tuple, set):
        return type(value)(copied(entry, replace) for entry in value)
    if isinstance(value, tuple) and hasattr(value, "_make"):  # a named one
        return value._make(copied(entry, replace) for entry in value)
    if isinstance(value, FrozenDict):
        return FrozenDict({key: copied(entry, replace) for key, entry in value.items()})
    if isinstance(value, dict):
        return _updated(value, {key: copied(entry, replace) for key, entry in value.items()})
    if dataclasses.is_dataclass(value) and not jax.tree_util.all_leaves([value]):  # flax.struct
        new = copy.copy(value)  # its constructor may take, and do, other things
        for field in dataclasses.fields(value):
            if hasattr(value, field.name):
                entry = copied(getattr(value, field.name), replace)
                object.__setattr__(new, field.name, entry)
        return new
    if isinstance(value, Iterator) and type(value).__module__ in _OF_ITERATORS:
        return itertools.tee(value)[1]  # to be read again and again
    return replace(value)


def _updated(old: dict[Any, Any], entries: dict[Any, Any]) -> dict[Any, Any]:
    """Returns a copy of a dict, of its own type, with other entries."""
    new = copy.copy(old)
    changes = {key: entry for key, entry in entries.items() if entry is not old[key]}
    try:
        if changes:
            new.update(changes)
    except (AttributeError, TypeError):  # it is an immutable one
        new = type(old)(entries)
    return new
