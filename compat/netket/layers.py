"""The layers of a ``compat.MLP`` from its variables: where the structured paths begin."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import netket as nk
from flax import linen as nn

from haiku_mlp import arguments
from haiku_mlp.structure import Layer

from ..flax_adapter import MLP


def mlp_of(state: nk.vqs.MCState) -> MLP | None:
    """Returns the model of a state if it is a :class:`compat.MLP`, without its variables."""
    model = state.model
    if type(model) is not MLP:
        return None
    return model if model.scope is None else model.unbind()[0]


def log_psi(state: nk.vqs.MCState) -> Callable[[Any, jax.Array], jax.Array]:
    """Returns the function of variables and samples, equal for equal models.

    NetKet has no public name for it: ``state.model`` is what the user gave, of any framework.
    """
    return state._apply_fun


def layers(model: Any, variables: Any) -> tuple[Layer, ...] | None:
    """Returns the layers, or None where the model is more than they are.

    That is a model other than :class:`compat.MLP`, one whose activations own parameters or
    need a module's context, and variables beside the parameters.
    """
    if type(model) is not MLP or set(variables) != {"params"} or len(variables["params"]) != 1:
        return None
    (block,) = nn.unbox(variables["params"]).values()
    names = [f"Dense_{i}" for i in range(len(block))]
    if set(names) != set(block):
        return None
    hidden = arguments.for_each_layer(model.hidden_activations, len(names) - 1)
    found = tuple(
        Layer(block[name]["kernel"], block[name].get("bias"), activation, model.precision)
        for name, activation in zip(names, (*hidden, model.output_activation), strict=True)
    )
    are_functions = all(_is_function(layer.activation, layer.w.dtype) for layer in found)
    return found if are_functions else None


def bits(network: tuple[Layer, ...], x: jax.Array) -> int:
    """Returns the precision of the first layer at ``x``; 0 where it is no inexact number."""
    dtype = jnp.result_type(x, network[0].w)
    return jnp.finfo(dtype).bits if jnp.issubdtype(dtype, jnp.inexact) else 0


def is_cpu() -> bool:
    """Returns whether programs run on a CPU, where arithmetic, not starting kernels, takes time."""
    return jax.default_backend() == "cpu"


def _is_function(activation: Any, dtype: Any) -> bool:
    """Returns whether the activation runs outside of any module."""
    if not callable(activation):
        return True
    try:
        jax.eval_shape(activation, jax.ShapeDtypeStruct((1, 2), dtype))
    except Exception:  # whatever it raises, the model's own call decides what is said
        return False
    return True
