"""Whole trees of parameters and state, from Haiku to Flax and back."""

import re
import reprlib
from collections.abc import Mapping
from typing import Any

from .mirror.names import HaikuTree, Names, Tree, flatten, unflatten

_LAYER = re.compile(r"mlp/block/linear_\d+/[wb]?$")
_DENSE = re.compile(r"Dense_\d+$")
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2


def to_flax(
    params: Mapping[str, Mapping[str, Any]],
    state: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    root: str | None = None,
    netket: bool | None = None,
) -> dict[str, Any]:
    """Returns the Flax variables of a Haiku tree.

    They keep Haiku's names, and are those of :class:`compat.HaikuFunction`; with ``root``,
    those of :func:`compat.wrap`; with ``netket``, those of :class:`compat.MLP` and
    :class:`compat.blocks.MLP`.

    ===========================================  =====================  =====================
    from Haiku                                   to                     by
    ===========================================  =====================  =====================
    a function                                   ``HaikuFunction``      ``to_flax(params)``
    a module called ``net``                      ``wrap``               ``root="net"``
    ``haiku_mlp.MLP``                            ``MLP``                ``to_flax(params)``
    ``haiku_mlp.MLP`` in a function              ``HaikuFunction``      ``netket=False``
    ``MLP`` or ``blocks.MLP`` called ``net``     the same in Flax       ``root="net"``,
                                                                        ``netket=True``
    ===========================================  =====================  =====================

    A value with the name of a submodule, or which is itself a mapping, gets a ``~``
    behind its name; modules outside of ``root`` get a ``/`` before theirs.

    Args:
      params: ``{module: {name: value}}``; the values may be anything (arrays,
        ``ShapeDtypeStruct``, boxes) and are not copied.
      state: The same for Haiku's state.
      root: Name of the module whose level is left out.
      netket: Whether ``root`` (``"mlp"`` if not given) is a :class:`haiku_mlp.MLP` or
        :class:`haiku_mlp.blocks.MLP`, and gets NetKet's names.  None: True without ``root``
        for a tree of modules ``mlp/block/linear_0``, ... with ``w`` and ``b`` alone.

    Returns:
      ``{"params": ..., "state": ...}``, nested; without ``state`` if there is none.

    Raises:
      ValueError: The tree is not one of Haiku's, or may be that of an MLP or not: then give
        ``netket``.

    Example::

      >>> import compat
      >>> compat.to_flax({"mlp/block/linear_0": {"w": 1.0}})
      {'params': {'MLP_0': {'Dense_0': {'kernel': 1.0}}}}
      >>> compat.to_flax({"head/linear_0": {"w": 1.0}}, root="head", netket=True)
      {'params': {'Dense_0': {'kernel': 1.0}}}
      >>> compat.to_flax({"net/~/linear": {"w": 1.0}})
      {'params': {'net': {'~/linear': {'w': 1.0}}}}
      >>> compat.to_flax({"net/~/linear": {"w": 1.0}}, root="net")
      {'params': {'~/linear': {'w': 1.0}}}
    """
    trees = {"params": params, **({"state": state} if state else {})}
    for collection, tree in trees.items():
        _check_haiku(collection, tree)
    if netket is None:
        netket = root is None and _is_mlp(trees)
    names = _names_of(root, netket)
    variables = {name: unflatten(names, name, tree) for name, tree in trees.items()}
    for collection, tree in trees.items():
        back, _ = flatten(names, collection, variables[collection])
        for module, values in tree.items():
            if module not in back or back[module].keys() != values.keys():
                raise ValueError(f"{module!r} in {collection!r} has no name in Flax: rename it")
    return variables


