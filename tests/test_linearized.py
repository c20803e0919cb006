"""An MLP as a linear function of its parameters against vjp and the kernel of any network."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import cover
from comparison import assert_close

from haiku_mlp.structure import Layer, Linearized, forward, linearized


def network(*sizes, with_bias=True):
    rng = np.random.default_rng(0)
    shapes = list(itertools.pairwise((*sizes, 1)))
    return tuple(
        Layer(
            jnp.asarray(rng.normal(size=shape) / shape[0] ** 0.5),
            jnp.linspace(-0.3, 0.4, shape[1]) if with_bias and i % 2 == 0 else None,
            jnp.tanh if i < 2 else None,
        )
        for i, shape in enumerate(shapes)
    )


def weights(layers):
    return [(layer.w, layer.b) for layer in layers]


def with_weights(layers, weights):
    pairs = zip(layers, weights, strict=True)
    return tuple(layer._replace(w=w, b=b) for layer, (w, b) in pairs)


@pytest.mark.parametrize(("sizes", "rows"), cover([(4, 5, 3), (4, 5), (4,)], [3, 256, 1]))
def test_kernel_and_derivatives(sizes, rows, monkeypatch):
    monkeypatch.setattr(linearized, "_BLOCK_ROWS", rows)
    layers = network(*sizes)
    x = 2 * jax.random.bernoulli(jax.random.key(0), shape=(10, 4)).astype(jnp.int8) - 1

    def outputs(weights):
        return forward(with_weights(layers, weights), x)[:, 0]

    @jax.jit
    def both(values):
        at, change = Linearized(layers, x), jax.tree.map(jnp.cos, values)
        jacobian = jnp.concatenate(
            [leaf.reshape(10, -1) for leaf in jax.tree.leaves(jax.jacrev(outputs)(values))], 1
        )
        jacobian -= jnp.mean(jacobian, 0, keepdims=True)

        def linear(values):
            return at(with_weights(layers, values))

        ours = at.kernel(centered=True), linear(change), jax.vjp(linear, values)[1](x[:, 0] * 0.5)
        return ours, (
            jacobian @ jacobian.T,
            jax.jvp(outputs, (values,), (change,))[1],
            jax.vjp(outputs, values)[1](x[:, 0] * 0.5),
        )

    assert_close(*both(weights(layers)), 1e-13)


@pytest.mark.parametrize("centered", [True, False])
def test_kernel_in_single_precision(centered):
    """Where it is centred the factors are, before: the finished one would lose 1e-4 of it here."""
    rng = np.random.default_rng(0)
    x = 1 + 0.02 * rng.normal(size=(10, 4))
    layers = network(4, 5, 3)

    def kernel(dtype):
        cast = jax.tree.map(lambda a: a.astype(dtype), weights(layers))
        at = Linearized(with_weights(layers, cast), jnp.asarray(x, jnp.float32).astype(dtype))
        return at.kernel(centered=centered)

    ours, expected = jax.jit(lambda: (kernel(jnp.float32), kernel(float)))()
    assert ours.dtype == jnp.float32
    assert_close(ours.astype(float), expected, 1e-5)
