"""Whole trees of parameters and state, from Haiku to Flax and back."""

import re
from collections.abc import Mapping
from typing import Any

from .mirror.names import HaikuTree, Names, flatten, unflatten, unknown

_NETKET = Names(root="mlp", netket=True)


def to_flax(
    params: Mapping[str, Mapping[str, Any]],
    state: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    root: str | None = None,
) -> dict[str, Any]:
    """Returns the Flax variables of a Haiku tree.

    The tree of :class:`haiku_mlp.MLP` gets NetKet's names and is that of
    :class:`compat.MLP`.  Any other keeps Haiku's names and is that of
    :class:`compat.HaikuFunction`; with ``root``, that of :func:`compat.wrap`.

    A value with the name of a submodule, or which is itself a mapping, gets a ``~``
    behind its name; modules outside of ``root`` get a ``/`` before theirs.

    Args:
      params: ``{module: {name: value}}``; the values may be anything (arrays,
        ``ShapeDtypeStruct``, boxes) and are not copied.
      state: The same for Haiku's state.
      root: Name of the module whose level is left out.

    Returns:
      ``{"params": ..., "state": ...}``, nested; without ``state`` if there is none.

    Raises:
      ValueError: The tree is not one of Haiku's.

    Example::

      >>> import compat
      >>> compat.to_flax({"mlp/block/linear_0": {"w": 1.0}})
      {'params': {'MLP_0': {'Dense_0': {'kernel': 1.0}}}}
      >>> compat.to_flax({"net/~/linear": {"w": 1.0}})
      {'params': {'net': {'~/linear': {'w': 1.0}}}}
      >>> compat.to_flax({"net/~/linear": {"w": 1.0}}, root="net")
      {'params': {'~/linear': {'w': 1.0}}}
    """
    trees = {"params": params, **({"state": state} if state else {})}
    for collection, tree in trees.items():
        _check_haiku(collection, tree)
    names = Names(root=root)
    if root is None and _is_mlp(params, state):
        _check_linear(params, "mlp/block/linear_", "w", "b")
        names = _NETKET
    return {collection: unflatten(names, collection, tree) for collection, tree in trees.items()}


def to_haiku(
    variables: Mapping[str, Any], *, root: str | None = None
) -> tuple[HaikuTree, HaikuTree]:
    """Returns the Haiku parameters and state of Flax variables: the inverse of ``to_flax``.

    Takes the trees of NetKet's MLP, of ``compat`` and of
    ``haiku.experimental.flax.Module``.

    Args:
      variables: ``{"params": ..., "state": ...}``, either may be missing.
      root: Name of the module whose level the tree leaves out (:func:`compat.wrap`).

    Returns:
      ``(params, state)``, both ``{module: {name: value}}``.

    Raises:
      ValueError: There is another collection, a value at the top level without
        ``root``, a name that ``to_flax`` does not give, or an MLP with a layer or a
        kernel missing.

    Example::

      >>> import compat
      >>> compat.to_haiku({"params": {"MLP_0": {"Dense_0": {"kernel": 1.0}}}})
      ({'mlp/block/linear_0': {'w': 1.0}}, {})
    """
    for collection in variables:
        if collection not in ("params", "state"):
            raise ValueError(
                f"unknown collection {collection!r}: Haiku has 'params' and 'state'; "
                "give variables, {'params': ...}, without other collections"
            )
    params, state = variables.get("params", {}), variables.get("state", {})
    names = Names(root=root)
    if root is None:
        for collection, tree in (("params", params), ("state", state)):
            _check_levels(collection, tree)
        if "MLP_0" in params:
            _check_keys("'params'", params, {"MLP_0"}, {"MLP_0"})
            _check_linear(params["MLP_0"], "Dense_", "kernel", "bias")
            names = _NETKET
    for collection, tree in (("params", params), ("state", state)):
        key = unknown(names, collection, tree)
        if key is not None:
            raise ValueError(f"unknown key {key!r} in {collection!r}: compat names nothing so")
    return flatten(names, "params", params), flatten(names, "state", state)


def _is_mlp(params: Mapping[str, Any], state: Mapping[str, Any] | None) -> bool:
    return (
        bool(params) and not state and all(map(re.compile(r"mlp/block/linear_\d+$").match, params))
    )


def _check_linear(layers: Mapping[str, Any], prefix: str, weight: str, bias: str) -> None:
    """Raises unless the layers are numbered from 0 and have a weight, perhaps a bias."""
    expected = {f"{prefix}{i}" for i in range(len(layers))}
    _check_keys("the MLP", layers, expected, expected)
    for name, layer in layers.items():
        _check_keys(name, layer, {weight}, {weight, bias})


def _check_keys(where: str, tree: Mapping[str, Any], needed: set[str], known: set[str]) -> None:
    for key in sorted(set(tree) - known):
        raise ValueError(f"unknown key {key!r} in {where}: it has {sorted(known)}")
    for key in sorted(needed - set(tree)):
        raise ValueError(f"missing key {key!r} in {where}")


def _check_haiku(collection: str, tree: Mapping[str, Any]) -> None:
    for module_name, values in tree.items():
        if not isinstance(values, Mapping):
            raise ValueError(
                f"{collection}[{module_name!r}] must map names to values, got "
                f"{type(values).__name__}: give what hk.transform's init returned"
            )


def _check_levels(collection: str, tree: Mapping[str, Any]) -> None:
    for key, value in tree.items():
        if not isinstance(value, Mapping):
            raise ValueError(
                f"value {key!r} at the top level of {collection!r}: give the name of its Haiku "
                "module as root"
            )
