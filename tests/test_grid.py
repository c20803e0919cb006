"""Each structured quantity, of each kind of network, in each circumstance, against brute force.

A new quantity is a row of ``QUANTITIES``, and is held to all the rest.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import cover, x64
from jax import export
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, PartitionSpec

import haiku_mlp
from haiku_mlp import structure
from haiku_mlp.structure import layers

SAMPLES, SITES = 5, 8  # at which one change is an update of the first layer
DAMPING = 0.1
ONES = np.ones(SITES)
WEIGHTS = np.linspace(0.5, 2, SITES)  # of the inputs, as one over their masses


def own_parameter(z):
    """An activation with a parameter, which all layers share."""
    slope = hk.get_parameter("slope", (), jnp.float32, hk.initializers.Constant(0.7))
    return jnp.tanh(slope.astype(z.dtype) * z)


class Slopes(hk.Module):
    """A module that an activation makes, with a parameter for each unit."""

    def __call__(self, z):
        slopes = hk.get_parameter("slopes", z.shape[-1:], z.dtype, hk.initializers.Constant(0.7))
        return jnp.tanh(slopes.reshape((1,) * (z.ndim - 1) + (-1,)) * z)


FLOATS = np.random.default_rng(0).normal(size=(SAMPLES, SITES))
SPINS = np.sign(FLOATS).astype(np.int8)

# Fields of the network, and inputs.
NETWORKS = {
    "plain": ({"hidden_activations": jnp.tanh}, FLOATS),
    "own parameter": ({"hidden_activations": own_parameter}, FLOATS),
    "own module": ({"hidden_activations": lambda z: Slopes()(z)}, FLOATS),
    "mixed dtypes": ({"hidden_activations": own_parameter, "param_dtype": "float32"}, FLOATS),
    "half precision": ({"hidden_activations": jnp.tanh, "param_dtype": "bfloat16"}, FLOATS),
    "integers": ({"hidden_activations": (jnp.sin, lambda z: z > 0)}, SPINS),
}

# Those whose activations have no parameters.
WITHOUT_PARAMETERS = {"plain", "half precision", "integers"}


class Network(NamedTuple):
    """The pure functions of a network, and its inputs."""

    init: Callable[..., Any]
    forward: Callable[..., Any]
    tangent_kernel: Callable[..., Any]
    connected: Callable[..., Any]
    laplacian: Callable[..., Any]
    layers: Callable[..., Any]
    x: np.ndarray


@functools.cache
def network(name):
    fields, x = NETWORKS[name]

    def forward_and_methods():
        mlp = haiku_mlp.MLP(hidden_dims=(9, 3), use_output_bias=True, **fields)
        return mlp, (mlp, mlp.tangent_kernel, mlp.connected, mlp.laplacian)

    net = hk.without_apply_rng(hk.multi_transform(forward_and_methods))
    return Network(net.init, *net.apply, functools.partial(layers_of, fields), x)


def layers_of(fields, params):
    """Returns the layers of a network whose activations have no parameters."""
    activations = fields["hidden_activations"]
    both = activations if isinstance(activations, tuple) else (activations, activations)
    modules = [params[f"mlp/block/linear_{i}"] for i in range(3)]
    return tuple(
        layers.Layer(module["w"], module["b"], activation)
        for module, activation in zip(modules, (*both, None), strict=True)
    )


@functools.cache
def random_params(name):
    """Returns parameters none of which is zero."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(network(name).init, jax.random.key(0), network(name).x)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), shapes)


def flips(x):
    """Returns sites and values that change each entry in turn."""
    return jnp.arange(SITES)[:, None], -x[..., None]


def at_flips(net, params, x):
    flipped = x[:, None] * (1 - 2 * np.eye(SITES, dtype=np.int8))[None].astype(x.dtype)
    return structure.at_configurations(net.layers(params), x, flipped)[..., 0]


def residuals(x):
    return jnp.sin(jnp.arange(x.shape[0], dtype=float))


def step(net, params, x):
    kernel = net.tangent_kernel(params, x)
    return haiku_mlp.natural_gradient(
        lambda params: net.forward(params, x), params, kernel, residuals(x), DAMPING
    )


def in_float64(name):
    """Returns forward pass, parameters and inputs of a network."""
    net = network(name)
    params = jax.tree.map(lambda leaf: leaf.astype(float), random_params(name))
    return net.forward, params, net.x.astype(float)


def all_flipped(name):
    forward, params, x = in_float64(name)
    return jax.jit(forward)(params, x[:, None] * (1 - 2 * np.eye(SITES))[None])


def derivatives(name, weights=ONES):
    forward, params, x = in_float64(name)

    def of_one(x):
        return forward(params, x[None])[0]

    def of_each(x):
        second = jax.vmap(lambda x: jnp.diagonal(jax.hessian(of_one)(x)))(x)
        return forward(params, x), jax.vmap(jax.grad(of_one))(x), second @ weights

    return jax.jit(of_each)(x)


