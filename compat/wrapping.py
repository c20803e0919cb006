"""Any Haiku module class as a Flax module class."""

import copyreg
import dataclasses
import enum
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, get_origin

import haiku as hk
import jax
from flax import linen as nn
from flax.core import FrozenDict, freeze, unfreeze

from .mirror.caching import per_class
from .mirror.calls import public_methods
from .mirror.names import Names
from .mirror.rows import Mirrored


class _Argument(enum.Enum):
    """The default of a keyword-only argument that has none."""

    MISSING = enum.auto()


class WrappedClass(type(nn.Module)):  # type: ignore[misc]
    """The class of the classes that ``wrap`` makes, which pickle cannot import."""


class Wrapped(Mirrored, metaclass=WrappedClass):
    """The base of the classes that ``wrap`` makes."""

    if TYPE_CHECKING:
        # What wrap finds out of the Haiku class; at run time an annotation makes a field.
        _haiku_class: type[hk.Module]
        _parameters: dict[str, inspect.Parameter]
        _root: str | None

    @classmethod
    def __init_subclass__(cls, haiku: type[hk.Module] | None = None, **kwargs: Any) -> None:
        if haiku is not None:
            cls._add_fields(haiku)
        super().__init_subclass__(haiku=haiku, **kwargs)

    @classmethod
    def _add_fields(cls, haiku: type[hk.Module]) -> None:
        taken = _RESERVED.union(public_methods(haiku))
        cls._haiku_class = haiku
        cls._root = None
        cls._parameters = {}
        cls.__annotations__ = {}
        for parameter in inspect.signature(haiku).parameters.values():
            if parameter.name != "name":
                field = parameter.name + "_" * (parameter.name in taken)
                cls._parameters[field] = parameter
                cls.__annotations__[field] = Any
                default = _default(parameter)
                # A dataclass wants the fields without a default first.
                if default is not _Argument.MISSING or parameter.kind is parameter.KEYWORD_ONLY:
                    setattr(cls, field, default)

    def __post_init__(self) -> None:
        for field in self._parameters:
            value = _freeze(getattr(self, field))
            if value is _Argument.MISSING:
                raise TypeError(f"{type(self).__name__} needs the keyword argument {field!r}")
            object.__setattr__(self, field, value)
        super().__post_init__()

    @nn.nowrap
    def _names(self) -> Names:
        if self._root is None:
            type(self)._root = _module_name(self._haiku)
        return Names(root=self._root)

    @nn.nowrap
    def _haiku(self) -> hk.Module:
        kinds = [parameter.kind for parameter in self._parameters.values()]
        has_args = inspect.Parameter.VAR_POSITIONAL in kinds
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for field, parameter in self._parameters.items():
            value = _thaw(getattr(self, field), parameter)
            if parameter.kind is parameter.VAR_POSITIONAL:
                args.extend(value)
            elif parameter.kind is parameter.VAR_KEYWORD:
                kwargs.update(value)
            elif parameter.kind is parameter.POSITIONAL_ONLY or (
                has_args and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            ):
                args.append(value)
            else:
                kwargs[parameter.name] = value
        module = self._haiku_class(*args, **kwargs)
        if self._root not in (None, module.module_name):
            raise ValueError(
                f"{self._haiku_class.__name__} names itself {module.module_name!r} here and "
                f"{self._root!r} with other arguments: give HaikuFunction a function that calls it"
            )
        return module

    def __reduce__(self) -> tuple[Any, ...]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        cls = self._haiku_class if _is_made_by_wrap(type(self)) else type(self)
        return _rebuild, (cls, {**fields, "parent": None})


