"""Where the modules and values of Haiku code stand in a tree of attributes."""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import haiku as hk
import jax
from flax.core import meta

from .calls import Call, Calls
from .names import Names, Path
from .rows import Mirrored, snapshot
from .run import NameScope, is_missing_key

Example = tuple[Any, ...]
Reserved = Callable[[type[hk.Module]], Collection[str]]


class Value(NamedTuple):
    """A parameter or a piece of state: its Haiku names, and its attributes from the root."""

    collection: str
    module_name: str
    name: str
    path: Path


@dataclasses.dataclass(frozen=True)
class Layout:
    """The tree of attributes of a model.

    Attributes:
      modules: Path of each Haiku module, by its name.
      classes: Haiku class at each path, the levels above first.
      values: The values in Haiku's order.
      draws: Whether a call draws random keys.
    """

    modules: dict[str, Path]
    classes: dict[Path, type[hk.Module]]
    values: tuple[Value, ...]
    draws: bool


def abstract(*args: Any, **kwargs: Any) -> Example:
    """Returns the arguments of a call without the entries of their arrays, hashable."""
    leaves, treedef = jax.tree.flatten((args, kwargs))
    return treedef, *(
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") else leaf
        for leaf in leaves
    )


def find_layout(face: Mirrored, example: Example, reserved: Reserved) -> Layout:
    """Returns the layout of a Flax face, as a call of its Haiku code gives it.

    Attributes have Haiku's names, a leading ``~`` left out if the rest is unique; those
    that are reserved, or taken by a submodule, get a ``_`` behind.  Values outside of any
    module are the root's.

    Args:
      face: The Linen face.
      example: What ``abstract`` returns for the arguments of its call.
      reserved: Attributes that the node of a Haiku class has for itself.
    """
    seen = _Seen()
    params, state = _trace(face, example, seen)
    names = face._names()
    module_names = [*seen.classes, *params, *state]
    parts = {name: _parts(names, name) for name in dict.fromkeys(module_names)}
    parts_classes = {parts[name]: hk_cls for name, hk_cls in seen.classes.items()}
    tree = _Attributes(parts.values(), lambda path: reserved(parts_classes.get(path, NameScope)))
    values = [
        Value(collection, module_name, name, tree.add(parts[module_name], key))
        for collection, values in (("params", params), ("state", state))
        for module_name, name, value in hk.data_structures.traverse(values)
        for key in [names.key(collection, module_name, name, value)]
    ]
    return Layout(
        {name: tree.paths[path] for name, path in parts.items()},
        {path: parts_classes.get(known, NameScope) for known, path in tree.paths.items()},
        tuple(values),
        seen.draws,
    )


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a tree of nodes comes from, the same object in all of them.

    Equal sources are equal models: what follows from the two fields is not compared.
    """

    face: Mirrored
    example: Example
    layout: Layout = dataclasses.field(compare=False, repr=False)

    def module(self, path: Path) -> hk.Module:
        """Returns the Haiku module at a path, to be run by itself."""
        names = [name for name, known in self.layout.modules.items() if known == path]
        seen = _Seen(wanted=names[0] if names else "")
        _trace(self.face, self.example, seen)
        if seen.module is None:
            raise ValueError(
                f"{'.'.join(path)} cannot run by itself: Haiku calls it inside hk.scan, hk.vmap, "
                "hk.remat or the like; call the model"
            )
        return seen.module

    def __deepcopy__(self, memo: Any) -> "Source":
        return self


@dataclasses.dataclass
class _Seen:
    """What shows in a call of a Flax face: the classes by module name, one module.

    Nothing in it is of the trace, which ends.
    """

    wanted: str = ""
    classes: dict[str, type[hk.Module]] = dataclasses.field(default_factory=dict)
    module: hk.Module | None = None
    draws: bool = False


class _Modules:
    """A watcher that notes the modules."""

    def __init__(self) -> None:
        self.modules: dict[str, hk.Module] = {}

    def send(self, module: hk.Module, method: str, go_on: Call) -> Call:
        self.modules[module.module_name] = module
        return go_on

    def module(self, module_name: str) -> Any:
        """Intermediate values are no matter here."""
        return SILENT


class _Silent:
    """Stands for a module where nobody looks at its intermediate values."""

    def perturb(self, name: str, value: Any, collection: str) -> Any:
        return value

    def sow(self, collection: str, name: str, value: Any) -> bool:
        return False


SILENT = _Silent()


class _Attributes:
    """Gives names to attributes: ``paths`` leads from joined Haiku names to them."""

    def __init__(self, parts: Iterable[Path], reserved: Callable[[Path], Collection[str]]):
        self.paths: dict[Path, Path] = {(): ()}
        self._reserved = reserved
        self._taken: dict[Path, set[str]] = {}
        levels = dict.fromkeys(p[:depth] for p in parts for depth in range(1, len(p) + 1))
        for level in sorted(levels, key=len):
            *_, part = level
            plain = _plain(part)
            rivals = [known for known in levels if known[:-1] == level[:-1] and known != level]
            unique = part == plain or plain not in (_plain(known[-1]) for known in rivals)
            self.paths[level] = self.add(level[:-1], plain if unique else part)

    def add(self, parts: Path, name: str) -> Path:
        """Returns the path of a new attribute of a level."""
        taken = self._taken.setdefault(parts, {*self._reserved(parts)})
        while name in taken:
            name += "_"
        taken.add(name)
        return (*self.paths[parts], name)


def _parts(names: Names, module_name: str) -> Path:
    if module_name == "~" and names.root is None:
        return ()
    return dataclasses.replace(names, netket=False).path(module_name)


def _plain(part: str) -> str:
    return re.sub(r"^/?(~[^/]*/)*", "", part)


def _trace(face: Mirrored, example: Example, seen: _Seen) -> tuple[Any, Any]:
    """Returns the abstract parameters and state that a call of a face makes."""
    treedef, *leaves = example

    def call(*args: Any, **kwargs: Any) -> None:
        modules = _Modules()
        calls = Calls(modules)
        with calls.watched(), hk.custom_creator(_create_unboxed):
            face._haiku()(*args, **kwargs)
        seen.classes.update(calls.classes)
        if seen.wanted in modules.modules:
            with jax.ensure_compile_time_eval():
                seen.module = snapshot(modules.modules[seen.wanted], {})

    def run(arrays: list[jax.Array]) -> tuple[Any, Any]:
        given = iter(arrays)
        args, kwargs = treedef.unflatten(
            next(given) if _is_abstract(leaf) else leaf for leaf in leaves
        )
        net = hk.transform_with_state(call)
        params, state = net.init(jax.random.key(0), *args, **kwargs)
        try:
            net.apply(params, state, None, *args, **kwargs)
        except ValueError as error:
            if not is_missing_key(error):
                raise
            seen.draws = True
        return params, state

    return jax.eval_shape(run, list(filter(_is_abstract, leaves)))


def _create_unboxed(
    next_creator: Callable[..., Any],
    shape: Sequence[int],
    dtype: Any,
    init: Callable[..., Any],
    context: hk.GetterContext,
) -> Any:
    """Parameter creator: Haiku takes no box of Flax's (``nn.with_partitioning``)."""
    return meta.unbox(next_creator(shape, dtype, init))


def _is_abstract(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)
