"""Calls made twice, out of turn or under construction; modules that a call changes."""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import jmp
import netket as nk
import numpy as np
import pytest
from comparison import assert_close, assert_identical
from flax import errors
from flax import linen as nn

import compat

KEY = jax.random.key(5)
X = np.random.default_rng(0).normal(size=(2, 3))
PLAIN = {"width": 120, "force_terminal": False}


class Two(hk.Module):
    """Has two methods, and a name that Flax's rows once had for themselves."""

    def __call__(self, x):
        return 3 * self.origin(x)

    def origin(self, x):
        return jnp.tanh(hk.Linear(2)(x))


class Deep(hk.Module):
    def __call__(self, x):
        state = hk.get_state("calls", (), init=jnp.zeros)
        hk.set_state("calls", state + 1)
        return Two()(hk.Linear(4)(x))


def assert_changes_nothing(interceptor, mutable):
    """Asserts that the interceptor's model is the model."""
    for model in (compat.wrap(Deep)(), compat.HaikuFunction(lambda x: Deep()(x))):
        variables = model.init(KEY, X)

        def run(params, model=model, variables=variables):
            output = model.apply(variables | {"params": params}, X, mutable=mutable)
            return (output if mutable is False else output[0]).sum()

        expected = jax.jit(jax.value_and_grad(run))(variables["params"])
        with nn.intercept_methods(interceptor):
            assert_identical(model.init(KEY, X), variables)
            assert_close(run(variables["params"]), expected[0], 1e-6)
            with jax.checking_leaks():
                jax.make_jaxpr(jax.value_and_grad(run))(variables["params"])
            call = jax.jit(jax.value_and_grad(run))  # sums in another order, of float32 state
            assert_close(call(variables["params"]), expected, 1e-6)


@pytest.mark.parametrize(
    "mutable", [["state"], pytest.param(["state", "intermediates"], marks=pytest.mark.slow)]
)
def test_a_call_made_twice(mutable):
    def interceptor(next_f, args, kwargs, context):
        first = next_f(*args, **kwargs)
        if type(context.module).__name__ in ("Linear", "Two"):
            return (first + next_f(*args, **kwargs)) / 2
        return first

    assert_changes_nothing(interceptor, mutable)


@pytest.mark.parametrize(
    "mutable", [["state"], pytest.param(["state", "intermediates"], marks=pytest.mark.slow)]
)
def test_another_method_is_called_first(mutable):
    def interceptor(next_f, args, kwargs, context):
        if (type(context.module).__name__, context.method_name) != ("Two", "__call__"):
            return next_f(*args, **kwargs)
        other = context.module.origin(*args, **kwargs)
        return (next_f(*args, **kwargs) + 3 * other) / 2

    assert_changes_nothing(interceptor, mutable)


def test_the_arguments_of_a_call_made_again():
    """Each call gets its own."""

    def interceptor(next_f, args, kwargs, context):
        if type(context.module).__name__ != "Linear":
            return next_f(*args, **kwargs)
        return next_f(2 * args[0]) - next_f(args[0])

    model = compat.HaikuFunction(lambda x: hk.Linear(3)(x))
    variables = model.init(KEY, X)
    with nn.intercept_methods(interceptor):
        ours = model.apply(variables, X)
    np.testing.assert_allclose(ours, X @ variables["params"]["linear"]["w"], rtol=1e-12)


class CallsItself(hk.Module):
    """Calls a public method while it is constructed, as deepqmc's and ColabDesign's do."""

    def __init__(self, name=None):
        super().__init__(name)
        self.scale = self.make("scale")

    def make(self, name):
        return hk.get_parameter(name, (), init=jnp.ones)

    def __call__(self, x):
        return hk.Linear(3)(x) * self.scale


