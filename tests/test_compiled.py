"""The compiled programs of both faces are those of a plain stack of layers."""

import itertools
import re

import cases
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import compat
import haiku_mlp


class Stack(nn.Module):
    hidden_dims: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for size in self.hidden_dims:
            x = nn.gelu(nn.Dense(size)(x))
        return nn.Dense(1, use_bias=False)(x).squeeze(-1)


def program(function, *args):
    """Returns the compiled program without names and source lines."""
    text = jax.jit(function).lower(*args).compile().as_text()
    text = re.sub(r", metadata=\{[^}]*\}", "", text)
    parts = [part for part in text.split("\n\n") if "{" in part and " = " in part]
    numbers = {}
    text = re.sub(r"HloModule [^\n]*", "", "\n\n".join(parts))
    names = r"%?[A-Za-z_][\w.\-]*\.\d+|%[A-Za-z_][\w.\-]*"
    return re.sub(names, lambda m: numbers.setdefault(m[0].lstrip("%"), f"n{len(numbers)}"), text)


@pytest.mark.parametrize(
    ("hidden_dims", "is_gradient"),
    cases.first([((16,), True)], itertools.product([(32, 32), (16,)], [True, False])),
)
def test_compiled_text(hidden_dims, is_gradient, optimized):
    fields = {"hidden_dims": hidden_dims, "param_dtype": jnp.float32}
    x = jnp.ones((64, 8), jnp.float32)
    net = hk.without_apply_rng(hk.transform(lambda x: haiku_mlp.MLP(**fields)(x)))
    models = [
        (net.init, net.apply),
        *((m.init, m.apply) for m in (compat.MLP(**fields), Stack(hidden_dims))),
    ]
    programs = []
    for init, apply in models:
        weights = init(jax.random.key(0), x)
        loss = jax.grad(lambda w, x, apply=apply: apply(w, x).sum())
        programs.append(program(loss if is_gradient else apply, weights, x))
    assert len(programs[0].splitlines()) > 10
    assert programs[0] == programs[1] == programs[2]
