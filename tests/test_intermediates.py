"""``compat.perturb``, ``sow`` and ``perturb_outputs``, with the documentation's examples."""

import cases
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_identical
from flax import errors
from flax import linen as nn
from tables.haiku_programs import Net

import compat
import haiku_mlp

KEY = jax.random.key(5)
X = np.random.default_rng(0).normal(size=(2, 3))

# The documentation's own examples, with the module in Haiku.


class Affine(hk.Module):
    """``nn.Dense`` in Haiku."""

    def __init__(self, features, name=None):
        super().__init__(name=name)
        self.features = features

    def __call__(self, x):
        init = haiku_mlp.JaxInitializer(jax.nn.initializers.lecun_normal())
        zeros = haiku_mlp.JaxInitializer(jax.nn.initializers.zeros)
        kernel = hk.get_parameter("kernel", (x.shape[-1], self.features), jnp.float32, init)
        bias = hk.get_parameter("bias", (self.features,), jnp.float32, zeros)
        return x @ kernel + jnp.reshape(bias, (1, -1))


Dense = type("Dense", (Affine,), {})


class Foo(hk.Module):
    def __init__(self, hidden, features, name=None):
        super().__init__(name=name)
        self.hidden, self.features = hidden, features

    def __call__(self, x):
        x = Dense(self.hidden, name="Dense_0")(x)
        x = compat.perturb("dense3", x)
        return Dense(self.features, name="Dense_1")(x)


class PlainFoo(Foo):
    def __call__(self, x):
        return Dense(self.features, name="Dense_1")(Dense(self.hidden, name="Dense_0")(x))


class NativeFoo(nn.Module):
    hidden: int
    features: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.hidden)(x)
        return nn.Dense(self.features)(x)


@pytest.fixture
def documented_keys(optimized):
    with cases.x64(False), jax.threefry_partitionable(False):
        yield jax.random.PRNGKey(0)


def test_documented_perturbations(documented_keys):
    model = compat.wrap(Foo)(3, 2)
    x, y = jnp.ones((2, 9), "float32"), jnp.ones((2, 2), "float32")
    variables = model.init(documented_keys, x)

    def loss(variables):
        return jnp.mean((model.apply(variables, x) - y) ** 2)

    def of_perturbations(perturbations):
        return loss({"params": variables["params"], "perturbations": perturbations})

    grads = jax.grad(loss)(variables)["perturbations"]
    row = "[-1.456924   -0.44332537  0.02422847]"
    assert str(grads["dense3"]) == f"[{row}\n {row}]"
    assert_identical(jax.grad(of_perturbations)(variables["perturbations"]), grads)


@pytest.mark.slow
def test_documented_table(documented_keys):
    x = jnp.ones((16, 9), "float32")
    ours = compat.wrap(type("Foo", (PlainFoo,), {}))(4, 2)
    theirs = type("Foo", (NativeFoo,), {})(4, 2)
    for kwargs in ({}, {"compute_flops": True, "compute_vjp_flops": True}, {"depth": 1}):
        table = ours.tabulate(documented_keys, x, **kwargs)
        assert table == theirs.tabulate(documented_keys, x, **kwargs)
    for text in (
        "40 \x1b[0m\x1b[1;2m(160 B)",
        "10 \x1b[0m\x1b[1;2m(40 B)",
        "50 \x1b[0m\x1b[1;2m(200 B)",
    ):
        assert text in ours.tabulate(
            documented_keys, x, console_kwargs={"force_terminal": True, "width": 200}
        )
    assert_identical(ours.init(documented_keys, x), theirs.init(documented_keys, x))


# perturb and sow.


def square(x):
    y = compat.perturb("square", x**2)
    return (3 * y).sum()


def test_perturb():
    model = compat.HaikuFunction(square)
    variables = model.init(KEY, X)
    assert_identical(variables, {"perturbations": {"square": jnp.zeros(X.shape)}})
    grads = jax.grad(model.apply)(variables, X)
    assert_identical(grads, {"perturbations": {"square": np.full(X.shape, 3.0)}})
    shifted = jax.tree.map(jnp.ones_like, variables)
    assert_identical(model.apply(shifted, X), jnp.sum(3 * (jnp.asarray(X) ** 2 + 1)))
    # Absent, it is nothing at all; nor does plain Haiku know of it.
    assert_identical(model.apply({}, X), jnp.sum(3 * jnp.asarray(X) ** 2))
    net = hk.transform(square)
    assert net.init(KEY, X) == {}
    text = jax.jit(lambda x: model.apply({}, x)).lower(X).as_text()
    assert text == jax.jit(lambda x: net.apply({}, None, x)).lower(X).as_text()


