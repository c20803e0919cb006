"""The store: parameters and state between Haiku's frame and a Flax scope."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import haiku as hk
import jax
import numpy as np
from flax import errors
from flax.core import Scope, meta, tracers

from haiku_mlp import JaxInitializer

from .names import HaikuTree, Names, Path, flatten
from .private import haiku_context

Tree = Mapping[str, Mapping[str, Any]]


class Place:
    """The trace and the Haiku transform in which code was started."""

    def __init__(self) -> None:
        self._trace = tracers.current_trace()
        self._context = haiku_context()

    def is_same_transform(self) -> bool:
        """Returns whether this transform runs now; it gives the modules their names."""
        return haiku_context() is self._context

    def is_here(self) -> bool:
        """Returns whether this transform runs now, in the trace of its start."""
        return tracers.current_trace() == self._trace and self.is_same_transform()


class Store:
    """The values of one run of Haiku code: where they come from, where they go.

    Its hooks act on what Haiku does in the place of the start alone: inside ``hk.scan``
    and the like Haiku creates values by itself, and ``store_new`` takes them over.
    """

    def __init__(self, scope: Scope, names: Names):
        self.names = names
        self.may_create = scope.is_mutable_collection("params")
        self.flax_error: Exception | None = None
        self._root = scope
        self._scopes: dict[Path, Scope] = {(): scope}
        self._loaded: dict[str, HaikuTree] = {}
        self._submodules: dict[tuple[str, Path], set[str]] = {}
        self._created: dict[str, Any] = {}
        self._written: set[str] = set()

    def start(self) -> None:
        """Notes the place where the Haiku code starts."""
        self.place = Place()

    def load(self, collection: str, tree: Mapping[str, Any]) -> HaikuTree:
        """Returns a Flax collection as Haiku takes it."""
        flat = flatten(self.names, collection, tree)
        for values in flat.values():
            for name, value in values.items():
                if isinstance(value, meta.AxisMetadata):
                    values[name] = value.unbox()
        self._loaded[collection] = flat
        for module_name in flat:
            path = self.names.path(module_name)
            for depth, part in enumerate(path):
                self._submodules.setdefault((collection, path[:depth]), set()).add(part)
        return flat

    def scope(self, module_name: str) -> Scope:
        """Returns the Flax scope of the Haiku module with this name."""
        path = self.names.path(module_name)
        scope = self._scopes.get(path)
        if scope is None:
            scope = self._root
            for depth, part in enumerate(path, start=1):
                parent = scope
                scope = self._scopes.get(path[:depth])
                if scope is None:
                    taken = parent.reservations.get(part, {None})
                    if None not in taken:
                        raise _name_clash(module_name, part, parent)
                    scope = self._scopes[path[:depth]] = parent.push(part, reuse=True)
        return scope

    def knows(self, path: Path) -> bool:
        """Returns whether the level at ``path`` has a scope already."""
        return path in self._scopes

    def adopt(self, path: Path, scope: Scope) -> None:
        """Takes the scope that Flax made for the module at ``path``."""
        self._scopes[path] = scope

    def levels(self) -> list[tuple[Path, Scope]]:
        """Returns the paths that were in use, with their scopes."""
        return [item for item in self._scopes.items() if item[0]]

    def create_parameter(
        self,
        next_creator: Callable[..., Any],
        shape: Sequence[int],
        dtype: Any,
        init: Callable[..., Any],
        context: hk.GetterContext,
    ) -> Any:
        """Parameter creator: takes the scope's value, or puts a new one there."""
        if not self.place.is_same_transform():
            return next_creator(shape, dtype, init)
        if context.full_name in self._created:
            return hk.DO_NOT_STORE
        module_name, scope, name = self._target("params", context)
        if scope.has_variable("params", name):
            if self._is_module(module_name, name):
                raise _name_clash(context.full_name, name, scope)
            value = meta.unbox(scope.get_variable("params", name))
            self._check_shape(value, context)  # a tree in its place was not loaded
            return value
        if not self.may_create:
            self.flax_error = (
                errors.ScopeCollectionNotFound("params", name, scope.path_text)
                if scope.is_collection_empty("params")
                else errors.ScopeParamNotFoundError(name, scope.path_text)
            )
        if not self.may_create or not self.place.is_here():
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

    def get_parameter(
        self, next_getter: Callable[..., Any], value: Any, context: hk.GetterContext
    ) -> Any:
        """Parameter getter: notes a wrong shape, which Haiku is about to refuse."""
        if value is hk.DO_NOT_STORE:
            value = self._created.get(context.full_name, value)
        else:
            self._check_shape(value, context)
        return next_getter(value)

    def _check_shape(self, value: Any, context: hk.GetterContext) -> None:
        expected = tuple(context.original_shape)
        if getattr(value, "shape", None) != expected:
            shape = next((np.shape(leaf) for leaf in jax.tree.leaves(value)), None)
            _, scope, name = self._target("params", context)
            self.flax_error = errors.ScopeParamShapeError(name, scope.path_text, shape, expected)

    def create_state(
        self,
        next_creator: Callable[..., Any],
        shape: Sequence[int],
        dtype: Any,
        init: Callable[..., Any],
        context: hk.GetterContext,
    ) -> Any:
        """State creator: takes the scope's value where there is one."""
        self._written.add(context.name)
        if self.place.is_same_transform():
            module_name, scope, name = self._target("state", context)
            if scope.has_variable("state", name):
                if self._is_module(module_name, name):
                    raise _name_clash(context.full_name, name, scope)
                return meta.unbox(scope.get_variable("state", name))
        return next_creator(shape, dtype, init)

    def note_writes(self) -> contextlib.AbstractContextManager[Any]:
        """Returns a context in which ``store_changed`` can tell writes from reads."""
        if self._root.is_mutable_collection("state"):
            return contextlib.nullcontext()
        return hk.custom_setter(self._note_write)

    def _note_write(
        self, next_setter: Callable[..., Any], value: Any, context: hk.SetterContext
    ) -> Any:
        """State setter: notes the write; an inner transform hands back what it only read."""
        self._written.add(context.name)
        return next_setter(value)

    def state_not_found(self, module_name: str, name: str) -> Exception:
        """Returns Flax's error for state that there is not."""
        scope = self.scope(module_name)
        key = self.names.key("state", module_name, name)
        if scope.is_collection_empty("state"):
            return errors.ScopeCollectionNotFound("state", key, scope.path_text)
        return errors.ScopeVariableNotFoundError(key, "state", scope.path_text)

    def store_new(self, collection: str, tree: Tree) -> None:
        """Puts the values that Haiku made by itself into the Flax scopes."""
        for module_name, name, value in hk.data_structures.traverse(tree):
            scope = self.scope(module_name)
            key = self._key(collection, module_name, name, value)
            if not scope.has_variable(collection, key):
                _reserve(scope, collection, key, f"{module_name}/{name}")
                scope.put_variable(collection, key, value)

    def store_changed(self, state: Tree) -> None:
        """Puts the state that changed into the Flax scopes."""
        may_change = self._root.is_mutable_collection("state")
        for module_name, name, value in hk.data_structures.traverse(state):
            if value is self._loaded.get("state", {}).get(module_name, {}).get(name):
                continue
            if may_change or name.rpartition("/")[2] in self._written:
                scope = self.scope(module_name)
                key = self._key("state", module_name, name, value)
                if scope.has_variable("state", key):
                    value = meta.replace_boxed(scope.get_variable("state", key), value)
                scope.put_variable("state", key, value)

    def _target(self, collection: str, context: hk.GetterContext) -> tuple[str, Scope, str]:
        """Returns the module, the scope and the Flax name of the value asked for now."""
        module_name = hk.current_name()
        name = context.full_name.removeprefix(f"{module_name}/")  # may have a slash itself
        return module_name, self.scope(module_name), self.names.key(collection, module_name, name)

    def _key(self, collection: str, module_name: str, name: str, value: Any) -> str:
        submodules = self._submodules.get((collection, self.names.path(module_name)), ())
        return self.names.key(collection, module_name, name, value, submodules)

    def _is_module(self, module_name: str, key: str) -> bool:
        return (*self.names.path(module_name), key) in self._scopes


def _reserve(scope: Scope, collection: str, name: str, full_name: str) -> None:
    if name in scope.reservations and None in scope.reservations[name]:
        raise _name_clash(full_name, name, scope)
    if not scope.name_reserved(name, collection):
        scope.reserve(name, collection)


def _name_clash(full_name: str, part: str, parent: Scope) -> Exception:
    return ValueError(
        f"{part!r} at {parent.path_text!r} is both a value and a submodule, which Haiku "
        f"allows and Flax does not ({full_name!r}): rename one; or initialise with hk.transform "
        "and convert by compat.to_flax, apply takes that tree"
    )
