"""The mirror: runs Haiku code whose values and random keys are those of a Flax scope.

Haiku's frame stays the owner of the values.  They are loaded into it before the code
runs, and what changed is stored behind it.  In between, each call of a Haiku module
goes through a small Flax module at the same path, so that Flax sees what it sees of a
native model; but only where Flax looks, and where the code runs in the trace and the
transform in which it was started.  Inside ``hk.scan``, ``hk.vmap``, ``hk.remat`` and the
like it runs as plain Haiku, so that no tracer gets out.
"""

import contextvars
import inspect
from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import numpy as np
from flax import errors
from flax import linen as nn

from .caching import per_class
from .names import Names
from .private import is_flax_watching, is_missing_rng, missing_state
from .values import Store

_transformed = hk.transform_with_state(lambda body: body())
_running: contextvars.ContextVar["Mirror"] = contextvars.ContextVar("mirror")


def running() -> "Mirror | None":
    """Returns the mirror of the Haiku code that calls, or None where there is none."""
    mirror = _running.get(None)
    return mirror if mirror is not None and mirror.store.place.is_here() else None


class NameScope(hk.Module):
    """Stands for a level of Haiku names that no module has (``hk.force_name``)."""


class Mirror:
    """One run of Haiku code inside the scope of a bound Flax module."""

    def __init__(self, host: Any, names: Names):
        self.store = Store(host.scope, names)
        self._host = host
        self._rows: dict[str, tuple[hk.Module, Any]] = {}
        self._modules: dict[str, type[hk.Module]] = {}
        self._hidden: set[str] = set()
        self._entered: hk.Module | None = None

    def run(self, body: Callable[[], Any]) -> Any:
        """Returns ``body()``, run as Haiku code; raises Flax's errors for Haiku's."""
        store, scope = self.store, self._host.scope
        variables = scope.variables()
        creating = store.may_create and self._host.is_initializing()
        try:
            if creating:
                outputs: list[Any] = []
                rng = self._key("params")
                _transformed.init(rng, lambda: outputs.append(self._hooked(body, creating)))
                return outputs[0]
            params, state = (store.load(c, variables.get(c, {})) for c in ("params", "state"))
            rng = self._key("apply", "dropout", "params")
            return _transformed.apply(params, state, rng, lambda: self._hooked(body, creating))[0]
        except (ValueError, AttributeError) as error:
            if store.flax_error is not None:
                raise store.flax_error from error
            if is_missing_rng(error):
                stream = "params" if store.may_create else "apply"
                raise errors.InvalidRngError(f'{scope.name} needs PRNG for "{stream}"') from error
            missing = missing_state(error)
            if missing is not None and not creating:
                raise store.state_not_found(*missing) from error
            raise

    def enter(self, module: hk.Module) -> None:
        """Lets the next call of ``module`` pass: it is what the host's own method runs."""
        self._entered = module
        self._rows[module.module_name] = module, self._host

    def module(self, module_name: str) -> nn.Module:
        """Returns the Flax module at the scope of a Haiku module (the host's for ``~``)."""
        if module_name == "~":
            return self._host
        if module_name in self._rows:
            return self._rows[module_name][1]
        hk_cls = self._modules.get(module_name, NameScope)
        name = self.store.names.path(module_name)[-1]
        return self._host._row(hk_cls, self.store.scope(module_name), name)

    def _hooked(self, body: Callable[[], Any], creating: bool) -> Any:
        store = self.store
        store.start()
        key = _haiku_key()
        token = _running.set(self)
        try:
            with (
                self._host._parenthood(),
                hk.intercept_methods(self._call),
                hk.custom_creator(store.create_parameter),
                hk.custom_creator(store.create_state, params=False, state=True),
                hk.custom_getter(store.get_parameter),
                store.note_writes(),
            ):
                output = body()
        finally:
            _running.reset(token)
        self._count_draws(key)
        if creating:
            store.store_new("params", hk.get_params())
        if self._host.is_initializing():
            store.store_new("state", hk.get_initial_state())
            self._show_hidden()
        else:
            store.store_changed(hk.get_current_state())
        return output

    def _call(
        self,
        next_f: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: hk.MethodContext,
    ) -> Any:
        """Method interceptor: sends the call through the module's Flax module."""
        module, method = context.module, context.method_name
        if module is self._entered:
            self._entered = None
            return next_f(*args, **kwargs)
        if method == "__init__":
            next_f(*args, **kwargs)
            if self.store.place.is_same_transform() and hasattr(module, "module_name"):
                self._modules.setdefault(module.module_name, type(module))
            return None
        if not is_public(type(module), method, context.orig_class):
            return next_f(*args, **kwargs)
        name = module.module_name
        if not self.store.place.is_here():
            if self.store.place.is_same_transform():
                self._hidden.add(name)
            return next_f(*args, **kwargs)
        if not self._is_visible():
            return next_f(*args, **kwargs)
        known, row = self._rows.get(name, (None, self._host))
        named: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        dtypes = {key: value for key, value in named.items() if _is_dtype(value)}
        if known is not module or dtypes:
            row = self._new_row(module, dtypes)
            self._rows[name] = module, row
        return row._continue_with(next_f, method)(*args, **kwargs)

    def _is_visible(self) -> bool:
        """Returns whether it makes a difference that a call goes through Flax.

        Each step on the way makes the stack deeper, which slows down all tracing below:
        JAX looks at the whole stack for each operation.
        """
        host = self._host
        return host._compact or host.is_initializing() or is_flax_watching()

    def _new_row(self, module: hk.Module, dtypes: dict[Any, Any]) -> Any:
        path = self.store.names.path(module.module_name)
        _, parent = self._rows.get(module.module_name.rpartition("/")[0], (None, None))
        if parent is None or not parent._compact or self.store.knows(path):
            scope = self.store.scope(module.module_name)
            return self._host._row(module, scope, path[-1], dtypes)
        row = self._host._row(module, parent, path[-1], dtypes)
        self.store.adopt(path, row.scope)
        return row

    def _show_hidden(self) -> None:
        """Makes a call at each level that had none.

        ``tabulate`` counts a level without a call of its own twice, once at the level
        above and once below.
        """
        path = self.store.names.path
        modules = {path(name): hk_cls for name, hk_cls in self._modules.items()}
        shown = {path(name) for name in self._rows}
        for name in self._hidden:
            self.store.scope(name)
        hidden = set(map(path, self._hidden))
        above = {p[:depth] for p in shown | hidden for depth in range(1, len(p))}
        for level, scope in self.store.levels():
            if level not in shown and (level in modules or level in above):
                hk_cls = modules.get(level, NameScope)
                self._host._row(hk_cls, scope, level[-1]).inside_transform()

    def _key(self, *streams: str) -> jax.Array | None:
        """Returns the key that Haiku draws from, of the first stream there is, or None.

        The stream's counter stays where it is: what a native Flax module would draw from
        it next, a parameter at the root for instance, gets the same key here.
        """
        scope = self._host.scope
        self._stream = next(filter(scope.has_rng, streams), None)
        if self._stream is None:
            return None
        key = scope.make_rng(self._stream)
        scope.rng_counters[self._stream] -= 1
        return key

    def _count_draws(self, first: jax.Array | None) -> None:
        """Moves the stream's counter on if Haiku drew, so that the next run draws others."""
        if self._stream is not None and _haiku_key() is not first:
            self._host.scope.rng_counters[self._stream] += 1


