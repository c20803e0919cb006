"""The Laplacian of features, with weights, of more inputs than units; what is elementwise."""

import itertools

import cases
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_close

import haiku_mlp
from haiku_mlp.structure import Derivatives, Layer, derivatives, forward, laplacian
from haiku_mlp.structure.dependence import owners
from haiku_mlp.structure.first_layer import first_layer


def network(*sizes, activation=jnp.tanh, dtype=float):
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=shape) / shape[0] ** 0.5 for shape in itertools.pairwise(sizes)]
    if dtype is complex:
        weights = [w + 0.3j * rng.normal(size=w.shape) for w in weights]
    *hidden, last = (jnp.asarray(w, dtype) for w in weights)
    biases = [jnp.linspace(-0.3, 0.4, w.shape[1]) for w in hidden]
    return (*(Layer(w, b, activation) for w, b in zip(hidden, biases, strict=True)), Layer(last))


def inputs(num_inputs, batch=3):
    return jax.random.normal(jax.random.key(1), (batch, num_inputs))


def by_brute_force(function, x, weights=None):
    """Returns value, gradient and Laplacian by matrices of second derivatives."""

    def parts(x):
        value = function(x)
        return jnp.stack([value.real, value.imag])

    def one(x):
        first, second = jax.jacfwd(parts)(x), jax.jacfwd(jax.jacfwd(parts))(x)
        diagonal = jnp.diagonal(second, axis1=-2, axis2=-1)
        trace = jnp.sum(diagonal if weights is None else diagonal * weights, -1)
        return tuple(a[0] + 1j * a[1] for a in (parts(x), first, trace))

    found = Derivatives(*jax.vmap(one)(x))
    return found if jnp.iscomplexobj(function(x[0])) else jax.tree.map(jnp.real, found)


def assert_same(layers, x, tolerance=1e-12, features=None, weights=None):
    def both(x):
        ours = laplacian(layers, x, features=features, weights=weights)
        of = features or (lambda x: x)
        return ours, by_brute_force(lambda x: forward(layers, of(x)), x, weights)

    assert_close(*jax.jit(both)(x), tolerance)


@pytest.fixture(autouse=True)
def brute_force_promotes_ranks():
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize(
    ("sizes", "is_by_units"),
    [
        ((5, 4, 3, 2), True),  # 72 products, by the inputs 90
        ((4, 4, 3, 2), False),  # 72 either way
        ((3, 5, 4, 2), False),
        ((3, 5, 1), True),  # none for one hidden layer
    ],
)
def test_derivatives_by_what_takes_fewer_products(sizes, is_by_units):
    start = first_layer(network(*sizes), inputs(sizes[0])[0], None, None)
    _, jacobian, _ = start.at(inputs(sizes[0])[0])
    assert (jacobian is None) == is_by_units


def waves(x):
    return jnp.concatenate([jnp.sin(x), x[..., :1] ** 2, jnp.cos(2 * x), jnp.ones(1)], -1)


def distances(x):
    pairs = x.reshape(-1, 2)
    return jnp.sqrt(1 + jnp.sum((pairs[:, None] - pairs[None]) ** 2, -1)).reshape(-1)


SIZES = {
    "few units": (7, 3, 4, 2),
    "few units, deep": (9, 2, 2, 2, 1),
    "few inputs": (3, 5, 4, 2),
    "one hidden layer": (7, 3, 1),
}
WEIGHTS = jnp.array([1.0, 0.5, 2.0, -1.0, 0.0, 3.0, 1.5, 0.25, 4.0])


@pytest.mark.parametrize(("name", "with_weights"), cases.cover(list(SIZES), [False, True]))
def test_sizes_and_weights(name, with_weights):
    sizes = SIZES[name]
    layers, x = network(*sizes), inputs(sizes[0])
    weights = WEIGHTS[: sizes[0]] if with_weights else None
    assert_same(layers, x, weights=weights)


@pytest.mark.parametrize(
    "activation", [jnp.tanh, lambda z: z * jnp.exp(0.5j * z)], ids=["real", "complex"]
)
@pytest.mark.parametrize(
    ("features", "num_features"), [(waves, 14), (distances, 9)], ids=["waves", "distances"]
)
@pytest.mark.parametrize("with_weights", cases.first({True}, [False, True]))
def test_features(features, num_features, activation, with_weights):
    layers, x = network(num_features, 3, 2, activation=activation), inputs(6)
    weights = WEIGHTS[:6] if with_weights else None
    assert_same(layers, x, features=features, weights=weights)


