"""``compat.nnx``: what Flax's NNX does with a native model, it does with a Haiku module."""

import copy
import functools
import pickle

import cases
import haiku as hk
import jax
import jax.numpy as jnp
import jmp
import netket as nk
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from cases import GOOD
from comparison import assert_close, assert_identical, lowered_text
from flax import errors, nnx
from flax import linen as nn
from tables.haiku_modules import MODULES

import compat
import haiku_mlp
from compat import nnx as compat_nnx
from compat.netket import MinSR

X = np.random.default_rng(0).normal(size=(5, 3))
KEY = jax.random.key(0)
TABLE = {"console_kwargs": {"force_terminal": False, "width": 200}}


def make_mlp(seed=0, **fields):
    fields = {"hidden_dims": (4,), "use_output_bias": True, **fields}
    return compat_nnx.MLP(3, rngs=nnx.Rngs(seed), **fields)


class Net(hk.Module):
    """Modules made in the constructor and in a method, state, dropout, a second method."""

    def __init__(self, size, name=None):
        super().__init__(name=name)
        self.linear = hk.Linear(size)

    def __call__(self, x, is_training):
        x = hk.BatchNorm(True, True, 0.9)(self.linear(x), is_training)
        x = hk.dropout(hk.next_rng_key(), 0.5, x) if is_training else x
        return hk.Linear(2, name="head")(x)

    def features(self, x):
        return self.linear(x)


def make_net(seed=0):
    return compat_nnx.wrap(Net)(4, example=(X,), rngs=nnx.Rngs(seed))


def stack(x):
    return hk.Sequential([hk.Linear(4), jnp.tanh, hk.Linear(2)])(x)


def make_stack():
    return compat_nnx.HaikuFunction(stack, example=(X,), rngs=nnx.Rngs(0))


MAKERS = {"MLP": make_mlp, "wrap": make_net, "HaikuFunction": make_stack}


def plain(model):
    """The parameters and the state of a model as Haiku has them."""
    root = model._source.face._names().root
    is_mlp = isinstance(model, compat_nnx.MLP)
    return compat.to_haiku(compat_nnx.get_variables(model), root=None if is_mlp else root)


def shapes(tree):
    return jax.tree.map(jnp.shape, tree)


# Names and values.


def test_names():
    assert shapes(nnx.to_pure_dict(nnx.state(make_mlp(), nnx.Param))) == {
        "block": {
            "linear_0": {"kernel": (3, 4), "bias": (4,)},
            "linear_1": {"kernel": (4, 1), "bias": (1,)},
        }
    }
    net = make_net()
    assert shapes(nnx.to_pure_dict(nnx.state(net, nnx.Param))) == {
        "linear": {"w": (3, 4), "b": (4,)},
        "batch_norm": {"scale": (1, 4), "offset": (1, 4)},
        "head": {"w": (4, 2), "b": (2,)},
    }
    assert net.batch_norm.mean_ema.counter[...] == 0
    assert isinstance(net.batch_norm.mean_ema.counter, compat_nnx.HaikuState)


def test_names_that_are_taken():
    class Names(hk.Module):
        def __init__(self):
            super().__init__()
            self.inner = hk.Linear(3)

        def __call__(self, x):
            x = hk.Linear(2)(self.inner(x))  # named linear and ~/linear
            x = x + hk.get_parameter("train", (), init=jnp.ones)
            return hk.Linear(1, name="encode")(x) * hk.get_state("train", (), init=jnp.zeros)

        def encode(self, x):
            return x

    model = compat_nnx.wrap(Names)(example=(X,), rngs=nnx.Rngs(0))
    children = {name for name, value in vars(model).items() if isinstance(value, nnx.Module)}
    assert children == {"linear", "linear_", "encode_"}
    assert isinstance(model.train_, nnx.Param)
    assert isinstance(model.train__, compat_nnx.HaikuState)
    assert model(X).shape == (5, 1)


def test_values_outside_of_any_module_are_the_roots():
    def function(x):
        return x * hk.get_parameter("scale", (), init=jnp.ones)

    model = compat_nnx.HaikuFunction(function, example=(X,), rngs=nnx.Rngs(0))
    model.scale[...] = jnp.array(2.0)
    assert (model(X) == 2 * X).all()


