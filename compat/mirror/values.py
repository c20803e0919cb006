"""The values of one run of Haiku code: which Flax scope they come from and go to."""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import haiku as hk
import jax
from flax import errors
from flax.core import Scope, meta

from haiku_mlp import JaxInitializer

from .calls import Call, Place
from .names import Names, Path, Tree, flatten


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

    Attributes:
      params, state: What Haiku's frame gets.
      scopes: The Flax scope of each level in use, by its path.
    """

    def __init__(self, scope: Scope, names: Names, *, load: bool):
        self.names = names
        self.scopes: dict[Path, Scope] = {(): scope}
        self._root = scope
        self._is_written = False
        # Boxes of new parameters, and the shape of what is in them, by module and name.
        self._boxes: dict[tuple[str, str], tuple[meta.AxisMetadata[Any], tuple[int, ...]]] = {}
        variables = scope.variables() if load else {}
        self.params, self.state = (
            flatten(names, collection, meta.unbox(variables.get(collection, {})))[0]
            for collection in ("params", "state")
        )

    def scope(self, module_name: str) -> Scope:
        """Returns the Flax scope of the Haiku module with this name."""
        path = self.names.path(module_name)
        for depth, part in enumerate(path, start=1):
            if path[:depth] not in self.scopes:
                parent = self.scopes[path[: depth - 1]]
                _reserve(parent, part, None)
                self.scopes[path[:depth]] = parent.push(part, reuse=True)
        return self.scopes[path]

    @contextlib.contextmanager
    def hooked(self, place: Place) -> Iterator[None]:
        """Returns the context of the run, which is entered where the Haiku code starts."""
        self._place = place
        with (
            hk.custom_creator(self._create_parameter),
            hk.custom_creator(self._create_state, params=False, state=True),
            hk.custom_getter(self._get_parameter),
            hk.custom_setter(self._note_write),
        ):
            yield

    def keep(self) -> None:
        """Puts what Haiku made by itself, or changed, into the Flax scopes."""
        if hk.running_init():
            self._keep("params", hk.get_params())
        if self._root.get_flag("initializing", False):
            self._keep("state", hk.get_initial_state())
        # An inner transform hands back what it only read, as another object.
        elif self._is_written or self._root.is_mutable_collection("state"):
            self._keep("state", hk.get_current_state(), overwrite=True)

    def _keep(self, collection: str, tree: Mapping[str, Tree], *, overwrite: bool = False) -> None:
        found = getattr(self, collection)
        for module_name, name, value in hk.data_structures.traverse(tree):
            if value is found.get(module_name, {}).get(name, hk.DO_NOT_STORE):
                continue
            scope = self.scope(module_name)
            of_value = functools.partial(self.names.flax_name, collection, module_name, name)
            plain, key, escaped = map(of_value, (None, value, {}))
            if plain != escaped and isinstance(scope.get_variable(collection, plain), Mapping):
                plain = key = escaped  # that is a submodule
            found_keys = [k for k in {plain, escaped} if scope.has_variable(collection, k)]
            if found_keys and not overwrite:
                continue
            box, shape = self._boxes.get((module_name, name), (None, None))
            if box is not None and collection == "params" and shape == value.shape:
                value = box.replace_boxed(value)
            if key in found_keys:
                value = _as_before(scope.get_variable(collection, key), value)
            else:
                _reserve(scope, key, collection)
            for old in found_keys:
                scope.put_variable(collection, old, None)  # Flax deletes none, and merges mappings
            scope.put_variable(collection, key, value)

    def _create_parameter(
        self, make: Call, shape: Sequence[int], dtype: Any, init: Call, context: hk.GetterContext
    ) -> Any:
        """Parameter creator: takes the scope's value, or puts a new one there."""
        if not self._place.is_same_transform():
            return meta.unbox(make(shape, dtype, init))
        scope, name = self._find("params", context)
        if not scope.has_variable("params", name):
            if not scope.is_mutable_collection("params"):
                return make(shape, dtype, functools.partial(self._missing, init, context))
            if not self._place.is_here():
                return self._opened(make(shape, dtype, init), context)
            value = make(shape, dtype, _in_scope(init, scope))
            if value is hk.DO_NOT_STORE:
                return value
            if isinstance(value, Mapping):
                scope, name = self._find("params", context, value)
            scope.put_variable("params", name, value)
        # At apply Haiku's frame takes no new parameter; the getter supplies it.
        return _get(scope, "params", name) if hk.running_init() else hk.DO_NOT_STORE

    def _opened(self, value: Any, context: hk.GetterContext) -> Any:
        """Returns a value without its box, and notes that: ``keep`` puts its last one in there."""
        opened = meta.unbox(value)
        if isinstance(value, meta.AxisMetadata):
            self._boxes[_haiku_names(context)] = value.replace_boxed(None), opened.shape
        return opened

    def _missing(self, init: Call, context: hk.GetterContext, *args: Any) -> Any:
        """Raises Flax's error, unless the initializer leaves the value to a getter."""
        with contextlib.suppress(ValueError):  # it may want a key
            if init(*args) is hk.DO_NOT_STORE:
                return hk.DO_NOT_STORE
        return self._raise(context)

    def _get_parameter(self, next_getter: Call, value: Any, context: hk.GetterContext) -> Any:
        """Parameter getter: supplies what the frame does not take, and checks shapes as Flax."""
        if not self._place.is_same_transform():
            return next_getter(value)
        if value is hk.DO_NOT_STORE:
            scope, name = self._find("params", context)
            value = _get(scope, "params", name)
        stored, value = value, next_getter(value)  # which may make the shape of another one
        if stored is not hk.DO_NOT_STORE:
            shapes = {getattr(a, "shape", None) for a in (stored, value)}
            if tuple(context.original_shape) not in shapes:
                self._raise(context)
        return value

    def _create_state(
        self, make: Call, shape: Sequence[int], dtype: Any, init: Call, context: hk.GetterContext
    ) -> Any:
        """State creator: takes the scope's value where there is one."""
        if self._place.is_same_transform():
            scope, name = self._find("state", context)
            if scope.has_variable("state", name):
                return _get(scope, "state", name)
            if not scope.is_mutable_collection("state"):
                scope.rewound().variable("state", name)  # raises Flax's error
        return make(shape, dtype, init)

    def _note_write(self, next_setter: Call, value: Any, context: hk.SetterContext) -> Any:
        """State setter: notes the write."""
        self._is_written = True
        return next_setter(value)

    def _find(
        self, collection: str, context: hk.GetterContext, value: Any = None
    ) -> tuple[Scope, str]:
        """Returns scope and Flax name of the value that Haiku asks for, or of a new ``value``."""
        module_name, name = _haiku_names(context)
        scope = self.scope(module_name)
        key = self.names.flax_name(collection, module_name, name, value)
        escaped = key.removesuffix("~") + "~"
        if scope.has_variable(collection, escaped) and not scope.has_variable(collection, key):
            key = escaped
        _reserve(scope, key, collection)
        return scope, key

    def _raise(self, context: hk.GetterContext) -> None:
        """Raises what Flax does for a parameter that is missing or has another shape."""
        scope, name = self._find("params", context)
        shape = tuple(context.original_shape)
        scope.rewound().param(name, lambda _: jax.ShapeDtypeStruct(shape, "float32"))
        # Flax lets pass what has no shape at all, and then fails elsewhere.
        raise errors.ScopeParamShapeError(name, scope.path_text, None, shape)