def test_complex_weights_and_features():
    layers, x = network(4, 3, 2, activation=jnp.sin, dtype=complex), inputs(4)
    assert_same(layers, x, features=lambda x: jnp.exp(1j * x))


@pytest.mark.parametrize(
    ("features", "num_features"),
    [(None, 4), (lambda x: jnp.append(x, x), 8), (lambda x: jnp.append(x, x.sum()), 5)],
    ids=["inputs", "single inputs", "sums"],
)
@pytest.mark.parametrize("with_weights", cases.first({True}, [False, True]))
def test_a_real_network_behind_complex_weights(features, num_features, with_weights):
    """Weights of the inputs make nothing complex."""
    first, _ = network(num_features, 3, 2, activation=lambda z: jnp.abs(z) ** 2, dtype=complex)
    weights = WEIGHTS[:4] if with_weights else None
    layers = (first, *network(3, 2, 1))
    assert_same(layers, inputs(4), features=features, weights=weights)


def test_no_division_by_units_that_are_dead():
    first, *rest = network(7, 3, 4, 1)
    x = inputs(7)

    def total(w, of=laplacian):
        return jnp.sum(of((first._replace(w=w), *rest), x).laplacian)

    def brute_force(layers, x):
        return by_brute_force(lambda x: forward(layers, x), x)

    dead = jnp.zeros_like(first.w).at[:, 0].set(0.3)
    both = jax.jit(lambda w: (jax.grad(total)(w), jax.grad(total)(w, brute_force)))
    assert_close(*both(dead), 1e-12)


@pytest.mark.parametrize("weights", [None, WEIGHTS[:4]])
@pytest.mark.parametrize("function", [lambda x: jnp.prod(x), lambda x: jnp.cumsum(x) ** 3])
def test_derivatives_of_any_function(function, weights):
    x = inputs(4)
    both = jax.jit(
        lambda x: (derivatives(function, x, weights=weights), by_brute_force(function, x, weights))
    )
    assert_close(*both(x), 1e-13)
    one = jax.eval_shape(lambda x: derivatives(function, x), x[0])
    assert jax.tree.map(jnp.shape, one) == jax.tree.map(lambda a: a.shape[1:], both(x)[0])


def test_integers_are_numbers():
    layers, x = network(5, 3, 1), jnp.array([[1, -1, 1, 1, -1]], jnp.int8)
    both = jax.jit(lambda x: (laplacian(layers, x), laplacian(layers, x.astype(float))))
    assert_close(*both(x), 0)


SLOPES = jnp.linspace(0.5, 1.5, 3)
ELEMENTWISE = {
    "a slope a unit": lambda z: jnp.where(z > 0, z**2, SLOPES * z**2),
    "parts": lambda z: jnp.concatenate([jnp.tanh(z[..., :2]), z[..., 2:] ** 2], -1),
    "checkpoint": jax.checkpoint(jnp.tanh),
    "compiled": jax.jit(jax.nn.gelu),
    "branches": lambda z: jax.lax.cond(SLOPES[0] > 0, jnp.sin, jnp.cos, z),
    "a loop": lambda z: jax.lax.fori_loop(0, 2, lambda _, z: jnp.sin(z), z),
    "a scan": lambda z: jax.lax.scan(lambda z, _: (SLOPES * z, jnp.sin(z)), z, length=2)[1][1],
    "vectorized": jnp.vectorize(lambda z: SLOPES * jnp.sin(z), signature="(n)->(n)"),
}
MIXING = {
    "norm": lambda z: z / jnp.sqrt(1 + jnp.sum(z**2)),
    "softmax": jax.nn.softmax,
    "mean": lambda z: z - jnp.mean(z, -1, keepdims=True),
    "reversed": lambda z: z[..., ::-1],
    "rolled": lambda z: jnp.roll(z, 1, -1),
    "product": lambda z: z @ jnp.eye(3),
    "a loop that mixes": lambda z: jax.lax.fori_loop(0, 2, lambda _, z: jnp.roll(z, 1, -1), z),
    "a factor for all": lambda z: z * z[..., :1],
    "fewer": lambda z: z[..., :2],
}


QUICK = {"a slope a unit", "branches", "a scan"}


@pytest.mark.parametrize("name", cases.first(QUICK, ELEMENTWISE))
def test_elementwise_activations(name):
    layers, x = network(4, 3, 3, 1, activation=ELEMENTWISE[name]), inputs(4)
    assert_same(layers, x)