def test_initial_values_are_those_of_linen():
    key = nnx.Rngs(3).params()
    ours = compat_nnx.get_variables(make_mlp(3))
    fields = {"hidden_dims": (4,), "use_output_bias": True}
    assert_identical(ours, compat.MLP(**fields).init(key, X))
    assert_identical(ours, nk.models.MLP(**fields).init(key, X))
    linen = compat.wrap(Net)(4)
    assert_identical(compat_nnx.get_variables(make_net(3)), linen.init(key, X, is_training=True))
    assert_identical(
        compat_nnx.get_variables(make_stack()),
        compat.HaikuFunction(stack).init(nnx.Rngs(0).params(), X),
    )


NAMES = (
    *("two_layers", "alpha", "complex64", "activations", "output_activation"),
    *("no_hidden_bias", "output_bias", "precision", "kernel_init", "bias_init"),
)
FIELDS = {
    **{name: GOOD[name] for name in NAMES},
    "haiku_init": {"kernel_init": hk.initializers.RandomNormal()},
    "jax_initializer": {"kernel_init": haiku_mlp.JaxInitializer(jax.nn.initializers.normal())},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_each_field_gives_the_values_of_linen(fields):
    def ours(key):
        model = compat_nnx.MLP(3, **fields, rngs=nnx.Rngs(key))
        return compat_nnx.get_variables(model), model(X)

    def linens(key):
        variables = compat.MLP(**fields).init(nnx.Rngs(key).params(), X)
        return variables, compat.MLP(**fields).apply(variables, X)

    assert lowered_text(ours, KEY) == lowered_text(linens, KEY)


def test_the_numbers_are_those_of_nnx_linear():
    model = make_mlp()
    layers = [nnx.Linear(3, 4, rngs=nnx.Rngs(1)), nnx.Linear(4, 1, rngs=nnx.Rngs(2))]
    for ours, theirs in zip((model.block.linear_0, model.block.linear_1), layers, strict=True):
        nnx.update(ours, nnx.state(theirs))
    x = X.astype(np.float32)
    assert_identical(model(x), layers[1](jax.nn.gelu(layers[0](x))).squeeze(-1))


def test_an_example_may_be_abstract():
    abstract = jax.ShapeDtypeStruct(X.shape, X.dtype)
    model = compat_nnx.HaikuFunction(stack, example=(abstract,), rngs=nnx.Rngs(0))
    assert_identical(nnx.state(model), nnx.state(make_stack()))


@pytest.mark.parametrize("with_partitioning", [nn.with_partitioning, nnx.with_partitioning])
def test_names_of_axes(with_partitioning):
    init = with_partitioning(jax.nn.initializers.ones, (None, "S"))  # NetKet's mesh
    model = make_mlp(kernel_init=init)
    assert nnx.graphdef(model) == nnx.graphdef(make_mlp(kernel_init=init))
    specs = nnx.get_partition_spec(nnx.state(model))
    assert tuple(jax.tree.leaves(specs["block"]["linear_0"]["kernel"])[0]) == (None, "S")
    assert (model.block.linear_0.kernel[...] == 1).all()
    boxed = nn.with_partitioning(jax.nn.initializers.zeros, (None, "S"))
    linen = compat.MLP((4,), use_output_bias=True, kernel_init=boxed)
    compat_nnx.set_variables(model, linen.init(KEY, X))
    assert (model.block.linear_0.kernel[...] == 0).all()


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_trees_go_to_linen_and_haiku_and_back(make):
    model, other = make(), make()
    variables = jax.tree.map(lambda leaf: leaf + 1, compat_nnx.get_variables(model))
    kernel = jax.tree.leaves(nnx.state(other, nnx.Param))[0]
    compat_nnx.set_variables(other, variables)
    assert_identical(compat_nnx.get_variables(other), variables)
    assert (jax.tree.leaves(nnx.state(other, nnx.Param))[0] == kernel + 1).all()


def test_a_tree_of_haiku_becomes_the_models():
    net = hk.transform_with_state(lambda x: Net(4)(x, is_training=True))
    params, state = net.init(KEY, X)
    model = make_net()
    compat_nnx.set_variables(model, compat.to_flax(params, state, root="net"))
    key = nnx.clone(model.rngs)()
    assert_identical(model(X), net.apply(params, state, key, X)[0])


def test_other_trees_are_refused():
    model, variables = make_mlp(), compat_nnx.get_variables(make_mlp(hidden_dims=(4, 4)))
    del variables["params"]["MLP_0"]["Dense_0"]["bias"]
    with pytest.raises(ValueError, match=r"bias'\] must have the shape \(4,\), got nothing: give"):
        compat_nnx.set_variables(model, variables)
    variables = compat_nnx.get_variables(model)
    variables["params"]["MLP_0"]["Dense_2"] = {"kernel": X}
    with pytest.raises(ValueError, match=r"kernel'\] is no variable of this model"):
        compat_nnx.set_variables(model, variables)
    with pytest.raises(ValueError, match=r"must have the shape \(4,\), got \(5,\)"):
        compat_nnx.set_variables(model, compat_nnx.get_variables(make_mlp(hidden_dims=(5,))))


def test_bad_arguments():
    with pytest.raises(TypeError, match="unexpected keyword argument 'name'"):
        make_mlp(name="mlp")
    with pytest.raises(ValueError, match="give only one"):
        make_mlp(hidden_dims_alpha=(2,))
    with pytest.raises(TypeError, match=r"give nnx.Rngs"):
        compat_nnx.MLP(3, rngs=0)
    with pytest.raises(TypeError, match=r"got ndarray: give example=\(x,\)"):
        compat_nnx.HaikuFunction(stack, example=X, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"wrap takes a subclass of hk.Module"):
        compat_nnx.wrap(stack)


# Plain Haiku's numbers and programs.


@pytest.mark.parametrize("name", cases.first({"BatchNorm"}, ["BatchNorm", "LSTM, dynamic_unroll"]))
def test_numbers_are_haikus(name):
    function, x = MODULES[name].function, MODULES[name].input()
    model = compat_nnx.HaikuFunction(function, example=(x,), rngs=nnx.Rngs(0))
    net = hk.transform_with_state(function)
    params, state = plain(model)
    assert jax.tree.structure((params, state)) == jax.tree.structure(net.init(KEY, x))
    output, state = net.apply(params, state, None, x)
    assert_identical(model(x), output)
    assert_identical(plain(model), (params, state))


@pytest.mark.parametrize(
    "name", cases.first({"SpectralNorm", "nets.VectorQuantizerEMA", "GRU, dynamic_unroll"}, MODULES)
)
def test_programs_of_all_modules_are_haikus(name):
    assert_program_is_haikus(MODULES[name].function, MODULES[name].input())


def assert_program_is_haikus(function, x):
    model = nnx.eval_shape(
        lambda: compat_nnx.HaikuFunction(function, example=(x,), rngs=nnx.Rngs(0))
    )
    graph, values = nnx.split(model)
    net = hk.transform_with_state(function)

    def ours(values, x):
        model = nnx.merge(graph, values)
        return model(x), plain(model)[1]

    def theirs(values, x):
        model = nnx.merge(graph, values)
        key = model.rngs() if hasattr(model, "rngs") else None
        return net.apply(*plain(model), key, x)

    assert lowered_text(ours, values, x) == lowered_text(theirs, values, x)


def scanned(x):
    linear, norm = hk.Linear(3), hk.BatchNorm(True, True, 0.9)

    def step(x, _):
        return norm(linear(x), is_training=True), None

    return hk.scan(step, x, None, 2)[0]


def mapped(x):
    linear = hk.Linear(3)

    def noisy(x):
        return hk.dropout(hk.next_rng_key(), 0.5, linear(x))

    return hk.vmap(noisy, split_rng=not hk.running_init())(x)


def stacked(x):
    return hk.experimental.layer_stack(2)(lambda x: hk.remat(hk.Linear(3))(x))(x)


def lifted(x):
    inner = hk.transform_with_state(lambda x: hk.BatchNorm(True, True, 0.9)(x, True))
    init, updater = hk.lift_with_state(inner.init, name="lifted")
    output, state = inner.apply(*init(None, x), None, x)
    updater.update(state)
    return output


def differentiated(x):
    linear, norm = hk.Linear(3), hk.BatchNorm(True, True, 0.9)
    return hk.grad(lambda x: norm(linear(x), is_training=True).sum())(x) + linear(x)


def named(x):
    with hk.name_scope("outer"):
        x = hk.Linear(3)(x) * hk.get_parameter("scale", (), init=jnp.ones)
    linear = hk.Linear(3, name=hk.force_name("top"))
    return linear(linear(x))


class Transparent(hk.Module):
    def __call__(self, x):
        return self.inner(hk.Linear(3)(x))

    @hk.transparent
    def inner(self, x):
        return hk.Linear(3)(x)


class Half(hk.Linear):
    """A layer with a policy of mixed precision."""


def mixed(x):
    policy = jmp.get_policy("params=float32,compute=bfloat16,output=float32")
    hk.mixed_precision.set_policy(Half, policy)
    try:
        return Half(2)(Half(4)(x.astype(np.float32)))
    finally:
        hk.mixed_precision.clear_policy(Half)


def transparent(x):
    return Transparent()(x)


ODD = (scanned, mapped, stacked, lifted, differentiated, named, transparent, mixed)


def test_initial_values_that_are_constants_are_arrays():
    """Flax's lazy initialisation gives numbers for what needs neither key nor input."""

    def constants(x):
        power = hk.get_parameter("power", (), int, lambda *_: jnp.array(2))
        return x**power + hk.get_state("shift", (), float, lambda *_: jnp.array(0.5))

    model = compat_nnx.HaikuFunction(constants, example=(X,), rngs=nnx.Rngs(0))
    params, state = hk.transform_with_state(constants).init(KEY, X)
    assert_identical(plain(model), (params, state))
    np.testing.assert_array_equal(model(X), X**2 + 0.5)


@pytest.mark.parametrize("function", ODD)
def test_programs_of_odd_code_are_haikus(function):
    assert_program_is_haikus(function, X)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_the_program_is_haikus(make):
    model = make()
    if hasattr(model, "eval"):
        model.eval()
    graph, values, rest = nnx.split(model, nnx.Param, ...)
    functions = {
        "MLP": lambda x: haiku_mlp.MLP((4,), use_output_bias=True)(x),
        "Net": lambda x: Net(4)(x, is_training=False),
        "HaikuFunction": stack,
    }
    net = hk.transform_with_state(functions[type(model).__name__])
    params, state = plain(model)

    def ours(params, x):
        return nnx.merge(graph, params, rest)(x)

    def theirs(params, x):
        return net.apply(params, state, None, x)[0]

    program = lowered_text(ours, values, X)
    assert "dot_general" in program
    assert program == lowered_text(theirs, params, X)


# Transformations.


def test_jit():
    model = make_net()
    key = nnx.clone(model.rngs)()
    ours = nnx.jit(lambda model, x: model(x))(model, X)
    other = make_net()
    net = hk.transform_with_state(lambda x: Net(4)(x, is_training=True))
    np.testing.assert_allclose(ours, net.apply(*plain(other), key, X)[0], rtol=1e-6)
    assert (model.batch_norm.mean_ema.average[...] != 0).all()
    assert model.rngs.count[...] == 1


def test_one_trace_for_equal_models():
    traces = []

    @nnx.jit
    def call(model, x):
        traces.append(model)
        return model(x)

    for seed in range(2):
        assert (call(make_mlp(seed), X) == jax.jit(make_mlp(seed))(X)).all()
    assert len(traces) == 1


def test_grad_and_value_and_grad():
    model = make_mlp()
    net = hk.without_apply_rng(hk.transform(lambda x: haiku_mlp.MLP((4,), use_output_bias=True)(x)))
    value, grads = jax.value_and_grad(lambda params: net.apply(params, X).sum())(plain(model)[0])
    ours, ours_grads = nnx.value_and_grad(lambda model: model(X).sum())(model)
    assert_identical(ours, value)
    expected = {name.split("/")[-1]: leaves for name, leaves in grads.items()}
    for found in (ours_grads, nnx.grad(lambda model: model(X).sum())(model)):
        block = nnx.to_pure_dict(found)["block"]
        for name, leaves in expected.items():
            assert_identical(block[name], {"kernel": leaves["w"], "bias": leaves["b"]})


@pytest.mark.slow
def test_vmap_ensemble():
    keys = jax.random.split(KEY, 3)
    models = nnx.vmap(lambda key: make_mlp(key))(keys)
    assert models.block.linear_0.kernel.shape == (3, 3, 4)
    outputs = nnx.vmap(lambda model, x: model(x), in_axes=(0, None))(models, X)
    for key, output in zip(keys, outputs, strict=True):
        np.testing.assert_allclose(output, make_mlp(key)(X), rtol=1e-12)


def test_scan_over_layers():
    def layer(x):
        return jnp.tanh(hk.Linear(3)(x))

    def make(key):
        return compat_nnx.HaikuFunction(layer, example=(X,), rngs=nnx.Rngs(key))

    keys = jax.random.split(KEY, 3)
    y = nnx.scan(lambda x, model: model(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
        jnp.asarray(X), nnx.vmap(make)(keys)
    )
    x = X
    for key in keys:
        x = make(key)(x)
    np.testing.assert_allclose(y, x, rtol=1e-12)


@pytest.mark.slow
def test_an_ensemble_with_state_and_streams():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return compat_nnx.wrap(Net)(4, example=(X,), rngs=rngs)

    models = make(nnx.Rngs(0))
    outputs = nnx.vmap(lambda model, x: model(x), in_axes=(0, None))(models, X)
    assert len({output.tobytes() for output in np.asarray(outputs)}) == 3
    assert models.batch_norm.mean_ema.counter[...].tolist() == [1, 1, 1]
    assert models.rngs.count[...].tolist() == [1, 1, 1]


@pytest.mark.slow
def test_other_transformations():
    model = make_net()
    expected = make_net()(X)
    remat = nnx.remat(lambda model, x: model(x))(nnx.clone(model), X)
    np.testing.assert_allclose(remat, expected, rtol=1e-6)
    branch = nnx.cond(True, lambda m, x: m(x), lambda m, x: 0 * m(x), nnx.clone(model), X)
    np.testing.assert_allclose(branch, expected, rtol=1e-6)
    nnx.fori_loop(0, 3, lambda i, carry: (carry[0], carry[0](X)), (model, expected))
    assert model.batch_norm.mean_ema.counter[...] == model.rngs.count[...] == 3
    made = nnx.jit(make_net)()
    np.testing.assert_allclose(made(X), expected, rtol=1e-6)


def test_a_deterministic_model_may_be_closed_over():
    def with_loop(x, is_training):
        """Hands its key on even where it draws nothing."""
        x = hk.dropout(hk.next_rng_key(), 0.5, x) if is_training else x
        return hk.scan(lambda carry, _: (jnp.tanh(carry), None), x, None, length=2)[0]

    looped = compat_nnx.HaikuFunction(with_loop, example=(X,), rngs=nnx.Rngs(0))
    for model in (looped, make_mlp(), make_net()):
        model.eval()
        np.testing.assert_allclose(jax.jit(lambda x, m=model: m(x))(X), model(X), rtol=1e-6)
    model.train()
    with pytest.raises(errors.TraceContextError):
        jax.jit(lambda x: model(x))(X)
    closed = compat_nnx.HaikuFunction(
        lambda x: hk.dropout(hk.next_rng_key(), 0.5, x), example=(X,), rngs=nnx.Rngs(0)
    )
    y = jax.jit(lambda x, key: closed(x, rngs=nnx.Rngs(dropout=key)))(X, KEY)
    assert_identical(y, closed(X, rngs=nnx.Rngs(dropout=KEY)))
    assert closed.rngs.count[...] == 0
    stream = nnx.Rngs(dropout=KEY).dropout
    assert_identical(y, closed(X, rngs=stream))
    assert int(stream.count[...]) == 1
    assert_identical(y, closed(X, rngs=jax.random.fold_in(KEY, 0)))
    assert_identical(nnx.clone(closed)(X, rngs=None), closed(X))
    with pytest.raises(TypeError, match="a stream of it or a key, got int"):
        closed(X, rngs=0)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.slow
def test_no_tracer_leaks(name, check_leaks):
    make = MAKERS[name]
    nnx.jit(lambda model, x: model(x))(make(), X)
    jax.jit(lambda x: make()(x)).lower(X)
    jax.eval_shape(jax.grad(lambda x: make()(x).sum()), X)


@pytest.mark.parametrize("function", cases.first({stacked}, ODD))
def test_no_tracer_leaks_from_odd_code(function, check_leaks):
    def run(x):
        return compat_nnx.HaikuFunction(function, example=(x,), rngs=nnx.Rngs(0))(x)

    jax.eval_shape(run, X)


# The tools for modules.


def test_split_merge_state_update():
    model = make_net()
    graph, params, rest = nnx.split(nnx.clone(model), nnx.Param, ...)
    merged = nnx.merge(graph, params, rest)
    model.eval()
    merged.eval()
    assert_identical(merged(X), model(X))
    nnx.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))
    assert (model(X) == 0).all()
    assert (merged(X) != 0).any()