def to_haiku(
    variables: Mapping[str, Any], *, root: str | None = None, netket: bool | None = None
) -> tuple[HaikuTree, HaikuTree]:
    """Returns the Haiku parameters and state of Flax variables: the inverse of ``to_flax``.

    Takes the trees of NetKet's MLP, of ``compat`` and of
    ``haiku.experimental.flax.Module``.

    Args:
      variables: ``{"params": ..., "state": ...}``, either may be missing.
      root: Name of the module whose level the tree leaves out (:func:`compat.wrap`).
      netket: Whether the names are NetKet's (:class:`compat.MLP`,
        :class:`compat.blocks.MLP`), and ``root`` (``"mlp"`` if not given) the Haiku name of
        the MLP.  None: True without ``root`` for a tree that has ``MLP_0`` at the top.

    Returns:
      ``(params, state)``, both ``{module: {name: value}}``.

    Raises:
      ValueError: There is another collection, a value at the top level without
        ``root``, or a name that ``to_flax`` does not give; or names that may be NetKet's or
        not: then give ``netket``.

    Example::

      >>> import compat
      >>> compat.to_haiku({"params": {"MLP_0": {"Dense_0": {"kernel": 1.0}}}})
      ({'mlp/block/linear_0': {'w': 1.0}}, {})
      >>> compat.to_haiku({"params": {"Dense_0": {"kernel": 1.0}}}, root="head", netket=True)
      ({'head/linear_0': {'w': 1.0}}, {})
    """
    if not isinstance(variables, Mapping) or not variables.keys() <= {"params", "state"}:
        raise ValueError(
            "variables must be {'params': ..., 'state': ...} and no more, got "
            f"{_SHORT.repr(variables)}: leave the rest out; a tree alone is {{'params': tree}}"
        )
    if netket is None:
        netket = _has_netket_names(variables.get("params", {}), root)
    names = _names_of(root, netket)
    params, state = (_flat(names, name, variables.get(name, {})) for name in ("params", "state"))
    return params, state


def _flat(names: Names, collection: str, tree: Tree) -> HaikuTree:
    """Returns the Haiku tree of a collection, or raises if anything in it has no name there."""
    flat, left_out = flatten(names, collection, tree)
    # Haiku has a ~ only behind the name of a module, which was left out here.
    of_root = [] if names.root else [name for name in flat if name.startswith("~/")]
    unknown = [*flat.get("", ()), *of_root, *left_out]
    if unknown:
        raise ValueError(
            f"unknown key {unknown[0]!r} in {collection!r}: no name that compat gives; if the tree "
            "leaves a level out, give the name of its Haiku module as root"
        )
    return flat


def _names_of(root: str | None, netket: bool) -> Names:
    return Names(root=root or "mlp", netket=True) if netket else Names(root=root)


def _is_mlp(trees: Mapping[str, Mapping[str, Tree]]) -> bool:
    """Returns whether trees are those of ``haiku_mlp.MLP``."""
    modules = [item for tree in trees.values() for item in tree.items()]
    names = [f"{module}/{name}" for module, values in modules for name in values or [""]]
    layers = list(filter(_LAYER.match, names))
    if layers and layers != names and all(name.startswith("mlp/block/") for name in names):
        raise _not_told(layers[0])
    return bool(layers) and layers == names


def _has_netket_names(params: Tree, root: str | None) -> bool:
    """Returns whether a tree has NetKet's names."""
    if root is None and "MLP_0" in params:
        return True  # a Haiku module of that name would be /MLP_0
    for name, level in params.items():
        is_layer = _DENSE.match(name) and isinstance(level, Mapping) and "kernel" in level
        if is_layer or name == "MLP_0":
            raise _not_told(name)
    return False


def _not_told(name: str) -> Exception:
    return ValueError(
        f"{name!r} may be part of an MLP of haiku_mlp, or not: give netket=True, and the MLP's "
        "Haiku name as root unless it is 'mlp', or netket=False"
    )


def _check_haiku(collection: str, tree: Any) -> None:
    if not _is_nested(tree) or (tree.get("params") and _is_nested(tree["params"])):
        raise ValueError(
            f"{collection} must be {{module: {{name: value}}}}, as hk.transform's init returns it, "
            f"got {_SHORT.repr(tree)}: give to_flax(params), or to_flax(params, state); to_haiku "
            "takes Flax variables"
        )


def _is_nested(tree: Any) -> bool:
    return isinstance(tree, Mapping) and all(isinstance(v, Mapping) for v in tree.values())
