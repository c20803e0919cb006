"""``compat.nnx``: methods, submodules, what they are replaced by, and what they are part of."""

import copy

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparison import assert_identical
from flax import nnx
from test_nnx import Net, X, make_mlp, make_net, make_stack, table_of

import compat
from compat import nnx as compat_nnx


def test_other_methods_and_submodules_run_by_themselves():
    model = make_net()
    x = X @ model.linear.w[...] + model.linear.b[...][None]
    for call in (model.linear, model.features, nnx.jit(model.linear)):
        np.testing.assert_allclose(call(X), x, rtol=1e-12)
    model.batch_norm(x, is_training=True)
    assert model.batch_norm.mean_ema.counter[...] == 1
    block = make_mlp().block
    assert_identical(block(X).squeeze(-1), make_mlp()(X))


def test_a_submodule_that_needs_others_does_not_run_by_itself():
    with pytest.raises(ValueError, match=r"not in sequential: .* call the model"):
        make_stack().sequential(X)


def scanned(make):
    def function(x):
        module = make()
        return hk.scan(lambda x, _: (module(x), None), x, None, 2)[0]

    return compat_nnx.HaikuFunction(function, example=(X,), rngs=nnx.Rngs(0))


def test_replacing_a_submodule():
    model, other = make_mlp(), make_mlp(7)
    model.block.linear_0 = nnx.Linear(3, 4, rngs=nnx.Rngs(1))
    x = jax.nn.gelu(model.block.linear_0(X))
    assert_identical(model(X), model.block.linear_1(x).squeeze(-1))
    grads = nnx.grad(lambda model: model(X).sum())(model)
    assert (grads["block"]["linear_0"]["kernel"][...] != 0).any()
    assert table_of(model, X)[2][:2] == ["block/linear_0", "Linear"]

    model.block.linear_0 = other.block.linear_0  # one of ours
    x = jax.nn.gelu(other.block.linear_0(X))
    assert_identical(model(X), model.block.linear_1(x).squeeze(-1))

    model.block = nnx.Linear(3, 1, rngs=nnx.Rngs(1))  # with all that it has
    assert_identical(model(X), model.block(X).squeeze(-1))


def test_a_replaced_submodule_that_would_not_run_is_an_error():
    model = scanned(lambda: hk.Linear(3))
    model.linear.w[...] = jnp.eye(3)
    assert (model(X) == X).all()
    model.linear = nnx.Linear(3, 3, rngs=nnx.Rngs(1))
    without_values = scanned(lambda: hk.Flatten(name="linear"))
    without_values.linear = model.linear
    for scan in (model, without_values):
        with pytest.raises(ValueError, match=r"replaced by a Linear, but Haiku .* inside hk.scan"):
            scan(X)


def test_state_that_the_example_does_not_make_is_an_error():
    def function(x, is_first):
        if not is_first:
            hk.set_state("last", x)
        return x

    model = compat_nnx.HaikuFunction(function, example=(X, True), rngs=nnx.Rngs(0))
    assert (model(X, True) == X).all()
    with pytest.raises(ValueError, match="the call made new state, 'last'"):
        model(X, False)


def count(x):
    number = hk.get_state("number", (), init=jnp.zeros)
    hk.set_state("number", number + 1)
    return x + number


class Count(hk.Module):
    def __call__(self, x):
        return count(x)


def compiled_pair():
    net = hk.transform_with_state(count)
    return hk.TransformedWithState(net.init, jax.jit(net.apply))


def compiled_inside():
    inner = hk.transform_with_state(count)
    apply = jax.jit(inner.apply)

    def function(x):
        lifted, updater = hk.lift_with_state(inner.init, name="inner")
        params, state = lifted(None, x)
        output, state = apply(params, state, None, x)
        updater.update(state)
        return output

    return function


def without_a_setter(x):
    inner = hk.transform_with_state(lambda x: hk.get_state("number", (), init=jnp.ones) * x)
    lifted, updater = hk.transparent_lift_with_state(inner.init)
    _, state = lifted(None, x)
    updater.update(jax.tree.map(lambda number: 2 * number, state))
    return state["~"]["number"]


@pytest.mark.parametrize("make", [compiled_pair, compiled_inside, lambda: without_a_setter])
def test_state_that_no_setter_writes(make):
    """JAX has compiled the code before, or Haiku hands the state over as a whole."""
    x, net = jnp.zeros(()), make()
    model = compat_nnx.HaikuFunction(net, example=(x,), rngs=nnx.Rngs(0))
    plain = net if isinstance(net, hk.TransformedWithState) else hk.transform_with_state(net)
    params, state = plain.init(None, x)
    for _ in range(3):
        output, state = plain.apply(params, state, None, x)
        assert_identical(model(x), output)


