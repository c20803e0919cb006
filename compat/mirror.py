"""The mirror: runs Haiku code whose values and random keys are those of a Flax scope.

Haiku's frame stays the owner of the values.  They are loaded into it before the code
runs, and what changed is stored behind it.  In between, each call of a Haiku module
goes through a small Flax module at the same path, so that Flax sees what it sees of a
native model; but only where the code runs in the trace and the transform in which it
was started.  Inside ``hk.scan``, ``hk.vmap``, ``hk.remat`` and the like it runs as
plain Haiku, so that no tracer gets out.
"""

import contextvars
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import haiku as hk
import jax
import numpy as np
from flax import errors
from flax import linen as nn
from flax.core import Scope, meta, tracers

from haiku_mlp import JaxInitializer

from .internals import haiku_context, is_missing_rng, no_flax_parent
from .params import HaikuTree, Names, Path, flatten


class NameScope(hk.Module):
    """Stands for a level of Haiku names that no module has (``hk.name_scope``)."""


_transformed = hk.transform_with_state(lambda body: body())
_running: contextvars.ContextVar["Mirror"] = contextvars.ContextVar("mirror")


def running() -> "Mirror | None":
    """Returns the mirror of the Haiku code that calls, or None under plain Haiku."""
    mirror = _running.get(None)
    return mirror if mirror is not None and mirror.is_outermost() else None


