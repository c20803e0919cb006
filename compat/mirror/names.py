"""Names: how a Haiku tree reads as a Flax tree, and whole trees both ways.

A Haiku tree is flat, ``{"mlp/~/linear_0": {"w": ...}}``; a Flax tree is nested, one
level a module.  A ``~`` part of a Haiku name stands for no module: it is joined to
the part that follows, ``{"mlp": {"~/linear_0": {"w": ...}}}``.
"""

import functools
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

Path = tuple[str, ...]
Tree = Mapping[str, Any]
HaikuTree = dict[str, dict[str, Any]]

# A part of a Haiku name with the ~ parts before it; a slash in front of all stays.
_PART = re.compile(r"(?:^/)?(?:~[^/]*/)*[^/]+")
_LINEAR = re.compile(r"(^|/)linear_\d+$")
_DENSE = re.compile(r"Dense_(\d+)$")


class Names(NamedTuple):
    """A way to name Haiku modules and their values on the Flax side.

    Args:
      root: Name of the Haiku module whose own level the Flax tree leaves out, or None.
      netket: Whether an MLP's parts have NetKet's names (``MLP_0``, ``Dense_0``,
        ``kernel``, ``bias``) instead of their own (``block``, ``linear_0``, ``w``, ``b``).
    """

    root: str | None = None
    netket: bool = False

    def path(self, module_name: str) -> Path:
        """Returns the Flax path of a Haiku module."""
        return _path(self, module_name)

    def module_name(self, path: Path) -> str:
        """Returns the Haiku name of the module at a Flax path: the inverse of ``path``."""
        if path and path[0].startswith("/"):
            return "/".join(path)[1:]
        if self.netket:
            path = tuple("block" if p == "MLP_0" else _DENSE.sub(r"linear_\1", p) for p in path)
        return "/".join(path if self.root is None else (self.root, *path))

    def flax_name(
        self,
        collection: str,
        module_name: str,
        name: str,
        value: Any = None,
        submodules: Collection[str] = (),
    ) -> str:
        """Returns the Flax name of a Haiku value.

        A value that is itself a mapping, or has the name of a submodule, gets a ``~``
        behind its name, so that values and levels stay apart.
        """
        if self.netket and collection == "params" and _LINEAR.search(module_name):
            name = {"w": "kernel", "b": "bias"}.get(name, name)
        escaped = name in submodules or isinstance(value, Mapping) or name.endswith("~")
        return name + "~" if escaped else name

    def haiku_name(self, collection: str, module_name: str, key: str) -> str:
        """Returns the Haiku name of a Flax value: the inverse of ``flax_name``."""
        key = key.removesuffix("~")
        if self.netket and collection == "params" and _LINEAR.search(module_name):
            return {"kernel": "w", "bias": "b"}.get(key, key)
        return key


@functools.cache
def _path(names: Names, module_name: str) -> Path:
    root = "" if names.root is None else names.root + "/"
    level = module_name + "/"
    # NetKet's MLP_0 at the top is the MLP's block; a Haiku module of that name is not.
    if not level.startswith(root) or (not root and level.startswith("MLP_0/")):
        return tuple(_PART.findall("/" + module_name))
    path = tuple(_PART.findall(module_name[len(root) :]))
    if names.netket:
        path = tuple("MLP_0" if p == "block" else re.sub(r"^linear_", "Dense_", p) for p in path)
    return path


def unflatten(names: Names, collection: str, tree: Mapping[str, Tree]) -> dict[str, Any]:
    """Returns the nested Flax tree of a flat Haiku tree."""
    nested: dict[str, Any] = {}
    levels = {name: functools.reduce(_enter, names.path(name), nested) for name in tree}
    submodules = {name: set(level) for name, level in levels.items()}
    for module_name, values in tree.items():
        level = levels[module_name]
        if not values and (level or level is nested):
            level[""] = {}  # a module without values, which nothing else shows
        for name, value in values.items():
            named = names.flax_name(collection, module_name, name, value, submodules[module_name])
            level[named] = value
    return nested


def flatten(names: Names, collection: str, tree: Tree) -> tuple[HaikuTree, list[str]]:
    """Returns the flat Haiku tree of a nested Flax tree, and the paths of what is left out.

    The inverse of ``unflatten``.  Left out is a key that ``unflatten`` does not give.  A None is no
    value where it marks the other name of one that has become a mapping, or is none any more.  How
    a module's name is cut into levels does not matter: in ``haiku.experimental.flax`` a ``~`` is a
    level of its own.
    """
    flat: HaikuTree = {}
    left_out: list[str] = []
    levels = [(path, names.module_name(path), level) for path, level in _levels(tree)]
    levels.sort(key=lambda item: names.path(item[1]) != item[0])  # stable: our own cut first
    for path, module_name, level in levels:
        is_known = "/".join(names.path(module_name)) == "/".join(path) and module_name not in flat
        submodules = {key for key in level if key and not _is_value(key, level[key])}
        values: dict[str, Any] = {}
        for key, value in level.items():
            if not _is_value(key, value) or _is_gone(key, level):
                continue
            name = names.haiku_name(collection, module_name, key)
            named = names.flax_name(collection, module_name, name, value, submodules)
            if is_known and key == named and name not in values:
                values[name] = value
            else:
                left_out.append("/".join((*path, key)))
        if is_known and (values or "" in level or (path and not level)):
            flat[module_name] = values
    return flat, left_out


def _enter(tree: dict[str, Any], part: str) -> dict[str, Any]:
    return tree.setdefault(part, {})


def _levels(tree: Tree, path: Path = ()) -> Iterator[tuple[Path, Tree]]:
    yield path, tree
    for key, value in tree.items():
        if key and not _is_value(key, value):
            yield from _levels(value, (*path, key))


def _is_value(key: str, value: Any) -> bool:
    # At the end of a level's name a ~ is a part of its own, as in ~call/~.
    is_escaped = key.endswith("~") and key.rpartition("/")[2] != "~"
    return not isinstance(value, Mapping) or is_escaped


def _is_gone(key: str, level: Tree) -> bool:
    """Returns whether this is a None left behind: the value is at its other name, with ~ or not."""
    if level[key] is not None:
        return False
    if key.endswith("~"):
        return not isinstance(level.get(key[:-1], {}), Mapping)
    return level.get(f"{key}~") is not None
