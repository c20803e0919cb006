"""NNX modules whose methods run Haiku code: one for each Haiku module, its values in it."""

import copyreg
import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import haiku as hk
import jax
from flax import errors, nnx

from .attributes import Source
from .caching import per_class
from .calls import public_methods, run_method
from .names import Path
from .node_run import FLAX_METHODS, Run, StandIn, get, put, sent_to


class HaikuState(nnx.Variable):
    """A value of Haiku's state (``hk.set_state``), which a call of its model updates."""


class NodeClass(type(nnx.Module)):  # type: ignore[misc]
    """The class of the node classes; pickle cannot import those that are made of a Haiku class."""

    _maker: tuple[Any, ...] | None

    def __reduce_class__(cls) -> str | tuple[Any, ...]:
        return vars(cls).get("_maker") or cls.__qualname__


copyreg.pickle(NodeClass, NodeClass.__reduce_class__)


class Node(StandIn, metaclass=NodeClass):
    """The NNX module of a Haiku module: its values, its submodules, its public methods.

    ``class Face(Node, haiku=HaikuClass)`` gets the public methods of ``HaikuClass``, apart
    from those whose names NNX needs for itself.
    """

    if TYPE_CHECKING:
        _haiku_class: type[hk.Module]

    @classmethod
    def __init_subclass__(cls, haiku: type[hk.Module] | None = None, **kwargs: Any) -> None:
        if haiku is not None:
            cls._haiku_class = haiku
            methods = public_methods(haiku)
            for name in methods.keys() - FLAX_METHODS.union(vars(cls)):
                setattr(cls, name, run_method(name, methods[name]))
        super().__init_subclass__(**kwargs)

    def __init__(self, source: Source, path: Path):
        self._source = source
        self._path = path
        self._add_mode(*self._methods())

    def _methods(self) -> list[Callable[..., Any]]:
        """Returns functions with the signatures of the Haiku methods, ``__call__`` first."""
        names = sorted(public_methods(self._haiku_class), key=lambda name: name != "__call__")
        return list(map(self._function, names))

    def _add_mode(self, *functions: Callable[..., Any]) -> None:
        """Adds what ``eval()`` and ``train()`` set, if one of the functions takes ``is_training``.

        At first it is the default of the first one that does.
        """
        all_parameters = (inspect.signature(function).parameters for function in functions)
        found = next((of["is_training"] for of in all_parameters if "is_training" in of), None)
        if found is not None:
            self.deterministic = found.default is False

    def _in_mode(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Returns ``kwargs`` with ``is_training``, if it is wanted and not given."""
        if hasattr(self, "deterministic"):
            signature = inspect.signature(function)
            given = signature.bind_partial(*args, **kwargs).arguments
            if "is_training" in signature.parameters.keys() - given.keys():
                return {**kwargs, "is_training": not self.deterministic}
        return kwargs

    def _function(self, method: str) -> Callable[..., Any]:
        """Returns a function with the signature of the Haiku method."""
        return functools.partial(getattr(self._haiku_class, method), self)

    def _run(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls a method of the Haiku code, as part of the run that sent the call, if any."""
        arrive = sent_to(self, method)
        if arrive is not None:
            return arrive(*args, **kwargs)
        function = self._function(method)
        is_of_haiku = "rngs" in inspect.signature(function).parameters
        given = None if is_of_haiku else kwargs.pop("rngs", None)
        stream = stream_of(getattr(self, "rngs", None) if given is None else given)
        kwargs = self._in_mode(function, args, kwargs)
        run = Run(self)
        call = functools.partial(run, lambda: self._source.haiku(self._path), method, args, kwargs)
        if not isinstance(stream, nnx.RngStream):
            return call(stream)
        before = get(stream.count)
        try:
            key = stream()
        except errors.TraceContextError:  # closed over, where no call may draw
            output = call(nnx.clone(stream)())
            if run.drew and run.needs_key():
                raise
            return output
        after = get(stream.count)
        output = call(key)
        if not run.drew and get(stream.count) is after:  # which others may have, too
            put(stream.count, before)
        return output


def stream_of(rngs: Any) -> nnx.RngStream | jax.Array | None:
    """Returns the stream or key of a call's ``rngs``, of a type that ``nnx.Dropout`` takes."""
    if rngs is None or isinstance(rngs, nnx.RngStream | jax.Array):
        return rngs
    if not isinstance(rngs, nnx.Rngs):
        raise TypeError(
            f"rngs must be nnx.Rngs, a stream of it or a key, got {type(rngs).__name__}: give "
            "nnx.Rngs(0)"
        )
    return rngs.dropout if {"dropout", "default"} & {*rngs} else None


def reserved(hk_cls: type[hk.Module]) -> set[str]:
    """Returns the attributes that the node of a Haiku class has for itself."""
    return {*dir(Node), *public_methods(hk_cls), "_source", "_path", "deterministic", "rngs"}


@per_class
def node_class(hk_cls: type[hk.Module], base: type[Node]) -> Any:
    """Returns the class of the nodes that stand for modules of a Haiku class."""
    namespace = {
        "__module__": hk_cls.__module__,
        "__doc__": hk_cls.__doc__,
        "_maker": (node_class, (hk_cls, base)),
    }
    return NodeClass(hk_cls.__name__, (base,), namespace, haiku=hk_cls)
