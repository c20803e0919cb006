"""Flax modules among the arguments of a Haiku module, inside hk.scan, hk.vmap and hk.remat."""

import itertools

import cases
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_identical
from flax import errors
from flax import linen as nn

import compat

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)


class Lifted(hk.Module):
    """Calls what it is given in a transformation, or at init outside of it."""

    def __init__(self, inner, lift, outside=True, name=None):
        super().__init__(name=name)
        self.inner, self.lift, self.outside = inner, lift, outside

    def __call__(self, x):
        def call(x):
            return self.inner(x)

        if self.outside and hk.running_init():
            return call(x[0])
        return self.lift(call)(x)


def scan(call):
    return lambda x: hk.scan(lambda carry, row: (carry, call(row)), 0, x)[1]


def vmap(call):
    return hk.vmap(call, split_rng=not hk.running_init())


def looped(call):
    return lambda x: hk.fori_loop(0, 2, lambda _, x: call(x), x)


LIFTS = {"scan": scan, "vmap": vmap, "remat": hk.remat, "fori_loop": looped}

GUESTS = {
    "flax": nn.Dense(3),
    "nested": nn.Sequential([nn.remat(nn.Dense)(5), nn.tanh, nn.Dense(3)]),
    "haiku": compat.wrap(hk.nets.MLP)([5, 3]),
    "guest of a guest": compat.wrap(Lifted)(nn.Dense(3), lambda call: call, outside=False),
}


@pytest.mark.parametrize(
    ("guest", "lift"),
    cases.first(
        {
            ("flax", "vmap"),
            ("nested", "scan"),
            ("haiku", "fori_loop"),
            ("guest of a guest", "remat"),
        },
        itertools.product(GUESTS, LIFTS),
    ),
)
def test_values(guest, lift):
    guest = GUESTS[guest]
    model = compat.wrap(Lifted)(guest, LIFTS[lift])
    variables = model.init(KEY, X)
    inner = {"params": variables["params"]["flax_modules_inner_0"]}
    expected = guest.apply(inner, guest.apply(inner, X) if lift == "fori_loop" else X)
    rngs = {"dropout": KEY}
    np.testing.assert_allclose(model.apply(variables, X, rngs=rngs), expected, rtol=1e-5)
    for apply in (jax.jit(model.apply), nn.remat(compat.wrap(Lifted))(guest, LIFTS[lift]).apply):
        np.testing.assert_allclose(apply(variables, X, rngs=rngs), expected, rtol=1e-5)
    gradient = jax.grad(lambda v: model.apply(v, X, rngs=rngs).sum())(variables)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def dropout(x):
    return hk.dropout(hk.next_rng_key(), 0.5, x)


@pytest.mark.parametrize(
    "guest", [nn.Dropout(0.5, deterministic=False), compat.HaikuFunction(dropout)]
)
@pytest.mark.parametrize("lift", [scan, vmap])
def test_each_call_draws_its_own(guest, lift):
    model = compat.wrap(Lifted)(guest, lift)
    kept = model.apply({}, jnp.ones((3, 64)), rngs={"dropout": KEY})
    assert len(np.unique(kept, axis=0)) == 3


@pytest.mark.parametrize("lift", ["vmap", "remat"])
def test_values_are_made_outside(lift):
    """They would be tracers: Flax puts them into its scope from the inner trace."""
    model = compat.wrap(Lifted)(nn.Dense(3), LIFTS[lift], outside=False)
    with pytest.raises(errors.FlaxError, match="kernel") as caught:
        model.init(KEY, X)
    assert "Dense is a Flax module inside hk.scan" in caught.value.__notes__[0]


class Count(nn.Module):
    @nn.compact
    def __call__(self, x):
        count = self.variable("state", "count", jnp.zeros, ())
        if not self.is_initializing():
            count.value += 1
        return x + count.value


@pytest.mark.parametrize("lift", ["scan", "remat"])
def test_state_is_not_written(lift):
    model = compat.wrap(Lifted)(Count(), LIFTS[lift])
    variables = model.init(KEY, X)
    with pytest.raises(errors.ModifyScopeVariableError, match="count") as caught:
        model.apply(variables, X, mutable=["state"])
    assert "take a Haiku module" in caught.value.__notes__[0]
    outside = compat.wrap(Lifted)(Count(), lambda call: call)
    _, changed = outside.apply(variables, X, mutable=["state"])
    assert_identical(changed["state"]["flax_modules_inner_0"]["count"], jnp.ones(()))