@per_class
def is_public(hk_cls: type[hk.Module], method: str, defined_in: type[hk.Module]) -> bool:
    """Returns whether calling ``method`` of a Haiku module is a call that Flax sees.

    Haiku reports properties, private methods and each class of a ``super()`` chain too.
    """
    if method not in public_methods(hk_cls):
        return False
    return next(cls for cls in hk_cls.__mro__ if method in vars(cls)) is defined_in


@per_class
def public_methods(hk_cls: type[hk.Module]) -> dict[str, Callable[..., Any]]:
    """Returns the methods of a Haiku module that its Flax module has too."""
    reserved = {*dir(hk.Module), *dir(nn.Module)} - {"__call__"}
    methods = {name: inspect.getattr_static(hk_cls, name) for name in {*dir(hk_cls)} - reserved}
    return {
        name: method
        for name, method in sorted(methods.items())
        if inspect.isfunction(method) and (name == "__call__" or not name.startswith("_"))
    }


def _haiku_key() -> jax.Array | None:
    """Returns the key that Haiku will split next: another object after each split."""
    state = hk.maybe_get_rng_sequence_state()
    return None if state is None else state[0]


def _is_dtype(value: Any) -> bool:
    """Returns whether Flax's summary takes ``value`` for a scalar array."""
    if not isinstance(value, type | np.dtype | str):
        return False
    try:
        jax.numpy.result_type(value)
    except TypeError:
        return False
    return True
