"""The calls of Haiku modules: which of them a framework sees, and how it passes them on."""

import contextlib
import contextvars
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import haiku as hk
from flax import linen as nn
from flax.core import tracers

from .caching import per_class
from .private import haiku_context

Call = Callable[..., Any]


class Watcher(Protocol):
    """A framework's side of one run of Haiku code."""

    def send(self, module: hk.Module, method: str, go_on: Call) -> Call:
        """Returns what runs in place of a call; ``go_on`` makes it, as often as wanted."""

    def module(self, module_name: str) -> Any:
        """Returns the framework's module that stands for a Haiku module."""


class Place:
    """The trace and the Haiku transform in which code was started."""

    def __init__(self) -> None:
        self._trace = tracers.current_trace()
        self._context: object = haiku_context()
        self._next: object = None

    @contextlib.contextmanager
    def handed_over(self) -> Iterator[Callable[[], None]]:
        """Hands this place over to the transform that starts next after a call of ``take_over``.

        The context yields ``take_over``.  Before its call no code is in this place: the ``init``
        of a pair of functions is not watched, its ``apply`` is.
        """
        context, self._context = self._context, None
        try:
            yield functools.partial(setattr, self, "_next", context)
        finally:
            self._context, self._next = context, None

    def move(self, trace: object = None) -> object:
        """Moves to a trace, that which runs now if None, and returns the one before."""
        before, self._trace = self._trace, trace or tracers.current_trace()
        return before

    def is_same_transform(self) -> bool:
        """Returns whether the transform of the start runs now: modules have their names from it."""
        context = haiku_context()
        if self._next is not None and context is not self._next:
            self._context, self._next = context, None
        return context is self._context

    def is_here(self) -> bool:
        """Returns whether the transform of the start runs now, in the same trace."""
        return tracers.current_trace() == self._trace and self.is_same_transform()


_running: contextvars.ContextVar[tuple[Watcher, Place]] = contextvars.ContextVar("running")


def watcher() -> Any:
    """Returns the watcher of the run that the calling code is in; None in another place."""
    watcher, place = _running.get((None, None))
    return watcher if place is not None and place.is_here() else None


def place() -> Place:
    """Returns the place of the run that the calling code is in."""
    return _running.get()[1]


class Calls:
    """The calls of one run of Haiku code, sent through a watcher.

    It does not keep its watcher: in a cycle, values would live on until the garbage collector
    comes.

    Only in the trace and the transform of the start: inside ``hk.scan``, ``hk.vmap``,
    ``hk.remat`` and the like the code runs as plain Haiku, so that no tracer gets out.

    Args:
      is_sending: Whether calls are sent at all.  Each step on the way makes the stack deeper,
        which slows down all tracing below: JAX looks at the whole stack for each operation.
    """

    def __init__(self, *, is_sending: bool = True):
        self._is_sending = is_sending
        self.classes: dict[str, type[hk.Module]] = {}
        # By its id: modules that are dataclasses have an ==.
        self._passing: tuple[int, str] | None = None

    @contextlib.contextmanager
    def watched(self, watcher: Watcher) -> Iterator[Place]:
        """Watches the code inside; yields the place, where the context is entered."""
        place = Place()
        with contextlib.ExitStack() as stack:
            stack.callback(_running.reset, _running.set((watcher, place)))
            if self._is_sending:
                intercept = functools.partial(self._intercept, watcher, place)
                stack.enter_context(hk.intercept_methods(intercept))
            yield place

    def unsent(self, module: hk.Module, method: str) -> Call:
        """Returns a method whose next call goes to Haiku directly; those that it makes are sent."""
        if self._is_sending:
            self._passing = id(module), method
        return getattr(module, method)

    def _intercept(
        self,
        watcher: Watcher,
        place: Place,
        next_f: Call,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: hk.MethodContext,
    ) -> Any:
        module, method = context.module, context.method_name
        if self._passing == (id(module), method):
            self._passing = None
            return next_f(*args, **kwargs)
        # Haiku reports properties, private methods and each class of a super() chain too.
        public = public_methods(type(module)).get(method)
        is_call = public is not None and public is vars(context.orig_class).get(method)
        if is_call and place.is_same_transform():
            self.classes[module.module_name] = type(module)
        if not is_call or not place.is_here():
            return next_f(*args, **kwargs)
        attempts = iter((next_f,))  # Haiku's own runs once; a call that is made again is a new one

        def go_on(*args: Any, **kwargs: Any) -> Any:
            attempt = next(attempts, None) or self.unsent(module, method)
            before = place.move()  # an interceptor may take derivatives, or map
            try:
                output = attempt(*args, **kwargs)
            finally:
                place.move(before)
            # Haiku casts outside of this call; what is seen of it should have its final dtype.
            policy = hk.mixed_precision.get_policy(type(module))
            return output if policy is None else policy.cast_to_output(output)

        return watcher.send(module, method, go_on)(*args, **kwargs)


@per_class
def public_methods(hk_cls: type[hk.Module]) -> dict[str, Call]:
    """Returns the methods of a Haiku module that its Flax module has too."""
    reserved = {*dir(hk.Module), *dir(nn.Module)}
    fields: Any = dataclasses.fields(hk_cls) if dataclasses.is_dataclass(hk_cls) else ()
    defaults = {field.name: field.default for field in fields}  # which may be functions
    return {
        name: method
        for name, method in inspect.getmembers_static(hk_cls, inspect.isfunction)
        if name == "__call__" or not (name.startswith("_") or name in reserved)
        if method is not defaults.get(name)
    }


def run_method(name: str, method: Call | None = None) -> Call:
    """Returns the method of a framework's module that runs the Haiku method ``name``."""

    def framework_method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._run(name, args, kwargs)

    if method is not None:
        functools.update_wrapper(framework_method, method)
    framework_method.__name__ = name  # Flax's summaries look for the method by it
    return framework_method