@functools.cache
def jacobian(name):
    forward, params, x = in_float64(name)
    flat, unravel = ravel_pytree(params)
    return np.asarray(jax.jit(jax.jacrev(lambda flat: forward(unravel(flat), x)))(flat))


def jacobian_kernel(name):
    return jacobian(name) @ jacobian(name).T


def centered_kernel(name):
    rows = jacobian(name) - jacobian(name).mean(0)
    return rows @ rows.T


def parameter_space_step(name):
    rows, rhs = jacobian(name), np.asarray(residuals(network(name).x))
    rows, rhs = rows - rows.mean(0), rhs - rhs.mean()
    metric = rows.T @ rows / SAMPLES + DAMPING * np.eye(rows.shape[1])
    unravel = ravel_pytree(in_float64(name)[1])[1]
    return unravel(np.linalg.solve(metric, rows.T @ rhs / SAMPLES))


class Quantity(NamedTuple):
    """Ours, a function of network, parameters and inputs ``(B, N)``, and brute force's."""

    ours: Callable[..., Any]
    expected: Callable[[str], Any]
    without: tuple[str, ...] = ()
    """Circumstances that it does not know."""
    of_layers: bool = False
    """Whether activations must not have parameters."""


QUANTITIES = {
    "tangent_kernel": Quantity(lambda net, *args: net.tangent_kernel(*args), jacobian_kernel),
    "of any network": Quantity(
        lambda net, *args: haiku_mlp.tangent_kernel(net.forward, *args), jacobian_kernel
    ),
    "of two batches": Quantity(
        lambda net, params, x: haiku_mlp.tangent_kernel(net.forward, params, x, jnp.roll(x, 1, 0)),
        lambda name: jacobian(name) @ np.roll(jacobian(name), 1, 0).T,
    ),
    "centered": Quantity(
        lambda net, *args: haiku_mlp.tangent_kernel(net.forward, *args, centered=True),
        centered_kernel,
        without=("sharded",),
    ),
    "connected": Quantity(lambda net, p, x: net.connected(p, x, *flips(x)), all_flipped),
    "at_configurations": Quantity(at_flips, all_flipped, of_layers=True),
    "laplacian": Quantity(lambda net, *args: tuple(net.laplacian(*args)), derivatives),
    "weighted laplacian": Quantity(
        lambda net, *args: tuple(net.laplacian(*args, weights=WEIGHTS)),
        lambda name: derivatives(name, WEIGHTS),
    ),
    "natural_gradient": Quantity(step, parameter_space_step, without=("sharded",)),
}


def assert_equal(ours, quantity, name):
    """Asserts an error of few roundings of the coarsest dtype beside the largest entry."""
    brute_force = QUANTITIES[quantity].expected(name)
    assert jax.tree.structure(ours) == jax.tree.structure(brute_force)
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(brute_force), strict=True)
    leaves = [(np.asarray(a, float), b) for a, b in pairs]
    dtypes = {leaf.dtype for leaf in jax.tree.leaves((ours, random_params(name)))}
    eps = max(float(jnp.finfo(dtype).eps) for dtype in dtypes)
    scale = max(np.max(np.abs(b)) for _, b in leaves)
    for a, b in leaves:
        assert a.shape == b.shape
        assert np.max(np.abs(a - b)) <= 50 * eps * scale


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Makes five samples more than one block."""
    monkeypatch.setattr(layers, "_BLOCK_ENTRIES", 2 * SITES * 9)


@pytest.mark.parametrize(
    ("quantity", "name"),
    [
        case
        for case in cover(list(QUANTITIES), list(NETWORKS))
        if case.values[1] in WITHOUT_PARAMETERS or not QUANTITIES[case.values[0]].of_layers
    ],
)
def test_networks(quantity, name):
    net, params = network(name), random_params(name)
    ours = jax.jit(functools.partial(QUANTITIES[quantity].ours, net))(params, net.x)
    assert_equal(ours, quantity, name)
    if quantity == "natural_gradient":
        dtypes = jax.tree.map(jnp.result_type, (ours, params))
        assert dtypes[0] == dtypes[1]


def strictly(function, params, x):
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        return jax.jit(function)(params, x)


def debugged(function, params, x):
    """One operation at a time, each looked at."""
    with jax.debug_nans(True):
        return function(params, x)


def in_32_bits(function, params, x):
    with x64(False):
        narrow = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
        return jax.jit(function)(narrow, jnp.asarray(x))


def sharded(function, params, x):
    """Each device has its samples."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    samples = PartitionSpec("data")
    with jax.set_mesh(mesh):  # NetKet, where it is imported, has set another one
        spread = jax.shard_map(function, in_specs=(PartitionSpec(), samples), out_specs=samples)
        return jax.jit(spread)(params, x)


def on_an_explicit_mesh(function, params, x):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        params, x = jax.device_put((params, x), (PartitionSpec(), PartitionSpec("data")))
        return jax.jit(function)(params, x)


