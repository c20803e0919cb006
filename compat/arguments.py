"""The arguments of a constructor as a value: kept as given, compared by a frozen view."""

import dataclasses
import inspect
import reprlib
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from itertools import count
from typing import Any

import haiku as hk
import jax
import numpy as np
from flax import linen as nn
from flax.core import FrozenDict

from .mirror.caching import per_class
from .mirror.copies import copied

Modules = Mapping[str, nn.Module]

_signature = per_class(inspect.signature)
_BY_POSITION = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL}


class Slot(str):
    """A placeholder for a Flax module among the arguments: its key among the modules."""


class Given:
    """The arguments of a Haiku class, by name, as they were given.

    Two are equal if all arguments are, the defaults included: in value, type and order.
    What has no hash, and no entries to look at, is equal to itself alone.

    Dicts, lists and sets are copied, on the way in and on the way out: what becomes of
    them elsewhere does not matter.
    """

    def __init__(self, hk_cls: type[hk.Module], arguments: dict[str, Any]):
        self._class, self._arguments = hk_cls, arguments
        self._module_names: dict[str | None, str] = {}

    @classmethod
    def split(cls, hk_cls: type[hk.Module], arguments: dict[str, Any]) -> tuple["Given", Modules]:
        """Returns the arguments with slots in place of Flax modules, and the modules."""
        modules: dict[str, nn.Module] = {}

        def put(slots: Iterator[Slot], leaf: Any) -> Any:
            if not isinstance(leaf, nn.Module):
                return leaf
            modules[slot := next(slots)] = leaf
            return slot

        kept = {
            name: copied(value, partial(put, (Slot(f"{name}_{i}") for i in count())))
            for name, value in arguments.items()
        }
        return cls(hk_cls, kept), FrozenDict(modules)

    def arguments(self, modules: Modules) -> dict[str, Any]:
        """Returns the arguments, with the modules in their slots."""
        return copied(self._arguments, lambda v: modules[v] if isinstance(v, Slot) else v)

    def value(self, name: str, modules: Modules) -> Any:
        """Returns one argument, its default if it was not given."""
        field = getattr(self._class, "__dataclass_fields__", {}).get(name)
        factory = getattr(field, "default_factory", None)
        if name not in self._arguments and callable(factory):
            return factory()
        return self._bound(self.arguments(modules), defaults=True).arguments[name]

    def construct(self, name: str | None, modules: Modules) -> hk.Module:
        """Returns a new Haiku module; a required ``name`` is this one or that of its class."""
        arguments = self.arguments(modules)
        parameter = _signature(self._class).parameters.get("name")
        if parameter is not None and parameter.default is parameter.empty:
            arguments["name"] = name or self._class.__name__.lower()
        bound = self._bound(arguments)
        return self._class(*bound.args, **bound.kwargs)

    def module_name(self, name: str | None, modules: Modules) -> str:
        """Returns the Haiku name of the module, which only its construction tells."""
        if name not in self._module_names:
            found: list[str] = []
            net = hk.transform_with_state(
                lambda: found.append(self.construct(name, modules).module_name)
            )
            try:
                jax.eval_shape(net.init, jax.random.key(0))
            except jax.errors.JAXTypeError:  # it looks at the entries of arrays
                net.init(jax.random.key(0))
            self._module_names[name] = found[0]
        return self._module_names[name]

    def _bound(self, arguments: Any, defaults: bool = False) -> inspect.BoundArguments:
        """Returns arguments as they are passed to the constructor."""
        bound = inspect.BoundArguments(_signature(self._class), arguments)
        kinds = {bound.signature.parameters[name].kind for name in arguments}
        if defaults or kinds & _BY_POSITION:
            bound.apply_defaults()
        return bound

    @cached_property
    def _view(self) -> Any:
        return self._class, _view(self._bound(self._arguments, defaults=True).arguments)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Given) and self._view == other._view

    def __hash__(self) -> int:
        return hash(self._view)

    @reprlib.recursive_repr()  # methods of a module that has this one may be among them
    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self._arguments.items())
        return f"{self._class.__name__}({arguments})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Given, (self._class, self._arguments)

    def __deepcopy__(self, memo: Any) -> "Given":
        return self


def _view(value: Any) -> Any:
    """Returns a hashable view of a value, for comparisons in which types count."""
    content = value
    if isinstance(value, np.ndarray):
        content = value.dtype, value.shape, value.tobytes()
    elif isinstance(value, set | frozenset):
        content = frozenset(map(_view, value))
    elif isinstance(value, list | tuple):
        content = tuple(map(_view, value))
    elif hasattr(type(value), "items"):
        content = _view(tuple(value.items()))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name, None) for f in dataclasses.fields(value)}
        content = _view(fields | getattr(value, "__dict__", {}))
    else:
        try:
            hash(value)
        except TypeError:
            content = id(value)
    return type(value), content
