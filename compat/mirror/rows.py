"""Flax modules whose methods run Haiku code."""

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
from flax import errors
from flax import linen as nn

from .caching import per_class
from .names import Names
from .private import no_flax_parent
from .run import Mirror, public_methods


class Mirrored(nn.Module):
    """A Flax module whose methods are those of Haiku code.

    ``class Face(Mirrored, haiku=HaikuClass)`` gets the public methods of ``HaikuClass``.
    """

    # Whether Flax modules and parameters made in the Haiku code become this module's, as
    # in a compact method.  In general they do not: Haiku has names of its own for them.
    _compact = False
    # What a mirrored call continues with.  A clone has none: it runs by itself, as
    # Flax does with each row when it counts FLOPs.
    _next_f = None

    @classmethod
    def __init_subclass__(cls, haiku: type[hk.Module] | None = None, **kwargs: Any) -> None:
        for name, method in ({} if haiku is None else public_methods(haiku)).items():
            if name not in vars(cls):
                flax_method = _flax_method(name, method)
                setattr(cls, name, nn.compact(flax_method) if cls._compact else flax_method)
        super().__init_subclass__(**kwargs)

    @nn.nowrap
    def _names(self) -> Names:
        """Returns how Haiku's names read in this module's scope."""
        return Names()

    @nn.nowrap
    def _haiku(self) -> Any:
        """Returns the Haiku module or function; called inside a transform."""
        raise NotImplementedError

    @nn.nowrap
    def _run(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls a method of the Haiku code, as part of the outer run if there is one."""
        next_f = self._next_f
        if next_f is not None:
            object.__setattr__(self, "_next_f", None)
            with self._parenthood():
                return next_f(*args, **kwargs)
        if self.scope is None:
            raise errors.CallCompactUnboundModuleError
        mirror = Mirror(self, self._names())

        def body() -> Any:
            haiku = self._haiku()
            if isinstance(haiku, hk.Module):
                mirror.enter(haiku)
            return getattr(haiku, method)(*args, **kwargs)

        return mirror.run(body)

    @nn.nowrap
    def _continue_with(self, next_f: Callable[..., Any], method: str) -> Callable[..., Any]:
        """Returns the Flax method with ``next_f`` for its body."""
        if not hasattr(type(self), method):
            return next_f
        object.__setattr__(self, "_next_f", next_f)
        return getattr(self, method)

    @nn.nowrap
    def _parenthood(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context in which Haiku code of this module runs."""
        return contextlib.nullcontext() if self._compact else no_flax_parent()

    @nn.nowrap
    def _row(
        self,
        module: hk.Module | type[hk.Module],
        parent: Any,
        name: str,
        dtypes: Mapping[int | str, Any] = MappingProxyType({}),
    ) -> "Mirrored":
        """Returns the Flax module that stands for a Haiku module.

        Args:
          module: The module; its class, if Flax sees none of its calls.
          parent: The Flax parent, or the module's own :class:`flax.core.Scope`.
          name: The Flax name.
          dtypes: The dtypes among the arguments of the call.
        """
        hk_cls = module if isinstance(module, type) else type(module)
        origin = Origin(module, self._names().netket, dtypes)
        return row_class(hk_cls)(origin, parent=parent, name=name)


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a row comes from, in one field: Flax walks through each field of a module."""

    module: Any
    netket: bool
    dtypes: Mapping[int | str, Any]


class Row(Mirrored):
    """The Flax module of a Haiku module that is part of another."""

    origin: Origin

    @nn.nowrap
    def _names(self) -> Names:
        return Names(root=self.origin.module.module_name, netket=self.origin.netket)

    @nn.nowrap
    def _run(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._next_f is None:
            # Flax's summary gives a scalar array in place of a dtype when it counts FLOPs.
            dtypes = self.origin.dtypes
            args = tuple(dtypes.get(i, arg) for i, arg in enumerate(args))
            kwargs = {key: dtypes.get(key, value) for key, value in kwargs.items()}
        return super()._run(method, args, kwargs)

    @nn.nowrap
    def _haiku(self) -> hk.Module:
        return _without_tracers(self.origin.module, {})

    def inside_transform(self) -> tuple[()]:
        """Stands in ``tabulate`` for calls inside an inner transform (``hk.scan``, ...)."""
        return ()


@per_class
def row_class(hk_cls: type[hk.Module]) -> type[Row]:
    """Returns the Flax class for the rows of a Haiku class."""
    namespace = {"__module__": __name__, "__doc__": hk_cls.__doc__}
    return type(hk_cls.__name__, (Row,), namespace, haiku=hk_cls)


def _flax_method(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def flax_method(self: Mirrored, *args: Any, **kwargs: Any) -> Any:
        return self._run(name, args, kwargs)

    flax_method.__name__ = name  # Flax's summary looks for the method by it
    return flax_method


def _without_tracers(value: Any, copies: dict[int, Any]) -> Any:
    """Copies a Haiku module with zeros for the tracers it keeps of the run it is from."""
    if isinstance(value, hk.Module):
        if id(value) not in copies:
            copies[id(value)] = module = copy.copy(value)
            for name, attribute in vars(value).items():
                object.__setattr__(module, name, _without_tracers(attribute, copies))
        return copies[id(value)]
    if isinstance(value, jax.core.Tracer):
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.key(0), value.shape)
        return jnp.zeros(value.shape, value.dtype)
    leaves, treedef = jax.tree.flatten(value)
    if jax.tree_util.treedef_is_leaf(treedef):
        return value
    return jax.tree.unflatten(treedef, [_without_tracers(leaf, copies) for leaf in leaves])