def test_equal_models_have_equal_graphs():
    graphs = [nnx.graphdef(make_mlp(seed)) for seed in range(2)]
    assert graphs[0] == graphs[1]
    assert hash(graphs[0]) == hash(graphs[1])
    other = make_mlp(hidden_activations=jnp.tanh)
    assert nnx.graphdef(other) != graphs[0]
    assert nnx.graphdef(other.block) != nnx.graphdef(make_mlp().block)


def test_optimizer_and_freezing():
    model = make_mlp()
    first = nnx.PathContains("linear_0")
    trained = nnx.All(nnx.Param, nnx.Not(first))
    optimizer = nnx.Optimizer(model, optax.adam(0.05), wrt=trained)
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return ((model(X) - 1) ** 2).mean()

        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, trained))(model)
        optimizer.update(model, grads)
        return value

    losses = [step(model, optimizer) for _ in range(20)]
    assert losses[-1] < losses[0] / 2
    assert_identical(nnx.state(model, first), nnx.filter_state(before, first))


def table_of(model, *args, **kwargs):
    text = nnx.tabulate(model, *args, **TABLE, **kwargs)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    return [row for row in rows if len(row) > 2 and row[1] and row[1] != "type"]


def test_tabulate():
    rows = table_of(make_mlp(), X)
    assert [row[:4] for row in rows] == [
        ["", "MLP", "float64[5,3]", "float64[5]"],
        ["block", "MLP", "float64[5,3]", "float64[5,1]"],
        ["block/linear_0", "Linear", "float64[5,3]", "float64[5,4]"],
        ["block/linear_1", "Linear", "float64[5,4]", "float64[5,1]"],
    ]
    assert [row[0] for row in table_of(make_net(), X)] == [
        "",
        "linear",
        "batch_norm",
        "batch_norm/mean_ema",
        "batch_norm/var_ema",
        "head",
    ]
    # Modules of the root that another one calls.
    assert [row[0] for row in table_of(make_stack(), X)] == ["", "sequential", "linear", "linear_1"]
    native = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    assert [row[:2] for row in table_of(native, X)] == [["", "Linear"]]


