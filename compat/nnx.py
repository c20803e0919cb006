"""Haiku modules as Flax NNX modules: the other Flax face.

A model is a tree of :class:`flax.nnx.Module`, one for each Haiku module, with ``nnx.Param``
and :class:`HaikuState` in it: ``model.mlp.linear_0.w``.  The names are Haiku's, without
``~``; one that is taken, by a method for instance, has a ``_`` behind.

From ``rngs=nnx.Rngs(key)`` a model has the values of its Linen face, those of
``init(rngs.params(), *example)``: one key for the whole model, so that one rule holds for
all Haiku modules, and ``compat.MLP``, NetKet's MLP and this MLP are one model from one key.
(A stack of ``nnx.Linear`` draws a key for each parameter, in the order of the lines of its
constructor, which a Haiku module does not have.)

A call updates the state.  It draws random keys from the model's copy of the stream
``dropout``, and only if Haiku draws, or hands its key on (``hk.scan``): a deterministic
model may be closed over by ``jax.jit``.  ``rngs`` in a call takes the place of that stream:
``nnx.Rngs(...)``, one of its streams or a key.
``is_training``, of all methods that take it, is what ``model.train()`` and ``model.eval()`` set,
unless a call gives it.

A submodule may be called by itself, where it needs no values but its own, and replaced, by
a native module or one from another model: ``model.block.linear_0 = nnx.Linear(...)``.  That
runs its own code; a native one takes no ``is_training`` but has a mode of its own.
:func:`get_variables` and :func:`set_variables` lead to the trees of Linen and Haiku.

Flax 0.11 is the lowest version; ``nnx.capture`` and ``nnx.iter_modules`` came later.

Example::

  >>> import haiku as hk, jax, jax.numpy as jnp, optax
  >>> from flax import nnx
  >>> from compat import nnx as compat_nnx
  >>> x = jnp.ones((5, 3))
  >>> net = lambda x: hk.nets.MLP((8, 1))(x)
  >>> model = compat_nnx.HaikuFunction(net, example=(x,), rngs=nnx.Rngs(0))
  >>> model.mlp.linear_0.w.shape
  (3, 8)
  >>> optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
  >>> loss, grads = nnx.value_and_grad(lambda model: (model(x) ** 2).mean())(model)
  >>> _ = optimizer.update(model, grads)
  >>> table = nnx.tabulate(model, x)                 # a row for each Haiku module
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.core import meta

import haiku_mlp
from haiku_mlp.arguments import check_is_of_its_call, size

from . import flax_adapter, functions, wrapping
from .mirror.attributes import Method, Source, abstract_call, find_layout
from .mirror.copies import copied
from .mirror.names import HaikuTree, Path, flatten, unflatten
from .mirror.node_run import Run, put
from .mirror.nodes import HaikuState as HaikuState
from .mirror.nodes import Node, node_class, reserved, stream_of
from .mirror.rows import Mirrored


class Face(Node):  # type: ignore[metaclass]
    """The root of a model."""

    def _build(
        self,
        face: Mirrored,
        function: Callable[..., Any],
        example: tuple[Any, ...],
        rngs: nnx.Rngs,
        method: Method = "__call__",
    ) -> None:
        """Makes the modules and values that a call of a Linen face's method makes.

        ``function`` has the signature of the method.
        """
        if not isinstance(example, tuple):
            raise TypeError(
                f"example must be a tuple of arguments, got {type(example).__name__}: "
                "give example=(x,)"
            )
        if not isinstance(rngs, nnx.Rngs):
            raise TypeError(f"rngs must be nnx.Rngs, got {type(rngs).__name__}: give nnx.Rngs(0)")
        self._add_mode(function, *self._methods())
        kwargs = self._in_mode(function, example, {})
        arguments = abstract_call(*example, **kwargs)
        layout = find_layout(face, method, arguments, reserved)
        given: dict[str, Any] = {"method": method, **kwargs}
        variables = face.lazy_init({"params": rngs.params()}, *example, **given)
        variables = jax.tree.map(jnp.asarray, variables)  # constants are no arrays there
        self._source, self._path = Source(face, method, arguments, layout), ()
        for path, hk_cls in layout.classes.items():
            if path:
                node = node_class(hk_cls, Node)(self._source, path)
                setattr(self._at(path[:-1]), path[-1], node)
        trees = _haiku_trees(face, variables)
        for (collection, module_name, name), path in layout.values.items():
            array = trees[collection][module_name][name]
            setattr(self._at(path[:-1]), path[-1], _variable(_TYPES[collection], array))
        draws = layout.draws or self._draws_in_training(function, example)
        if draws and stream_of(rngs) is not None:
            self.rngs = rngs.dropout.fork()

    def _draws_in_training(self, function: Callable[..., Any], example: tuple[Any, ...]) -> bool:
        """Returns whether a call like the example's would draw after ``train()``."""
        if not getattr(self, "deterministic", False):
            return False
        face, method = self._source.face, self._source.method
        kwargs = {**self._in_mode(function, example, {}), "is_training": True}
        try:
            arguments = abstract_call(*example, **kwargs)
            return find_layout(face, method, arguments, reserved).draws
        except Exception:  # training may take other arguments, too
            return False

    def _at(self, path: Path) -> Any:
        return functools.reduce(getattr, path, self)