def test_perturb_refuses_what_flax_refuses():
    model = compat.HaikuFunction(square)
    other = {"perturbations": {"cube": jnp.zeros(X.shape)}}
    with pytest.raises(ValueError, match="Perturbation collection"):
        model.apply(other, X)
    clash = compat.HaikuFunction(lambda x: hk.Linear(3)(compat.perturb("linear", x)))
    with pytest.raises((ValueError, errors.NameInUseError), match="linear"):
        clash.init(KEY, X)


class Deep(hk.Module):
    """Perturbs and sows in a submodule and in its parent."""

    def __call__(self, x):
        compat.sow("seen", "x", x)
        return compat.perturb("y", Inner()(x), collection="p") * 2


class Inner(hk.Module):
    def __call__(self, x):
        for factor in (1, 2):
            stored = compat.sow("seen", "x", factor * x)
            assert stored in (True, False)
        return compat.perturb("y", hk.Linear(3, with_bias=False)(x), collection="p")


def test_the_variables_belong_to_the_module_that_runs():
    model = compat.wrap(Deep)()
    variables = model.init(KEY, X)
    zeros = jnp.zeros((2, 3))
    assert_identical(variables["p"], {"y": zeros, "inner": {"y": zeros}})
    params = {"params": variables["params"]}
    x = jnp.asarray(X)
    _, sown = model.apply(params, x, mutable=["seen"])
    assert_identical(sown, {"seen": {"x": (x,), "inner": {"x": (1 * x, 2 * x)}}})
    grads = jax.grad(lambda p: model.apply({**params, "p": p}, x).sum())(variables["p"])
    assert_identical(grads, {"y": zeros + 2, "inner": {"y": zeros + 2}})


class Scaled(hk.Module):
    """Looks at values before its constructor returns."""

    def __init__(self, name=None):
        super().__init__(name=name)
        scale = hk.get_parameter("scale", (), init=jnp.ones)
        self.scale = compat.perturb("square", scale**2)
        compat.sow("seen", "scale", scale)

    def __call__(self, x):
        return self.scale * x


@pytest.mark.parametrize(
    ("model", "level"),
    [
        (compat.wrap(Scaled)(), lambda values: values),
        (compat.HaikuFunction(lambda x: Scaled()(x)), lambda values: {"scaled": values}),
    ],
    ids=["wrap", "HaikuFunction"],
)
def test_in_a_constructor(model, level):
    x, one, zero = jnp.ones(3), jnp.ones((), "float32"), jnp.zeros((), "float32")
    seen = {"seen": level({"scale": (one,)})}
    variables = model.init(KEY, x)
    values = {"params": level({"scale": one}), "perturbations": level({"square": zero})}
    assert_identical(variables, {**values, **seen})
    assert_identical(model.apply(values, x, mutable=["seen"])[1], seen)
    grads = jax.grad(lambda v: model.apply(v, x).sum())(values)
    assert_identical(grads["perturbations"], level({"square": 3 * one}))


def transformed(kind):
    def body(x):
        compat.sow("seen", "x", x)
        return compat.perturb("y", x)

    return {
        "scan": lambda x: jax.lax.scan(lambda c, _: (body(c), ()), x, None, length=2)[0],
        "vmap": jax.vmap(body),
        "remat": jax.checkpoint(body),
        "jit": lambda x: jax.jit(body)(x),
        "grad": jax.grad(lambda x: body(x).sum()),
        "another transform": lambda x: hk.transform(body).apply({}, None, x),
    }[kind]


@pytest.mark.parametrize("kind", ["scan", "vmap", "remat", "jit", "grad", "another transform"])
def test_inside_a_transform_nothing_happens(kind, check_leaks):
    model = compat.HaikuFunction(transformed(kind))
    assert model.init(KEY, X, mutable=True) == {}
    _, stored = model.apply({}, X, mutable=True)
    assert stored == {}


# perturb_outputs.