class Mirror:
    """One run of Haiku code inside the scope of a bound Flax module."""

    def __init__(self, host: Any, names: Names):
        self.names = names
        self._host = host
        self._scope: Scope = host.scope
        self._scopes: dict[Path, Scope] = {(): self._scope}
        self._rows: dict[str, tuple[hk.Module, Any]] = {}
        self._modules: dict[str, type[hk.Module]] = {}
        self._hidden: set[str] = set()
        self._entered: hk.Module | None = None
        self._loaded: dict[str, HaikuTree] = {}
        self._created: dict[str, Any] = {}
        self._written: set[str] = set()
        self._flax_error: Exception | None = None
        self._may_create = self._scope.is_mutable_collection("params")

    def run(self, body: Callable[[], Any]) -> Any:
        """Returns ``body()``, run as Haiku code; raises Flax's errors for Haiku's."""
        variables = self._scope.variables()
        creating = self._may_create and (
            self._host.is_initializing() or not (variables.get("params") or variables.get("state"))
        )
        try:
            if creating:
                outputs: list[Any] = []
                rng = self._peek_key()
                _transformed.init(rng, lambda: outputs.append(self._hooked(body, creating)))
                return outputs[0]
            for collection in ("params", "state"):
                self._loaded[collection] = _load(
                    self.names, collection, variables.get(collection, {})
                )
            rng = self._next_key()
            output, _ = _transformed.apply(
                self._loaded["params"],
                self._loaded["state"],
                rng,
                lambda: self._hooked(body, creating),
            )
            return output
        except ValueError as error:
            if self._flax_error is not None:
                raise self._flax_error from error
            if is_missing_rng(error):
                raise errors.InvalidRngError(
                    f'{self._scope.name} needs PRNG for "{"params" if creating else "apply"}"'
                ) from error
            raise

    def is_outermost(self) -> bool:
        """Returns whether the code runs in the trace and the transform of its start."""
        return tracers.current_trace() == self._trace and haiku_context() is self._context

    def scope(self, module_name: str) -> Scope:
        """Returns the Flax scope of the Haiku module with this name."""
        path = self.names.path(module_name)
        scope = self._scopes.get(path)
        if scope is None:
            scope = self._scope
            for depth, part in enumerate(path, start=1):
                parent = scope
                scope = self._scopes.get(path[:depth])
                if scope is None:
                    taken = parent.reservations.get(part, {None})
                    if None not in taken:
                        raise _name_clash(module_name, part, parent)
                    scope = self._scopes[path[:depth]] = parent.push(part, reuse=True)
        return scope

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
        return self._host._row(self._modules.get(module_name, NameScope), self.scope(module_name))

    def _hooked(self, body: Callable[[], Any], creating: bool) -> Any:
        self._trace = tracers.current_trace()
        self._context = haiku_context()
        token = _running.set(self)
        try:
            with (
                no_flax_parent(),
                hk.intercept_methods(self._call),
                hk.custom_creator(self._create_parameter),
                hk.custom_creator(self._create_state, params=False, state=True),
                hk.custom_getter(self._get_parameter),
                hk.custom_setter(self._set_state),
            ):
                output = body()
        finally:
            _running.reset(token)
        if creating:
            self._store_new("params", hk.get_params())
        if self._host.is_initializing():
            self._store_new("state", hk.get_initial_state())
            self._show_hidden()
        else:
            self._store_changed(hk.get_current_state())
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
            if haiku_context() is self._context and hasattr(module, "module_name"):
                self._modules.setdefault(module.module_name, type(module))
            return None
        if not is_public(type(module), method, context.orig_class):
            return next_f(*args, **kwargs)
        name = module.module_name
        if not self.is_outermost():
            if haiku_context() is self._context:
                self._hidden.add(name)
            return next_f(*args, **kwargs)
        known, row = self._rows.get(name, (None, None))
        if known is not module:
            row = self._host._row(module, self.scope(name))
            self._rows[name] = module, row
        return row._continue_with(next_f, method)(*args, **kwargs)

    def _create_parameter(
        self,
        next_creator: Callable[..., Any],
        shape: Sequence[int],
        dtype: Any,
        init: Callable[..., Any],
        context: hk.GetterContext,
    ) -> Any:
        """Parameter creator: takes the scope's value, or puts a new one there."""
        if haiku_context() is not self._context:
            return next_creator(shape, dtype, init)
        if context.full_name in self._created:
            return hk.DO_NOT_STORE
        scope = self.scope(context.module_name)
        name = self.names.leaf("params", context.module_name, context.name)
        if scope.has_variable("params", name):
            return meta.unbox(scope.get_variable("params", name))
        if not self._may_create:
            empty = scope.is_collection_empty("params")
            self._flax_error = (
                errors.ScopeCollectionNotFound("params", name, scope.path_text)
                if empty
                else errors.ScopeParamNotFoundError(name, scope.path_text)
            )
        if not self._may_create or not self.is_outermost():
            return next_creator(shape, dtype, init)
        _reserve(scope, "params", name, context.full_name)
        if isinstance(init, JaxInitializer):
            keyed = init.init

            def init(shape: Sequence[int], dtype: Any) -> Any:
                return keyed(scope.make_rng("params"), tuple(shape), dtype)

        value = next_creator(shape, dtype, init)
        if value is hk.DO_NOT_STORE:
            return value
        scope.put_variable("params", name, value)
        value = meta.unbox(value)
        if hk.running_init():
            return value
        # At apply Haiku's frame takes no new parameter; the getter supplies it.
        self._created[context.full_name] = value
        return hk.DO_NOT_STORE

    def _get_parameter(
        self, next_getter: Callable[..., Any], value: Any, context: hk.GetterContext
    ) -> Any:
        """Parameter getter: notes a wrong shape, which Haiku is about to refuse."""
        if value is hk.DO_NOT_STORE:
            value = self._created.get(context.full_name, value)
        elif np.shape(value) != tuple(context.original_shape):
            scope = self.scope(context.module_name)
            name = self.names.leaf("params", context.module_name, context.name)
            self._flax_error = errors.ScopeParamShapeError(
                name, scope.path_text, np.shape(value), tuple(context.original_shape)
            )
        return next_getter(value)

    def _create_state(
        self,
        next_creator: Callable[..., Any],
        shape: Sequence[int],
        dtype: Any,
        init: Callable[..., Any],
        context: hk.GetterContext,
    ) -> Any:
        """State creator: takes the scope's value where there is one."""
        self._written.add(context.name)
        if haiku_context() is self._context:
            scope = self.scope(context.module_name)
            name = self.names.leaf("state", context.module_name, context.name)
            if scope.has_variable("state", name):
                return meta.unbox(scope.get_variable("state", name))
        return next_creator(shape, dtype, init)

    def _set_state(
        self, next_setter: Callable[..., Any], value: Any, context: hk.SetterContext
    ) -> Any:
        """State setter: notes the write."""
        self._written.add(context.name)
        return next_setter(value)

    def _store_new(self, collection: str, tree: Mapping[str, Mapping[str, Any]]) -> None:
        for module_name, name, value in hk.data_structures.traverse(tree):
            scope = self.scope(module_name)
            key = self._key(collection, module_name, name, value)
            if not scope.has_variable(collection, key):
                _reserve(scope, collection, key, f"{module_name}/{name}")
                scope.put_variable(collection, key, value)

    def _store_changed(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        may_change = self._scope.is_mutable_collection("state")
        for module_name, name, value in hk.data_structures.traverse(state):
            if value is self._loaded.get("state", {}).get(module_name, {}).get(name):
                continue
            # An inner transform hands back a new object for a value that it only read.
            if may_change or name in self._written:
                scope = self.scope(module_name)
                key = self._key("state", module_name, name, value)
                box = scope.get_variable("state", key)
                scope.put_variable("state", key, meta.replace_boxed(box, value))

    def _key(self, collection: str, module_name: str, name: str, value: Any) -> str:
        key = self.names.leaf(collection, module_name, name)
        return f"{key}~" if isinstance(value, Mapping) else key

    def _show_hidden(self) -> None:
        """Makes a call at each level that had none; ``tabulate`` counts a level without
        a call of its own twice, once at the level above and once below.
        """
        modules = {self.names.path(name): hk_cls for name, hk_cls in self._modules.items()}
        shown = {self.names.path(name) for name in self._rows}
        hidden = {self.names.path(name) for name in self._hidden}
        for name in self._hidden:
            self.scope(name)
        above = {path[:depth] for path in shown | hidden for depth in range(1, len(path))}
        for path, scope in list(self._scopes.items()):
            if path and path not in shown and (path in modules or path in above):
                self._host._row(modules.get(path, NameScope), scope).inside_transform()

    def _next_key(self) -> jax.Array | None:
        """Returns the key that Haiku draws from at apply, None without random streams."""
        for stream in ("apply", "dropout", "params"):
            if self._scope.has_rng(stream):
                return self._scope.make_rng(stream)
        return None

    def _peek_key(self) -> jax.Array | None:
        """Returns the key that Haiku draws from at init.

        The scope's counter stays where it is: a parameter at the root gets the key
        that it would get in a native Flax module.
        """
        scope = self._scope
        if not scope.has_rng("params"):
            return None
        counters = dict(scope.rng_counters)
        scope.rng_counters["params"] += self._host._count_run()
        key = scope.make_rng("params")
        scope.rng_counters["params"] = counters["params"]
        return key


@functools.cache
def is_public(hk_cls: type[hk.Module], method: str, defined_in: type[hk.Module]) -> bool:
    """Returns whether calling ``method`` of a Haiku module is a call that Flax sees.

    Haiku reports properties, private methods and each class of a ``super()`` chain too.
    """
    if method not in public_methods(hk_cls):
        return False
    return next(cls for cls in hk_cls.__mro__ if method in vars(cls)) is defined_in


@functools.cache
def public_methods(hk_cls: type[hk.Module]) -> dict[str, Callable[..., Any]]:
    """Returns the methods of a Haiku module that its Flax module has too."""
    reserved = {*dir(hk.Module), *dir(nn.Module)} - {"__call__"}
    methods = {name: inspect.getattr_static(hk_cls, name) for name in {*dir(hk_cls)} - reserved}
    return {
        name: method
        for name, method in sorted(methods.items())
        if inspect.isfunction(method) and (name == "__call__" or not name.startswith("_"))
    }


def _load(names: Names, collection: str, tree: Mapping[str, Any]) -> HaikuTree:
    flat = flatten(names, collection, tree)
    for values in flat.values():
        for name, value in values.items():
            if isinstance(value, meta.AxisMetadata):
                values[name] = value.unbox()
    return flat


def _reserve(scope: Scope, collection: str, name: str, full_name: str) -> None:
    if name in scope.reservations and None in scope.reservations[name]:
        raise _name_clash(full_name, name, scope)
    if not scope.name_reserved(name, collection):
        scope.reserve(name, collection)


def _name_clash(full_name: str, part: str, parent: Scope) -> Exception:
    return errors.NameInUseError("submodule", part, parent.path_text)
