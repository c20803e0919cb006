"""``compat.wrap`` and ``compat.HaikuFunction``: their classes, keys, state, streams, errors."""

import functools
import gc
import inspect
import weakref

import cloudpickle
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_identical, median_ratios, num_calls, root_key
from flax import errors, nnx
from flax import linen as nn
from tables.haiku_programs import Counter, Net

import compat
import haiku_mlp
from compat import nnx as compat_nnx

KEY = jax.random.key(5)
X = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)


# The classes.


class Layers(hk.Module):
    """All kinds of arguments."""

    def __init__(
        self,
        sizes,
        /,
        depth=2,
        *rest,
        scale,
        options=None,
        copy=1,
        names: list = (),
        name=None,
        **more,
    ):
        super().__init__(name=name)
        self.arguments = (sizes, depth, rest, scale, options, copy, names, more)

    def __call__(self, x):
        return hk.Linear(3)(x), self.arguments

    def encode(self, x):
        return hk.Linear(2, name="encoder")(x)

    def decode(self, x):
        return hk.Linear(3, name="decoder")(x)

    def init(self, x):
        return self.encode(x)

    @property
    def size(self):
        return 3

    def _private(self, x):
        return x


class Named(hk.Module):
    """Has its name from an argument."""

    def __init__(self, by, name=None):
        super().__init__(name=name or (by.__name__ if callable(by) else f"by_{abs(by)}"))

    def __call__(self, x):
        return hk.Linear(2)(x)


def function_called(name):
    def function():
        """Lives no longer than the module that has it."""

    function.__name__ = name
    return function


@pytest.mark.parametrize(
    "makers",
    [
        [functools.partial(function_called, name) for name in ("encoder", "decoder", "head")],
        [lambda: -1, lambda: -2],  # which have the same hash
    ],
)
def test_each_model_leaves_out_its_own_level(makers):
    for make in makers:
        params = compat.wrap(Named)(make()).init(KEY, X)["params"]
        assert list(params) == ["linear"]


WrappedLayers = compat.wrap(Layers)


def test_class():
    assert compat.wrap(Layers) is WrappedLayers
    assert issubclass(WrappedLayers, nn.Module)
    assert WrappedLayers.__name__ == "Layers"
    assert WrappedLayers.__doc__ == Layers.__doc__
    # copy is a method of Flax's.
    expected = "(sizes, depth=2, *rest, scale, options=None, copy_=1, names: list = (), "
    assert str(inspect.signature(WrappedLayers)) == expected + "parent=None, name=None, **more)"
    public = {name for name in vars(WrappedLayers) if not name.startswith("_")}
    assert public - {"parent", "name", "scope", "flax_modules"} == {"encode", "decode"}
    assert "init" not in vars(WrappedLayers)


def test_a_class_survives_copies_by_value():
    class Local(hk.Module):
        def __call__(self, x):
            return x

    classes = compat.wrap(Local), compat_nnx.wrap(Local)
    models = classes[0](), classes[1](example=(1.0,), rngs=nnx.Rngs(0))
    copies = cloudpickle.loads(cloudpickle.dumps((Local, *models)))
    assert (Local, *classes) == (copies[0], *map(type, copies[1:]))
    assert classes == (compat.wrap(Local), compat_nnx.wrap(Local))


@pytest.mark.slow
def test_cloudpickle_in_another_process(run_fresh, tmp_path):
    path = tmp_path / "model"
    path.write_bytes(cloudpickle.dumps(compat.wrap(hk.Linear)(3)))
    process = run_fresh(
        f"""if True:
        import pathlib, pickle, compat, haiku as hk
        model = pickle.loads(pathlib.Path({str(path)!r}).read_bytes())
        print(model == compat.wrap(hk.Linear)(3))
        """
    )
    assert process.stdout == "True\n", process.stderr