@pytest.mark.parametrize("is_root", [True, False])
def test_a_constructor_calls_a_method(is_root, check_leaks):
    def function(x):
        return CallsItself()(x)

    model = compat.wrap(CallsItself)() if is_root else compat.HaikuFunction(function)
    net = hk.without_apply_rng(hk.transform(function))
    variables = model.init(KEY, X)
    params, _ = compat.to_haiku(variables, root="calls_itself" if is_root else None)
    key = jax.random.key(0)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, net.init(key, X))
    assert_identical(model.apply(variables, X), net.apply(params, X))
    assert "Total Parameters: 13 " in model.tabulate(KEY, X, console_kwargs=PLAIN)
    _, captured = model.apply(variables, X, capture_intermediates=lambda *_: True)
    level = captured["intermediates"] if is_root else captured["intermediates"]["calls_itself"]
    assert level["make"] == (1,)


class UsedUp(hk.Module):
    """Each call takes away a layer and keeps what it computed."""

    def __init__(self, name=None):
        super().__init__(name)
        self.layers = {"first": [hk.Linear(3), hk.Linear(2)], 2: None}

    def __call__(self, x):
        while self.layers["first"]:
            self.kept = x = self.layers["first"].pop(0)(x)
        return x


START = {name: jnp.zeros(()) for name in "abcde"}
STATES = {
    "a mapping, then none": lambda s: 1 + (s["a"] if isinstance(s, dict) else s),
    "in turn": lambda s: s["a"] if isinstance(s, dict) else {"a": s + 1},
    "more keys": lambda s: {**s, f"key {len(s)}": jnp.ones(())},
    "fewer keys": lambda s: {key: s[key] + 1 for key in sorted(s)[1:]},
    "None": lambda s: None if isinstance(s, dict) else {"a": jnp.ones(())},
    "longer": lambda s: [s] if isinstance(s, dict) else [*s, jnp.ones(())],
}
CHANGES = [(START, changed) for changed in STATES.values()] + [(None, lambda s: s or START)]


@pytest.mark.parametrize(("start", "changed"), CHANGES, ids=[*STATES, "None first"])
@pytest.mark.parametrize("is_root", [True, False])
def test_state_that_changes_its_structure(start, changed, is_root):
    class Changing(hk.Module):
        def __call__(self):
            state = hk.get_state("s", (), init=lambda *_: start)
            hk.set_state("s", changed(state))
            return state

    net = hk.transform_with_state(lambda: Changing()())
    model = compat.wrap(Changing)() if is_root else compat.HaikuFunction(lambda: Changing()())
    root = "changing" if is_root else None
    variables = {"state": {}, **model.init(KEY)}
    params, state = net.init(KEY)
    for _ in range(4):
        assert compat.to_haiku(variables, root=root) == (params, state)
        expected, state = net.apply(params, state, None)
        output, changed_variables = model.apply(variables, mutable=["state"])
        assert_identical(output, expected)
        variables = {**variables, **changed_variables}


def test_a_none_that_is_no_value_is_refused():
    for level in ({"w~": None}, {"w~": None, "w": {"b": 1}, "b~": None}):
        with pytest.raises(ValueError, match=r"unknown key '.*~'"):
            compat.to_haiku({"params": {"net": level}})


def test_a_module_called_params():
    """Flax takes it for the collection, in its own models too."""

    class Params(hk.Module):
        def __call__(self, x):
            return hk.Linear(2, name="params")(x)

    class Native(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name="params")(x)

    for model in (compat.wrap(Params)(), Native()):
        with pytest.raises(errors.ApplyScopeInvalidVariablesStructureError):
            model.apply(model.init(KEY, X), X)


def test_flops_of_a_module_that_its_call_uses_up():
    def flops(function):
        model = compat.HaikuFunction(function)
        table = model.tabulate(KEY, X, compute_flops=True, console_kwargs=PLAIN)
        rows = [[cell.strip() for cell in line.split("│")] for line in table.splitlines()]
        return {row[1]: row[5] for row in reversed(rows) if len(row) > 5}  # the first line of each

    used_up = flops(lambda x: UsedUp()(x))
    fresh = flops(lambda x: hk.Linear(2)(hk.Linear(3)(x)))
    assert used_up["used_up"] == used_up[""] != "0"
    assert used_up["used_up/~/linear"] == fresh["linear_1"]