_TYPES: dict[str, type[nnx.Variable]] = {"params": nnx.Param, "state": HaikuState}


class MLP(Face, haiku=haiku_mlp.MLP):
    """A multi-layer perceptron with one output, an NNX module.

    :class:`haiku_mlp.MLP` with the fields of :class:`compat.MLP` behind ``in_features``, and
    the parameters of a stack of ``nnx.Linear``: ``model.block.linear_0.kernel``, ``bias``.
    Its methods ``tangent_kernel``, ``connected`` and ``laplacian`` use the same parameters.

    Args:
      in_features: Size of the last axis of the input.
      *args, **kwargs: The fields of :class:`compat.MLP`.
      rngs: The values are those of ``compat.MLP(...).init(rngs.params(), x)``.

    Raises:
      ValueError, TypeError: As :class:`compat.MLP`.  An activation must be no Flax module.

    Source: `Multi-layer perceptron of NetKet
    <https://netket.readthedocs.io/en/latest/api/_generated/models/netket.models.MLP.html>`_.

    Example::

      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from compat import nnx as compat_nnx
      >>> model = compat_nnx.MLP(3, hidden_dims=(8, 8), rngs=nnx.Rngs(0))
      >>> model.block.linear_0.kernel.shape
      (3, 8)
      >>> model(jnp.ones((5, 3))).shape
      (5,)
      >>> model.tangent_kernel(jnp.ones((5, 3))).shape
      (5, 5)
    """

    def __init__(self, in_features: int, *args: Any, rngs: nnx.Rngs, **kwargs: Any):
        self.in_features = size(in_features, "in_features")
        x = jax.ShapeDtypeStruct((self.in_features,), jnp.float32)
        for name in {"kernel_init", "bias_init"} & kwargs.keys():
            init = kwargs[name]
            if callable(init) and not isinstance(init, haiku_mlp.JaxInitializer):
                kwargs[name] = _Boxed(init)
        self._build(_make(flax_adapter.MLP, args, kwargs), self._function("__call__"), (x,), rngs)

    def _run(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        check_is_of_its_call(self, method)
        return super()._run(method, args, kwargs)


@dataclasses.dataclass(frozen=True)
class _Boxed:
    """An initializer that Linen can call: metadata of NNX's become a box."""

    init: Callable[..., Any]

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.init)  # tells JAX's initializers from Haiku's

    def __call__(self, *args: Any) -> Any:
        value = self.init(*args)
        if isinstance(value, nnx.VariableMetadata):  # nnx.with_partitioning
            return nnx.bridge.NNXMeta(nnx.Param, value.raw_value, dict(value.metadata))
        return value