BAD = {
    "no class": (lambda: compat.wrap(3), "subclass of hk.Module, got 3"),
    "another class": (lambda: compat.wrap(nn.Dense), "subclass of hk.Module"),
    "a module": (
        lambda: compat.HaikuFunction(lambda: compat.wrap(hk.Linear(3))).init(KEY),
        r"give the class first, wrap\(hk.Linear\)\(3\)",
    ),
    "no function": (lambda: compat.HaikuFunction(3), "takes a function"),
    "missing": (
        lambda: WrappedLayers(scale=1),
        "missing .*'sizes': Layers takes sizes, depth, rest, scale, .*, parent, name, more",
    ),
    "missing keyword": (lambda: WrappedLayers(3), "missing .*'scale'"),
    "unknown": (
        lambda: compat.wrap(hk.Linear)(3, units=4),
        "'units': Linear takes output_size, with_bias, ",
    ),
    "too many": (lambda: compat.wrap(hk.Linear)(3, True, None, None, 5), "too many"),
    "unknown change": (
        lambda: compat.wrap(hk.Linear)(3).clone(units=4),
        "'units': Linear takes output_size, with_bias, ",
    ),
    "a name that Flax has": (
        lambda: WrappedLayers(3, scale=1, copy=2),
        "give 'copy_': Layers takes .* copy_,",
    ),
    "several functions": (
        lambda: compat.HaikuFunction(hk.multi_transform(lambda: (None, None))),
        "got MultiTransformed: .* hk.multi_transform, give wrap an hk.Module class with several",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_methods():
    model = WrappedLayers(3, scale=1)
    variables = model.init(KEY, X, method="encode")
    assert set(variables["params"]) == {"~encode/encoder"}
    encoded = model.apply(variables, X, method="encode")
    assert_identical(encoded, model.apply(variables, X, method=WrappedLayers.encode))
    assert_identical(encoded, model.apply(variables, X, method=compat.haiku_method("init")))
    assert_identical(model.bind(variables).encode(X), encoded)

    class Coder(nn.Module):
        def setup(self):
            self.layers = WrappedLayers(3, scale=1)

        def __call__(self, x):
            return self.layers.decode(self.layers.encode(x))

    params = Coder().init(KEY, X)["params"]
    assert set(params["layers"]) == {"~encode/encoder", "~decode/decoder"}
    layers = {"params": params["layers"]}
    encoded = model.apply(layers, X, method="encode")
    decoded = model.apply(layers, encoded, method="decode")
    assert_identical(Coder().apply({"params": params}, X), decoded)


WRAPPED = {
    "Linear": (hk.Linear, (3,), {}, (X,), {}),
    "MLP": (hk.nets.MLP, ([4, 3],), {"activation": jnp.tanh}, (X,), {"dropout_rate": 0.5}),
    "LSTM": (hk.LSTM, (4,), {}, (X, hk.LSTMState(*np.ones((2, 2, 4), np.float32))), {}),
    "BatchNorm": (hk.BatchNorm, (True, True, 0.9), {}, (X,), {"is_training": True}),
    "our MLP": (haiku_mlp.MLP, (), {"hidden_dims": (4,)}, (X,), {}),
    "Net": (Net, (), {}, (X,), {}),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_is_haiku(name):
    """The values of ``hk.transform``, under the names without the module's own."""
    cls, args, fields, inputs, kwargs = WRAPPED[name]
    if "dropout_rate" in kwargs:
        kwargs = {**kwargs, "rng": jax.random.key(1)}
    net = hk.transform_with_state(lambda *inputs: cls(*args, **fields)(*inputs, **kwargs))
    model = compat.wrap(cls)(*args, **fields)
    variables = model.init(KEY, *inputs, **kwargs)
    params, state = net.init(root_key(KEY, "params"), *inputs)
    root = next(iter(params)).split("/")[0]
    if name == "our MLP":  # the keys are Flax's
        params, _ = compat.to_haiku(variables, root=root)
    assert_identical(compat.to_haiku(variables, root=root), (params, state))
    outputs, changed = model.apply(variables, *inputs, **kwargs, mutable=["state"])
    new_state = compat.to_haiku({**variables, **changed}, root=root)[1]
    assert_identical((outputs, new_state), net.apply(params, state, None, *inputs))


def noisy(x):
    return hk.dropout(hk.next_rng_key(), 0.5, Counter()(Net()(x)))


_PLAIN = hk.transform_with_state(noisy)
_QUIET = hk.transform(lambda x: Net()(x))
STATE = hk.transform_with_state(lambda x: Counter()(Net()(x)))
FORMS = {
    "function": (noisy, _PLAIN),
    "transform_with_state": (_PLAIN, _PLAIN),
    "with state, by hand": (
        hk.TransformedWithState(
            lambda key, x: _PLAIN.init(key, x), lambda p, s, key, x: _PLAIN.apply(p, s, key, x)
        ),
        _PLAIN,
    ),
    "transform": (_QUIET, hk.with_empty_state(_QUIET)),
    "transform, by hand": (
        hk.Transformed(lambda key, x: _QUIET.init(key, x), lambda p, k, x: _QUIET.apply(p, k, x)),
        hk.with_empty_state(_QUIET),
    ),
    "without_apply_rng": (hk.without_apply_rng(_QUIET), hk.with_empty_state(_QUIET)),
    "without_apply_rng, with state": (hk.without_apply_rng(STATE), STATE),
    "with_empty_state": (hk.with_empty_state(_QUIET), hk.with_empty_state(_QUIET)),
    "by hand, of any arguments": (
        hk.Transformed(lambda *args: _QUIET.init(*args), lambda *args: _QUIET.apply(*args)),
        hk.with_empty_state(_QUIET),
    ),
    "jit": (hk.Transformed(*map(jax.jit, _QUIET)), hk.with_empty_state(_QUIET)),
}


@pytest.mark.parametrize(("form", "plain"), FORMS.values(), ids=FORMS)
def test_forms_of_a_function(form, plain):
    model = compat.HaikuFunction(form)
    assert model == compat.HaikuFunction(form)
    outputs, variables = model.init_with_output(KEY, X)
    assert outputs.shape == X.shape
    params, state = compat.to_haiku(variables)
    assert_identical((params, state), plain.init(root_key(KEY, "params"), X))
    outputs, changed = model.apply(variables, X, rngs={"apply": KEY}, mutable=["state"])
    expected = plain.apply(params, state, root_key(KEY, "apply"), X)
    assert_identical((outputs, compat.to_haiku({**variables, **changed})[1]), expected)


@pytest.mark.parametrize("form", ["transform_with_state", "with state, by hand"])
def test_flax_sees_the_modules_of_a_pair(form):
    """As those of its function: in the table and in what is captured; but for its key."""
    pair, plain = (compat.HaikuFunction(FORMS[name][0]) for name in (form, "function"))
    options = {"console_kwargs": {"force_terminal": False}}
    assert pair.tabulate(KEY, X, **options) == plain.tabulate(KEY, X, **options)
    variables = plain.init(KEY, X)
    call = {"capture_intermediates": True, "mutable": True, "rngs": {"apply": KEY}}
    assert_identical(pair.apply(variables, X, **call), plain.apply(variables, X, **call))


def scaled(net):
    """A pair with an init and an apply of its own, which says that it is the given one."""

    @functools.wraps(net.init)
    def init(*args):
        return jax.tree.map(lambda w: w / 4, net.init(*args))

    @functools.wraps(net.apply)
    def apply(params, *args):
        return net.apply(jax.tree.map(lambda w: w * 2, params), *args) + 1

    return hk.Transformed(init, apply)


@pytest.mark.parametrize("rng", [True, False])
def test_a_pair_runs_as_it_is(rng):
    pair = scaled(_QUIET) if rng else hk.without_apply_rng(scaled(_QUIET))
    model = compat.HaikuFunction(pair)
    output, variables = model.init_with_output(KEY, X)
    params = pair.init(root_key(KEY, "params"), X)
    assert_identical(compat.to_haiku(variables)[0], params)
    expected = pair.apply(params, *[None] * rng, X)
    assert_identical(output, expected)
    assert_identical(model.apply(variables, X), expected)
    captured = model.apply(variables, X, capture_intermediates=True)[1]["intermediates"]
    assert "net" in captured


def test_calls_of_a_pair_draw_different_keys():
    pair = hk.transform(lambda x: hk.dropout(hk.next_rng_key(), 0.5, x))
    model, x = compat.HaikuFunction(pair), np.ones(100)
    first, second = model.apply({}, x, rngs={"dropout": KEY}, method=lambda m, x: (m(x), m(x)))
    assert (first != second).any()


def test_a_pair_has_the_arguments_of_its_function():
    """By which NNX finds its mode."""
    pair = hk.transform(lambda x, is_training=True: x * is_training)
    model = compat_nnx.HaikuFunction(pair, example=(X,), rngs=nnx.Rngs(0))
    assert model(X).any()
    model.eval()
    assert not model(X).any()


def test_multi_transform():
    """A tree for several functions serves each of them."""

    def coder():
        encoder, decoder = hk.Linear(2, name="encoder"), hk.Linear(3, name="decoder")
        return lambda x: decoder(encoder(x)), (encoder, decoder)

    nets = hk.multi_transform(coder)
    params = nets.init(KEY, X)
    model = compat.HaikuFunction(lambda x: coder()[1][0](x))
    assert_identical(model.apply(compat.to_flax(params), X), nets.apply[0](params, None, X))


# Keys.


def key_as_value(key, shape, dtype):
    return jax.random.key_data(key)


class HaikuKeys(hk.Module):
    """Parameters that are the keys they get, before and after a submodule."""

    def __init__(self, depth, noise=False, name=None):
        super().__init__(name=name)
        self.depth, self.noise = depth, noise

    def __call__(self):
        init = haiku_mlp.JaxInitializer(key_as_value)
        hk.get_parameter("a", (2,), jnp.uint32, init)
        if self.noise:
            hk.get_parameter("noise", (), init=hk.initializers.RandomNormal())
        hk.get_parameter("b", (2,), jnp.uint32, init)
        if self.depth:
            HaikuKeys(self.depth - 1, self.noise, name="child")()
        hk.get_parameter("c", (2,), jnp.uint32, init)


class FlaxKeys(nn.Module):
    depth: int

    @nn.compact
    def __call__(self):
        self.param("a", key_as_value, (2,), jnp.uint32)
        self.param("b", key_as_value, (2,), jnp.uint32)
        if self.depth:
            FlaxKeys(self.depth - 1, name="child")()
        self.param("c", key_as_value, (2,), jnp.uint32)


def without_noise(tree):
    return {
        name: without_noise(value) if isinstance(value, dict) else value
        for name, value in tree.items()
        if name != "noise"
    }


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("depth", [0, 2])
def test_keys_of_jax_initializers(depth, noise):
    """Those of ``nn.Module.param``, whatever Haiku's own initializers draw in between."""
    model = compat.wrap(HaikuKeys)(depth, noise)
    expected = FlaxKeys(depth).init(KEY)
    assert_identical(without_noise(model.init(KEY)), expected)
    _, created = model.apply({}, rngs={"params": KEY}, mutable=["params"])
    assert_identical(without_noise(created), expected)

    class Parent(nn.Module):
        model: nn.Module

        def __call__(self):
            self.model()

    ours, theirs = Parent(model).init(KEY), Parent(FlaxKeys(depth)).init(KEY)
    assert_identical(without_noise(ours), theirs)


# State.


def counting(x):
    return Counter()(x)


def first_at_apply(x):
    """State that init does not make."""
    return x if hk.running_init() else Counter()(x)


def only_reads(x):
    return x + hk.get_state("total", (3,), init=jnp.ones).sum()


COUNT = {"state": {"counter": {"count": np.float32(4)}}}


def test_state():
    model = compat.HaikuFunction(counting)
    assert_identical(
        model.init(KEY, X), {"state": {"counter": {"count": jnp.zeros((), "float32")}}}
    )
    outputs, changed = model.apply(COUNT, X, mutable=["state"])
    assert_identical(outputs, jnp.asarray(X + 4))
    assert changed["state"]["counter"]["count"] == 5
    assert COUNT["state"]["counter"]["count"] == 4
    bound = model.bind(COUNT, mutable=["state"])
    bound(X)
    bound(X)
    assert bound.variables["state"]["counter"]["count"] == 6


@pytest.mark.parametrize("mutable", [False, ["intermediates"]])
def test_state_that_is_immutable(mutable):
    with pytest.raises(errors.ModifyScopeVariableError, match='"count"'):
        compat.HaikuFunction(counting).apply(COUNT, X, mutable=mutable)
    model = compat.HaikuFunction(only_reads)
    assert_identical(model.apply(model.init(KEY, X), X), jnp.asarray(X + 3))


def total(x, write):
    value = hk.get_state("total", (), init=jnp.ones)
    if write:
        hk.set_state("total", value + 1)
    return x + value


def lifted(x, write):
    inner = hk.transform_with_state(lambda x: total(x, write))
    init, updater = hk.lift_with_state(inner.init)
    output, state = jax.jit(inner.apply)(*init(None, x), None, x)
    updater.update(state)
    return output


def scanned(x, write):
    if hk.running_init():
        return total(x, write)
    return hk.scan(lambda carry, _: (total(carry, write), ()), x, None, length=1)[0]


@pytest.mark.parametrize("function", [lifted, scanned])
def test_immutable_state_that_an_inner_transform_hands_back(function):
    """What it only read is another object, and has not been written."""
    model = compat.HaikuFunction(function)
    variables = model.init(KEY, X, True)
    assert_identical(model.apply(variables, X, False), jnp.asarray(X + 1))
    with pytest.raises(errors.ModifyScopeVariableError, match='"total"'):
        model.apply(variables, X, True)


@pytest.mark.parametrize("function", [counting, first_at_apply])
def test_state_first_made_at_apply(function):
    model = compat.HaikuFunction(function)
    outputs, changed = model.apply({}, X, mutable=["state"])
    assert_identical(outputs, jnp.asarray(X))
    assert_identical(changed, {"state": {"counter": {"count": jnp.ones((), "float32")}}})
    with pytest.raises(errors.ScopeCollectionNotFound, match='"count"'):
        model.apply({}, X)


NORM = compat.wrap(hk.BatchNorm)(True, True, 0.9)


@pytest.mark.parametrize(
    "change",
    [lambda state: {}, lambda state: {**state, "mean_ema": {}}],
    ids=["no collection", "no leaf"],
)
def test_state_that_is_missing(change):
    """Where Haiku cannot make it, Haiku says so."""
    variables = NORM.init(KEY, X, is_training=True)
    state = {name.removeprefix("~/"): value for name, value in variables["state"].items()}
    state = {f"~/{name}": value for name, value in change(state).items()}
    variables = {**variables, "state": state} if state else {"params": variables["params"]}
    with pytest.raises(ValueError, match="'average' in 'batch_norm/~/mean_ema'"):
        NORM.apply(variables, X, is_training=False)


@pytest.mark.parametrize("lift", [hk.remat, lambda f: hk.vmap(f, split_rng=False)])
def test_boxes_of_parameters_made_in_an_inner_transform(lift):
    init = haiku_mlp.JaxInitializer(
        nn.with_logical_partitioning(nn.initializers.ones, ("in", "out"))
    )

    def linear(x):
        return hk.Linear(2, w_init=init)(x)

    inside, outside = compat.HaikuFunction(lambda x: lift(linear)(x)), compat.HaikuFunction(linear)
    variables = inside.init(KEY, X)
    assert_identical(variables, outside.init(KEY, X))
    assert variables["params"]["linear"]["w"].names == ("in", "out")
    assert_identical(inside.apply(variables, X), outside.apply(variables, X))


def test_stacked_layers_have_no_boxes():
    """Haiku stacks arrays; the names of their axes would be one short."""
    init = haiku_mlp.JaxInitializer(
        nn.with_logical_partitioning(nn.initializers.ones, ("in", "out"))
    )
    layers = hk.experimental.layer_stack(2)
    model = compat.HaikuFunction(lambda x: layers(hk.Linear(3, w_init=init))(x))
    (layer,) = model.init(KEY, X)["params"].values()
    assert layer["linear"]["w"].shape == (2, 3, 3)


class Inside(hk.Module):
    """Calls a Flax module in a transformation, at init outside of it or not."""

    def __init__(self, inner, lift, outside=True, name=None):
        super().__init__(name)
        self.inner, self.lift, self.outside = inner, lift, outside

    def __call__(self, x):
        is_outside = self.outside and hk.running_init()
        return self.inner(x) if is_outside else self.lift(lambda x: self.inner(x))(x)


def each_row(call):
    return lambda x: hk.scan(lambda carry, row: (carry, call(row)), 0, x)[1]


@pytest.mark.parametrize("lift", [hk.remat, each_row])
def test_a_flax_module_inside_reads_its_parameters(lift):
    model = compat.wrap(Inside)(nn.Dense(2), lift)
    variables = model.init(KEY, X)
    expected = nn.Dense(2).apply({"params": variables["params"]["flax_modules_inner_0"]}, X)
    np.testing.assert_allclose(model.apply(variables, X), expected, rtol=1e-6)


def test_limits_of_a_flax_module_inside():
    """What the README says of it: tracers that leak, and one key for all steps."""
    variables = compat.wrap(Inside)(nn.Dense(2), hk.remat, outside=False).init(KEY, X)
    assert all(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(variables))
    model = compat.wrap(Inside)(nn.Dropout(0.5, deterministic=False), each_row)
    kept = model.apply({}, jnp.ones((3, 64)), rngs={"dropout": KEY})
    assert len(np.unique(kept, axis=0)) == 1


def test_boxed_state_keeps_its_box():
    boxed = {"state": {"counter": {"count": nn.Partitioned(jnp.zeros(()), ())}}}
    _, changed = compat.HaikuFunction(counting).apply(boxed, X, mutable=["state"])
    assert_identical(changed, jax.tree.map(lambda leaf: leaf + 1, boxed))


# Random keys.


def draws(x):
    return hk.next_rng_key()


DRAWS = compat.HaikuFunction(draws)


@pytest.mark.parametrize(
    ("streams", "used"),
    [
        (["apply"], "apply"),
        (["dropout"], "dropout"),
        (["params"], "params"),
        (["apply", "dropout", "params"], "apply"),
        (["params", "dropout"], "dropout"),
    ],
)
@pytest.mark.parametrize("mutable", [False, ["state"], ["params"], True])
def test_stream(streams, used, mutable):
    """The first there is of ``apply``, ``dropout`` and ``params``, whatever is mutable."""
    rngs = {stream: jax.random.fold_in(KEY, i) for i, stream in enumerate(streams)}
    drawn = DRAWS.apply({"state": {"~": {"a": X}}}, X, rngs=rngs, mutable=mutable)
    key = root_key(rngs[used], used)
    plain = hk.transform(draws).apply({}, key, X)
    assert_identical(drawn if mutable is False else drawn[0], plain)


@pytest.mark.parametrize("mutable", [False, ["state"], ["params"], True])
def test_a_module_without_values_draws(mutable):
    """It is applied, not initialised: there is nothing to make."""
    flags = []
    model = compat.HaikuFunction(lambda x: (flags.append(hk.running_init()), draws(x))[1])
    drawn = model.apply({}, X, rngs={"dropout": KEY}, mutable=mutable)
    assert_identical(
        drawn if mutable is False else drawn[0],
        hk.transform(draws).apply({}, root_key(KEY, "dropout"), X),
    )
    assert flags == [False]


def test_init_needs_one_stream():
    assert_identical(DRAWS.init(KEY, X), {})
    output, _ = DRAWS.init_with_output(KEY, X)
    assert_identical(output, hk.transform(draws).apply({}, root_key(KEY, "params"), X))


def test_two_calls_draw_different_keys():
    def twice(model, x):
        return model(x), model(x)

    first, second = DRAWS.apply({}, X, rngs={"dropout": KEY}, method=twice)
    assert first != second
    again = DRAWS.apply({}, X, rngs={"dropout": KEY}, method=twice)
    assert_identical((first, second), again)


@pytest.mark.parametrize("lift", [lambda cls: cls, nn.jit, nn.remat], ids=["none", "jit", "remat"])
def test_dropout_in_a_parent(lift):
    class Parent(nn.Module):
        def setup(self):
            self.drop = lift(compat.wrap(Drop))()

        def __call__(self, x):
            return self.drop(x), self.drop(x)

    first, second = Parent().apply({}, np.ones(100), rngs={"dropout": KEY})
    assert (first != second).any()
    assert_identical((first, second), Parent().apply({}, np.ones(100), rngs={"dropout": KEY}))


class Drop(hk.Module):
    def __call__(self, x):
        return hk.dropout(hk.next_rng_key(), 0.5, x)


# Errors.


def deep(x):
    return Net()(x)


DEEP = compat.HaikuFunction(deep)
LINEAR = compat.wrap(hk.Linear)(3)


def deep_without(*path):
    variables = jax.tree.map(lambda leaf: leaf, DEEP.init(KEY, X))
    *levels, name = ("params", *path)
    tree = variables
    for level in levels:
        tree = tree[level]
    del tree[name]
    return variables


ERRORS = {
    "shape": (
        lambda: LINEAR.apply({"params": {"w": np.ones((4, 3)), "b": np.ones(3)}}, X),
        errors.ScopeParamShapeError,
        r'(?=.*\(3, 3\))(?=.*\(4, 3\)).*parameter "w" in "/"',  # in any order: Flax 0.11
    ),
    "deep shape": (
        lambda: DEEP.apply(DEEP.init(KEY, X), X[:, :2]),
        errors.ScopeParamShapeError,
        r'(?=.*\(2, 3\))(?=.*\(3, 3\)).*parameter "w" in "/net/~/linear"',
    ),
    "leaf": (
        lambda: DEEP.apply(deep_without("net", "~/linear", "w"), X),
        errors.ScopeParamNotFoundError,
        '"w" in scope "/net/~/linear"',
    ),
    "level": (
        lambda: DEEP.apply(deep_without("net", "second"), X),
        errors.ScopeParamNotFoundError,
        '"w" in scope "/net/second"',
    ),
    "params": (lambda: DEEP.apply({}, X), errors.ScopeCollectionNotFound, '"params" in "/net'),
    "key of init": (lambda: DEEP.init({}, X), errors.InvalidRngError, 'PRNG for "params"'),
    "key of apply": (lambda: DRAWS.apply({}, X), errors.InvalidRngError, 'PRNG for "apply"'),
    "key to create": (
        lambda: DEEP.apply({}, X, mutable=["params"]),
        errors.InvalidRngError,
        'PRNG for "params"',
    ),
    "key to create one": (
        lambda: DEEP.apply(deep_without("net", "~/linear", "w"), X, mutable=["params"]),
        errors.InvalidRngError,
        'PRNG for "params"',
    ),
    "unbound": (lambda: LINEAR(X), errors.CallCompactUnboundModuleError, "unbound"),
}


@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(call, error, message):
    """Flax's, with Flax's path."""
    with pytest.raises(error, match=message):
        call()


def test_an_error_of_the_code_is_left_alone():
    def fails(x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        compat.HaikuFunction(fails).init(KEY, X)


# Values and submodules of one name.


class Clash(hk.Module):
    def __init__(self, kind, module_first, name=None):
        super().__init__(name=name)
        self.kind, self.module_first = kind, module_first

    def __call__(self, x):
        if self.module_first:
            return hk.Linear(3, name="w")(x) * self._value()
        return self._value() * hk.Linear(3, name="w")(x)

    @hk.transparent
    def _value(self):
        if self.kind == "params":
            return hk.get_parameter("w", (), init=jnp.ones)
        value = hk.get_state("w", (), init=jnp.ones)
        hk.set_state("w", value + 1)
        return value


@pytest.mark.parametrize("module_first", [False, True])
@pytest.mark.parametrize("kind", ["params", "state"])
def test_clash(kind, module_first):
    model = compat.wrap(Clash)(kind, module_first)
    with pytest.raises(ValueError, match=r"both a value and a submodule.*compat\.to_flax"):
        model.init(KEY, X)
    net = hk.transform_with_state(lambda x: Clash(kind, module_first)(x))
    params, state = net.init(KEY, X)
    variables = compat.to_flax(params, state, root="clash")
    assert_identical(compat.to_haiku(variables, root="clash"), (params, state))
    outputs, changed = model.apply(variables, X, mutable=["state"])
    new = compat.to_haiku({**variables, **changed}, root="clash")[1]
    assert_identical((outputs, new), net.apply(params, state, None, X))


@pytest.mark.parametrize("name", ["~", "a~", "~a", "a/b"])
def test_strange_names_of_values(name):
    """What ``init`` gives, ``apply`` and ``to_haiku`` take."""

    def function(x):
        return x + hk.get_parameter(name, (), init=hk.initializers.RandomNormal())

    net, model = hk.transform(function), compat.HaikuFunction(function)
    variables = model.init(KEY, X)
    params = net.init(root_key(KEY, "params"), X)
    assert_identical(compat.to_haiku(variables)[0], params)
    assert_identical(compat.to_flax(params), variables)
    assert_identical(model.apply(variables, X), net.apply(params, None, X))


def in_a_scope(x):
    with hk.name_scope("scope"):
        return Net()(x)


@pytest.mark.parametrize("depth", [0, 1, 2, None])
@pytest.mark.parametrize(
    "function",
    [
        lambda x: hk.to_module(lambda x: Net()(x))("made")(x),
        in_a_scope,
        lambda x: hk.Linear(3, name=hk.experimental.force_name("a/b/c"))(x),
        lambda x: hk.get_parameter("w", (3,), init=jnp.ones),
    ],
    ids=["to_module", "name_scope", "force_name", "outside"],
)
def test_the_total_at_each_depth(function, depth):
    model = compat.HaikuFunction(function)
    variables = model.init(KEY, X)
    table = model.tabulate(KEY, X, depth=depth, console_kwargs={"force_terminal": False})
    size = sum(leaf.size for leaf in jax.tree.leaves(variables))
    assert f"Total Parameters: {size} " in table


# In Flax.


class Pair(nn.Module):
    """Two of a class, one of them shared."""

    @nn.compact
    def __call__(self, x):
        shared = compat.wrap(Net)()
        return compat.wrap(Net)()(shared(shared(x)))


class InSetup(nn.Module):
    def setup(self):
        self.nets = [compat.wrap(Net)(), compat.wrap(Net)()]
        self.named = {"a": compat.wrap(Counter)()}

    def __call__(self, x):
        return self.nets[1](self.nets[0](self.named["a"](self.named["a"](x))))


def test_names_and_sharing_in_compact():
    variables = Pair().init(KEY, X)
    assert list(variables["params"]) == ["Net_0", "Net_1"]
    net = compat.wrap(Net)()
    shared, other = ({"params": variables["params"][name]} for name in ("Net_0", "Net_1"))
    expected = net.apply(other, net.apply(shared, net.apply(shared, X)))
    assert_identical(Pair().apply(variables, X), expected)


def test_names_and_sharing_in_setup():
    variables = InSetup().init(KEY, X)
    assert set(variables["params"]) == {"nets_0", "nets_1"}
    assert set(variables["state"]) == {"named_a"}
    _, changed = InSetup().apply(variables, X, mutable=["state"])
    assert changed["state"]["named_a"]["count"] == 2


def test_bind_and_lazy_init():
    net = compat.wrap(Net)()
    variables = net.init(KEY, X)
    bound = net.bind(variables)
    assert_identical(bound(X), net.apply(variables, X))
    assert bound.unbind()[0] == net
    assert_identical(bound.unbind()[1], variables)
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    assert_identical(net.lazy_init(KEY, shape), jax.jit(net.init)(KEY, X))


class Parts(hk.Module):
    def encode(self, x):
        return hk.Linear(3, name="encoder")(x)

    def __call__(self, x):
        return jnp.tanh(self.encode(x))


class Scaled(compat.wrap(Parts)):
    def encode(self, x):
        return 2 * super().encode(x)


@pytest.mark.parametrize(
    "through",
    [lambda c: c, pytest.param(nn.jit, marks=pytest.mark.slow), nn.remat],
    ids=["plain", "jit", "remat"],
)
def test_haiku_code_calls_its_own_methods(through):
    """A method of a Flax subclass is for calls from outside: a limit that is stated."""
    variables = compat.wrap(Parts)().init(KEY, X)
    encoded = compat.wrap(Parts)().apply(variables, X, method="encode")
    model = through(Scaled)()
    np.testing.assert_allclose(model.apply(variables, X), jnp.tanh(encoded), 1e-6)
    captures = {"capture_intermediates": True, "mutable": ["intermediates"]}
    outputs, _ = model.apply(variables, X, **captures)
    np.testing.assert_allclose(outputs, jnp.tanh(encoded), 1e-6)
    outputs = model.apply(variables, X, method="encode")
    np.testing.assert_allclose(outputs, 2 * encoded, 1e-6)


class Stateful(hk.Module):
    """All kinds of values."""

    def __call__(self, x):
        return Counter()(Net()(x))


LIFTED = compat.wrap(Stateful)


@pytest.mark.parametrize("lift", [nn.jit, nn.remat, nn.fold_rngs])
def test_lifts_that_change_nothing(lift):
    variables = LIFTED().init(KEY, X)
    lifted = lift(LIFTED)()
    assert jax.tree.structure(lifted.init(KEY, X)) == jax.tree.structure(variables)

    def run(model):
        return jax.jit(lambda v, x: model.apply(v, x, mutable=["state"]))(variables, X)

    assert_identical(run(lifted), run(LIFTED()))


def slices(tree):
    return [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(2)]


@pytest.mark.slow
def test_vmap():
    """Each slice is a model of its own."""
    axes = {"params": 0, "state": 0}
    lifted = nn.vmap(LIFTED, variable_axes=axes, split_rngs={"params": True})()
    inputs = np.stack([X, 2 * X])
    variables = lifted.init(KEY, inputs)
    first, second = slices(variables)
    assert (first["params"]["net"]["offset"] != second["params"]["net"]["offset"]).all()
    result = lifted.apply(variables, inputs, mutable=["state"])
    for (outputs, changed), v, x in zip(slices(result), (first, second), inputs, strict=True):
        expected = LIFTED().apply(v, x, mutable=["state"])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, 1e-6), (outputs, changed), expected
        )


def test_scan():
    """Layers one after the other, each with values of its own."""
    scan = nn.scan(
        lambda model, x, _: (model(x), ()),
        variable_axes={"params": 0, "state": 0},
        split_rngs={"params": True},
        length=2,
    )

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            return scan(LIFTED(name="layer"), x, None)[0]

    variables = Stack().init(KEY, X)
    outputs, changed = Stack().apply(variables, X, mutable=["state"])
    x, states = X, []
    for layer in slices({name: tree["layer"] for name, tree in variables.items()}):
        x, new = LIFTED().apply(layer, x, mutable=["state"])
        states.append(new["state"])
    np.testing.assert_allclose(outputs, x, 1e-6)
    assert_identical(slices(changed["state"]["layer"]), states)


def test_map_variables():
    lifted = nn.map_variables(
        compat.wrap(Net), "params", trans_in_fn=lambda tree: jax.tree.map(jnp.sin, tree), init=True
    )()
    net = compat.wrap(Net)()
    variables = net.init(KEY, X)
    sines = jax.tree.map(jnp.sin, variables)
    assert_identical(lifted.apply(variables, X), net.apply(sines, X))
    assert_identical(lifted.init(KEY, X), sines)  # as for nn.Dense


def test_share_scope():
    class Same(nn.Module):
        net: nn.Module

        def setup(self):
            nn.share_scope(self, self.net)

        def __call__(self, x):
            return self.net(x)

    net = compat.wrap(Net)()
    assert_identical(Same(net).init(KEY, X), net.init(KEY, X))


def test_partitioned_parameters():
    def boxed(axes):
        normal = jax.nn.initializers.normal()
        return haiku_mlp.JaxInitializer(nn.with_logical_partitioning(normal, axes))

    def function(x):
        return hk.Linear(3, w_init=boxed(("in", "out")), b_init=boxed(("out",)))(x)

    model = compat.HaikuFunction(function)
    variables = model.init(KEY, X)
    specs = nn.get_partition_spec(variables)
    spec = jax.sharding.PartitionSpec
    assert specs == {"params": {"linear": {"w": spec("in", "out"), "b": spec("out")}}}
    mesh_specs = nn.logical_to_mesh(specs, (("in", None), ("out", "x")))
    assert mesh_specs["params"]["linear"]["w"] == spec(None, "x")
    assert_identical(model.apply(variables, X), model.apply(nn.unbox(variables), X))
    _, kept = model.apply(variables, X, mutable=["params"])
    assert_identical(kept, variables)
    grads = jax.grad(lambda v: model.apply(v, X).sum())(variables)
    assert jax.tree.structure(grads) == jax.tree.structure(variables)


# Tracing.


def test_the_function_is_traced_once():
    runs = []
    model = compat.HaikuFunction(lambda x: (runs.append(1), Net()(x))[1])
    variables = model.init(KEY, X)
    assert len(runs) == 1
    model.apply(variables, X)
    assert len(runs) == 2


def resnet():
    """Returns what traces a ResNet-18 by itself and through the adapter."""
    x = np.ones((2, 32, 32, 3), np.float32)
    net = hk.transform_with_state(lambda x: hk.nets.ResNet18(10)(x, is_training=True))
    model = compat.wrap(hk.nets.ResNet18)(10)
    params, state = jax.eval_shape(net.init, KEY, x)
    variables = compat.to_flax(params, state, root="res_net18")

    def ours():
        jax.eval_shape(
            lambda v, x: model.apply(v, x, is_training=True, mutable=["state"]), variables, x
        )

    def theirs():
        jax.eval_shape(lambda p, s, x: net.apply(p, s, None, x), params, state, x)

    return ours, theirs


def test_calls_to_trace_a_resnet():
    ours, theirs = map(num_calls, resnet())
    assert ours <= 1.5 * theirs, (ours, theirs)


@pytest.mark.slow
def test_time_to_trace_a_resnet():
    ours, theirs = resnet()
    ratios = median_ratios({"ours": ours, "theirs": theirs}, "theirs")
    assert ratios["ours"] <= 1.5, ratios


@pytest.mark.parametrize("transform", [hk.transform, hk.transform_with_state])
def test_a_pair_without_a_key_makes_no_parameters_at_apply(transform):
    """As its own ``apply``."""
    model = compat.HaikuFunction(hk.without_apply_rng(transform(lambda x: hk.Linear(2)(x))))
    with pytest.raises(errors.InvalidRngError, match="does not hand it on"):
        model.apply({}, jnp.ones(3), rngs=KEY, mutable=["params"])
    with pytest.raises(errors.InvalidRngError, match="give rngs="):
        model.apply({}, jnp.ones(3), mutable=["params"])


def test_a_compiled_function_is_refused_as_by_haiku():
    function = jax.jit(lambda x: hk.Linear(2)(x))
    with pytest.raises(ValueError, match="pass an already jit") as refused:
        compat.HaikuFunction(function)
    with pytest.raises(ValueError, match="pass an already jit") as by_haiku:
        hk.transform(function)
    assert str(refused.value) == str(by_haiku.value)


def ones_by_getter():
    def creator(next_creator, shape, dtype, init, context):
        return hk.DO_NOT_STORE

    def getter(next_getter, value, context):
        assert value is hk.DO_NOT_STORE
        return next_getter(jnp.ones(context.original_shape))

    with hk.custom_creator(creator), hk.custom_getter(getter):
        return hk.get_parameter("w", (2,), init=jnp.zeros)


def ones_by_initializer():
    def getter(next_getter, value, context):
        return next_getter(jnp.ones(context.original_shape))

    with hk.custom_getter(getter):
        return hk.get_parameter("w", (2,), init=lambda *_: hk.DO_NOT_STORE)


def test_a_getter_that_makes_another_shape():
    """Where the parameter is stored as it should be the error is Haiku's."""

    def function(x):
        with hk.custom_getter(lambda next_getter, value, context: next_getter(value)[:1]):
            return hk.Linear(2)(x)

    for run in (compat.HaikuFunction(function), hk.transform(function)):
        with pytest.raises(ValueError, match="with retrieved shape"):
            run.init(KEY, jnp.ones(3))


@pytest.mark.parametrize("function", [ones_by_getter, ones_by_initializer])
def test_parameters_that_nothing_stores(function):
    model = compat.HaikuFunction(function)
    assert not model.init(jax.random.key(0))
    for variables in ({}, {"params": {"other": jnp.ones(3)}}):
        assert model.apply(variables).tolist() == [1, 1]
    with pytest.raises(errors.ScopeCollectionNotFound):
        compat.HaikuFunction(lambda: hk.get_parameter("w", (2,), init=jnp.ones)).apply({})


def called(model):
    variables = model.init(KEY, jnp.ones((2, 3)))
    model.apply(variables, jnp.ones((2, 3)), capture_intermediates=True)
    return jax.tree.leaves(variables)


def called_in_nnx(model):
    model(jnp.ones((2, 3)))
    return jax.tree.leaves(nnx.state(model))


@pytest.mark.parametrize(
    ("make", "run"),
    [
        (lambda: compat.MLP(hidden_dims=(4,)), called),
        (lambda: compat.wrap(hk.nets.MLP)((4, 2)), called),
        (lambda: compat.HaikuFunction(lambda x: hk.Linear(4)(x)), called),
        (lambda: compat_nnx.MLP(3, hidden_dims=(4,), rngs=nnx.Rngs(0)), called_in_nnx),
    ],
    ids=["MLP", "wrapped", "function", "NNX"],
)
def test_no_value_waits_for_the_garbage_collector(make, run):
    gc.collect()
    gc.disable()
    try:
        kept = [weakref.ref(leaf) for leaf in run(make())]
        assert [leaf() for leaf in kept] == [None] * len(kept)
    finally:
        gc.enable()