def test_a_table_changes_nothing():
    model = make_net()
    before = jax.tree.map(jnp.copy, nnx.state(model))
    table_of(model, X)
    assert_identical(nnx.state(model), before)


def test_display(capsys):
    nnx.display(make_mlp())
    shown = capsys.readouterr().out
    assert "linear_0=Linear(" in shown
    assert "Param" in shown


def test_eval_shape():
    model = nnx.eval_shape(make_net)
    assert isinstance(jax.tree.leaves(nnx.state(model))[0], jax.ShapeDtypeStruct)
    assert (model.linear.w.shape, model.linear.w.dtype) == ((3, 4), jnp.float64)
    assert nnx.graphdef(model) == nnx.graphdef(make_net())


def test_train_and_eval():
    model = make_net()
    assert not model.deterministic
    before = jax.tree.map(jnp.copy, nnx.state(model, compat_nnx.HaikuState))
    assert (model(X) != model(X)).any()  # dropout
    assert model.batch_norm.mean_ema.counter[...] == 2
    model.eval()
    after = jax.tree.map(jnp.copy, nnx.state(model, compat_nnx.HaikuState))
    assert (model(X) == model(X)).all()
    assert_identical(nnx.state(model, compat_nnx.HaikuState), after)
    assert (after["batch_norm"]["mean_ema"]["average"][...] != 0).any()
    model(X, is_training=True)  # what a call says goes first
    assert model.batch_norm.mean_ema.counter[...] == 3
    assert before["batch_norm"]["mean_ema"]["counter"][...] == 0