class HaikuFunction(Face):
    """A function of Haiku modules as an NNX module.

    Args:
      fn: A function that creates and calls Haiku modules, an :class:`haiku.Transformed` or
        an :class:`haiku.TransformedWithState`.
      example: The arguments of a call, arrays or :class:`jax.ShapeDtypeStruct`; the code is
        traced, and sees no entries of arrays.
      rngs: The values are those of the Linen face, ``compat.HaikuFunction(fn)
        .init(rngs.params(), *example)``.  A model that draws random keys takes its own
        from the stream ``dropout``.

    Raises:
      TypeError: ``example`` is no tuple, ``rngs`` no ``nnx.Rngs``, or ``fn`` no function.

    Example::

      >>> import haiku as hk, jax.numpy as jnp
      >>> from flax import nnx
      >>> from compat import nnx as compat_nnx
      >>> x = jnp.ones((5, 3))
      >>> net = lambda x: hk.nets.MLP((8, 1))(x)
      >>> model = compat_nnx.HaikuFunction(net, example=(x,), rngs=nnx.Rngs(0))
      >>> model.mlp.linear_0.w.shape, model(x).shape
      ((3, 8), (5, 1))
    """

    def __init__(
        self,
        fn: Callable[..., Any] | hk.Transformed | hk.TransformedWithState,
        *,
        example: tuple[Any, ...],
        rngs: nnx.Rngs,
    ):
        face = functions.HaikuFunction(fn)
        self._build(face, face._haiku(), example, rngs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function."""
        return self._run("__call__", args, kwargs)

    def _function(self, method: str) -> Callable[..., Any]:
        return self._source.face._haiku()

    def _methods(self) -> list[Callable[..., Any]]:
        return []


# Arguments whose names the constructor has for itself.
_OF_NNX = {"example_": "example", "rngs_": "rngs", "method_": "method"}


class Wrapped(Face):
    """The base of the classes that ``wrap`` makes."""

    def __init__(
        self,
        *args: Any,
        example: tuple[Any, ...],
        rngs: nnx.Rngs,
        method: Method = "__call__",
        **kwargs: Any,
    ):
        if not callable(method) and not hasattr(self, method):
            raise TypeError(
                f"{type(self).__name__} has no {method}: give method=, the name of a method that "
                "takes example, or a function of the module that calls several"
            )
        function = functools.partial(method, self) if callable(method) else self._function(method)
        face_class = wrapping.wrap(self._haiku_class)
        for name in kwargs.keys() & _OF_NNX.keys() - inspect.signature(face_class).parameters:
            kwargs[_OF_NNX[name]] = kwargs.pop(name)
        self._build(_make(face_class, args, kwargs), function, example, rngs, method)


def wrap(hk_cls: type[hk.Module]) -> type[Face]:
    """Returns the NNX module class of a Haiku module class.

    It takes the arguments of the Haiku constructor, ``name`` apart, and

    - ``example`` and ``rngs`` as :class:`HaikuFunction`,
    - ``method``, the name of the method that takes the example (``"__call__"``), or a
      function of the module that calls several: ``lambda module, x: module.decode(...)``.

    An argument of the Haiku class with one of these names gets a ``_`` behind it.

    Its methods are the public methods of ``hk_cls``, apart from those whose names Flax needs
    for itself: :func:`compat.haiku_method` reaches them.  At first ``is_training`` is what
    the Haiku code has as default, true without a default.

    Args:
      hk_cls: A subclass of :class:`haiku.Module`.

    Returns:
      The class, the same one each time.

    Raises:
      TypeError: ``hk_cls`` is no subclass of :class:`haiku.Module`, or has no ``method``; or a
        Flax module is among the arguments of its constructor.

    Example::

      >>> import haiku as hk, jax.numpy as jnp
      >>> from flax import nnx
      >>> from compat import nnx as compat_nnx
      >>> x = jnp.ones((5, 4))
      >>> model = compat_nnx.wrap(hk.BatchNorm)(True, True, 0.9, example=(x,), rngs=nnx.Rngs(0))
      >>> y = model(x)                               # training: updates the averages
      >>> int(model.mean_ema.counter[...])
      1
      >>> model.eval()
      >>> y = model(x)
    """
    wrapping.wrap(hk_cls)  # raises
    return node_class(hk_cls, Wrapped)


def _variable(variable_type: type[nnx.Variable], value: Any) -> nnx.Variable:
    """Returns a Variable; what a Linen box says becomes its metadata."""
    if isinstance(value, nnx.bridge.NNXMeta):
        return value.to_nnx_variable()
    if isinstance(value, meta.Partitioned):
        return variable_type(**value.to_nnx_metadata())
    return variable_type(meta.unbox(value))


def get_variables(model: Face) -> dict[str, Any]:
    """Returns the variables of a model's Linen face, for ``compat.to_haiku`` for instance.

    Those of a submodule that has been replaced are not among them.

    Args:
      model: The model.

    Returns:
      ``{"params": ..., "state": ...}``, nested, without a collection that is empty.

    Example::

      >>> import compat
      >>> from compat import nnx as compat_nnx
      >>> from flax import nnx
      >>> model = compat_nnx.MLP(3, rngs=nnx.Rngs(0))
      >>> params, state = compat.to_haiku(compat_nnx.get_variables(model))
      >>> params["mlp/block/linear_0"]["w"].shape
      (3, 1)
    """
    names = model._source.face._names()
    return {name: unflatten(names, name, tree) for name, tree in Run(model).load().items() if tree}


def set_variables(model: Face, variables: Mapping[str, Any]) -> None:
    """Gives a model the values of its Linen face, those of ``compat.to_flax`` for instance.

    Args:
      model: The model; other references to its Variables see the new values.
      variables: ``{"params": ..., "state": ...}``.

    Raises:
      ValueError: A value is missing, unknown, or has another shape.

    Example::

      >>> import compat, jax
      >>> from compat import nnx as compat_nnx
      >>> from flax import nnx
      >>> model = compat_nnx.MLP(3, rngs=nnx.Rngs(0))
      >>> variables = compat.MLP().init(jax.random.key(1), jax.numpy.ones(3))
      >>> compat_nnx.set_variables(model, variables)
    """
    variables = meta.unbox(variables)
    known, given = _shapes(get_variables(model)), _shapes(variables)
    for key in [*known, *given]:
        if key not in known:
            raise ValueError(
                f"variables{key} is no variable of this model: give those of the same model"
            )
        if known[key] != given.get(key):
            raise ValueError(
                f"variables{key} must have the shape {known[key]}, got "
                f"{given.get(key, 'nothing')}: give the variables of the same model"
            )
    trees = _haiku_trees(model._source.face, variables)
    for (collection, module_name, name), path in model._source.layout.values.items():
        if name in trees[collection].get(module_name, {}):  # else another module stands there
            put(model._at(path), trees[collection][module_name][name])


def _haiku_trees(face: Mirrored, variables: Mapping[str, Any]) -> dict[str, HaikuTree]:
    return {name: flatten(face._names(), name, variables.get(name, {}))[0] for name in _TYPES}


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in leaves}


def _make(face_class: type[Mirrored], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mirrored:
    """Returns a Linen face; ``parent`` and ``name`` are refused."""
    copied((args, kwargs), _refuse_module)
    parameters = inspect.signature(face_class).parameters.values()
    own = [p for p in parameters if p.name not in ("parent", "name")]
    inspect.Signature(own).bind_partial(*args, **kwargs)  # the class refuses what is missing
    return face_class(*args, **kwargs)


def _refuse_module(value: Any) -> Any:
    """Raises for a module whose parameters would be no part of the model."""
    if isinstance(value, nnx.Module | nn.Module):
        raise TypeError(
            f"a {type(value).__name__} of Flax among the arguments would not be trained: give "
            "HaikuFunction a function that makes a Haiku module, and put the other in its place"
        )
    return value
