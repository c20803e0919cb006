"""Intermediate values of Haiku code as Flax variables: ``perturb`` and ``sow``."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
from flax import linen as nn

from .mirror.calls import watcher


def perturb(name: str, value: Any, collection: str = "perturbations") -> Any:
    """Adds a zero variable to an intermediate value inside Haiku code.

    The gradient with respect to the variable is that with respect to the value, as for
    :meth:`flax.linen.Module.perturb`.  The variable belongs to the Haiku module that
    is running.  Under plain ``hk.transform``, and inside ``hk.scan``, ``hk.vmap`` and
    the like, ``value`` is returned as it is.  (At ``init`` Haiku runs the first step of
    ``hk.scan`` outside of it; a variable made there gets a zero gradient.)

    Args:
      name: Name of the variable.
      value: An array or a tree of arrays.
      collection: Collection of the variable.

    Returns:
      ``value`` plus the variable, where there is one.

    Raises:
      TypeError: JAX's, where ``value`` has another shape than at ``init`` (another batch size).

    Example::

      >>> import haiku as hk, jax, jax.numpy as jnp
      >>> import compat
      >>> def f(x):
      ...     return (compat.perturb("square", x**2) * 3).sum()
      >>> model = compat.HaikuFunction(f)
      >>> variables = model.init(jax.random.key(0), jnp.ones(2))
      >>> jax.grad(model.apply)(variables, jnp.ones(2))["perturbations"]["square"].tolist()
      [3.0, 3.0]
    """
    module = _running_module()
    return value if module is None else module.perturb(name, value, collection)


def sow(collection: str, name: str, value: Any) -> bool:
    """Stores an intermediate value of Haiku code in a collection.

    As :meth:`flax.linen.Module.sow`: repeated values append to a tuple.  Does nothing
    where :func:`perturb` does nothing.

    Args:
      collection: The collection; stored only where it is mutable.
      name: Name of the value.
      value: Any tree of arrays.

    Returns:
      Whether the value was stored.

    Example::

      >>> import jax.numpy as jnp
      >>> import compat
      >>> model = compat.HaikuFunction(lambda x: compat.sow("intermediates", "mean", x.mean()))
      >>> _, variables = model.apply({}, jnp.arange(3.0), mutable=["intermediates"])
      >>> [float(mean) for mean in variables["intermediates"]["mean"]]
      [1.0]
    """
    module = _running_module()
    return module is not None and module.sow(collection, name, value)


def _running_module() -> Any:
    """Returns what stands for the Haiku module that runs, or None where Flax sees none."""
    mirror = watcher()
    return None if mirror is None else mirror.module(hk.current_name())


@contextlib.contextmanager
def perturb_outputs(collection: str = "perturbations") -> Iterator[None]:
    """Perturbs the output of each module call inside, under the name of the method.

    Gradients of every intermediate value, without an edit of the model.  Outputs that
    have no gradient (integers, keys) are left alone.  Calls of one method that have the
    same shapes share a variable, and their gradients sum.

    Args:
      collection: Collection of the variables.

    Raises:
      ValueError: A call finds no variable of its shape: initialise with inputs of the same
        batch size.

    Example::

      >>> import jax, jax.numpy as jnp
      >>> import compat
      >>> model, x = compat.MLP(hidden_dims=(2,)), jnp.ones((1, 3))
      >>> with compat.perturb_outputs():
      ...     variables = model.init(jax.random.key(0), x)
      ...     grads = jax.grad(lambda v: model.apply(v, x).sum())(variables)
      >>> jax.tree.map(jnp.shape, grads["perturbations"]["MLP_0"]["Dense_0"])
      {'__call__': (1, 2)}
    """

    def interceptor(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        output, module = next_fun(*args, **kwargs), context.module
        leaves, treedef = jax.tree.flatten(output)
        is_leaf = jax.tree_util.treedef_is_leaf(treedef)
        for i, leaf in enumerate(leaves if module.scope is not None else ()):
            if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact):
                name = context.method_name if is_leaf else f"{context.method_name}_{i}"
                name = _variable_name(module, collection, name, leaf)
                leaves[i] = module.perturb(name, leaf, collection)
        return jax.tree.unflatten(treedef, leaves)

    with nn.intercept_methods(interceptor):
        yield


def _variable_name(module: nn.Module, collection: str, name: str, value: jax.Array) -> str:
    """Returns ``name``, numbered while a variable of another shape has it."""

    def is_free(name: str) -> bool:
        return jnp.shape(module.get_variable(collection, name, default=value)) == value.shape

    return next(filter(is_free, (f"{name}_{i}" if i else name for i in itertools.count())))
