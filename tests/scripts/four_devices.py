"""Tests that need four devices; ``test_sharding.py`` runs them where there are four."""

import re

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scripts import worker

import compat
import haiku_mlp
from haiku_mlp.structure import layers

P = PartitionSpec
KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(8, 4))

# Split sums add their float64 terms (at most 16 samples or 12 units) in another order.
ROUNDING = 1e-13


def run(face, data, model, steps=6, kind=AxisType.Auto):
    """Returns the losses of a training and the last weights."""
    steps = list(worker.train(worker.FACES[face](), worker.make_mesh(data, model, kind), steps))
    return [value for _, value, _ in steps], steps[-1][2]


@pytest.fixture(scope="module")
def on_one_device():
    return run("haiku", 1, 1)


def test_devices():
    assert jax.device_count() == 4


@pytest.mark.parametrize(("data", "model"), [(4, 1), (1, 4), (2, 2)])
def test_training(on_one_device, data, model):
    losses, weights = on_one_device
    haiku_losses, haiku_weights = run("haiku", data, model)
    flax_losses, flax_weights = run("flax", data, model)
    np.testing.assert_allclose(haiku_losses, losses, rtol=ROUNDING)
    assert flax_losses == haiku_losses
    jax.tree.map(np.testing.assert_array_equal, compat.to_flax(haiku_weights), flax_weights)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=ROUNDING), weights, haiku_weights
    )
    assert losses[-1] < losses[0] / 1.5


@pytest.mark.parametrize("face", ["haiku", "flax"])
def test_training_on_explicit_axes(face):
    """Which are what ``jax.make_mesh`` gives: the same program, the types of the arrays apart."""
    assert run(face, 2, 2, kind=AxisType.Explicit)[0] == run(face, 2, 2)[0]


def test_each_device_holds_its_part_of_the_hidden_units():
    _, weights = run("flax", 1, 4, steps=2)
    parts = jax.tree.map(lambda leaf: leaf.addressable_shards[0].data.shape, weights)
    assert parts["params"]["MLP_0"] == {
        "Dense_0": {"kernel": (6, 2), "bias": (2,)},
        "Dense_1": {"kernel": (2, 12), "bias": (12,)},
        "Dense_2": {"kernel": (12, 1), "bias": (1,)},
        "Dense_3": {"kernel": (1, 1), "bias": (1,)},
    }


def test_a_pair_of_layers_ends_with_one_sum():
    """And nothing else goes from device to device: four layers, two sums."""
    face, mesh = worker.haiku_face(), worker.make_mesh(1, 4)
    where = worker.shardings(face, mesh)["weights"]
    weights = jax.jit(face.init, out_shardings=where)(KEY, worker.X)
    program = jax.jit(face.apply).lower(weights, worker.X).compile().as_text()
    collectives = r"= \S+ (all-\w+|reduce-scatter|collective-\w+)\("
    assert re.findall(collectives, program) == ["all-reduce", "all-reduce"]


def test_a_size_that_does_not_divide_is_refused():
    model = compat.MLP(hidden_dims=(6,))
    mesh = worker.make_mesh(1, 4)
    variables = model.init(KEY, X)
    specs = compat.to_flax(haiku_mlp.partition_specs(compat.to_haiku(variables)[0]))
    where = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    with pytest.raises(ValueError, match=r"full shape: \(6,\)"):
        jax.device_put(variables, where)


def test_data_parallel_outputs_have_the_bits_of_one_device():
    model = compat.MLP(hidden_dims=(8,))
    variables = model.init(KEY, X)
    x = jax.device_put(X, NamedSharding(worker.make_mesh(4, 1), P("data")))
    outputs = jax.jit(model.apply)(variables, x)
    assert outputs.sharding.spec == P("data")
    np.testing.assert_array_equal(outputs, jax.jit(model.apply)(variables, X))


@pytest.mark.parametrize("dtype", [float, complex])
def test_tangent_kernel_over_samples(dtype):
    model = compat.MLP(hidden_dims=(8, 8), param_dtype=dtype, hidden_activations=jnp.tanh)
    variables = model.init(KEY, X)
    mesh = worker.make_mesh(4, 1)

    @jax.jit
    def kernel(variables, x):
        return model.apply(variables, x, method="tangent_kernel")

    sharded = kernel(variables, jax.device_put(X, NamedSharding(mesh, P("data"))))
    whole = kernel(variables, X)
    assert {shard.data.shape for shard in sharded.addressable_shards} == {(2, 8)}

    np.testing.assert_array_equal(sharded, whole)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit, AxisType.Manual])
@pytest.mark.parametrize("method", ["connected", "laplacian"])
def test_structured_methods_over_samples(method, kind, monkeypatch):
    """On a mesh, or inside ``shard_map``, with more samples on a device than one block."""
    monkeypatch.setattr(layers, "_BLOCK_ENTRIES", 64)
    model = compat.MLP(hidden_dims=(8,), hidden_activations=jnp.tanh)
    variables = model.init(KEY, X)
    is_manual = kind == AxisType.Manual
    mesh = worker.make_mesh(4, 1, AxisType.Auto if is_manual else kind)
    arguments = (jnp.arange(4)[:, None], -X[..., None]) if method == "connected" else ()

    def call(variables, x, *arguments):
        return model.apply(variables, x, *arguments, method=method)

    over_samples = (P("data"), P(), P("data"))[: 1 + len(arguments)]
    specs = {"in_specs": (P(), *over_samples), "out_specs": P("data")}
    function = jax.shard_map(call, mesh=mesh, **specs) if is_manual else call
    placed = jax.device_put(
        (variables, X, *arguments),
        tuple(NamedSharding(mesh, spec) for spec in (P(), *over_samples)),
    )
    found = jax.jit(function)(*placed)
    expected = jax.jit(call)(variables, X, *arguments)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.sharding.spec[0] == "data"
        np.testing.assert_allclose(a, b, rtol=0, atol=ROUNDING)


