"""Any Haiku module class as a Flax module class."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import haiku as hk
from flax import linen as nn

from .arguments import Given, Modules
from .mirror.caching import per_class
from .mirror.calls import public_methods
from .mirror.names import Names
from .mirror.rows import Mirrored

_OF_FLAX = "parent", "name"


class Wrapped(Mirrored):
    """The base of the classes that ``wrap`` makes."""

    __signature__: ClassVar[inspect.Signature]
    _haiku_class: ClassVar[type[hk.Module]]
    # The names of its arguments, by the names that they have here.
    _arguments: ClassVar[dict[str, str]]
    # The fields that a subclass adds.
    _own_fields: ClassVar[list[dataclasses.Field[Any]]] = []

    haiku_arguments: Given
    # Those of the arguments that are Flax modules: Flax looks for submodules in fields.
    flax_modules: Modules = dataclasses.field(repr=False)

    @classmethod
    def __init_subclass__(cls, haiku: type[hk.Module] | None = None, **kwargs: Any) -> None:
        if haiku is not None:
            cls._haiku_class = haiku
            cls._arguments, cls.__signature__ = _signature(haiku)
        if "__init__" not in vars(cls):
            cls.__init__ = _init  # type: ignore[method-assign]  # Flax's takes the fields
        super().__init_subclass__(haiku=haiku, **kwargs)
        taken = {*Wrapped.__dataclass_fields__, *cls._arguments}
        cls._own_fields = [f for f in dataclasses.fields(cls) if f.init and f.name not in taken]
        own = {field.name: _parameter(field) for field in cls._own_fields}
        parameters = {**cls.__signature__.parameters, **own}
        in_order = sorted(parameters.values(), key=lambda p: p.kind)
        cls.__signature__ = inspect.Signature(in_order)

    @nn.nowrap
    def __getattr__(self, name: str) -> Any:
        if name not in self._arguments:
            return super().__getattr__(name)
        return self.haiku_arguments.value(self._arguments[name], self.flax_modules)

    @nn.nowrap
    def _names(self) -> Names:
        return Names(root=self.haiku_arguments.module_name(self.name, self.flax_modules))

    @nn.nowrap
    def _haiku(self) -> hk.Module:
        return self.haiku_arguments.construct(self.name, self.flax_modules)

    @nn.nowrap
    def __reduce__(self) -> tuple[Any, ...]:
        is_made_by_wrap = type(self) is _flax_class(self._haiku_class)
        cls = self._haiku_class if is_made_by_wrap else type(self)
        own = {field.name: getattr(self, field.name) for field in self._own_fields}
        return _rebuild, (cls, self.haiku_arguments, self.flax_modules, self.name, own)


def wrap(hk_cls: type[hk.Module]) -> type[Mirrored]:
    """Returns the Flax module class of a Haiku module class.

    It takes the arguments of the Haiku constructor and hands them on as they are;
    ``model.argument`` reads one, ``model.clone(argument=...)`` changes one.  ``name`` and
    ``parent`` are Flax's; a class that needs a ``name`` gets that of the Flax module, or
    else its own in small letters.  Models are equal if their arguments are, in value, type
    and order.  For an argument that is a Haiku module give a function that makes and calls
    it, or a Flax module: that is a submodule then, ``flax_modules_inner_0`` for the
    argument ``inner``.

    The methods are the public methods of ``hk_cls``.  A name that Flax needs for itself
    (``init``, ``apply``, ``copy``, ``path``, ...) gets a ``_`` behind it as an argument, and
    is left out as a method: :func:`haiku_method` reaches it.

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
            f"wrap takes a subclass of hk.Module, got {hk_cls!r}: give the class first, "
            "wrap(hk.Linear)(3), and a function to HaikuFunction"
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


def _signature(hk_cls: type[hk.Module]) -> tuple[dict[str, str], inspect.Signature]:
    """Returns what the parameters of the Flax class are called in Haiku, and its signature."""
    taken = {*dir(nn.Module), *Wrapped.__dataclass_fields__, "scope", *public_methods(hk_cls)}
    of_haiku = [p for p in inspect.signature(hk_cls).parameters.values() if p.name != "name"]
    names = {p.name + "_" * (p.name in taken): p.name for p in of_haiku}
    parameters = [
        # Flax clones by keyword.
        p.replace(name=name, kind=max(p.kind, p.POSITIONAL_OR_KEYWORD))
        for name, p in zip(names, of_haiku, strict=True)
    ] + [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in _OF_FLAX]
    return names, inspect.Signature(sorted(parameters, key=lambda p: p.kind))


def _parameter(field: dataclasses.Field[Any]) -> inspect.Parameter:
    """Returns a field as a parameter; a function that makes its default stands for that."""
    is_made = field.default_factory is not dataclasses.MISSING
    default = field.default_factory if is_made else field.default
    if default is dataclasses.MISSING:
        default = inspect.Parameter.empty
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default)


def _init(self: Any, *args: Any, **kwargs: Any) -> None:
    """Takes the arguments of the Haiku class; or from Flax the fields, and what changes."""
    given, modules = (kwargs.pop(name, None) for name in ("haiku_arguments", "flax_modules"))
    names = [field.name for field in self._own_fields]
    own = {name: vars(self)[name] for name in names if name in vars(self)}  # by another __init__
    changes = _bound(type(self), given is not None, *args, **{**own, **kwargs})
    of_flax = {name: changes.pop(name) for name in _OF_FLAX if name in changes}
    for field in self._own_fields:
        if field.name not in changes:
            is_made = field.default_factory is not dataclasses.MISSING
            changes[field.name] = field.default_factory() if is_made else field.default
        setattr(self, field.name, changes.pop(field.name))
    if given is None or changes:
        arguments = {} if given is None else given.arguments(modules)
        for argument, value in changes.items():
            name, parameter = self._arguments[argument], self.__signature__.parameters[argument]
            is_more = parameter.kind is parameter.VAR_KEYWORD
            arguments[name] = {**arguments.get(name, {}), **value} if is_more else value
        given, modules = Given.split(self._haiku_class, arguments)
    Wrapped.__init__(self, given, modules, **of_flax)


def _bound(cls: type[Wrapped], is_change: bool, /, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Returns arguments by the names that they have in Flax."""
    signature = cls.__signature__
    many = [p.name for p in signature.parameters.values() if p.kind is p.VAR_POSITIONAL]
    # A clone gives all of *arguments anew, by keyword.
    changes = {name: kwargs.pop(name) for name in many if is_change and name in kwargs}
    try:
        for name in kwargs:
            if cls._arguments.get(name + "_") == name != "parent":
                raise TypeError(f"{name!r} is Flax's own, give {name + '_'!r}")
        bound = (signature.bind_partial if is_change else signature.bind)(*args, **kwargs)
    except TypeError as error:
        arguments = ", ".join(signature.parameters)
        raise TypeError(f"{error}: {cls.__name__} takes {arguments}") from None
    return {**bound.arguments, **changes}


def _rebuild(
    cls: type, given: Given, modules: Modules, name: str | None, own: dict[str, Any]
) -> Mirrored:
    make: Any = wrap(cls) if issubclass(cls, hk.Module) else cls
    return make(haiku_arguments=given, flax_modules=modules, parent=None, name=name, **own)
