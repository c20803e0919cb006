"""Flax modules whose methods run Haiku code."""

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict

from .caching import per_class
from .calls import public_methods, run_method, watcher
from .names import Names
from .run import Host, Run


class Mirrored(Host):
    """A Flax module whose methods are those of Haiku code.

    ``class Face(Mirrored, haiku=HaikuClass)`` gets the public methods of ``HaikuClass``.
    """

    @classmethod
    def __init_subclass__(cls, haiku: type[hk.Module] | None = None, **kwargs: Any) -> None:
        for name, method in ({} if haiku is None else public_methods(haiku)).items():
            if name not in vars(cls):
                flax_method = run_method(name, method)
                setattr(cls, name, nn.compact(flax_method) if cls._compact else flax_method)
        super().__init_subclass__(**kwargs)

    @nn.nowrap
    def _run(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls a method of the Haiku code, as part of the outer run if there is one."""
        outer = watcher()
        again = outer.again(self, method) if isinstance(outer, Run) else None
        if again is not None:
            return again(*args, **kwargs)
        return Run(self)(method, args, kwargs)

    @nn.nowrap
    def _row(self, module: hk.Module | type[hk.Module], parent: Any, name: str) -> "Mirrored":
        hk_cls = module if isinstance(module, type) else type(module)
        # Flax's summary runs a row again by itself, and the call that comes may change it.
        origin = snapshot(module) if self.is_initializing() else module
        return row_class(hk_cls)(origin, self._names().netket, parent=parent, name=name)


class Row(Mirrored):
    """The Flax module of a Haiku module that is part of another."""

    _origin: Any
    _netket: bool

    @nn.nowrap
    def _names(self) -> Names:
        return Names(root=self._origin.module_name, netket=self._netket)

    @nn.nowrap
    def _haiku(self) -> hk.Module:
        return snapshot(self._origin)

    def inside_transform(self) -> tuple[()]:
        """Stands in ``tabulate`` for calls inside an inner transform (``hk.scan``, ...)."""
        return ()


@per_class
def row_class(hk_cls: type[hk.Module]) -> type[Row]:
    """Returns the Flax class for the rows of a Haiku class."""
    namespace = {"__module__": __name__, "__doc__": hk_cls.__doc__}
    return type(hk_cls.__name__, (Row,), namespace, haiku=hk_cls)


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
    """Copies what Flax looks for modules in, ``replace`` done to all else in it."""
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
