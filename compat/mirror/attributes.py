"""Where the modules and values of Haiku code stand in a tree of attributes."""

import dataclasses
import re
import types
from collections.abc import Callable, Collection
from typing import Any

import haiku as hk
import jax
from flax.core import meta

from .calls import Call, Calls
from .copies import snapshot
from .names import Names, Path
from .rows import Mirrored
from .run import NameScope, haiku_key

Method = str | Callable[..., Any]
# The tree structure of (args, kwargs) and its leaves, arrays as jax.ShapeDtypeStruct.
AbstractCall = tuple[Any, ...]
Reserved = Callable[[type[hk.Module]], Collection[str]]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The tree of attributes of a model; a path leads from the root.

    Attributes:
      modules: Path of each Haiku module, by its name; ``~`` is outside of any.
      classes: Haiku class at each path, the levels above first.
      values: Path of each value, by collection, module name and name, in Haiku's order.
      draws: Whether a call uses a random key, if only to hand it on (``hk.scan``).
    """

    modules: dict[str, Path]
    classes: dict[Path, type[hk.Module]]
    values: dict[tuple[str, str, str], Path]
    draws: bool


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a tree of nodes comes from, the same object in all of them.

    Equal sources are equal models: the layout follows from the rest.

    Attributes:
      face: The Linen face.
      method: A method of it, or a function of the face.
      arguments: The arguments of a call, from ``abstract_call``.
      layout: What that call makes.
    """

    face: Mirrored
    method: Method
    arguments: AbstractCall
    layout: Layout = dataclasses.field(compare=False, repr=False)

    def haiku(self, path: Path) -> Any:
        """Returns the Haiku module, or function, at a path; called inside a transform."""
        if not path:
            return self.face._haiku()
        names = [name for name, known in self.layout.modules.items() if known == path]
        module = _Trace(self.face, self.method, self.arguments, wanted=names[:1]).found
        if module is None:
            raise ValueError(
                f"{'.'.join(path)} cannot run by itself: Haiku calls it inside hk.scan, hk.vmap, "
                "hk.remat or the like, or it keeps an array of the model's call; call the model"
            )
        return module

    def __deepcopy__(self, memo: Any) -> "Source":
        return self


def abstract_call(*args: Any, **kwargs: Any) -> AbstractCall:
    """Returns the arguments of a call without the entries of their arrays, hashable."""
    leaves, treedef = jax.tree.flatten((args, kwargs))
    return treedef, *(
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") else leaf
        for leaf in leaves
    )


def find_layout(
    face: Mirrored, method: Method, arguments: AbstractCall, reserved: Reserved
) -> Layout:
    """Returns the layout of a Flax face, as a call of its Haiku code gives it.

    Attributes have Haiku's names without a leading ``~``; those that are reserved, or taken
    by one that comes before, a module or a value, get a ``_`` behind.  Values outside of
    any module are the root's.

    Args:
      face, method, arguments: As in ``Source``.
      reserved: Attributes that the node of a Haiku class has for itself.
    """
    trace = _Trace(face, method, arguments)
    names = face._names()
    values = [
        (collection, module_name, name)
        for collection, tree in (("params", trace.params), ("state", trace.state))
        for module_name, name, _ in hk.data_structures.traverse(tree)
    ]
    module_names = ["~", *trace.classes, *(module_name for _, module_name, _ in values)]
    levels = {name: _level(names, name) for name in dict.fromkeys(module_names)}
    known = {levels[name]: hk_cls for name, hk_cls in trace.classes.items()}
    paths: dict[Path, Path] = {(): ()}
    taken: dict[Path, set[str]] = {}

    def add(level: Path, name: str) -> Path:
        names_there = taken.setdefault(level, {*reserved(known.get(level, NameScope))})
        while name in names_there:
            name += "_"
        names_there.add(name)
        return (*paths[level], name)

    above = [level[:depth] for level in levels.values() for depth in range(1, len(level) + 1)]
    for level in sorted(dict.fromkeys(above), key=len):
        paths[level] = add(level[:-1], re.sub(r"^/?(~[^/]*/)*", "", level[-1]))
    return Layout(
        {name: paths[level] for name, level in levels.items()},
        {path: known.get(level, NameScope) for level, path in paths.items()},
        {value: add(levels[value[1]], names.flax_name(*value)) for value in values},
        trace.draws,
    )


def _level(names: Names, module_name: str) -> Path:
    """Returns the levels of a module's name, Haiku's own names for those of an MLP too."""
    return () if module_name == "~" else names._replace(netket=False).path(module_name)


# Stands for a module where nobody looks at its intermediate values.
SILENT = types.SimpleNamespace(
    perturb=lambda name, value, collection: value, sow=lambda collection, name, value: False
)


class _Trace:
    """An abstract call of a Flax face, the watcher of its own Haiku code.

    Attributes:
      params, state: What it makes.
      classes: The classes of the modules, by name.
      draws: Whether a call with these values uses a random key.
      found: The wanted module as it is before its first call, if it can run by itself.
    """

    def __init__(
        self, face: Mirrored, method: Method, arguments: AbstractCall, wanted: Collection[str] = ()
    ):
        self.classes: dict[str, type[hk.Module]] = {}
        self.draws = False
        self.found: hk.Module | None = None
        self._wanted = wanted
        treedef, *leaves = arguments

        def call(*args: Any, **kwargs: Any) -> None:
            self.calls = Calls()
            first = haiku_key()
            with self.calls.watched(self), hk.custom_creator(_unboxed):
                haiku = face._haiku()
                if callable(method):
                    method(haiku, *args, **kwargs)
                else:
                    getattr(haiku, method)(*args, **kwargs)
            self.classes.update(self.calls.classes)
            self.draws = haiku_key() is not first

        def run(arrays: list[jax.Array]) -> tuple[Any, Any]:
            given = iter(arrays)
            args, kwargs = treedef.unflatten(
                next(given) if _is_abstract(leaf) else leaf for leaf in leaves
            )
            net = hk.transform_with_state(call)
            key = jax.random.key(0)
            params, state = net.init(key, *args, **kwargs)
            net.apply(params, state, key, *args, **kwargs)
            return params, state

        self.params, self.state = jax.eval_shape(run, list(filter(_is_abstract, leaves)))

    def send(self, module: hk.Module, method: str, go_on: Call) -> Call:
        if module.module_name in self._wanted and self.found is None:
            tracers: list[Any] = []
            copy = snapshot(module, tracers)
            self.found = None if tracers else copy
        return go_on

    def module(self, module_name: str) -> Any:
        return SILENT


def _unboxed(make: Any, shape: Any, dtype: Any, init: Any, context: hk.GetterContext) -> Any:
    """Parameter creator: Haiku takes no box of Flax's (``nn.with_partitioning``)."""
    return meta.unbox(make(shape, dtype, init))


def _is_abstract(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)
