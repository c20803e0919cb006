"""Any Haiku module class as a Flax module class."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import haiku as hk
import jax
from flax import linen as nn
from flax.core import FrozenDict

from .arguments import Given, Slot, copied
from .mirror.caching import per_class
from .mirror.calls import public_methods
from .mirror.names import Names
from .mirror.rows import Mirrored

Modules = Mapping[str, tuple[nn.Module, ...]]
NO_MODULES: Modules = FrozenDict()


class Wrapped(Mirrored):
    """The base of the classes that ``wrap`` makes."""

    __signature__: ClassVar[inspect.Signature]
    _haiku_class: ClassVar[type[hk.Module]]
    # The names of its arguments, by the names that they have here.
    _arguments: ClassVar[dict[str, str]]
    # What Haiku calls its modules, by what they are made of: hashes, which keep nothing alive.
    _roots: ClassVar[dict[tuple[int, str | None], str]]

    haiku_arguments: Given
    # Those of the arguments that are Flax modules: Flax looks for submodules in fields.
    flax_modules: Modules = dataclasses.field(default=NO_MODULES, repr=False)

    @classmethod
    def __init_subclass__(cls, haiku: type[hk.Module] | None = None, **kwargs: Any) -> None:
        if haiku is not None:
            cls._haiku_class, cls._roots = haiku, {}
            cls._arguments, cls.__signature__ = _signature(haiku)
        if "__init__" not in vars(cls):
            cls.__init__ = _init  # type: ignore[method-assign]  # Flax's takes the fields
        super().__init_subclass__(haiku=haiku, **kwargs)

    @nn.nowrap
    def __getattr__(self, name: str) -> Any:
        if name not in self._arguments or "haiku_arguments" not in vars(self):
            return super().__getattr__(name)
        value = self.haiku_arguments.value(self._arguments[name])
        return copied(value, _filling(self.flax_modules))

    @nn.nowrap
    def _names(self) -> Names:
        made_of = hash(self.haiku_arguments), self.name
        if made_of not in self._roots:
            self._roots[made_of] = _module_name(self._haiku)
        return Names(root=self._roots[made_of])

    @nn.nowrap
    def _haiku(self) -> hk.Module:
        name = self.name or self._haiku_class.__name__.lower()
        return self.haiku_arguments.construct(name, _filling(self.flax_modules))

    @nn.nowrap
    def __reduce__(self) -> tuple[Any, ...]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        is_made_by_wrap = type(self) is _flax_class(self._haiku_class)
        cls = self._haiku_class if is_made_by_wrap else type(self)
        return _rebuild, (cls, {**fields, "parent": None})


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
        advice = "give a function to HaikuFunction"
        if isinstance(hk_cls, hk.Module):
            advice = f"give the class first, wrap({type(hk_cls).__name__})(...)"
        raise TypeError(f"wrap takes a subclass of hk.Module, got {hk_cls!r}: {advice}")
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
    """Returns the signature of the Flax class, and what its parameters are called in Haiku."""
    taken = {*dir(nn.Module), *Wrapped.__dataclass_fields__, "scope", *public_methods(hk_cls)}
    of_flax = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in ("parent", "name")
    ]
    names, parameters = {}, []
    for parameter in inspect.signature(hk_cls).parameters.values():
        if parameter.name != "name":
            name = parameter.name + "_" * (parameter.name in taken)
            names[name] = parameter.name
            # Flax clones by keyword.
            kind = max(parameter.kind, parameter.POSITIONAL_OR_KEYWORD)
            parameters.append(parameter.replace(name=name, kind=kind))
    return names, inspect.Signature(sorted([*parameters, *of_flax], key=lambda p: p.kind))


def _init(
    self: Any,
    *args: Any,
    haiku_arguments: Given | None = None,
    flax_modules: Modules = NO_MODULES,
    **kwargs: Any,
) -> None:
    """Takes the arguments of the Haiku class; or from Flax the fields, and what changes."""
    signature, is_new = self.__signature__, haiku_arguments is None
    try:
        for name in kwargs:
            if self._arguments.get(name + "_") == name != "parent":
                raise TypeError(f"{name!r} is Flax's own, give {name + '_'!r}")
        bound = (signature.bind if is_new else signature.bind_partial)(*args, **kwargs)
    except TypeError as error:
        arguments = ", ".join(signature.parameters)
        raise TypeError(f"{error}: {type(self).__name__} takes {arguments}") from None
    of_flax = {n: bound.arguments.pop(n) for n in ("parent", "name") if n in bound.arguments}
    if haiku_arguments is None or bound.arguments:
        given = haiku_arguments.arguments(_filling(flax_modules)) if haiku_arguments else {}
        for argument, value in bound.arguments.items():
            name, parameter = self._arguments[argument], signature.parameters[argument]
            is_more = parameter.kind is parameter.VAR_KEYWORD
            given[name] = {**given.get(name, {}), **value} if is_more else value
        haiku_arguments, flax_modules = _given(self._haiku_class, given)
    Wrapped.__init__(self, haiku_arguments, flax_modules, **of_flax)


def _given(hk_cls: type[hk.Module], arguments: Mapping[str, Any]) -> tuple[Given, Modules]:
    """Returns the arguments with slots in place of Flax modules, and the modules."""
    modules: dict[str, list[nn.Module]] = {}

    def put(argument: str, value: Any) -> Any:
        if isinstance(value, hk.Module):
            raise TypeError(
                f"{argument!r} of {hk_cls.__name__} is a Haiku module, which lives in one run "
                "only: give a function that makes and calls it, or a Flax module, "
                f"compat.wrap({type(value).__name__})(...)"
            )
        if not isinstance(value, nn.Module):
            return value
        known = modules.setdefault(argument, [])
        known.append(value)
        return Slot(argument, len(known) - 1)

    slots = {name: copied(value, partial(put, name)) for name, value in arguments.items()}
    return Given(hk_cls, slots), FrozenDict({name: tuple(m) for name, m in modules.items()})


def _filling(modules: Modules) -> Callable[[Any], Any]:
    """Returns a function that puts the modules in place of their slots."""
    return lambda value: value.content(modules) if isinstance(value, Slot) else value


def _module_name(construct: Callable[[], hk.Module]) -> str:
    """Returns the name that Haiku gives to a module, which shows when it is constructed."""
    names: list[str] = []
    transformed = hk.transform_with_state(lambda: names.append(construct().module_name))
    jax.eval_shape(transformed.init, jax.random.key(0))
    return names[0]


def _rebuild(cls: type, fields: dict[str, Any]) -> Mirrored:
    make: Any = wrap(cls) if issubclass(cls, hk.Module) else cls
    return make(**fields)
