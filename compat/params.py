"""Names: how a Haiku tree reads as a Flax tree, and whole trees both ways.

A Haiku tree is flat, ``{"mlp/~/linear_0": {"w": ...}}``; a Flax tree is nested, one
level a module.  A ``~`` part of a Haiku name stands for no module: it is joined to
the part that follows, ``{"mlp": {"~/linear_0": {"w": ...}}}``.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

Path = tuple[str, ...]
Tree = Mapping[str, Any]
HaikuTree = dict[str, dict[str, Any]]

_LINEAR = re.compile(r"(^|/)linear_\d+$")
_DENSE = re.compile(r"Dense_(\d+)$")


@dataclasses.dataclass(frozen=True)
class Names:
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

    def leaf(self, collection: str, module_name: str, name: str) -> str:
        """Returns the Flax name of a Haiku value."""
        if self.netket and collection == "params" and _LINEAR.search(module_name):
            return {"w": "kernel", "b": "bias"}.get(name, name)
        return name

    def haiku_leaf(self, collection: str, module_name: str, name: str) -> str:
        """Returns the Haiku name of a Flax value: the inverse of ``leaf``."""
        if self.netket and collection == "params" and _LINEAR.search(module_name):
            return {"kernel": "w", "bias": "b"}.get(name, name)
        return name


@functools.cache
def _path(names: Names, module_name: str) -> Path:
    if names.root is None:
        # NetKet's MLP_0 at the top is the MLP's block; a Haiku module of that name is not.
        outside = module_name.split("/")[0] == "MLP_0"
        inner = module_name
    else:
        outside = module_name != names.root and not module_name.startswith(names.root + "/")
        inner = module_name[len(names.root) + 1 :]
    if outside:
        return _parts("/" + module_name)
    path = _parts(inner)
    if names.netket:
        path = tuple("MLP_0" if p == "block" else re.sub(r"^linear_", "Dense_", p) for p in path)
    return path


def _parts(module_name: str) -> Path:
    """Splits a Haiku name, ``~`` and ``~method`` joined to the part that follows."""
    parts: list[str] = []
    prefix = "/" if module_name.startswith("/") else ""
    for part in filter(None, module_name.split("/")):
        prefix += part
        if not part.startswith("~"):
            parts.append(prefix)
            prefix = ""
        else:
            prefix += "/"
    return (*parts, *filter(None, [prefix.removesuffix("/")]))


def unflatten(names: Names, collection: str, tree: Mapping[str, Tree]) -> dict[str, Any]:
    """Returns the nested Flax tree of a flat Haiku tree.

    A value that is itself a mapping, or has the name of a submodule, gets a ``~``
    behind its name, so that values and levels stay apart.
    """
    nested: dict[str, Any] = {}
    levels = {name: _level(nested, names.path(name)) for name in tree}
    submodules = {name: set(level) for name, level in levels.items()}
    for module_name, values in tree.items():
        level = levels[module_name]
        if not values and level:
            level[""] = {}  # a module without values, but with submodules
        for name, value in values.items():
            key = names.leaf(collection, module_name, name)
            clash = key in submodules[module_name] or isinstance(value, Mapping)
            level[key + "~" if clash or key.endswith("~") else key] = value
    return nested


def flatten(names: Names, collection: str, tree: Tree) -> HaikuTree:
    """Returns the flat Haiku tree of a nested Flax tree: the inverse of ``unflatten``."""
    flat: HaikuTree = {}
    for path, level in _levels(tree):
        values = {key: value for key, value in level.items() if _is_value(key, value)}
        if values or "" in level or (path and not level):
            module_name = names.module_name(path)
            flat[module_name] = {
                names.haiku_leaf(collection, module_name, key.removesuffix("~")): value
                for key, value in values.items()
            }
    return flat


def _level(tree: dict[str, Any], path: Path) -> dict[str, Any]:
    for part in path:
        tree = tree.setdefault(part, {})
    return tree


def _levels(tree: Tree, path: Path = ()) -> Iterator[tuple[Path, Tree]]:
    yield path, tree
    for key, value in tree.items():
        if key and not _is_value(key, value):
            yield from _levels(value, (*path, key))


def _is_value(key: str, value: Any) -> bool:
    return not isinstance(value, Mapping) or (len(key) > 1 and key.endswith("~"))