def test_a_bridge_to_linen():
    linen = nnx.bridge.to_linen(compat_nnx.wrap(Net), 4, example=(X,))
    variables = jax.eval_shape(linen.init, {"params": KEY, "dropout": KEY}, X)
    params = nnx.state(nnx.eval_shape(make_net), nnx.Param)
    assert shapes(variables["params"]) == shapes(nnx.to_pure_dict(params))
    apply = functools.partial(linen.apply, mutable=["HaikuState"])
    y, updated = jax.eval_shape(apply, variables, X, rngs={"dropout": KEY})
    assert y.shape == (5, 2)
    assert shapes(updated["HaikuState"]) == shapes(variables["HaikuState"])


def test_the_first_mode_is_that_of_the_code():
    def function(x, is_training=False):
        return x * (2 if is_training else 1)

    model = compat_nnx.HaikuFunction(function, example=(X,), rngs=nnx.Rngs(0))
    assert (model(X) == X).all()
    model.train()
    assert (model(X) == 2 * X).all()


def test_keys_are_drawn_when_haiku_draws():
    model = make_net()
    key = nnx.clone(model.rngs)()
    net = hk.transform_with_state(lambda x: Net(4)(x, is_training=True))
    expected, _ = net.apply(*plain(model), key, X)
    assert_identical(model(X), expected)
    model.eval()
    model(X)
    assert model.rngs.count[...] == 1
    assert not hasattr(make_mlp(), "rngs")


