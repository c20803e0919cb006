"""Runs Haiku code whose values are those of a tree of NNX modules.

As for a Flax scope, Haiku's frame stays the owner of the values: they are loaded into it
before the code runs, and the state that it wrote is put back.  In between, each call of a
Haiku module goes through the NNX module at its path, so that NNX sees what it sees of a
native model (``nnx.tabulate``, ``nnx.capture``), and a submodule can be replaced.
"""

import contextlib
import contextvars
import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import haiku as hk
import jax
from flax import errors, nnx

from .attributes import SILENT, Source
from .calls import Call, Calls, watcher
from .names import HaikuTree, Path
from .private import is_capturing
from .run import haiku_key, is_missing_key, is_missing_parameter, transformed


class StandIn(nnx.Module):
    """An NNX module that stands for a Haiku module: runs send it the calls of that one."""

    if TYPE_CHECKING:
        _source: Source
        _path: Path

    def set_view(self, deterministic: bool | None = None) -> None:
        """Method used by ``nnx.view``.

        Args:
          deterministic: Whether ``is_training`` is False where a call does not give it.
        """
        if deterministic is not None and hasattr(self, "deterministic"):
            self.deterministic = deterministic


# The names of methods that a node has from Flax, not from Haiku.
FLAX_METHODS = frozenset(dir(StandIn))


class Run:
    """One run of Haiku code on the values of a tree of nodes.

    Args:
      node: The node whose method runs.
      outer: The run that sent the call, from another trace.  What the code uses outside
        of ``node`` is that of the outer run, and is not written.
    """

    def __init__(self, node: StandIn, outer: "Run | None" = None):
        self.calls = Calls()
        self.drew = False
        self._node = node
        self._layout = node._source.layout
        self._outer = outer
        self._sent: set[str] = set()
        self._written: set[str] = set()

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
            with self.calls.watched(self), hk.custom_setter(self._note_write):
                haiku = make()
                if isinstance(haiku, hk.Module):
                    haiku = self.calls.unsent(haiku, method)
                output = haiku(*args, **kwargs)
            self.drew = haiku_key() is not first
            return output

        def alone() -> Any:
            haiku = make()
            function = getattr(haiku, method) if isinstance(haiku, hk.Module) else haiku
            return function(*args, **kwargs)

        self._alone = alone
        loaded = self.load()
        try:
            output, state = transformed.apply(*loaded.values(), key, body)
        except ValueError as error:
            # A parameter that is missing makes its initializer draw, which misses a key then.
            if is_missing_parameter(error):
                self._check_replaced(self._layout.modules)
                error.add_note(
                    f"It is not in {'.'.join(self._node._path) or 'the model'}: give an example "
                    "that makes it; or, if it is of another submodule, call the model."
                )
            elif is_missing_key(error):
                error.add_note(
                    "The model has no stream: construct it with an example in which it draws "
                    "(is_training=True) and rngs that have one, nnx.Rngs(0) or nnx.Rngs(params=0, "
                    "dropout=1); or give rngs=nnx.Rngs(...) to the call."
                )
            raise
        self._check_replaced(self.calls.classes.keys() - self._sent)
        self._keep(loaded["state"], state)
        return output

    def needs_key(self) -> bool:
        """Returns whether the code fails without a key; ``hk.scan`` and the like hand it on."""

        def alone() -> Any:
            with Calls(is_sending=False).watched(self):
                return self._alone()

        try:
            jax.eval_shape(lambda: transformed.apply(*self.load().values(), None, alone))
        except Exception:  # it may be for want of a submodule that has been replaced
            return True
        return False

    def send(self, module: hk.Module, method: str, go_on: Call) -> Call:
        """Returns ``go_on`` as a method of the node that stands for ``module``."""
        path, node = self._stand_in(module.module_name)
        if method in FLAX_METHODS or not hasattr(node, method):
            return go_on
        self._sent.add(module.module_name)
        if not self._is_own(node, path):
            return _as_called(getattr(node, method), getattr(module, method))

        def arrive(copy: StandIn, *args: Any, **kwargs: Any) -> Any:
            with _sending(None):
                if watcher() is self:
                    return go_on(*args, **kwargs)
                # In another trace, as in nnx.tabulate, the node is a copy.
                return Run(copy, self)(lambda: module, method, args, kwargs, haiku_key())

        def call(*args: Any, **kwargs: Any) -> Any:
            with _sending(_address(node, method), arrive):
                return getattr(node, method)(*args, **kwargs)

        return call

    def module(self, module_name: str) -> Any:
        """Returns the node to which a Haiku module's intermediate values go, if any are kept."""
        path, node = self._stand_in(module_name)
        return node if self._is_own(node, path) and is_capturing(node) else SILENT

    def load(self) -> dict[str, HaikuTree]:
        """Returns the parameters and the state as Haiku has them."""
        trees: dict[str, HaikuTree] = {"params": {}, "state": {}}
        for (collection, module_name, name), path in self._layout.values.items():
            variable = self._find(path)
            if variable is not None:
                trees[collection].setdefault(module_name, {})[name] = get(variable)
        return trees

    def _find(self, path: Path) -> Any:
        """Returns what stands at a path, None where a submodule above has been replaced."""
        depth = len(self._node._path)
        if path[:depth] != self._node._path:
            return None if self._outer is None else self._outer._find(path)
        node: Any = self._node
        for end in range(depth, len(path)):
            node = getattr(node, path[end], None) if self._is_own(node, path[:end]) else None
        return node

    def _stand_in(self, module_name: str) -> tuple[Path | None, Any]:
        """Returns the path of a Haiku module, and what stands there."""
        path = self._layout.modules.get(module_name)
        return path, None if path is None else self._find(path)

    def _is_own(self, node: Any, path: Path | None) -> bool:
        """Returns whether a node is the model's own at a path, not a replacement."""
        is_there = isinstance(node, StandIn) and node._path == path
        return is_there and node._source == self._node._source

    def _check_replaced(self, names: Iterable[str]) -> None:
        """Raises for a submodule that has been replaced, among those that are named."""
        for name in sorted(names):
            path, node = self._stand_in(name)
            if node is not None and not self._is_own(node, path):
                raise ValueError(
                    f"{'.'.join(path or ())} has been replaced by a {type(node).__name__}, but "
                    "Haiku calls a method that the other has not, or calls it inside hk.scan, "
                    "hk.vmap, hk.remat or the like, where only its own module runs: put the "
                    "original back, or change its Params"
                )

    def _note_write(
        self, next_setter: Callable[..., Any], value: Any, context: hk.SetterContext
    ) -> Any:
        """State setter: notes the write; an inner transform hands back what it only read."""
        self._written.add(context.name)
        return next_setter(value)

    def _keep(self, loaded: HaikuTree, state: HaikuTree) -> None:
        """Puts the state that the call changed into the nodes."""
        for module_name, name, value in hk.data_structures.traverse(state):
            path = self._layout.values.get(("state", module_name, name))
            if path is None or name not in loaded.get(module_name, {}):
                raise ValueError(
                    f"the call made new state, {name!r} of {module_name!r}: give an example that "
                    "makes it; or, if it is of another submodule, call the model"
                )
            old, variable = loaded[module_name][name], self._find(path)
            if path[: len(self._node._path)] != self._node._path or _is_same(value, old):
                continue
            now = get(variable)
            if now is not old and now is get(variable):  # that of a jax.Ref is new each time
                raise ValueError(
                    f"{'.'.join(path)} has changed during the call, from another place: give each "
                    "place a Variable of its own (nnx.clone), since Haiku keeps values for a call"
                )
            try:
                put(variable, value)
            except errors.TraceContextError:
                # Closed over, where an inner transform (hk.scan) hands back what it only read.
                if name.rpartition("/")[2] in self._written:
                    raise