def exported(function, params, x):
    """For any number of samples."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    samples = jax.ShapeDtypeStruct(export.symbolic_shape(f"b, {SITES}"), x.dtype)
    return export.export(jax.jit(function))(shapes, samples).call(params, x)


CIRCUMSTANCES = {
    function.__name__: function
    for function in (
        strictly,
        in_32_bits,
        exported,
        sharded,
        on_an_explicit_mesh,
        debugged,
    )
}


@pytest.mark.parametrize(
    ("quantity", "circumstance"),
    [
        case
        for case in cover(list(QUANTITIES), list(CIRCUMSTANCES))
        if case.values[1] not in QUANTITIES[case.values[0]].without
    ],
)
def test_circumstances(quantity, circumstance):
    """Of a network whose activation has a parameter, of another dtype, where that may be."""
    name = "half precision" if QUANTITIES[quantity].of_layers else "own parameter"
    ours = functools.partial(QUANTITIES[quantity].ours, network(name))
    found = CIRCUMSTANCES[circumstance](ours, random_params(name), network(name).x)
    assert_equal(found, quantity, name)


@pytest.mark.parametrize("quantity", [name for name in QUANTITIES if name != "natural_gradient"])
def test_results_are_spread_as_the_samples_are(quantity):
    """Which one device tells as well as many."""
    name = "half precision" if QUANTITIES[quantity].of_layers else "own parameter"
    specs = []

    def noted(params, x):
        found = QUANTITIES[quantity].ours(network(name), params, x)
        specs.extend(jax.typeof(leaf).sharding.spec for leaf in jax.tree.leaves(found))

    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        arguments = random_params(name), network(name).x
        jax.eval_shape(noted, *jax.device_put(arguments, (PartitionSpec(), PartitionSpec("data"))))
    assert {spec[0] for spec in specs} == {"data"}


@pytest.mark.parametrize("circumstance", CIRCUMSTANCES)
def test_kernel_plan(circumstance):
    """Is the same everywhere: it looks at shapes alone."""
    net, params = network("own parameter"), random_params("own parameter")
    plans = []

    def planned(params, x):
        plans.append(haiku_mlp.kernel_plan(net.forward, params, x))
        return x

    CIRCUMSTANCES[circumstance](planned, params, net.x)
    assert {route.path for route in plans[0] if route.route == "gram"} == {
        f"['mlp/block/linear_{i}']['{name}']" for i in range(3) for name in "bw"
    }
    assert plans[0] == haiku_mlp.kernel_plan(net.forward, params, net.x)


@pytest.mark.parametrize(
    ("name", "method"),
    cover(["own parameter", "own module"], ["tangent_kernel", "connected", "laplacian"]),
)
def test_parameters_made_by_a_method(name, method):
    """Are those that the call makes, and hold no tracer."""
    fields, x = NETWORKS[name]

    def call(x):
        mlp = haiku_mlp.MLP(hidden_dims=(9, 3), use_output_bias=True, **fields)
        return getattr(mlp, method)(x, *(flips(x) if method == "connected" else ()))

    params = jax.jit(hk.transform(call).init)(jax.random.key(0), x)
    by_call = jax.jit(network(name).init)(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, params, by_call)


@pytest.mark.parametrize("activation", [lambda z: z > 0, lambda z: jnp.round(z).astype(int)])
def test_activations_that_give_no_floats_have_no_slope(activation):
    hidden = layers.Layer(w=jnp.ones((SITES, 4)), activation=activation)
    of_steps = structure.laplacian((hidden, layers.Layer(w=jnp.ones((4, 2)))), FLOATS)
    expected = layers.forward((hidden, layers.Layer(w=jnp.ones((4, 2)))), FLOATS)
    np.testing.assert_array_equal(of_steps.value, expected)
    assert not np.any(of_steps.gradient)
    assert not np.any(of_steps.laplacian)


@pytest.mark.parametrize("change", ["before", "after"])
def test_getters_act_once(change):
    """On the parameters of layers and of activations."""

    def double(next_getter, value, context):
        return next_getter(2 * value) if change == "before" else 2 * next_getter(value)

    def outputs(x):
        mlp = haiku_mlp.MLP(hidden_dims=(4, 3), hidden_activations=lambda z: Slopes()(z))
        with hk.custom_getter(double):
            present = mlp.connected(x, jnp.zeros((1, 1), int), x[:, :1, None])[:, 0]
            return mlp(x), present, mlp.tangent_kernel(x)

    net = hk.without_apply_rng(hk.transform(outputs))
    params = jax.jit(net.init)(jax.random.key(0), FLOATS)
    by_call, by_connected, kernel = jax.jit(net.apply)(params, FLOATS)
    np.testing.assert_allclose(by_connected, by_call, rtol=1e-14)
    flat, unravel = ravel_pytree(params)
    rows = jax.jit(jax.jacrev(lambda flat: net.apply(unravel(flat), FLOATS)[0]))(flat)
    np.testing.assert_allclose(kernel, rows @ rows.T, rtol=1e-12)