def test_a_model_without_a_stream_says_so():
    def function(x, is_training):
        return hk.dropout(hk.next_rng_key(), 0.5, x) if is_training else x

    model = compat_nnx.HaikuFunction(function, example=(X, False), rngs=nnx.Rngs(0))
    assert (model(X, False) == X).all()
    with pytest.raises(ValueError, match="The model has no stream: construct it"):
        model(X)
    assert (model(X, rngs=nnx.Rngs(0)) != X).any()


def optional_dropout(x):
    key = hk.maybe_next_rng_key()
    return x if key is None else hk.dropout(key, 0.5, x)


def own_use_of_the_key(x):
    first, _ = jax.random.split(hk.maybe_next_rng_key())
    return x + jax.random.normal(first, x.shape)


@pytest.mark.parametrize("function", [optional_dropout, own_use_of_the_key])
def test_code_that_may_do_without_a_key_gets_one(function):
    """With streams for values and calls, or one for both."""
    for streams in ({"params": 0, "dropout": 1}, {"default": 0}):
        model = compat_nnx.HaikuFunction(function, example=(X,), rngs=nnx.Rngs(**streams))
        key = nnx.clone(model.rngs)()
        expected = hk.transform(function).apply({}, key, X)
        assert_identical(model(X), expected)
        assert (expected != X).any()


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_model_that_draws_in_training_alone(mode):
    """It is made in the mode that is Haiku's default, and has a stream all the same."""

    def function(x, is_training=False):
        return optional_dropout(x) if is_training else x

    model = compat_nnx.HaikuFunction(function, example=(X,), rngs=nnx.Rngs(0))
    getattr(model, mode)()
    assert (model(X) != X).any() == (mode == "train")
    assert model.rngs.count[...] == (mode == "train")


