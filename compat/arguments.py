"""The arguments of a constructor as a value: kept as given, compared by a frozen view."""

import copy
import dataclasses
import functools
import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import haiku as hk
import numpy as np

from .mirror.caching import per_class

Replace = Callable[[Any], Any]

_signature = per_class(inspect.signature)
_BY_POSITION = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL}


@dataclasses.dataclass(frozen=True)
class Slot:
    """Stands for a Flax module among the arguments."""

    argument: str
    index: int

    def content(self, modules: Mapping[str, Sequence[Any]]) -> Any:
        """Returns the module."""
        return modules[self.argument][self.index]

    def __repr__(self) -> str:
        return f"flax_modules[{self.argument!r}][{self.index}]"


class Given:
    """The arguments of a Haiku class, by name, as they were given.

    Two are equal if all arguments are, the defaults included: in value, type and order.
    What has no hash, and no entries to look at, is equal to itself alone.

    Dicts, lists and sets are copied, on the way in and on the way out: what becomes of
    them elsewhere does not matter.
    """

    def __init__(self, hk_cls: type[hk.Module], arguments: Mapping[str, Any]):
        self._class = hk_cls
        self._arguments = copied(dict(arguments))

    def arguments(self, replace: Replace) -> dict[str, Any]:
        """Returns the arguments, ``replace`` done to all in them that is no container."""
        return copied(self._arguments, replace)

    def with_defaults(self) -> dict[str, Any]:
        """Returns all arguments, those by default too."""
        return _bound(self._class, self._arguments, defaults=True).arguments

    def value(self, name: str) -> Any:
        """Returns one argument, its default if it was not given."""
        field = getattr(self._class, "__dataclass_fields__", {}).get(name)
        if name in self._arguments or field is None or field.default_factory is dataclasses.MISSING:
            return self.with_defaults()[name]
        return field.default_factory()

    def construct(self, name: str, replace: Replace) -> hk.Module:
        """Returns a new Haiku module, ``name`` given to a class that needs one."""
        parameter = _signature(self._class).parameters.get("name")
        needs_name = parameter is not None and parameter.default is parameter.empty
        needed = {"name": name} if needs_name else {}
        bound = _bound(self._class, self.arguments(replace) | needed)
        return self._class(*bound.args, **bound.kwargs)

    @functools.cached_property
    def _view(self) -> Any:
        return self._class, _view(self.with_defaults())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Given) and self._view == other._view

    def __hash__(self) -> int:
        return hash(self._view)

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self._arguments.items())
        return f"{self._class.__name__}({arguments})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Given, (self._class, self._arguments)

    def __deepcopy__(self, memo: Any) -> "Given":
        return self


def _bound(
    hk_cls: type[hk.Module], arguments: Mapping[str, Any], defaults: bool = False
) -> inspect.BoundArguments:
    """Returns arguments by name as they are passed to the constructor."""
    signature = _signature(hk_cls)
    bound = inspect.BoundArguments(signature, {**arguments})
    if defaults or any(signature.parameters[name].kind in _BY_POSITION for name in arguments):
        bound.apply_defaults()
    return bound


def copied(value: Any, replace: Replace = lambda leaf: leaf) -> Any:
    """Copies dicts, lists, tuples and sets, ``replace`` done to all else in them."""
    if type(value) in (list, tuple):
        return type(value)(copied(entry, replace) for entry in value)
    if type(value) in (dict, OrderedDict, defaultdict):
        new = copy.copy(value)
        new.update({key: copied(entry, replace) for key, entry in value.items()})
        return new
    return set(value) if type(value) is set else replace(value)


def _view(value: Any) -> Any:
    """Returns what stands for a value in comparisons: hashable, with all types in it."""
    content = value
    if isinstance(value, Mapping) or hasattr(type(value), "items"):
        content = tuple((_view(key), _view(entry)) for key, entry in value.items())
    elif isinstance(value, list | tuple):
        content = tuple(map(_view, value))
    elif isinstance(value, set | frozenset):
        content = frozenset(map(_view, value))
    elif isinstance(value, np.ndarray):
        content = value.dtype, value.shape, value.tobytes()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        content = tuple(_view(getattr(value, field.name)) for field in dataclasses.fields(value))
    elif not isinstance(value, Hashable):
        content = id(value)
    return type(value), content