def test_state_that_comes_to_nothing_is_not_written():
    def function(x):
        hk.eval_shape(count, x)
        return x + hk.get_state("number", (), init=jnp.zeros)

    model = compat_nnx.HaikuFunction(function, example=(X,), rngs=nnx.Rngs(0))
    assert (jax.jit(lambda x: model(x))(X) == X).all()


def test_one_state_in_two_places_is_an_error():
    def net(x):
        return Count(name="b")(Count(name="a")(x))

    x = jnp.zeros(())
    model = compat_nnx.HaikuFunction(net, example=(x,), rngs=nnx.Rngs(0))
    a, model.a = model.a, model.b
    with pytest.raises(ValueError, match=r"b.number has changed during the call, .*nnx.clone"):
        model(x)
    model.a, a.number = a, model.b.number
    with pytest.raises(ValueError, match=r"b.number has changed during the call, .*nnx.clone"):
        model(x)
    model = compat_nnx.HaikuFunction(net, example=(x,), rngs=nnx.Rngs(0))
    model.a = nnx.clone(model.b)
    assert [float(model(x)) for _ in range(3)] == [0, 2, 4]


def test_state_of_another_submodule_is_not_made_anew():
    class Block(hk.Module):
        def __init__(self, inner, name=None):
            super().__init__(name)
            self.inner = inner

        def __call__(self, x):
            return self.inner(x)

    class Outer(hk.Module):
        def __call__(self, x):
            return Block(Count())(x)

    x = jnp.zeros(())
    model = compat_nnx.wrap(Outer)(example=(x,), rngs=nnx.Rngs(0))
    assert [float(model(x)) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match=r"new state, 'number' of .* call the model"):
        model.block(x)


class Modes(hk.Module):
    def at_rest(self, x, is_training=False):
        return self(x, is_training)

    def __call__(self, x, is_training=True):
        return -x if is_training else x

    def features(self, x):
        return x

    def both(self, x, is_training):
        return self(x, is_training)


@pytest.mark.parametrize("method", ["features", "both", lambda module, x: module(x)])
def test_a_mode_is_for_all_methods(method):
    class OfModes(hk.Module):
        def run(self, x, is_training=True):
            return Modes()(x, is_training)

    model = compat_nnx.wrap(Modes)(example=(X,), rngs=nnx.Rngs(0), method=method)
    other = compat_nnx.HaikuFunction(lambda x: OfModes().run(x), example=(X,), rngs=nnx.Rngs(0))
    for sign in (-1, 1):
        for call in (model, model.both, model.at_rest, other.of_modes.run):
            assert (call(X) == sign * X).all()
        model.eval()
        other.eval()


@pytest.mark.parametrize("transform", [hk.transform, hk.transform_with_state])
@pytest.mark.parametrize("changed", [lambda pair: pair, hk.without_apply_rng])
def test_a_pair_without_draws_may_be_closed_over(transform, changed):
    pair = changed(transform(lambda x: hk.Linear(3)(x)))
    model = compat_nnx.HaikuFunction(pair, example=(X,), rngs=nnx.Rngs(0))
    assert_identical(jax.jit(lambda x: model(x))(X), jax.jit(lambda m, x: m(x))(model, X))
    assert hasattr(model, "rngs") == (changed is not hk.without_apply_rng)


def test_an_other_modules_code_runs_in_its_place():
    model, other = make_mlp(), make_mlp(hidden_activations=jnp.tanh)
    model.block = other.block
    assert_identical(model(X), other(X))
    model.block.linear_0 = other.block.linear_1 = compat_nnx.wrap(hk.Linear)(
        4, example=(X,), rngs=nnx.Rngs(1)
    )
    x = jnp.tanh(model.block.linear_0(X))
    other.block.linear_1 = make_mlp().block.linear_1
    assert_identical(model(X), other.block.linear_1(x).squeeze(-1))


def test_a_submodule_in_the_place_of_another():
    def function(x):
        return hk.Linear(3, name="first")(hk.Linear(3, with_bias=False, name="second")(x))

    model = compat_nnx.HaikuFunction(function, example=(X,), rngs=nnx.Rngs(0))
    model.first = model.second
    w = model.second.w[...]
    np.testing.assert_allclose(model(X), X @ w @ w, rtol=1e-12)


def test_a_native_module_follows_train_and_eval():
    x = X.astype(np.float32)
    model = compat_nnx.wrap(Net)(4, example=(x,), rngs=nnx.Rngs(0))
    model.batch_norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    mean = model.batch_norm.mean[...]
    model(x)
    assert (model.batch_norm.mean[...] != mean).all()
    model.eval()
    mean = model.batch_norm.mean[...]
    model(x)
    assert (model.batch_norm.mean[...] == mean).all()