def test_an_activation_that_needs_a_batch():
    def in_rows(z):
        return jax.vmap(lambda row: SLOPES * jnp.sin(row) + row.shape[0])(z)

    x = inputs(4)
    ours = laplacian(network(4, 3, 3, 1, activation=in_rows), x)
    plain = laplacian(network(4, 3, 3, 1, activation=lambda z: SLOPES * jnp.sin(z) + 3), x)
    assert_close(ours, plain, 1e-14)


@pytest.mark.parametrize("sizes", [(9, 2, 1), (3, 5, 1)])
def test_single_weights_of_double_inputs(sizes):
    """All is computed as precisely as the inputs are."""
    single = tuple(layer._replace(w=layer.w.astype(jnp.float32)) for layer in network(*sizes))
    double = tuple(layer._replace(w=layer.w.astype(float)) for layer in single)
    x = inputs(sizes[0])
    assert_close(laplacian(single, x), laplacian(double, x), 1e-14)


@pytest.mark.parametrize("name", MIXING)
def test_activations_that_mix_are_refused(name):
    layers = network(4, 3, 3, 1, activation=MIXING[name])
    with pytest.raises(ValueError, match="act on each number by itself, got one that mixes"):
        laplacian(layers, inputs(4))


def test_mixing_that_a_derivative_rule_hides():
    @jax.custom_jvp
    def hidden(z):
        return z * jnp.sum(z**2)

    hidden.defjvp(lambda at, along: (hidden(*at), jnp.sum(at[0] ** 2) * along[0]))
    with pytest.raises(ValueError, match="mixes"):
        laplacian(network(4, 3, 1, activation=hidden), inputs(4))


def test_owners_of_a_loop_that_ends_by_its_values():
    def function(x):
        return jax.lax.while_loop(
            lambda c: c[0].sum() < 9, lambda c: (2 * c[0], c[1] * c[0]), (x, x)
        )

    assert owners(lambda x: jnp.stack(function(x)), jnp.ones(2)).tolist() == [[0, 1], [0, 1]]
    assert owners(lambda x: jax.lax.map(jnp.sin, x), jnp.ones(2)).tolist() == [-2, -2]


def test_owners():
    def function(x):
        return jnp.stack([jnp.sin(x[:2]), x[1:], jnp.ones(2), x[:2] + x[1:]])

    assert owners(function, jnp.ones(3)).tolist() == [[0, 1], [1, 2], [-1, -1], [-2, -2]]


@pytest.mark.slow
def test_faces_take_features_and_weights():
    def net(method, *args, **kwargs):
        return getattr(haiku_mlp.MLP(hidden_dims=(3,)), method)(*args, **kwargs)

    model = hk.without_apply_rng(hk.transform(net))
    x, options = inputs(6), {"features": waves, "weights": WEIGHTS[:6]}
    params = model.init(jax.random.key(0), "laplacian", x, **options)

    def both(x):
        expected = by_brute_force(
            lambda x: model.apply(params, "__call__", waves(x)), x, WEIGHTS[:6]
        )
        return model.apply(params, "laplacian", x, **options), expected

    assert_close(*jax.jit(both)(x), 1e-12)


@pytest.mark.parametrize(("dtype", "of_inputs"), [(jnp.float32, float), (complex, jnp.float32)])
def test_strict_promotion(dtype, of_inputs):
    first, *rest = network(4, 3, 1, dtype=dtype)
    layers, weights = (first._replace(b=None), *rest), jnp.arange(1.0, 5.0)
    x = inputs(4).astype(of_inputs)
    expected = laplacian(layers, x, weights=weights)
    with jax.numpy_dtype_promotion("strict"):
        assert_close(laplacian(layers, x, weights=weights), expected, 1e-12)


@pytest.mark.parametrize("weights", [[1.0, 2.0, -3.0], np.array([1.0, 2.0, -3.0])])
def test_derivatives_of_several_outputs_by_single_precision(weights):
    def function(x):
        return jnp.stack([jnp.sum(x**2), jnp.prod(x)])

    x = inputs(3).astype(jnp.float32)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        at = derivatives(function, x, weights=weights)
    assert at.laplacian.dtype == jnp.float32
    np.testing.assert_array_equal(at.laplacian, np.zeros((3, 2)))  # 2 (1 + 2 - 3), 0


def test_complex_bias_of_real_weights():
    first, last = network(6, 2, 1)
    layers, x = (first._replace(b=first.b + 0.3j), last), inputs(6)
    expected = by_brute_force(lambda x: forward(layers, x)[0], x)
    assert_close(jax.tree.map(lambda a: a[:, 0], laplacian(layers, x)), expected, 1e-12)
