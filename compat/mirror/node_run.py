"""Runs Haiku code whose values are those of a tree of NNX modules.

As for a Flax scope, Haiku's frame stays the owner of the values: they are loaded into it
before the code runs, and the state that it wrote is put back.  In between, each call of a
Haiku module goes through the NNX module at its path, so that NNX sees what it sees of a
native model (``nnx.tabulate``, ``nnx.capture``), and a submodule can be replaced.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import haiku as hk
import jax
from flax import nnx

from .attributes import SILENT, Source
from .calls import Call, Calls
from .names import Path
from .private import is_capturing
from .run import haiku_key, is_missing_key

_transformed = hk.transform_with_state(lambda body: body())


class StandIn(nnx.Module):
    """An NNX module that stands for a Haiku module: runs send it the calls of that one."""

    if TYPE_CHECKING:
        _source: Source
        _path: Path


class Run:
    """One run of Haiku code on the values of a tree of nodes.

    Args:
      source: Where the tree comes from.
      path: The attributes that lead from the tree's root to ``node``.
      node: The node whose method runs.
      outer: The run that sent the call, from another trace.  What the code uses outside
        of ``node`` is that of the outer run, and is not written.
    """

    def __init__(self, source: Source, path: Path, node: StandIn, outer: "Run | None" = None):
        self.source = source
        self.calls = Calls(self)
        self.drew = False
        self._path = path
        self._node = node
        self._outer = outer
        self._sent_to: set[str] = set()
        self._written: set[str] = set()
        self.values: dict[str, dict[str, dict[str, Any]]] = {"params": {}, "state": {}}
        self._load()

    def __call__(
        self,
        make: Callable[[], Any],
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        key: jax.Array | None,
    ) -> Any:
        """Calls a method of the Haiku module, or the function, that ``make`` returns."""

        def body() -> Any:
            first = haiku_key()
            with (
                self.calls.watched(),
                hk.custom_creator(self._refuse),
                hk.custom_setter(self._note_write),
            ):
                haiku = make()
                is_module = isinstance(haiku, hk.Module)
                output = (self.calls.unsent(haiku, method) if is_module else haiku)(*args, **kwargs)
            self.drew = haiku_key() is not first
            return output

        try:
            params, state = self.values["params"], self.values["state"]
            output, state = _transformed.apply(params, state, key, body)
        except ValueError as error:
            self._explain(error)
            raise
        self._check_replaced()
        self._keep(state)
        return output

    def send(self, module: hk.Module, method: str, go_on: Call) -> Call:
        """Returns ``go_on`` as a method of the node that stands for ``module``."""
        path = self.source.layout.modules.get(module.module_name)
        node = None if path is None else self.find(path)
        if node is None or path is None:
            return go_on
        if not isinstance(node, StandIn):
            self._sent_to.add(module.module_name)
            return node if method == "__call__" else getattr(node, method)
        if not hasattr(type(node), method):
            return go_on

        def call(*args: Any, **kwargs: Any) -> Any:
            with _sending(Sent(self, path, node, module, go_on)):
                return getattr(node, method)(*args, **kwargs)

        return call

    def module(self, module_name: str) -> Any:
        """Returns the node to which a Haiku module's intermediate values go, if any are kept."""
        node = self.find(self.source.layout.modules.get(module_name, ()))
        return node if isinstance(node, StandIn) and is_capturing(node) else SILENT

    def find(self, path: Path) -> Any:
        """Returns what stands at a path, None where a submodule above has been replaced."""
        depth = len(self._path)
        if path[:depth] != self._path:
            return None if self._outer is None else self._outer.find(path)
        node: Any = self._node
        for part in path[depth:]:
            node = getattr(node, part, None) if isinstance(node, StandIn) else None
        return node

    def _load(self) -> None:
        for value in self.source.layout.values:
            node = self.find(value.path[:-1])
            variable = getattr(node, value.path[-1], None) if isinstance(node, StandIn) else None
            if variable is not None:
                values = self.values[value.collection].setdefault(value.module_name, {})
                values[value.name] = get(variable)

    def _refuse(
        self,
        next_creator: Callable[..., Any],
        shape: Sequence[int],
        dtype: Any,
        init: Callable[..., Any],
        context: hk.GetterContext,
    ) -> Any:
        """Parameter creator: nothing is made in a call, so the parameter is missing."""
        if not self.calls.place.is_same_transform():
            return next_creator(shape, dtype, init)
        where = ".".join(self._path) or "the model"
        raise ValueError(
            f"{context.full_name!r} is no parameter of {where}: give an example that makes it; "
            "if it is that of another submodule, or has been replaced, call the model"
        )

    def _note_write(
        self, next_setter: Callable[..., Any], value: Any, context: hk.SetterContext
    ) -> Any:
        """State setter: notes the write; an inner transform hands back what it only read."""
        self._written.add(context.name)
        return next_setter(value)

    def _keep(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Puts the state that the code wrote into the nodes."""
        values = self.source.layout.values
        known = {(v.module_name, v.name): v for v in values if v.collection == "state"}
        for module_name, name, value in hk.data_structures.traverse(state):
            if name.rpartition("/")[2] not in self._written:
                continue
            if (module_name, name) not in known:
                raise ValueError(
                    f"the call made new state, {name!r} of {module_name!r}: give an example "
                    "that makes it"
                )
            path = known[module_name, name].path
            if path[: len(self._path)] == self._path:
                put(getattr(self.find(path[:-1]), path[-1]), value)

    def _check_replaced(self) -> None:
        """Raises for a replaced submodule that the Haiku code called unseen."""
        for name in sorted(self.calls.classes.keys() - self._sent_to):
            path = self.source.layout.modules.get(name)
            node = None if path is None else self.find(path)
            if node is not None and not isinstance(node, StandIn):
                raise ValueError(
                    f"{'.'.join(path or ())} has been replaced by a {type(node).__name__}, but "
                    "Haiku calls it inside hk.scan, hk.vmap, hk.remat or the like, where only its "
                    "own module runs: put the original back, or change its Params"
                )

    def _explain(self, error: ValueError) -> None:
        """Raises a clearer error for what Haiku lacked."""
        self._check_replaced()
        if is_missing_key(error):
            raise ValueError(
                f"{type(self._node).__name__} draws random keys in this call, but has no stream: "
                "construct it with an example in which it draws (is_training=True), and rngs that "
                "have a 'dropout' or default stream"
            ) from error


@dataclasses.dataclass
class Sent:
    """A call of a Haiku module on its way through a node."""

    run: Run
    path: Path
    node: StandIn
    module: hk.Module
    go_on: Call

    def is_for(self, node: StandIn) -> bool:
        """Returns whether the call is sent to ``node``, or to the one of which it is a copy."""
        return type(node) is type(self.node) and node._path == self.node._path

    def arrive(
        self, node: StandIn, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Makes the call: in another trace, as in ``nnx.tabulate``, on a copy of the node."""
        with _sending(None):
            if self.run.calls.place.is_here():
                return self.go_on(*args, **kwargs)
            inner = Run(self.run.source, self.path, node, outer=self.run)
            return inner(lambda: self.module, method, args, kwargs, haiku_key())


_sent: contextvars.ContextVar[Sent | None] = contextvars.ContextVar("sent", default=None)


def sent_to(node: StandIn) -> Sent | None:
    """Returns the call that is on its way to ``node``, if there is one."""
    sent = _sent.get()
    return sent if sent is not None and sent.is_for(node) else None


@contextlib.contextmanager
def _sending(sent: Sent | None) -> Iterator[None]:
    token = _sent.set(sent)
    try:
        yield
    finally:
        _sent.reset(token)


def get(variable: Any) -> Any:
    """Returns the value of a Variable, or an array that stands in its place."""
    if not isinstance(variable, nnx.Variable):
        return variable
    # Flax 0.11 has no get_value, 0.12 warns of value.
    return variable.get_value() if hasattr(nnx.Variable, "get_value") else variable.value


def put(variable: nnx.Variable, value: Any) -> None:
    """Sets the value of a Variable."""
    if hasattr(nnx.Variable, "set_value"):
        variable.set_value(value)
    else:
        variable[...] = value