def wrap(hk_cls: type[hk.Module]) -> type[Mirrored]:
    """Returns the Flax module class of a Haiku module class.

    Its fields are the arguments of the constructor, ``name`` apart, in their order and
    with their defaults.  Lists and dicts are frozen, so that equal configurations are
    equal; ``*args`` and ``**kwargs`` are a tuple and a dict field.  Its methods are the
    public methods of ``hk_cls``.  A name that Flax needs for itself (``init``,
    ``apply``, ``copy``, ``path``, ...) gets a ``_`` behind it as a field, and is left
    out as a method: :func:`haiku_method` reaches it.

    The Flax tree has Haiku's names, one level a module, without that of the wrapped
    module itself.  State is the collection ``state``.

    Args:
      hk_cls: A subclass of :class:`haiku.Module`.

    Returns:
      The class, the same one each time.

    Raises:
      TypeError: ``hk_cls`` is no subclass of :class:`haiku.Module`.

    Example::

      >>> import haiku as hk, jax, jax.numpy as jnp
      >>> import compat
      >>> model = compat.wrap(hk.Linear)(3)
      >>> variables = model.init(jax.random.key(0), jnp.ones((5, 4)))
      >>> jax.tree.map(jnp.shape, variables)
      {'params': {'b': (3,), 'w': (4, 3)}}
    """
    if not (isinstance(hk_cls, type) and issubclass(hk_cls, hk.Module)):
        raise TypeError(
            f"wrap takes a subclass of hk.Module, got {hk_cls!r}: give a function to HaikuFunction"
        )
    return _flax_class(hk_cls)


@per_class
def _flax_class(hk_cls: type[hk.Module]) -> type[Mirrored]:
    namespace = {"__module__": hk_cls.__module__, "__doc__": hk_cls.__doc__}
    return type(hk_cls.__name__, (Wrapped,), namespace, haiku=hk_cls)


def haiku_method(name: str) -> Callable[..., Any]:
    """Returns a function of a module that calls the Haiku method ``name``.

    For the methods whose names Flax needs for itself.

    Example::

      >>> import haiku as hk, jax
      >>> import compat
      >>> class Counter(hk.Module):
      ...     def copy(self):
      ...         return hk.get_parameter("start", (), init=jax.numpy.zeros) + 1
      >>> model = compat.wrap(Counter)()
      >>> copy = compat.haiku_method("copy")
      >>> variables = model.init(jax.random.key(0), method=copy)
      >>> float(model.apply(variables, method=copy))
      1.0
    """

    def method(module: Mirrored, *args: Any, **kwargs: Any) -> Any:
        return module._run(name, args, kwargs)

    method.__name__ = name
    return method


_RESERVED = frozenset(dir(nn.Module)) | {"parent", "scope"}


def _default(parameter: inspect.Parameter) -> Any:
    if parameter.kind is parameter.VAR_POSITIONAL:
        return ()
    if parameter.kind is parameter.VAR_KEYWORD:
        return FrozenDict()
    return _Argument.MISSING if parameter.default is parameter.empty else _freeze(parameter.default)


def _freeze(value: Any) -> Any:
    if isinstance(value, list) or type(value) is tuple:
        return tuple(map(_freeze, value))
    if isinstance(value, Mapping):
        return freeze({key: _freeze(entry) for key, entry in value.items()})
    return value


def _thaw(value: Any, parameter: inspect.Parameter) -> Any:
    if isinstance(value, FrozenDict):
        return unfreeze(value)
    wants_list = isinstance(parameter.default, list) or list in (
        parameter.annotation,
        get_origin(parameter.annotation),
    )
    return list(value) if wants_list and isinstance(value, tuple) else value


def _module_name(construct: Callable[[], hk.Module]) -> str:
    """Returns the name that Haiku gives to a module, which shows when it is constructed."""
    names: list[str] = []
    transformed = hk.transform_with_state(lambda: names.append(construct().module_name))
    jax.eval_shape(transformed.init, jax.random.key(0))
    return names[0]


def _rebuild(cls: type, fields: dict[str, Any]) -> Mirrored:
    make: Any = wrap(cls) if issubclass(cls, hk.Module) else cls
    return make(**fields)


def _is_made_by_wrap(cls: type[Wrapped]) -> bool:
    hk_cls = getattr(cls, "_haiku_class", None)
    return hk_cls is not None and wrap(hk_cls) is cls


def _reduce_class(cls: type[Wrapped]) -> str | tuple[Any, ...]:
    return (wrap, (cls._haiku_class,)) if _is_made_by_wrap(cls) else cls.__qualname__


copyreg.pickle(WrappedClass, _reduce_class)