MLP = compat.MLP(hidden_dims=(5, 3))


def test_outputs_of_the_mlp():
    """The gradient of each layer's output, from the layers behind it."""
    with compat.perturb_outputs():
        variables = MLP.init(KEY, X)
        grads = jax.jit(jax.grad(lambda v: MLP.apply(v, X).sum()))(variables)["perturbations"]
    layers = variables["params"]["MLP_0"]

    def rest(h, first):
        for i in range(first, 3):
            h = jax.nn.gelu(h) @ layers[f"Dense_{i}"]["kernel"] + jnp.reshape(
                layers[f"Dense_{i}"].get("bias", jnp.zeros(1)), (1, -1)
            )
        return h.sum()

    h = X @ layers["Dense_0"]["kernel"]
    for i in range(3):
        expected = jax.grad(rest)(h, i + 1)
        np.testing.assert_allclose(grads["MLP_0"][f"Dense_{i}"]["__call__"], expected, 1e-12)
        if i < 2:
            h = jax.nn.gelu(h) @ layers[f"Dense_{i + 1}"]["kernel"]
    np.testing.assert_array_equal(grads["__call__"], 1)
    # The same numbers as without.
    assert_identical(
        {"params": variables["params"]}, jax.tree.map(lambda leaf: leaf, MLP.init(KEY, X))
    )


def test_outputs_of_wrapped_modules():
    net = compat.wrap(Net)()
    x = X.astype(np.float32)
    with compat.perturb_outputs("p"):
        variables = net.init(KEY, x)
        grads = jax.grad(lambda v: (net.apply(v, x) ** 2).sum())(variables)["p"]
        output = net.apply(variables, x)
    assert set(grads) == {"__call__", "encode", "second", "~"} - {"~"} | {"~/linear"}
    np.testing.assert_array_equal(grads["__call__"], 2 * output)
    np.testing.assert_array_equal(grads["second"]["__call__"], 2 * output)
    np.testing.assert_array_equal(grads["~/linear"]["__call__"], grads["encode"])


def test_outputs_of_another_shape():
    """Two calls of one method whose outputs differ in shape have a variable each."""
    model = compat.HaikuFunction(lambda x: hk.Linear(1, name="l")(x).sum() + shapes(x))

    def shapes(x):
        net = hk.Flatten(name="flat")
        return net(x[None]).sum() + net(x).sum() + net(2 * x).sum()

    with compat.perturb_outputs():
        variables = model.init(KEY, X)
        grads = jax.grad(lambda v: model.apply(v, X))(variables)["perturbations"]
    assert_identical(
        grads["flat"], {"__call__": np.ones((1, 6)), "__call___1": np.full((2, 3), 2.0)}
    )


def test_outputs_without_a_gradient():
    def function(x):
        return hk.to_module(lambda x: (x > 0, x.astype(int), {"a": x}, x.sum()))("several")(x)

    model = compat.HaikuFunction(function)
    with compat.perturb_outputs():
        variables = model.init(KEY, X)
    shapes = jax.tree.map(jnp.shape, variables["perturbations"]["several"])
    assert shapes == {"__call___2": (2, 3), "__call___3": ()}


def test_outputs_of_an_unbound_module():
    class Doubles(nn.Module):
        def double(self, x):
            return 2 * x

    with compat.perturb_outputs():
        assert Doubles().double(1.5) == 3
        np.testing.assert_array_equal(Doubles().double(X), 2 * X)


def test_outputs_of_another_batch():
    with compat.perturb_outputs():
        variables = MLP.init(KEY, X)
        with pytest.raises(ValueError, match="missing perturbation variable __call___1"):
            MLP.apply(variables, X[:1])
    MLP.apply(variables, X[:1])


def test_weights_are_no_output():
    """Of the layers that ``connected`` takes apart no call is captured."""
    model, sites = compat.MLP(hidden_dims=(4,)), jnp.zeros((2, 1), int)
    arguments = X[0], sites, jnp.ones((2, 1))
    variables = model.init(KEY, X[0])
    options = {"capture_intermediates": lambda module, name: True, "mutable": True}
    _, found = model.apply(variables, *arguments, method="connected", **options)
    assert set(found["intermediates"]) == {"connected", "MLP_0"}
    assert set(found["intermediates"]["MLP_0"]) == {"connected"}