# Where a call is on its way to, and what makes it there.
_sent: contextvars.ContextVar[tuple[Any, ...]] = contextvars.ContextVar("sent", default=(None,))


def sent_to(node: StandIn, method: str) -> Call | None:
    """Returns what makes the call that was sent to ``node``, or to the node it is a copy of."""
    sent = _sent.get()
    return functools.partial(sent[1], node) if sent[0] == _address(node, method) else None


def _address(node: StandIn, method: str) -> tuple[Any, ...]:
    return type(node), node._path, method


@contextlib.contextmanager
def _sending(*sent: Any) -> Iterator[None]:
    token = _sent.set(sent)
    try:
        yield
    finally:
        _sent.reset(token)


def _as_called(native: Callable[..., Any], method: Callable[..., Any]) -> Call:
    """Returns the method of a replacement, as it is called with the arguments of Haiku's.

    A native module takes no ``is_training``; it has ``train()`` and ``eval()``.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        if "is_training" in inspect.signature(native).parameters:
            return native(*args, **kwargs)
        bound = inspect.signature(method).bind(*args, **kwargs)
        bound.arguments.pop("is_training", None)
        return native(*bound.args, **bound.kwargs)

    return call


def _is_same(new: Any, old: Any) -> bool:
    """Returns whether a value has not been changed: its arrays are the same objects."""
    trees: Any = map(jax.tree.flatten, (new, old))
    (arrays, structure), (others, old_structure) = trees
    return structure == old_structure and all(map(operator.is_, arrays, others))


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