def test_a_stream_that_others_draw_from():
    """A replacement and the model itself draw different keys; none draws the same one again."""

    def noise(x):
        return jax.random.normal(hk.next_rng_key(), x.shape)

    class Noise(hk.Module):
        def __call__(self, x):
            return noise(x)

    class NativeNoise(nnx.Module):
        def __init__(self, stream):
            self.stream = stream

        def __call__(self, x):
            return jax.random.normal(self.stream(), x.shape)

    for own in (noise, lambda x: x):

        def net(x, own=own):
            return own(x), Noise()(x)

        model = compat_nnx.HaikuFunction(net, example=(X,), rngs=nnx.Rngs(0))
        model.noise = NativeNoise(model.rngs)
        results = [model(X) for _ in range(3)]
        drawn = [a for pair in results for a in pair if not (a == X).all()]
        assert len({a.tobytes() for a in map(np.asarray, drawn)}) == len(drawn) >= 3


def test_a_model_may_have_no_stream():
    model = compat_nnx.HaikuFunction(optional_dropout, example=(X,), rngs=nnx.Rngs(params=0))
    assert (model(X) == X).all()
    model = compat_nnx.HaikuFunction(own_use_of_the_key, example=(X,), rngs=nnx.Rngs(params=0))
    assert_identical(model(X, rngs=KEY), hk.transform(own_use_of_the_key).apply({}, KEY, X))
    model = compat_nnx.HaikuFunction(optional_dropout, example=(X,), rngs=nnx.Rngs(0))
    assert (model(X, rngs=nnx.Rngs(params=0)) == X).all()


@pytest.mark.parametrize("make", [make_mlp, make_net])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, nnx.clone, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_copies(make, copied):
    model = make()
    model.eval()
    other = copied(model)
    assert nnx.graphdef(other) == nnx.graphdef(model)
    assert_identical(other(X), model(X))
    first = jax.tree.leaves(nnx.state(model))[0]
    nnx.update(other, jax.tree.map(jnp.zeros_like, nnx.state(other, nnx.Param)))
    assert_identical(jax.tree.leaves(nnx.state(model))[0], first)
    assert (model(X) != 0).any()


def test_graphs_pickle():
    for graph in map(nnx.graphdef, (make_mlp(), make_net())):
        assert pickle.loads(pickle.dumps(graph)) == graph


def test_orbax(tmp_path):
    model = make_net()
    model(X)
    values = nnx.state(model, nnx.Param, compat_nnx.HaikuState)
    with ocp.StandardCheckpointer() as checkpointer:
        for number, state in enumerate(values):
            checkpointer.save(tmp_path / str(number), nnx.to_pure_dict(state))
    other = make_net(7)
    with ocp.StandardCheckpointer() as checkpointer:
        for number, state in enumerate(nnx.state(other, nnx.Param, compat_nnx.HaikuState)):
            like = nnx.to_pure_dict(state)
            nnx.replace_by_pure_dict(state, checkpointer.restore(tmp_path / str(number), like))
            nnx.update(other, state)
    model.eval()
    other.eval()
    assert_identical(other(X), model(X))


