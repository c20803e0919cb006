"""The values of one run of Haiku code: which Flax scope they come from and go to."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import haiku as hk
import jax
from flax import errors
from flax.core import Scope, meta

from haiku_mlp import JaxInitializer

from .calls import Place
from .names import HaikuTree, Names, Path, flatten

Tree = Mapping[str, Mapping[str, Any]]
Context = hk.GetterContext | hk.SetterContext


class Values:
    """Parameters and state between Haiku's frame and a Flax scope.

    The hooks act on what Haiku does in the transform of the start alone, and create values
    in its trace alone: inside ``hk.scan`` and the like Haiku creates them by itself, and
    ``keep`` takes them over.

    Args:
      scope: The Flax scope.
      names: How Haiku's names read in it.
      load: Whether Haiku's frame gets the values before the code runs.  Otherwise each is
        looked up when the code asks for it, in the scope that its module has by then.

    ``scopes`` has the Flax scope of each level in use, by its path.
    """

    place: Place

    def __init__(self, scope: Scope, names: Names, *, load: bool):
        self.names = names
        self._root = scope
        self.scopes: dict[Path, Scope] = {(): scope}
        self._found: dict[str, HaikuTree] = {"params": {}, "state": {}}
        self._created: dict[str, Any] = {}
        self._written: set[str] = set()
        if load:
            variables = scope.variables()
            for collection in self._found:
                flat = flatten(names, collection, variables.get(collection, {}))
                self._found[collection] = {
                    module: {name: _unbox(value) for name, value in values.items()}
                    for module, values in flat.items()
                }
        self.params, self.state = self._found["params"], self._found["state"]

    def scope(self, module_name: str) -> Scope:
        """Returns the Flax scope of the Haiku module with this name."""
        path = self.names.path(module_name)
        for depth, part in enumerate(path, start=1):
            if path[:depth] not in self.scopes:
                parent = self.scopes[path[: depth - 1]]
                if None not in parent.reservations.get(part, {None}):
                    raise _name_clash(module_name, part, parent)
                self.scopes[path[:depth]] = parent.push(part, reuse=True)
        return self.scopes[path]

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Returns the context of the run."""
        with (
            hk.custom_creator(self._create_parameter),
            hk.custom_creator(self._create_state, params=False, state=True),
            hk.custom_getter(self._get_parameter),
            hk.custom_setter(self._note_write),
        ):
            yield

    def keep(self, collection: str, tree: Tree) -> None:
        """Puts the values that Haiku made by itself into the Flax scopes."""
        for scope, name, value in self._not_found(collection, tree):
            if not scope.has_variable(collection, name):
                _reserve(scope, collection, name)
                scope.put_variable(collection, name, value)

    def keep_changed(self, state: Tree) -> None:
        """Puts the state that the code wrote into the Flax scopes."""
        for scope, name, value in self._not_found("state", state):
            if scope.has_variable("state", name):
                value = meta.replace_boxed(scope.get_variable("state", name), value)
            scope.put_variable("state", name, value)

    def _is_written(self, name: str) -> bool:
        """Returns whether state of this name may have changed.

        An inner transform hands back what it only read, as another object; where state is
        immutable, that must not count.  It calls the setter under names of its own.
        """
        is_mutable = self._root.is_mutable_collection("state")
        return is_mutable or name.rpartition("/")[2] in self._written

    def _not_found(self, collection: str, tree: Tree) -> Iterator[tuple[Scope, str, Any]]:
        """Yields scope, Flax name and value of what is another than was found."""
        found = self._found[collection]
        for module_name, name, value in hk.data_structures.traverse(tree):
            is_found = value is found.get(module_name, {}).get(name)
            if is_found or (collection == "state" and not self._is_written(name)):
                continue
            scope = self.scope(module_name)
            key = self.names.key(collection, module_name, name, value)
            is_level = isinstance(scope.get_variable(collection, key), Mapping)
            yield scope, key + "~" if is_level and not key.endswith("~") else key, value

    def _create_parameter(
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
        scope, name, is_there = self._find("params", context)
        if is_there:
            value = self._look_up("params", scope, name, context)
        else:
            may_create = scope.is_mutable_collection("params")
            if may_create and not self.place.is_here():
                return next_creator(shape, dtype, init)
            if not may_create:
                self._raise(context)
            _reserve(scope, "params", name)
            value = next_creator(shape, dtype, _in_scope(init, scope))
            if value is hk.DO_NOT_STORE:
                return value
            scope.put_variable("params", name, value)
            value = _unbox(value)
        if hk.running_init():
            return value
        # At apply Haiku's frame takes no new parameter; the getter supplies it.
        self._created[context.full_name] = value
        return hk.DO_NOT_STORE

    def _get_parameter(
        self, next_getter: Callable[..., Any], value: Any, context: hk.GetterContext
    ) -> Any:
        """Parameter getter: raises Flax's error for a shape that Haiku is about to refuse."""
        if value is hk.DO_NOT_STORE:
            value = self._created.get(context.full_name, value)
        is_checked = value is not hk.DO_NOT_STORE and self.place.is_same_transform()
        if is_checked and getattr(value, "shape", None) != tuple(context.original_shape):
            self._raise(context)
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
        if self.place.is_same_transform():
            scope, name, is_there = self._find("state", context)
            if is_there:
                return self._look_up("state", scope, name, context)
            if not scope.is_mutable_collection("state"):
                scope.rewound().variable("state", name)  # raises Flax's error
        return next_creator(shape, dtype, init)

    def _note_write(
        self, next_setter: Callable[..., Any], value: Any, context: hk.SetterContext
    ) -> Any:
        """State setter: notes the write."""
        self._written.add(context.name)
        return next_setter(value)

    def _find(self, collection: str, context: Context) -> tuple[Scope, str, bool]:
        """Returns scope and Flax name of the value asked for now, and whether it is there."""
        module_name = hk.current_name()
        name = context.full_name.removeprefix(f"{module_name}/")  # may have a slash itself
        scope, key = self.scope(module_name), self.names.key(collection, module_name, name)
        is_there = scope.has_variable(collection, key)
        if is_there and (*self.names.path(module_name), key) in self.scopes:
            raise _name_clash(context.full_name, key, scope)
        return scope, key, is_there

    def _look_up(self, collection: str, scope: Scope, key: str, context: Context) -> Any:
        value = _unbox(scope.get_variable(collection, key))
        found = self._found[collection].setdefault(hk.current_name(), {})
        found[context.full_name.removeprefix(f"{hk.current_name()}/")] = value
        return value

    def _raise(self, context: hk.GetterContext) -> None:
        """Raises what Flax does for a parameter that is missing or has another shape."""
        scope, name, _ = self._find("params", context)
        shape = tuple(context.original_shape)
        scope.rewound().param(name, lambda _: jax.ShapeDtypeStruct(shape, "float32"))
        # Flax lets pass what has no shape at all, and then fails elsewhere.
        raise errors.ScopeParamShapeError(name, scope.path_text, None, shape)


def _in_scope(init: Callable[..., Any], scope: Scope) -> Callable[..., Any]:
    """Returns an initializer that draws from the scope if it is one of JAX's."""
    if not isinstance(init, JaxInitializer):
        return init
    keyed = init.init
    return lambda shape, dtype: keyed(scope.make_rng("params"), tuple(shape), dtype)


def _unbox(value: Any) -> Any:
    return value.unbox() if isinstance(value, meta.AxisMetadata) else value


def _reserve(scope: Scope, collection: str, name: str) -> None:
    if None in scope.reservations.get(name, ()):
        raise _name_clash(name, name, scope)
    if not scope.name_reserved(name, collection):
        scope.reserve(name, collection)


def _name_clash(full_name: str, part: str, parent: Scope) -> Exception:
    return ValueError(
        f"{part!r} at {parent.path_text!r} is both a value and a submodule, which Haiku "
        f"allows and Flax does not ({full_name!r}): rename one; or initialise with hk.transform "
        "and convert by compat.to_flax, apply takes that tree"
    )
