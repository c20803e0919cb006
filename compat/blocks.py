"""The Flax faces of the MLP's parts."""

import itertools
import sys
from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
from flax import errors
from flax import linen as nn
from flax.core import Scope

import haiku_mlp
from haiku_mlp.arguments import (
    BlockArguments,
    OtherCallError,
    check_batches,
    check_is_of_its_call,
    for_each_layer,
    shared,
)
from haiku_mlp.initializers import JaxInitializer, as_haiku_initializer

from .kernels import tangent_kernel
from .mirror.names import Names
from .mirror.private import no_flax_parent
from .mirror.rows import Mirrored

# Those that a layer has in both, besides its size.
_LAYER_FIELDS = "use_bias", "param_dtype", "precision", "kernel_init", "bias_init"


class Perceptron(Mirrored):
    """What the MLP and its block share: NetKet's names, and rows that Flax names."""

    _compact = True

    def tangent_kernel(
        self, x: jax.Array, y: jax.Array | None = None, *, chunk_size: int | None = None
    ) -> jax.Array:
        """Returns the tangent kernel; parameters that Flax activations own count, too.

        See :meth:`haiku_mlp.MLP.tangent_kernel` and :meth:`haiku_mlp.blocks.MLP.tangent_kernel`.
        """
        check_batches(x, y)
        self(x)  # makes them under init
        apply: Any = self.clone(parent=None).apply
        return tangent_kernel(apply, self.variables, x, y, chunk_size=chunk_size)

    @nn.nowrap
    def _run(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        check_is_of_its_call(self, method)
        if method != "__call__" and self._makes_flax_modules():
            raise OtherCallError(
                f"{method} knows no activations that make Flax modules: give the module itself, "
                "for instance hidden_activations=nn.PReLU(), or make a Haiku module"
            )
        return super()._run(method, args, kwargs)

    @nn.nowrap
    def _names(self) -> Names:
        return Names(root="mlp", netket=True)

    @nn.nowrap
    def _open_activations(self) -> list[Callable[..., Any]]:
        activations = (*for_each_layer(self.hidden_activations, 1), self.output_activation)
        # Flax finds a module of its own among the fields, and has named it.
        functions = [a for a in activations if callable(a) and not isinstance(a, nn.Module)]
        return list(filter(_is_open, functions))

    @nn.nowrap
    def _makes_flax_modules(self) -> bool:
        widths: Any = {1, 2, *(self.hidden_dims or ())}
        trials = itertools.product(self._open_activations(), widths)
        return any(itertools.starmap(_creates_flax_module, trials))

    @nn.nowrap
    def _runs_own_layers_only(self) -> bool:
        is_subclass = "_haiku" not in vars(type(self))  # whose methods may make modules, too
        scope: Any = self.scope
        is_open = is_subclass or bool(scope.reservations or self._open_activations())
        initializers = map(as_haiku_initializer, (self.kernel_init, self.bias_init))
        return not is_open and all(isinstance(init, JaxInitializer) for init in initializers)

    @nn.nowrap
    def _row(self, module: hk.Module | type[hk.Module], parent: Any, name: str) -> Mirrored:
        # Flax names the children of a compact method itself: MLP_0, Dense_0, Dense_1, ...
        place: Any = {"parent": parent, "name": name if isinstance(parent, Scope) else None}
        if type(module) is haiku_mlp.blocks.MLP:
            return MLP(module.output_dim, **shared(module), **place)
        if type(module) is haiku_mlp.Linear:
            fields = {name: getattr(module, name) for name in _LAYER_FIELDS}
            return Dense(module.output_size, **fields, **place)
        return super()._row(module, parent, name)


def _is_open(activation: Callable[..., Any]) -> bool:
    """Returns whether an activation may make modules or draw keys: all but JAX's and NetKet's."""
    module, name = (str(getattr(activation, of, "")) for of in ("__module__", "__name__"))
    if not module.startswith(("jax.", "netket.nn.activation")):
        return True
    return getattr(sys.modules.get(module), name, None) is not activation


def _creates_flax_module(activation: Callable[..., Any], width: int) -> bool:
    """Returns whether an activation of a layer calls Flax modules that it makes."""
    try:
        with no_flax_parent():  # which they need
            jax.eval_shape(activation, jax.ShapeDtypeStruct((1, width), jnp.float32))
    except (errors.FlaxError, AttributeError):
        return True
    except Exception:  # it makes Haiku's, or is of another width
        return False
    return False


class Dense(Mirrored, nn.Dense, haiku=haiku_mlp.Linear):
    """An affine layer of the MLP: a ``flax.linen.Dense`` computed by Haiku."""

    @nn.nowrap
    def _names(self) -> Names:
        return Names(root="linear_0", netket=True)

    @nn.nowrap
    def _haiku(self) -> haiku_mlp.Linear:
        fields = {name: getattr(self, name) for name in _LAYER_FIELDS}
        return haiku_mlp.Linear(self.features, **fields, name="linear_0")


class MLP(BlockArguments, Perceptron, haiku=haiku_mlp.blocks.MLP):
    """A multi-layer perceptron with ``output_dim`` outputs, a Flax module.

    :class:`haiku_mlp.blocks.MLP` with the fields and the parameter tree of
    ``netket.nn.blocks.MLP``: ``Dense_0``, ``Dense_1``, ... with ``kernel`` and ``bias``.

    Args:
      output_dim: Number of outputs.  The other fields are those of :class:`compat.MLP`, but
        for ``use_output_bias``, which is True here.

    Raises:
      ValueError: Both sizes are given, a size is not positive, the number of
        activations is not that of the hidden layers, or the precision is unknown.
      TypeError: The dtype is unknown, or an activation or initializer is not callable.

    Example::

      >>> import jax, jax.numpy as jnp
      >>> import compat
      >>> block = compat.blocks.MLP(output_dim=2, hidden_dims=(8,))
      >>> variables = block.init(jax.random.key(0), jnp.ones((5, 3)))
      >>> jax.tree.map(jnp.shape, variables["params"]["Dense_1"])
      {'bias': (2,), 'kernel': (8, 2)}
      >>> block.apply(variables, jnp.ones((5, 3))).shape
      (5, 2)
    """

    tangent_kernel = Perceptron.tangent_kernel  # in place of Haiku's

    @nn.nowrap
    def _haiku(self) -> haiku_mlp.blocks.MLP:
        return haiku_mlp.blocks.MLP(self.output_dim, **shared(self))
