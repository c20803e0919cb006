"""Any Haiku module class as a Flax module class."""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import haiku as hk
from flax import linen as nn

from .arguments import Given, Modules
from .mirror.caching import per_class
from .mirror.calls import public_methods, run_method
from .mirror.names import Names
from .mirror.rows import Mirrored


class Wrapped(Mirrored):
    """The base of the classes that ``wrap`` makes."""

    __signature__: ClassVar[inspect.Signature]
    _haiku_class: ClassVar[type[hk.Module]]
    # The names of its arguments in Haiku, by those that they have here: {"init_": "init"}.
    _haiku_names: ClassVar[dict[str, str]]
    # The signature with each argument by keyword, *args too, as Flax gives them in a clone.
    _by_keyword: ClassVar[inspect.Signature]

    haiku_arguments: Given
    # Those of the arguments that are Flax modules: Flax looks for submodules in fields.
    flax_modules: Modules = dataclasses.field(repr=False)

    @classmethod
    def __init_subclass__(cls, haiku: type[hk.Module] | None = None, **kwargs: Any) -> None:
        if haiku is not None:
            cls._haiku_class = haiku
            cls._haiku_names, cls.__signature__ = _signature(haiku)
        # The annotation of a Haiku argument, in a subclass, makes no field of it.
        annotations = inspect.get_annotations(cls)
        cls.__annotations__ = {n: a for n, a in annotations.items() if n not in cls._haiku_names}
        has_constructor = "__init__" in vars(cls)
        super().__init_subclass__(haiku=haiku, **kwargs)
        if not has_constructor:
            cls.__init__ = _constructor(cls, cls.__init__)  # type: ignore[method-assign]
        fields = [f for f in dataclasses.fields(cls) if f.name not in Wrapped.__dataclass_fields__]
        own = {field.name: _parameter(field) for field in fields if field.init}
        parameters = {**cls.__signature__.parameters, **own}.values()
        in_order = sorted(parameters, key=lambda p: p.kind)
        cls.__signature__ = inspect.Signature(in_order)
        by_keyword = [p.replace(kind=max(p.kind, p.KEYWORD_ONLY)) for p in in_order]
        cls._by_keyword = inspect.Signature(by_keyword)

    @nn.nowrap
    def __getattr__(self, name: str) -> Any:
        if name in self._haiku_names:
            with contextlib.suppress(KeyError):  # which the constructor fills in
                return self.haiku_arguments.value(self._haiku_names[name], self.flax_modules)
        return super().__getattr__(name)

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
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
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
    is left out as a method: :func:`haiku_method` reaches it.  Haiku code calls those of its own
    class, whatever a Flax subclass has in their place.

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

    Args:
      name: The method's name in the Haiku class.

    Returns:
      A function for ``method=`` of ``init`` and ``apply``, which hands its arguments on.

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

    return run_method(name)


def _signature(hk_cls: type[hk.Module]) -> tuple[dict[str, str], inspect.Signature]:
    """Returns what the parameters of the Flax class are called in Haiku, and its signature."""
    taken = {*dir(nn.Module), *Wrapped.__dataclass_fields__, "scope", *public_methods(hk_cls)}
    of_haiku = [p for p in inspect.signature(hk_cls).parameters.values() if p.name != "name"]
    names = {p.name + "_" * (p.name in taken): p.name for p in of_haiku}
    parameters = [
        # Flax clones by keyword.
        p.replace(name=name, kind=max(p.kind, p.POSITIONAL_OR_KEYWORD))
        for name, p in zip(names, of_haiku, strict=True)
    ]
    for name in ("parent", "name"):
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None))
    return names, inspect.Signature(sorted(parameters, key=lambda p: p.kind))


def _parameter(field: dataclasses.Field[Any]) -> inspect.Parameter:
    """Returns a field as a parameter; a function that makes its default stands for that."""
    given = (d for d in (field.default, field.default_factory) if d is not dataclasses.MISSING)
    default = next(given, inspect.Parameter.empty)
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default)


def _constructor(cls: type[Wrapped], set_fields: Callable[..., None]) -> Callable[..., None]:
    """Returns the constructor of a class; ``set_fields`` is Flax's, which takes the fields."""

    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        """Takes the arguments of the Haiku class; or from Flax the fields, and what changes."""
        given, modules = (kwargs.pop(name, None) for name in ("haiku_arguments", "flax_modules"))
        fields = _bound(cls, given is not None, *args, **kwargs)
        changes = {name: fields.pop(name) for name in cls._haiku_names if name in fields}
        if given is None or changes:
            arguments = {} if given is None else given.arguments(modules)
            for argument, value in changes.items():
                name, parameter = cls._haiku_names[argument], cls.__signature__.parameters[argument]
                is_more = parameter.kind is parameter.VAR_KEYWORD
                arguments[name] = {**arguments.get(name, {}), **value} if is_more else value
            given, modules = Given.split(cls._haiku_class, arguments)
        set_fields(self, given, modules, **fields)

    return construct


def _bound(cls: type[Wrapped], is_change: bool, /, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Returns arguments by the names that they have in Flax."""
    signature = cls._by_keyword if is_change else cls.__signature__
    # What is missing may be filled in by what wraps the constructor (gin).
    is_part = is_change or hasattr(cls._haiku_class.__init__, "__wrapped__")
    bind = signature.bind_partial if is_part else signature.bind
    try:
        for name in kwargs:
            if cls._haiku_names.get(name + "_") == name != "parent":
                raise TypeError(f"{name!r} is Flax's own, give {name + '_'!r}")
        return bind(*args, **kwargs).arguments
    except TypeError as error:
        arguments = ", ".join(cls.__signature__.parameters)
        raise TypeError(f"{error}: {cls.__name__} takes {arguments}") from None


def _rebuild(cls: type, fields: dict[str, Any]) -> Mirrored:
    make: Any = wrap(cls) if issubclass(cls, hk.Module) else cls
    return make(**fields)
