"""Flax modules whose methods run Haiku code."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
from flax import errors
from flax import linen as nn
from flax.core import Scope

from .internals import no_flax_parent
from .mirror import Mirror, public_methods
from .params import Names


class Mirrored(nn.Module):
    """A Flax module whose methods are those of Haiku code.

    ``class Face(Mirrored, haiku=HaikuClass)`` gets the public methods of ``HaikuClass``.
    """

    # What a mirrored call continues with.  A clone has none: it runs by itself, as
    # Flax does with each row when it counts FLOPs.
    _next_f = None
    _num_runs = 0

    @classmethod
    def __init_subclass__(cls, haiku: type[hk.Module] | None = None, **kwargs: Any) -> None:
        for name, method in ({} if haiku is None else public_methods(haiku)).items():
            if name not in vars(cls):
                setattr(cls, name, _flax_method(name, method))
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
            with no_flax_parent():
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
    def _row(self, module: hk.Module | type[hk.Module], scope: Scope) -> "Mirrored":
        """Returns the Flax module that stands for a Haiku module at ``scope``.

        A class in place of a module: one whose calls Flax does not see.
        """
        hk_cls = module if isinstance(module, type) else type(module)
        return row_class(hk_cls)(module, self._names(), parent=scope, name=scope.name)

    @nn.nowrap
    def _count_run(self) -> int:
        """Returns how often this bound module ran before."""
        num_runs = self._num_runs
        object.__setattr__(self, "_num_runs", num_runs + 1)
        return num_runs

    def inside_transform(self) -> tuple[()]:
        """Stands in ``tabulate`` for calls inside an inner transform (``hk.scan``, ...)."""
        return ()


class Row(Mirrored):
    """The Flax module of a Haiku module that is part of another."""

    haiku_module: Any
    haiku_names: Names

    @nn.nowrap
    def _names(self) -> Names:
        return Names(root=self.haiku_module.module_name, netket=self.haiku_names.netket)

    @nn.nowrap
    def _haiku(self) -> hk.Module:
        return _without_tracers(self.haiku_module, {})


@functools.cache
def row_class(hk_cls: type[hk.Module]) -> type[Row]:
    """Returns the Flax class for the rows of a Haiku class."""
    namespace = {"__module__": __name__, "__doc__": hk_cls.__doc__}
    return type(hk_cls.__name__, (Row,), namespace, haiku=hk_cls)  # type: ignore[call-overload]


def _flax_method(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def flax_method(self: Mirrored, *args: Any, **kwargs: Any) -> Any:
        return self._run(name, args, kwargs)

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
    if treedef == jax.tree.structure(0):
        return value
    return jax.tree.unflatten(treedef, [_without_tracers(leaf, copies) for leaf in leaves])