def test_a_native_module_has_not_all_methods():
    model = make_mlp()
    model.block.linear_0 = nnx.Linear(3, 4, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match=r"linear_0 has been replaced .* a method that the other"):
        model.tangent_kernel(X)


class Scaled(hk.Module):
    def __init__(self, name=None):
        super().__init__(name)
        self.scale = hk.get_parameter("scale", (), init=jnp.ones)

    def __call__(self, x):
        return self.scale * x


def test_a_submodule_that_keeps_an_array_does_not_run_by_itself():
    model = compat_nnx.HaikuFunction(lambda x: Scaled()(x), example=(X,), rngs=nnx.Rngs(0))
    model.scaled.scale[...] = jnp.array(2.0)
    assert (model(X) == 2 * X).all()
    with pytest.raises(ValueError, match=r"scaled cannot run by itself: .* keeps an array"):
        model.scaled(X)
    alone = compat_nnx.wrap(Scaled)(example=(X,), rngs=nnx.Rngs(0))
    assert (alone(X) == X).all()


class Residual(hk.Module):
    def __init__(self, inner, name=None):
        super().__init__(name)
        self.inner = inner

    def __call__(self, x):
        return x + self.inner(x)


def test_a_module_among_the_arguments_is_refused():
    inner = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    for module in (inner, compat.wrap(hk.Linear)(3)):
        with pytest.raises(TypeError, match="Linear of Flax among the arguments would not be"):
            compat_nnx.wrap(Residual)(module, example=(X,), rngs=nnx.Rngs(0))
    model = compat_nnx.HaikuFunction(
        lambda x: Residual(hk.Linear(3, name="inner"))(x), example=(X,), rngs=nnx.Rngs(0)
    )
    model.inner = inner
    assert_identical(model(X), X + inner(X))


class AutoEncoder(hk.Module):
    """Methods with parameters of their own, one of which Flax has a method of that name for."""

    def encode(self, x):
        return hk.Linear(2, name="encoder")(x)

    def train(self, x):
        return hk.Linear(3, name="decoder")(self.encode(x))

    def decode(self, z, is_training=False):
        return hk.Linear(3, name="decoder")(z) * (2 if is_training else 1)


def test_the_method_that_makes_the_parameters():
    make = compat_nnx.wrap(AutoEncoder)
    with pytest.raises(TypeError, match="AutoEncoder has no __call__: give method="):
        make(example=(X,), rngs=nnx.Rngs(0))
    model = make(example=(X,), rngs=nnx.Rngs(0), method="encode")
    assert not hasattr(model, "decoder")
    with pytest.raises(ValueError, match="It is not in the model: give an example"):
        model.decode(model.encode(X))

    def both(module, x, is_training=False):
        return module.decode(module.encode(x), is_training)

    model = make(example=(X,), rngs=nnx.Rngs(0), method=both)
    z = X @ model.encoder.w[...]
    np.testing.assert_allclose(model.encode(X), z, rtol=1e-12)
    expected = z @ model.decoder.w[...]
    np.testing.assert_allclose(model.decode(z), expected, rtol=1e-12)
    model.train()
    np.testing.assert_allclose(model.decode(z), 2 * expected, rtol=1e-12)


def test_a_method_whose_name_flax_has():
    model = compat_nnx.HaikuFunction(
        lambda x: AutoEncoder().train(x), example=(X,), rngs=nnx.Rngs(0)
    )
    x = X @ model.auto_encoder.encoder.w[...]
    np.testing.assert_allclose(model(X), x @ model.auto_encoder.decoder.w[...], rtol=1e-12)
    model.train()  # Flax's own
    compat.haiku_method("train")(model.auto_encoder, X)


# What NNX does with a Haiku module in a native one.


class Native(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.Sequential(nnx.Linear(3, 3, rngs=rngs), make_net())
        self.head = compat_nnx.MLP(2, hidden_dims=(4,), rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(self.layers(x)))


def test_in_a_native_module():
    model = Native(nnx.Rngs(0))
    rows = [row[0] for row in table_of(model, X)]
    assert set(rows) > {"", "layers/layers/0", "layers/layers/1/head", "head/block/linear_0"}
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda model: ((model(X) - 1) ** 2).mean())(model)
        optimizer.update(model, grads)
        return loss

    model.eval()
    losses = [step(model, optimizer) for _ in range(10)]
    assert losses[-1] < losses[0] / 2
    assert_identical(copy.deepcopy(model)(X), model(X))