def subclasses(**fields):
    """Returns NetKet's model and ours, called twice in one compact method."""

    def model(base):
        class Twice(base):
            @nn.compact
            def __call__(self, x):
                return super().__call__(x) - super().__call__(x + 1)

        return Twice(**fields)

    return [model(nk.models.MLP), model(compat.MLP)]


class Scaled(nn.Module):
    """Takes numbers too; its parameter is drawn."""

    @nn.compact
    def __call__(self, z):
        return z * self.param("scale", nn.initializers.normal(), ())


def shared(activation):
    """Returns NetKet's model and ours, in one that shares a module with it."""

    def model(mlp):
        class Parent(nn.Module):
            @nn.compact
            def __call__(self, x):
                scaled = Scaled()
                return scaled(mlp(hidden_dims=(4,), hidden_activations=activation(scaled))(x))

        return Parent()

    return [model(nk.models.MLP), model(compat.MLP)]


def dense(z):
    return nn.Dense(5)(z)


@pytest.mark.parametrize(
    "models",
    [
        lambda: subclasses(hidden_dims=(4,)),
        lambda: [
            m(hidden_dims=(3, 4), hidden_activations=dense) for m in (nk.models.MLP, compat.MLP)
        ],
        lambda: subclasses(hidden_dims=(4,), hidden_activations=dense),
        lambda: shared(lambda scaled: lambda z: Scaled()(z)),
        lambda: shared(lambda scaled: scaled),
    ],
    ids=["two calls", "Dense in an activation", "both", "made", "shared"],
)
def test_flax_numbers_the_names(models):
    """As in NetKet's model, which is compact."""
    theirs, ours = models()
    variables = theirs.init(KEY, X)
    assert_identical(ours.init(KEY, X), variables)
    assert_identical(ours.apply(variables, X), theirs.apply(variables, X))
    table = ours.tabulate(KEY, X, console_kwargs=PLAIN)
    assert table == theirs.tabulate(KEY, X, console_kwargs=PLAIN)


def test_a_row_alone():
    """What Flax shows of a layer is a module of its own, with the values of its level."""
    model, seen = compat.MLP(hidden_dims=(4,)), []

    def interceptor(next_f, args, kwargs, context):
        output = next_f(*args, **kwargs)
        seen.append((context.module.path, context.module.clone(parent=None), args, output))
        return output

    variables = model.init(KEY, X)
    with nn.intercept_methods(interceptor):
        model.apply(variables, X)
    assert len(seen) == 4
    for path, module, args, output in seen:
        params = functools.reduce(dict.__getitem__, path, variables["params"])
        assert_identical(module.apply({"params": params}, *args), output)
        assert jax.tree.structure(module.init(KEY, *args)["params"]) == jax.tree.structure(params)


def test_captures_under_a_policy():
    """Have the dtype that the caller gets, at the root and below."""

    def function(x):
        return hk.Linear(2)(hk.nets.MLP((4, 4))(x))

    x = X.astype("float32")
    policy = jmp.get_policy("params=float32,compute=float16,output=float32")
    with hk.mixed_precision.push_policy(hk.nets.MLP, policy):
        for model in (compat.wrap(hk.nets.MLP)((4, 4)), compat.HaikuFunction(function)):
            variables = model.init(KEY, x)
            outputs, captured = model.apply(variables, x, capture_intermediates=True)
            level = captured["intermediates"]
            assert outputs.dtype == level["__call__"][0].dtype == jnp.float32
            level = level.get("mlp", level)
            assert level["__call__"][0].dtype == jnp.float32
            assert level["~/linear_0"]["__call__"][0].dtype == jnp.float16


def test_a_missing_key_says_what_to_give():
    model = compat.HaikuFunction(lambda x: hk.dropout(hk.next_rng_key(), 0.5, x))
    with pytest.raises(Exception, match=r"give rngs=\{'dropout': key\}"):
        model.apply({}, X)
    assert model.apply({}, X, rngs={"dropout": KEY}).shape == X.shape