def _haiku_names(context: hk.GetterContext) -> tuple[str, str]:
    """Returns the names of the module and of the value that is asked for now."""
    module_name = getattr(context.module, "module_name", "~")
    return module_name, context.full_name.removeprefix(f"{module_name}/")  # may have a slash


def _in_scope(init: Call, scope: Scope) -> Call:
    """Returns an initializer that draws from the scope if it is one of JAX's."""
    if not isinstance(init, JaxInitializer):
        return init
    keyed = init.init
    return lambda shape, dtype: keyed(scope.make_rng("params"), tuple(shape), dtype)


def _as_before(old: Any, new: Any) -> Any:
    """Returns a value in the boxes of the one before it, if its structure is still the same."""
    before: Any = jax.tree.structure(meta.unbox(old))
    return meta.replace_boxed(old, new) if before == jax.tree.structure(new) else new


def _get(scope: Scope, collection: str, name: str) -> Any:
    return meta.unbox(scope.get_variable(collection, name, hk.DO_NOT_STORE))


def _reserve(scope: Scope, name: str, collection: str | None) -> None:
    """Takes a name for a value of a collection; None: for a submodule."""
    users = scope.reservations[name]
    if users and (None in users) != (collection is None):
        raise ValueError(
            f"{name!r} at {scope.path_text!r} is both a value and a submodule, which Haiku allows "
            "and Flax does not: rename one; or initialise with hk.transform and convert by "
            "compat.to_flax, apply takes that tree"
        )
    users.add(collection)