class Positions(nn.Module):
    """Layers at several positions, by both routes, and a parameter of no layer."""

    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm(param_dtype=float)(nn.Dense(16, param_dtype=float)(x[..., None]))
        h = nn.Dense(16, param_dtype=float)(jnp.tanh(h))
        return jnp.sum(h, (-2, -1)) * self.param("scale", nn.initializers.ones, (), float)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_tangent_kernel_of_a_network(kind, chunk_size):
    model, mesh = Positions(), worker.make_mesh(4, 1, kind)
    variables = model.init(KEY, X)

    def kernel(variables, x, y=None):
        return compat.tangent_kernel(model.apply, variables, x, y, chunk_size=chunk_size)

    whole = jax.jit(kernel)(variables, X)
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, P("data")))
        on_mesh = jax.device_put(variables, NamedSharding(mesh, P()))
        np.testing.assert_allclose(jax.jit(kernel)(on_mesh, x), whole, rtol=ROUNDING)
        if kind is AxisType.Auto:
            specs = P(), P("data"), P()
            shard = jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=P("data"))
            np.testing.assert_allclose(jax.jit(shard)(variables, x, X), whole, rtol=ROUNDING)


@pytest.mark.parametrize("of_keys", [P(), P("data")])
@pytest.mark.parametrize(("of_x", "of_y"), [(P("data"), P("data")), ("host", P("data"))])
def test_tangent_kernel_where_part_of_the_inputs_is_spread(of_x, of_y, of_keys):
    def function(params, inputs):
        x, keys = inputs
        noise = jax.vmap(lambda key: jax.random.normal(key, (4,)))(keys)
        return jnp.tanh(x @ params) @ params[0] + noise @ params[:, 0]

    params, keys = jnp.asarray(X[:4]), jax.random.split(KEY, 8)
    x, y = (X, keys), (X[::-1], keys)
    whole = haiku_mlp.tangent_kernel(function, params, x, y)
    mesh = worker.make_mesh(4, 1, AxisType.Explicit)
    with jax.set_mesh(mesh):

        def placed(inputs, spec):
            if spec == "host":
                return inputs
            return tuple(
                jax.device_put(a, NamedSharding(mesh, s))
                for a, s in zip(inputs, (spec, of_keys), strict=True)
            )

        kernel = haiku_mlp.tangent_kernel(function, params, placed(x, of_x), placed(y, of_y))
    assert kernel.sharding.spec[0] == (None if of_x == "host" else "data")
    np.testing.assert_allclose(kernel, whole, rtol=ROUNDING, atol=ROUNDING)


def boxed_mlp():
    init = nn.with_partitioning(jax.nn.initializers.lecun_normal(), ("inputs", "hidden"))
    return nn.Sequential([compat.blocks.MLP(8, kernel_init=init), jnp.tanh, nn.Dense(1)])


def boxed_haiku():
    init = nn.with_partitioning(jax.nn.initializers.lecun_normal(), ("inputs", "hidden"))
    w_init = haiku_mlp.JaxInitializer(init)
    return compat.HaikuFunction(lambda x: hk.Linear(8, with_bias=False, w_init=w_init)(x))


@pytest.mark.parametrize(
    ("model", "path"),
    [(boxed_mlp(), ("layers_0", "Dense_0", "kernel")), (boxed_haiku(), ("linear", "w"))],
    ids=["compat.MLP", "haiku"],
)
def test_boxes(model, path):
    """Logical names, mesh rules, and an init that makes each part on its own device."""
    mesh = worker.make_mesh(1, 4)
    logical = nn.get_partition_spec(jax.eval_shape(model.init, KEY, X))
    assert _at(logical, path) == P("inputs", "hidden")
    rules = (("inputs", None), ("hidden", "model"))
    specs = nn.logical_to_mesh(logical, rules)
    assert _at(specs, path) == P(None, "model")
    where = nn.logical_to_mesh_sharding(logical, mesh, rules)
    variables = jax.jit(model.init, out_shardings=where)(KEY, X)
    kernel = _at(variables, path)
    assert isinstance(kernel, nn.Partitioned)
    assert {shard.data.shape for shard in kernel.value.addressable_shards} == {(4, 2)}
    whole = jax.jit(model.init)(KEY, X)
    jax.tree.map(np.testing.assert_array_equal, variables, whole)
    outputs = jax.jit(model.apply)(variables, X)
    np.testing.assert_allclose(outputs, jax.jit(model.apply)(whole, X), rtol=ROUNDING)


def _at(variables, path):
    for key in ("params", *path):
        variables = variables[key]
    return variables
