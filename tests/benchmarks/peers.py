"""One MLP in seven ways, with the same weights."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import netket as nk
from flax import linen as nn

import compat
import haiku_mlp

Peer = tuple[Callable[[Any, jax.Array], jax.Array], Any]


class DenseStack(nn.Module):
    """The plain Flax way."""

    hidden_dims: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for size in self.hidden_dims:
            x = jax.nn.gelu(nn.Dense(size, param_dtype=x.dtype)(x))
        return nn.Dense(1, use_bias=False, param_dtype=x.dtype)(x).squeeze(-1)


def peers(num_inputs: int, hidden_dims: tuple[int, ...], dtype: Any) -> dict[str, Peer]:
    """Returns for each framework a function of weights and input, and the weights."""
    x = jnp.zeros((1, num_inputs), dtype)
    fields = {"hidden_dims": hidden_dims, "param_dtype": dtype}
    ours = compat.MLP(**fields)
    variables = ours.init(jax.random.key(0), x)
    params, _ = compat.to_haiku(variables)
    layers = [params[f"mlp/block/linear_{i}"] for i in range(len(hidden_dims) + 1)]

    haiku = hk.without_apply_rng(hk.transform(lambda x: haiku_mlp.MLP(**fields)(x)))
    stock = hk.without_apply_rng(hk.transform(lambda x: _stock_haiku(x, hidden_dims)))
    zero = jnp.zeros(1, dtype)
    stock_params = {
        f"mlp/~/linear_{i}": {"w": layer["w"], "b": layer.get("b", zero)}
        for i, layer in enumerate(layers)
    }
    equinox, static = eqx.partition(_equinox(num_inputs, hidden_dims, layers), eqx.is_array)
    return {
        "haiku_mlp.MLP": (haiku.apply, params),
        "compat.MLP": (ours.apply, variables),
        "netket.models.MLP": (nk.models.MLP(**fields).apply, variables),
        "hk.nets.MLP": (stock.apply, stock_params),
        "flax nn.Dense stack": (
            DenseStack(hidden_dims).apply,
            {"params": variables["params"]["MLP_0"]},
        ),
        "equinox.nn": (lambda w, x: jax.vmap(eqx.combine(w, static))(x), equinox),
        "raw jnp": (_raw, layers),
    }


def _stock_haiku(x: jax.Array, hidden_dims: tuple[int, ...]) -> jax.Array:
    return hk.nets.MLP((*hidden_dims, 1), activation=jax.nn.gelu)(x).squeeze(-1)


def _equinox(num_inputs: int, hidden_dims: tuple[int, ...], layers: list[Any]) -> eqx.nn.Sequential:
    # equinox.nn.MLP has one width for all hidden layers; its layers are these.
    sizes, modules = (num_inputs, *hidden_dims, 1), []
    for i, layer in enumerate(layers):
        linear = eqx.nn.Linear(sizes[i], sizes[i + 1], use_bias="b" in layer, key=jax.random.key(0))
        linear = eqx.tree_at(lambda m: m.weight, linear, layer["w"].T)
        if "b" in layer:
            linear = eqx.tree_at(lambda m: m.bias, linear, layer["b"])
        modules += [linear, eqx.nn.Lambda(jax.nn.gelu)]
    return eqx.nn.Sequential([*modules[:-1], eqx.nn.Lambda(lambda y: y.squeeze(-1))])


def _raw(layers: list[Any], x: jax.Array) -> jax.Array:
    for layer in layers[:-1]:
        x = jax.nn.gelu(x @ layer["w"] + layer["b"])
    return (x @ layers[-1]["w"]).squeeze(-1)