@pytest.mark.parametrize(
    ("method", "args"),
    [
        ("laplacian", (X,)),
        ("connected", (X, np.zeros((5, 2, 1), int), np.ones((5, 2, 1)))),
    ],
)
def test_methods_of_the_mlp(method, args):
    graph, values = nnx.split(make_mlp())
    linen = compat.MLP((4,), use_output_bias=True)

    def ours(values):
        return getattr(nnx.merge(graph, values), method)(*args)

    def linens(values):
        variables = compat_nnx.get_variables(nnx.merge(graph, values))
        return linen.apply(variables, *args, method=method)

    assert lowered_text(ours, values) == lowered_text(linens, values)


def test_tangent_kernel():
    model = make_mlp()
    linen = compat.MLP((4,), use_output_bias=True)
    variables = compat_nnx.get_variables(model)
    expected = linen.apply(variables, X, method="tangent_kernel")
    assert_close(model.tangent_kernel(X), expected, 1e-12)


def test_tangent_kernel_counts_the_parameters_of_activations():
    def slopes(z):
        shape = (1, z.shape[-1])
        return jnp.tanh(z * hk.get_parameter("slopes", shape, z.dtype, jnp.ones))

    def activation(z):
        return hk.to_module(slopes)()(jnp.atleast_2d(z)).reshape(z.shape)

    model = make_mlp(hidden_activations=activation)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    assert len(jax.tree.leaves(params)) == 5
    jacobian = jax.jacobian(lambda params: nnx.merge(graph, params, rest)(X))(params)
    rows = jnp.concatenate([a.reshape(len(X), -1) for a in jax.tree.leaves(jacobian)], 1)
    assert_close(model.tangent_kernel(X), rows @ rows.T, 1e-12)


@pytest.mark.slow
def test_tangent_kernel_of_any_model():
    model = make_net()
    model.eval()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def function(params, x):
        return nnx.merge(graph, params, rest)(x)

    jacobian = jax.jacobian(function)(params, X)
    expected = sum(
        jnp.einsum("ao...,bp...->abop", leaf, leaf) for leaf in jax.tree.leaves(jacobian)
    )
    assert_close(compat.tangent_kernel(function, params, X), expected, 1e-12)
    routes = {route.path: route.route for route in compat.kernel_plan(function, params, X)}
    assert [path for path, route in routes.items() if route == "gram" and "w" in path]


# NetKet.


@pytest.mark.parametrize("driver", [nk.driver.VMC_SR, MinSR])
@pytest.mark.slow
def test_netket(driver):
    hilbert = nk.hilbert.Spin(0.5, 4)
    hamiltonian = nk.operator.Ising(hilbert, nk.graph.Chain(4), h=1.0)
    sampler = nk.sampler.MetropolisLocal(hilbert, n_chains=4)
    model = compat_nnx.MLP(4, hidden_dims=(4,), rngs=nnx.Rngs(0))
    state = nk.vqs.MCState(sampler, model, n_samples=16, seed=1)
    linen = nk.vqs.MCState(
        sampler,
        compat.MLP(hidden_dims=(4,)),
        variables=compat_nnx.get_variables(model),
        n_samples=16,
        seed=1,
    )
    with jax.numpy_rank_promotion("allow"):  # NetKet's operators promote
        for vstate, make in ((state, driver), (linen, nk.driver.VMC_SR)):
            steps = make(hamiltonian, optax.sgd(0.1), diag_shift=1e-3, variational_state=vstate)
            steps.run(2, show_progress=False, out=None)
    ours, theirs = (jax.tree.leaves(vstate.parameters) for vstate in (state, linen))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8)


def test_import_of_linen_faces_alone(run_fresh):
    """``import compat`` loads NNX only where Flax's Linen does."""
    code = "import sys, flax.linen; before = 'flax.nnx' in sys.modules; import compat; "
    run = run_fresh(code + "assert ('flax.nnx' in sys.modules) == before")
    assert run.returncode == 0, run.stderr


def test_import_without_netket(run_fresh):
    run = run_fresh(
        "from compat import nnx as compat_nnx; import sys; assert 'netket' not in sys.modules"
    )
    assert run.returncode == 0, run.stderr


def test_variables_beside_a_module_that_has_been_replaced():
    model, other = (make_mlp(seed, hidden_dims=(4, 4)) for seed in (0, 1))
    for each in (model, other):
        each.block.linear_1 = nnx.Linear(4, 4, rngs=nnx.Rngs(2))
    variables = compat_nnx.get_variables(other)
    assert sorted(variables["params"]["MLP_0"]) == ["Dense_0", "Dense_2"]
    compat_nnx.set_variables(model, variables)
    assert_identical(compat_nnx.get_variables(model), variables)
