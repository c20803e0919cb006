"""The contract: what a Flax user may do with ``netket.models.MLP``, ours does to the bit."""

import copy
import dataclasses
import functools
import inspect
import pickle
import typing

import cases
import cloudpickle
import haiku as hk
import jax
import jax.numpy as jnp
import netket as nk
import numpy as np
import optax
import pytest
from comparison import assert_identical, median_ratios, num_calls, outcome
from flax import errors, nnx, serialization, traverse_util
from flax import linen as nn
from flax.core import DenyList, Scope, freeze
from flax.training.train_state import TrainState

import compat
import haiku_mlp

KEY = jax.random.key(0)
X = cases.INPUTS["batch"]
F = {"hidden_dims": (5, 3)}
V = nk.models.MLP(**F).init(KEY, X)
FACES = cases.FACES


def call(model, *args, **kwargs):
    return model(*args, **kwargs)


def bound(model, **kwargs):
    return model.bind(V, **kwargs)


def loss(model, variables):
    return jnp.sum(model.apply(variables, X) ** 2)


# Calls of one model that give a value; V are NetKet's variables of it.


def train(model):
    state = TrainState.create(apply_fn=model.apply, params=V["params"], tx=optax.adam(0.1))
    for _ in range(2):
        grads = jax.grad(lambda p: loss(model, {"params": p}))(state.params)
        state = state.apply_gradients(grads=grads)
    return state.step, state.params, state.opt_state


def freeze_a_layer(model):
    variables = model.init(KEY, X)
    labels = traverse_util.path_aware_map(
        lambda path, _: "frozen" if "Dense_1" in path else "free", variables["params"]
    )
    optimiser = optax.multi_transform(
        {"free": optax.sgd(1.0), "frozen": optax.set_to_zero()}, labels
    )
    grads = jax.grad(lambda p: loss(model, {"params": p}))(variables["params"])
    return labels, optimiser.update(grads, optimiser.init(variables["params"]))[0]


def intercepted(model):
    seen = []

    def interceptor(next_fun, args, kwargs, context):
        output = next_fun(*args, **kwargs)
        module = context.module
        seen.append((type(module).__name__, module.name, module.path, context.method_name))
        seen.append((args, kwargs, output))
        return output * 2

    with nn.intercept_methods(interceptor):
        return model.apply(V, input=X), model.init(KEY, X), seen


def intercepted_row(model):
    """An interceptor that makes parameters and modules in a layer, as in a compact method."""

    def interceptor(next_fun, args, kwargs, context):
        output = next_fun(*args, **kwargs)
        if context.module.name == "Dense_0":
            output = output * context.module.param("scale", nn.initializers.ones, (1, 5))
        if context.module.name == "MLP_0":
            output = output + nn.Dense(1)(args[0])
        return output

    with nn.intercept_methods(interceptor):
        return model.init_with_output(KEY, X)


def captured(model):
    seen = []

    def chosen(module, method):
        seen.append((type(module).__name__, module.name, module.path, method))
        return module.name != "Dense_0"

    return model.apply(V, X, capture_intermediates=chosen, mutable=["intermediates"]), seen


def converted_to_nnx(model):
    module = nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)).lazy_init(X)
    return module(X), nnx.to_pure_dict(nnx.state(module))


def children(model):
    """What a bound model shows of its children, before and after a call."""
    module = bound(model)
    before = repr(module)
    module(X)
    return before, repr(module)


CALLS = {
    # init
    "init": lambda m: m.init(KEY, X),
    "init: streams": lambda m: m.init({"params": KEY, "dropout": jax.random.key(1)}, X),
    "init: old key": lambda m: m.init(jax.random.PRNGKey(3), X),
    "init: by keyword": lambda m: m.init(rngs=KEY, input=X),
    "init: mutable": lambda m: m.init(KEY, X, mutable=["params"]),
    "init: deny list": lambda m: m.init(KEY, X, mutable=DenyList(())),
    "init: captured": lambda m: m.init(KEY, X, capture_intermediates=True),
    "init: method": lambda m: m.init(KEY, X, method=call),
    "init: name of a method": lambda m: m.init(KEY, X, method="__call__"),
    "init: jit": lambda m: jax.jit(m.init)(KEY, X),
    "init: vmap": lambda m: jax.jit(jax.vmap(m.init, (0, None)))(jax.random.split(KEY), X),
    "init: eval_shape": lambda m: jax.eval_shape(m.init, KEY, X),
    "init_with_output": lambda m: m.init_with_output(KEY, X),
    "lazy_init": lambda m: m.lazy_init(KEY, jax.ShapeDtypeStruct((7, 4), jnp.int8)),
    "nn.init": lambda m: nn.init(call, m)(KEY, X),
    "nn.init_with_output": lambda m: nn.init_with_output(call, m)(KEY, X),
    # apply
    "apply": lambda m: m.apply(V, X),
    "apply: by keyword": lambda m: m.apply(variables=V, input=X),
    "apply: mutable []": lambda m: m.apply(V, X, mutable=[]),
    "apply: mutable True": lambda m: m.apply(V, X, mutable=True),
    "apply: mutable params": lambda m: m.apply(V, X, mutable="params"),
    "apply: mutable others": lambda m: m.apply(V, X, mutable=["intermediates", "state"]),
    "apply: deny list": lambda m: m.apply(V, X, mutable=DenyList("params")),
    "apply: frozen": lambda m: m.apply(freeze(V), X),
    "apply: frozen, mutable": lambda m: m.apply(freeze(V), X, mutable=True),
    "apply: extra collection": lambda m: m.apply({**V, "cache": {"a": X}}, X, mutable=["cache"]),
    "apply: extra params": lambda m: m.apply({"params": {**V["params"], "a": X}}, X),
    "apply: creates": lambda m: m.apply({}, X, rngs=KEY, mutable=["params"]),
    "apply: creates one": lambda m: m.apply(
        {"params": {"MLP_0": {"Dense_0": V["params"]["MLP_0"]["Dense_0"]}}},
        X,
        rngs={"params": KEY},
        mutable=["params"],
    ),
    "apply: keys": lambda m: m.apply(V, X, rngs={"dropout": KEY}),
    "apply: captured": lambda m: m.apply(V, X, capture_intermediates=True, mutable=True),
    "apply: captured by a filter": captured,
    "apply: captured twice": lambda m: m.apply(
        V, X, method=lambda m, x: m(x) + m(2 * x), capture_intermediates=True, mutable=True
    ),
    "apply: not captured": lambda m: m.apply(V, X, capture_intermediates=True),
    "apply: method": lambda m: m.apply(V, X, method=call),
    "apply: jit": lambda m: jax.jit(m.apply)(V, X),
    "apply: vmap": lambda m: jax.vmap(m.apply, (None, 0))(V, X),
    "apply: static": lambda m: jax.jit(type(m).apply, static_argnums=0)(m, V, X),
    "nn.apply": lambda m: nn.apply(call, m)(V, X),
    "grad": lambda m: jax.jit(jax.value_and_grad(lambda v: loss(m, v)))(V),
    "grad by inputs": lambda m: jax.jit(jax.grad(lambda x: m.apply(V, x).sum()))(X),
    "hessian": lambda m: jax.jit(jax.hessian(lambda x: m.apply(V, x).sum()))(X[0]),
    "jvp": lambda m: jax.jit(lambda v: jax.jvp(lambda v: m.apply(v, X), (v,), (v,)))(V),
    # bind, clone, copy
    "bind": lambda m: bound(m)(X),
    "bind: variables": lambda m: bound(m).variables,
    "bind: mutable": lambda m: bound(m, mutable=True, rngs={"a": KEY}).make_rng("a"),
    "bind: children": children,
    "bind: equal": lambda m: (bound(m) == m, bound(m).unbind()[0] == m, bound(m).unbind()[1]),
    "bind: path": lambda m: (bound(m).path, bound(m).name, bound(m).scope.path),
    "clone": lambda m: (m.clone() == m, repr(m.clone(hidden_dims=(2,), name="a"))),
    "copy": lambda m: (m.copy() == m, repr(m.copy(param_dtype=complex))),
    "deepcopy": lambda m: (copy.deepcopy(m) == m, hash(copy.deepcopy(m)) == hash(m)),
    "repr": repr,
    "as a key": lambda m: {m: 1}[m.clone()],
    "unequal": lambda m: (m == m.clone(hidden_dims=(5,)), m == 3, m is m.clone()),
    "name, parent, scope": lambda m: (m.name, m.parent, m.scope),
    "fields": lambda m: [field.name for field in dataclasses.fields(m)],
    "annotations": lambda m: sorted(typing.get_type_hints(type(m))),
    # the scope
    "get_variable": lambda m: m.apply(
        V, method=lambda m: m.get_variable("params", "MLP_0")["Dense_0"]
    ),
    "get_variable: default": lambda m: bound(m).get_variable("params", "a", 3),
    "has_variable": lambda m: (
        bound(m).has_variable("params", "MLP_0"),
        bound(m).has_variable("params", "a"),
    ),
    "put_variable": lambda m: m.apply(
        V, X, method=lambda m, x: m.put_variable("cache", "a", m(x)), mutable=["cache"]
    ),
    "put_variable: before": lambda m: m.apply(
        V,
        X,
        method=lambda m, x: (
            m.put_variable("params", "MLP_0", jax.tree.map(jnp.ones_like, V["params"]["MLP_0"])),
            m(x),
        ),
        mutable=["params"],
    ),
    "has_rng": lambda m: m.apply(
        V,
        X,
        rngs={"params": KEY, "a": KEY},
        method=lambda m, x: (m(x), [m.has_rng(s) for s in ("params", "a", "dropout")]),
    ),
    "make_rng": lambda m: m.apply(
        V,
        X,
        rngs=KEY,
        method=lambda m, x: (m.make_rng("params"), m(x), m.make_rng("params"), m.make_rng("a")),
    ),
    "make_rng: init": lambda m: m.init_with_output(
        KEY, X, method=lambda m, x: (m.make_rng("params"), m(x), m.make_rng(), m(x))
    ),
    "is_initializing": lambda m: [
        m.init_with_output(KEY, method=lambda m: m.is_initializing())[0],
        m.apply({}, rngs=KEY, mutable=True, method=lambda m: m.is_initializing())[0],
    ],
    "is_mutable_collection": lambda m: [
        bound(m, mutable=mutable).is_mutable_collection("params")
        for mutable in (False, True, ["params"], ["a"])
    ],
    # intermediates
    "sow": lambda m: m.apply(
        V,
        X,
        method=lambda m, x: (m.sow("a", "x", x), m.sow("a", "x", m(x))),
        mutable=["a"],
    ),
    "sow: reduce": lambda m: m.apply(
        V,
        X,
        method=lambda m, x: [
            m.sow("a", "x", m(x), init_fn=lambda: 0.0, reduce_fn=lambda a, b: a + b)
            for _ in range(2)
        ],
        mutable=["a"],
    ),
    "sow: immutable": lambda m: m.apply(V, X, method=lambda m, x: m.sow("a", "x", m(x))),
    "sow: name of the block": lambda m: m.apply(
        V, X, method=lambda m, x: m.sow("a", "MLP_0", m(x)), mutable=["a"]
    ),
    "perturb": lambda m: m.init(KEY, X, method=lambda m, x: m.perturb("y", m(x))),
    "perturb: absent": lambda m: m.apply(V, X, method=lambda m, x: m.perturb("y", m(x))),
    "perturb: whole variables": lambda m: jax.grad(
        lambda v: m.apply(v, X, method=lambda m, x: m(m.perturb("x", x)).sum())
    )({**V, "perturbations": {"x": jnp.zeros_like(X)}}),
    "perturb: separate argument": lambda m: jax.grad(
        lambda p: m.apply(
            {**V, "perturbations": p}, X, method=lambda m, x: m(m.perturb("x", x)).sum()
        )
    )({"x": jnp.zeros_like(X)}),
    "perturb: twice": lambda m: jax.grad(
        lambda p: m.apply(
            {**V, "p": p},
            X,
            method=lambda m, x: m(m.perturb("x", m.perturb("x", x, "p") * 2, "p")).sum(),
        )
    )({"x": jnp.zeros_like(X)}),
    "perturb: name of the block": lambda m: m.init(
        KEY, X, method=lambda m, x: m.perturb("MLP_0", m(x))
    ),
    "intercept": intercepted,
    "intercept: parameters": intercepted_row,
    "module_paths": lambda m: {
        path: (type(module).__name__, module.name, repr(module))
        for path, module in m.module_paths(KEY, X).items()
    },
    # the whole
    "TrainState": train,
    "freeze a layer": freeze_a_layer,
    "to_bytes": lambda m: serialization.to_bytes(m.init(KEY, X)),
    "from_bytes": lambda m: serialization.from_bytes(m.init(KEY, X), serialization.to_bytes(V)),
    "to_state_dict": lambda m: serialization.to_state_dict(m.init(KEY, X)),
    "flatten_dict": lambda m: traverse_util.flatten_dict(m.init(KEY, X), sep="/"),
    "ToNNX": converted_to_nnx,
}


@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
def test_call(calls):
    ours, theirs = calls(compat.MLP(**F)), calls(nk.models.MLP(**F))
    assert_identical(ours, theirs)


def test_init_draws_no_key_that_netket_does_not(monkeypatch):
    make_rng = Scope.make_rng

    def places(cls):
        drawn = []
        note = functools.partialmethod(lambda s, name: drawn.append(s.path) or make_rng(s, name))
        monkeypatch.setattr(Scope, "make_rng", note)
        cls(**F).init(KEY, X)
        return drawn

    ours, theirs = map(places, FACES["MLP"])
    assert ours == theirs


def test_lazy_init_of_an_input_that_no_memory_holds():
    """Flax allocates nothing up to 0.12.8; from 0.12.12 on it fails, and so does ours."""
    x = jax.ShapeDtypeStruct((2**50, 4), jnp.int8)
    assert_identical(*(outcome(lambda m: m.lazy_init(KEY, x), cls(**F)) for cls in FACES["MLP"]))


TRANSFORMS = [
    lambda f, x: jax.jvp(f, (x,), (jnp.ones_like(x),))[0],
    pytest.param(lambda f, x: jax.vjp(f, x)[0], marks=pytest.mark.slow),
    pytest.param(lambda f, x: jax.vmap(f)(x), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("cls", [compat.MLP, type("Subclass", (compat.MLP,), {})])
@pytest.mark.parametrize("name", ["MLP_0", "Dense_0"])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=["jvp", "vjp", "vmap"])
def test_an_interceptor_transforms_a_call(cls, name, transform):
    """The initial values inside have the same keys, and calls inside of it are seen."""

    def calls(model):
        seen = []

        def interceptor(next_fun, args, kwargs, context):
            seen.append(context.module.path)
            if context.module.name == name:
                return transform(next_fun, args[0])
            return next_fun(*args, **kwargs)

        with nn.intercept_methods(interceptor):
            return model.init(KEY, X), model.apply(V, X), seen

    assert_identical(calls(cls(**F)), calls(nk.models.MLP(**F)))


TREES = ("init", "init_with_output", "apply: mutable True", "bind: variables")


@pytest.mark.parametrize("name", TREES)
def test_trees_are_plain_dicts(name):
    def check(tree):
        for key, value in tree.items():
            assert type(key) is str
            if not isinstance(value, jax.Array):
                assert type(value) is dict
                check(value)

    result = CALLS[name](compat.MLP(**F))
    check(result[1] if isinstance(result, tuple) else result)


# Calls that raise, with the class of the error.

ERRORS = {
    "init: no input": (lambda m: m.init(KEY), TypeError),
    "init: key": (lambda m: m.init(3, X), errors.InvalidRngError),
    "init: stream": (lambda m: m.init({"dropout": KEY}, X), errors.InvalidRngError),
    "init: of the class": (lambda m: type(m).init(KEY, X), errors.InvalidInstanceModuleError),
    "init: unknown keyword": (lambda m: m.init(KEY, X, a=3), TypeError),
    "init: nothing mutable": (
        lambda m: m.init(KEY, X, mutable=False),
        errors.ScopeCollectionNotFound,
    ),
    "init: number": (lambda m: m.init(KEY, 1.0), IndexError),
    "apply: of the class": (lambda m: type(m).apply(V, X), errors.InvalidInstanceModuleError),
    "apply: params twice": (
        lambda m: m.apply({"params": V}, X),
        errors.ApplyScopeInvalidVariablesStructureError,
    ),
    "apply: a list": (
        lambda m: m.apply({"params": [V]}, X),
        errors.ApplyScopeInvalidVariablesTypeError,
    ),
    "apply: nothing": (lambda m: m.apply({}, X), errors.ScopeCollectionNotFound),
    "apply: no layers": (
        lambda m: m.apply({"params": {"MLP_0": {}}}, X),
        errors.ScopeParamNotFoundError,
    ),
    "apply: a layer missing": (
        lambda m: m.apply({"params": {"MLP_0": {"Dense_0": V["params"]["MLP_0"]["Dense_0"]}}}, X),
        errors.ScopeParamNotFoundError,
    ),
    "apply: a leaf missing": (
        lambda m: m.apply(with_leaf("bias"), X),
        errors.ScopeParamNotFoundError,
    ),
    "apply: creates without a key": (
        lambda m: m.apply({}, X, mutable=["params"]),
        errors.InvalidRngError,
    ),
    "apply: shape of the input": (lambda m: m.apply(V, X[:, :3]), errors.ScopeParamShapeError),
    "apply: method": (lambda m: m.apply(V, X, method="energy"), AttributeError),
    "apply: no method": (
        lambda m: m.apply(V, X, method=3),
        errors.ApplyModuleInvalidMethodError,
    ),
    "put_variable": (
        lambda m: m.apply(V, method=lambda m: m.put_variable("params", "a", X)),
        errors.ModifyScopeVariableError,
    ),
    "param: outside of compact": (
        lambda m: m.init(KEY, method=lambda m: m.param("a", nn.initializers.ones, (3,))),
        ValueError,
    ),
    "perturb: clash": (
        lambda m: m.init(KEY, X, method=lambda m, x: m(m.perturb("MLP_0", x))),
        errors.NameInUseError,
    ),
    "perturb: not there": (
        lambda m: m.apply(
            {**V, "perturbations": {"x": X}}, X, method=lambda m, x: m.perturb("y", m(x))
        ),
        ValueError,
    ),
    "make_rng: no stream": (
        lambda m: m.apply(V, method=lambda m: m.make_rng("a")),
        errors.InvalidRngError,
    ),
    "field, bound": (
        lambda m: setattr(bound(m), "hidden_dims", (3,)),
        errors.SetAttributeFrozenModuleError,
    ),
    "clone: field": (lambda m: m.clone(depth=3), TypeError),
    "constructor": (lambda m: type(m)(depth=3), TypeError),
    "attribute": (lambda m: m.depth, AttributeError),
    "attribute, bound": (lambda m: bound(m).depth, AttributeError),
    "call, unbound": (lambda m: m(X), errors.CallCompactUnboundModuleError),
    "hash, bound": (lambda m: hash(bound(m)), TypeError),
    **{
        f"{name}, unbound": (lambda m, name=name, args=args: getattr(m, name)(*args), ValueError)
        for name, args in {
            "has_rng": ("params",),
            "make_rng": ("params",),
            "is_initializing": (),
            "is_mutable_collection": ("params",),
            "get_variable": ("params", "a"),
            "put_variable": ("params", "a", X),
            "has_variable": ("params", "a"),
            "sow": ("a", "x", X),
            "perturb": ("x", X),
        }.items()
    },
    "variables, unbound": (lambda m: m.variables, ValueError),
    "unbind, unbound": (lambda m: m.unbind(), errors.CallUnbindOnUnboundModuleError),
    "param, unbound": (lambda m: m.param("a", jnp.ones, ()), AssertionError),
    "path, unbound": (lambda m: m.path, ValueError),
    "tabulate: unknown keyword": (lambda m: m.tabulate(KEY, X, a=3), TypeError),
    "lazy_init: shape missing": (lambda m: m.lazy_init(KEY), TypeError),
}


def with_leaf(name, *value):
    """Returns V with another leaf in the first layer, or without it."""
    flat = traverse_util.flatten_dict(V)
    del flat["params", "MLP_0", "Dense_0", name]
    for leaf in value:
        flat["params", "MLP_0", "Dense_0", name] = leaf
    return traverse_util.unflatten_dict(flat)


@pytest.mark.parametrize(("calls", "error"), ERRORS.values(), ids=ERRORS)
def test_error(calls, error):
    ours, theirs = outcome(calls, compat.MLP(**F)), outcome(calls, nk.models.MLP(**F))
    assert isinstance(theirs, error)
    assert_identical(ours, theirs)


LEAVES = {
    "float": 3.0,
    "text": "abc",
    "list": [0.0] * 5,
    "tuple": (0.0,) * 5,
    "dict": {"a": X},
    "shape": np.ones(4),
    "axis": np.ones((1, 5)),
}


@pytest.mark.parametrize("mutable", [False, ["params"]])
@pytest.mark.parametrize("name", ["kernel", "bias"])
@pytest.mark.parametrize("value", LEAVES.values(), ids=LEAVES)
def test_error_of_a_leaf(name, value, mutable):
    variables = with_leaf(name, value)
    ours, theirs = (
        outcome(lambda m: m.apply(variables, X, mutable=mutable, rngs=KEY), cls(**F))
        for cls in FACES["MLP"]
    )
    assert isinstance(theirs, errors.ScopeParamShapeError)
    assert_identical(ours, theirs)


# Functions of the class: lifts, parents, fields.


class Twice(nn.Module):
    """Shares one in compact, beside another one."""

    cls: type

    @nn.compact
    def __call__(self, x):
        shared = self.cls(**F)
        return shared(x) + shared(2 * x) + self.cls(hidden_dims=(2,))(x)


class InSetup(nn.Module):
    cls: type

    def setup(self):
        self.one = self.cls(**F)
        self.many = [self.cls(**F), self.cls(hidden_dims=(2,))]
        self.named = {"a": self.cls(**F)}

    def __call__(self, x):
        return self.one(x) + self.one(2 * x) + self.many[1](x) + self.named["a"](x)

    def inner(self, x):
        return self.one(x)


class OfModules(nn.Module):
    """Gets its parts from outside."""

    first: nn.Module
    second: nn.Module

    def __call__(self, x):
        return self.first(x) + self.second(x)


class Scopes(nn.Module):
    """Has the scope of its part, or of its parts."""

    parts: tuple

    def setup(self):
        for part in self.parts:
            nn.share_scope(self, part)

    def __call__(self, x):
        return sum(part(x) for part in self.parts)


class Lifted(nn.Module):
    """Calls a lifted function in compact."""

    cls: type
    lift: object

    @nn.compact
    def __call__(self, x):
        return self.lift(self.cls, x)


def shown(module, *, grad=True):
    """Returns all that there is to see of a module: its programs, trees and table."""

    def captured(variables, x):
        return module.apply(variables, x, capture_intermediates=True, mutable=["intermediates"])

    def gradient(variables, x):
        return jax.grad(lambda v: jax.tree.leaves(module.apply(v, x))[0].sum())(variables)

    init = module.init_with_output
    variables = jax.eval_shape(init, KEY, X)[1]
    programs = [(init, KEY), (captured, variables), *[(gradient, variables)] * grad]
    traced = [jax.jit(function).trace(arg, X) for function, arg in programs]
    texts = [program.lower().as_text() for program in traced]
    return texts, [program.out_info for program in traced], table(module)


def lifted(lift):
    return lambda mlp: shown(Lifted(mlp, lift))


def scanned(mlp, x):
    scan = nn.scan(
        lambda model, carry, x: (carry + model(x), model(x)),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=3,
    )
    return scan(mlp(**F), jnp.zeros(()), X)


def looped(mlp, x):
    def body(model, carry):
        return carry[0] + 1, carry[1] + model(x)

    model = mlp(**F)
    first = model(x)
    return nn.while_loop(lambda _, carry: carry[0] < 2, body, model, (0, first))[1]


def custom_gradient(mlp, x):
    def forward(model, x):
        return nn.vjp(lambda model, x: model(x), model, x)

    def backward(vjp, cotangent):
        return jax.tree.map(lambda leaf: 2 * leaf, vjp(cotangent))

    return nn.custom_vjp(lambda model, x: model(x), forward, backward)(mlp(**F), x)


def sines(tree):
    return jax.tree.map(jnp.sin, tree)


def mapped(mlp):
    arcsines = functools.partial(jax.tree.map, jnp.arcsin)
    one_way = nn.map_variables(mlp, "params", trans_in_fn=sines, init=True)(**F)
    both_ways = nn.map_variables(mlp, "params", sines, arcsines, init=True)(**F)
    return [
        (m.init(KEY, X), m.apply(V, X), m.apply(V, X, mutable=["params"]), table(m))
        for m in (one_way, both_ways)
    ]


class Residual(nn.Module):
    """A block whose output has the shape of its input, for ``nn.remat_scan``."""

    cls: type

    @nn.compact
    def __call__(self, x):
        return x + self.cls(4, **F)(x)


class Scaled(nn.Module):
    """A parent that gives partitioned parameters."""

    cls: type
    boxed: object

    @nn.compact
    def __call__(self, x):
        init = self.boxed(nn.initializers.lecun_normal(), ("S", None))
        return self.cls(**F, kernel_init=init)(x)


def boxes(boxed):
    def show(mlp):
        model = Scaled(mlp, boxed)
        variables = model.init(KEY, X)
        return (
            variables,
            nn.get_partition_spec(variables),
            model.apply(nn.unbox(variables), X, mutable=["params"]),
            model.apply(variables, X, mutable=["params"]),
            jax.jit(jax.grad(lambda v: loss(model, v)))(variables),
            table(model),
        )

    return show


def subclass(method):
    def show(mlp):
        class Mine(mlp):
            @nn.compact
            def __call__(self, x):
                return method(mlp.__call__, self, x)

        return shown(Mine(**F))

    return show


def mesh_axes(mlp):
    variables = Scaled(mlp, nn.with_logical_partitioning).init(KEY, X)
    return nn.logical_to_mesh(nn.get_partition_spec(variables), (("S", None),))


CLASSES = {
    "compact": lambda mlp: shown(Twice(mlp)),
    "setup": lambda mlp: shown(InSetup(mlp)),
    "setup, another method": lambda mlp: InSetup(mlp).init(KEY, X, method="inner"),
    "from outside": lambda mlp: shown(OfModules(mlp(**F), mlp(**F))),
    "from outside, one": lambda mlp: shown(OfModules(*[mlp(**F)] * 2)),
    "from outside, names": lambda mlp: shown(OfModules(mlp(**F, name="a"), mlp(**F, name="b"))),
    "Sequential": lambda mlp: shown(
        nn.Sequential([mlp(**F), jnp.tanh, lambda x: x[:, None], mlp()])
    ),
    "share_scope": lambda mlp: shown(Scopes((mlp(**F),))),
    "jit": lambda mlp: shown(nn.jit(mlp)(**F)),
    "remat": lambda mlp: shown(nn.remat(mlp)(**F)),
    "vmap, shared": lambda mlp: shown(
        nn.vmap(mlp, variable_axes={"params": None}, split_rngs={"params": False})(**F)
    ),
    "vmap, split": lambda mlp: shown(
        nn.vmap(
            mlp, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2
        )(**F)
    ),
    "map_variables": mapped,
    "add_metadata_axis": lambda mlp: shown(
        nn.add_metadata_axis(mlp, variable_axes={"params": 0})(**F)
    ),
    "fold_rngs": lambda mlp: shown(nn.fold_rngs(mlp)(**F)),
    "remat_scan": lambda mlp: shown(nn.remat_scan(Residual, lengths=(2,))(BLOCKS[mlp])),
    "scan": lifted(scanned),
    "while_loop": lambda mlp: shown(Lifted(mlp, looped), grad=False),
    "custom_vjp": lifted(custom_gradient),
    "vjp": lifted(lambda mlp, x: nn.vjp(lambda m, x: m(x), mlp(**F), x)[0]),
    "jvp": lambda mlp: Lifted(
        mlp, lambda mlp, x: nn.jvp(lambda m, x: m(x), mlp(**F), (x,), (x,), {"params": V["params"]})
    ).apply({"params": {"MLP_0": V["params"]}}, X),
    "cond": lifted(
        lambda mlp, x: nn.cond(True, lambda m, x: m(x), lambda m, x: 2 * m(x), mlp(**F), x)
    ),
    "switch": lifted(
        lambda mlp, x: nn.switch(1, [lambda m, x: m(x), lambda m, x: 2 * m(x)], mlp(**F), x)
    ),
    "Partitioned": boxes(nn.with_partitioning),
    "LogicallyPartitioned": boxes(nn.with_logical_partitioning),
    "logical_to_mesh": mesh_axes,
    "positional": lambda mlp: repr(mlp((5,), None, complex, jnp.tanh, None, False, True, "high")),
    "name": lambda mlp: (mlp(**F, name="a").name, shown(mlp(**F, name="a"))),
    "subclass": subclass(lambda parent, self, x: parent(self, 2 * x)),
    "subclass: parameter before": subclass(
        lambda parent, self, x: self.param("a", nn.initializers.normal(), (3,)) * parent(self, x)
    ),
    "subclass: parameter after": subclass(
        lambda parent, self, x: parent(self, x) * self.param("a", nn.initializers.normal(), (3,))
    ),
    "subclass: variable": subclass(
        lambda parent, self, x: parent(self, x) * self.variable("cache", "a", jnp.ones, 3).value
    ),
    "subclass: layer": subclass(lambda parent, self, x: nn.Dense(2)(parent(self, x)[:, None])),
    "equal": lambda mlp: (
        mlp(**F) == mlp(**F),
        mlp() == mlp(param_dtype=float),
        len({mlp(**F), mlp(**F), mlp()}),
        mlp(**F, name="a") == mlp(**F),
    ),
    "a Flax activation": lambda mlp: shown(
        mlp(**F, hidden_activations=lambda x: nn.LayerNorm()(x))
    ),
    "an activation that tells numbers from arrays": lambda mlp: shown(
        mlp(**F, hidden_activations=lambda x: nn.Dense(x.shape[-1])(x) if x.ndim else x)
    ),
    "a Flax output": lambda mlp: shown(mlp(**F, output_activation=lambda x: nn.Dense(1)(x))),
    "what an initializer gets": lambda mlp: initializer_arguments(
        mlp(**F, param_dtype=jnp.float32)
    ),
    "rows of a dtype": lambda mlp: {
        path: repr(module)
        for path, module in mlp(param_dtype="float32").module_paths(KEY, X).items()
    },
    "signature of the call": lambda mlp: [
        (p.name, p.kind) for p in inspect.signature(mlp.__call__).parameters.values()
    ],
    "signature of the constructor": lambda mlp: [
        (p.name, p.kind) for p in inspect.signature(mlp).parameters.values()
    ],
    "fields": lambda mlp: [
        (f.name, str(f.default), f.kw_only)
        for f in (*dataclasses.fields(mlp), *dataclasses.fields(BLOCKS[mlp]))
        if f.name not in ("kernel_init", "bias_init")
    ],
}
BLOCKS = dict(zip(*FACES.values(), strict=True))


def initializer_arguments(model):
    seen = []

    def init(key, shape, dtype):
        seen.append((key, shape, dtype is jnp.float32, type(dtype).__name__))
        return jnp.ones(shape, dtype)

    model.copy(kernel_init=init, bias_init=init).init(KEY, X)
    return seen


# Like others, and long.
SLOW_CLASSES = {"remat_scan", "map_variables", "vmap, split", "LogicallyPartitioned", "switch"}
SLOW_CLASSES |= {"from outside, one", "from outside, names", "subclass: parameter after", "cond"}
SLOW_CLASSES |= {"subclass: variable", "vmap, shared", "logical_to_mesh", "setup, another method"}
SLOW_CLASSES |= {"jvp", "vjp", "while_loop", "fold_rngs", "a Flax output", "Sequential"}
SLOW_CLASSES |= {"subclass: layer", "subclass: parameter before"}


@pytest.mark.parametrize("name", cases.first(CLASSES.keys() - SLOW_CLASSES, CLASSES))
def test_class(name):
    ours, theirs = map(CLASSES[name], FACES["MLP"])
    assert_identical(ours, theirs)


def test_two_in_one_scope():
    ours, theirs = (outcome(Scopes((mlp(**F), mlp(**F))).init, KEY, X) for mlp in FACES["MLP"])
    assert isinstance(theirs, errors.NameInUseError)
    assert_identical(ours, theirs)


def test_public_names():
    """Beside the methods of the Haiku module, no more than NetKet's."""
    for ours, theirs in FACES.values():
        more = {name for name in {*dir(ours)} - {*dir(theirs)} if not name.startswith("_")}
        assert more == {"tangent_kernel", "connected", "laplacian"}
        assert ours.__doc__


# Tables.

TABLES = {
    "plain": {},
    **{f"depth {depth}": {"depth": depth} for depth in range(4)},
    "show_repeated": {"show_repeated": True},
    "flops": {"compute_flops": True},
    "vjp flops": {"compute_vjp_flops": True},
    "all flops, depth 1": {"compute_flops": True, "compute_vjp_flops": True, "depth": 1},
    "mutable": {"mutable": ["params"]},
    "console": {"console_kwargs": {"width": 60, "force_terminal": False}},
    "table": {"table_kwargs": {"expand": True}},
    "column": {"column_kwargs": {"justify": "right"}},
    "method": {"method": lambda m, x: m(x) + m(2 * x), "show_repeated": True},
}


def table(model, **kwargs):
    kwargs = {"console_kwargs": {"force_terminal": True, "width": 200}, **kwargs}
    return model.tabulate(KEY, X, **kwargs)


@pytest.mark.parametrize(
    "name", cases.first(TABLES.keys() - {"vjp flops", "all flops, depth 1"}, TABLES)
)
def test_table(name):
    kwargs = TABLES[name]
    ours, theirs = (table(mlp(**F), **kwargs) for mlp in FACES["MLP"])
    assert ours == theirs
    ours, theirs = (table(Twice(mlp), **kwargs) for mlp in FACES["MLP"])
    assert ours == theirs


TABLED = {"default", "two_layers", "complex", "bfloat16", "activations", "precision", "bias_init"}


@pytest.mark.parametrize("face", cases.first({"MLP"}, FACES))
@pytest.mark.parametrize("name", cases.first(TABLED, cases.GOOD))
def test_table_of_fields(face, name):
    fields = cases.GOOD[name]
    ours, theirs = FACES[face]
    kwargs = {"compute_flops": face == "MLP"}
    assert table(ours(**fields), **kwargs) == table(theirs(**fields), **kwargs)


def test_table_by_keyword():
    ours, theirs = (mlp(**F).tabulate(KEY, input=X, compute_flops=True) for mlp in FACES["MLP"])
    assert ours == theirs
    assert "input: " in ours


# Where NetKet is broken.


@pytest.mark.parametrize(("fields", "same"), cases.BEYOND.values(), ids=cases.BEYOND)
def test_beyond_netket(fields, same):
    for cls in (compat.MLP, compat.blocks.MLP):
        assert cls(**fields) == cls(**same)
        assert hash(cls(**fields)) == hash(cls(**same))
        assert repr(cls(**fields)) == repr(cls(**same))
    assert_identical(compat.MLP(**fields).init(KEY, X), nk.models.MLP(**same).init(KEY, X))


@pytest.mark.parametrize(("fields", "error", "message"), cases.BAD.values(), ids=cases.BAD)
def test_bad_fields(fields, error, message):
    """Refused by each of the four constructors."""
    for cls in (compat.MLP, compat.blocks.MLP):
        with pytest.raises(error, match=message):
            cls(**fields)
    for cls in (haiku_mlp.MLP, haiku_mlp.blocks.MLP):
        with pytest.raises(error, match=message):
            hk.transform(lambda cls=cls: cls(**fields)).init(KEY)


@pytest.mark.parametrize("name", ["key", "rng"])
def test_an_initializer_without_dtype(name):
    """One with a key first is a JAX initializer, and is called as one."""
    init = {"key": lambda key, shape: jnp.ones(shape), "rng": lambda rng, shape: jnp.ones(shape)}
    ours, theirs = (outcome(mlp(**F, kernel_init=init[name]).init, KEY, X) for mlp in FACES["MLP"])
    assert isinstance(theirs, TypeError)
    assert "takes 2 positional arguments but 3 were given" in str(ours)


@pytest.mark.parametrize("init", [lambda key, shape, dtype: 0.0, lambda *_: jnp.ones(1)])
def test_an_initializer_of_another_shape(init):
    """NetKet keeps what it gives, and broadcasts it."""
    with pytest.raises(errors.ScopeParamShapeError, match='parameter "bias" in "/MLP_0/Dense_0"'):
        compat.MLP(**F, bias_init=init).init(KEY, X)


@pytest.mark.parametrize("package", [pickle, cloudpickle])
@pytest.mark.parametrize("cls", [compat.MLP, compat.blocks.MLP])
@pytest.mark.parametrize("fields", [{}, F, {"param_dtype": complex, "precision": "high"}], ids=str)
def test_pickle(cls, fields, package):
    model = package.loads(package.dumps(cls(**fields)))
    assert model == cls(**fields)
    assert hash(model) == hash(cls(**fields))
    assert_identical(model.init(KEY, X), cls(**fields).init(KEY, X))


def test_equal_models_share_a_trace():
    num_traces = 0

    def apply(model, variables):
        nonlocal num_traces
        num_traces += 1
        return model.apply(variables, X)

    jitted = jax.jit(apply, static_argnums=0)
    for fields in (F, F, {"hidden_dims": [5, 3]}, {"hidden_dims": np.array([5, 3])}):
        jitted(compat.MLP(**fields), V)
    assert num_traces == 1
    jitted(compat.MLP(**F, hidden_activations=jnp.tanh), V)
    assert num_traces == 2


# Compiled programs, and the time to trace them.

PROGRAMS = {
    "two layers": (F, None),
    "a key": (F, KEY),
    "complex": ({**F, "param_dtype": complex}, None),
    "alpha": (cases.GOOD["alpha"], None),
}


@pytest.mark.parametrize(("fields", "rngs"), PROGRAMS.values(), ids=PROGRAMS)
def test_lowered_text(fields, rngs):
    """What XLA compiles: forward, gradient, with mutable collections, and init."""
    variables = jax.eval_shape(nk.models.MLP(**fields).init, KEY, X)

    def text(model):
        def forward(v, x):
            return model.apply(v, x, rngs=rngs)

        def gradient(v, x):
            return jax.grad(lambda v: model.apply(v, x, rngs=rngs).real.sum())(v)

        def mutable(v, x):
            return model.apply(v, x, rngs=rngs, mutable=["state"])

        def init(v, x):
            return model.init(KEY, x)

        functions = (forward, gradient, mutable, init)
        return [jax.jit(function).lower(variables, X).as_text() for function in functions]

    ours, theirs = (text(mlp(**fields)) for mlp in FACES["MLP"])
    assert ours == theirs


def tracing(num_layers):
    """Returns what traces NetKet's model, ours, and the Haiku module alone."""
    fields = {"hidden_dims": (8,) * num_layers}
    theirs, ours = nk.models.MLP(**fields), compat.MLP(**fields)
    net = hk.without_apply_rng(hk.transform(lambda x: haiku_mlp.MLP(**fields)(x)))
    variables = theirs.init(KEY, X)
    params, _ = compat.to_haiku(variables)
    functions = {"theirs": (theirs, variables), "ours": (ours, variables), "haiku": (net, params)}
    return {
        name: lambda model=model, v=v: jax.make_jaxpr(lambda v, x: model.apply(v, x))(v, X)
        for name, (model, v) in functions.items()
    }


DEPTHS = [2, 8, 32]


@pytest.mark.parametrize("num_layers", DEPTHS)
def test_calls_to_trace(num_layers):
    """Fewer calls than NetKet's; JAX's own, which all have, weigh more than their time does."""
    calls = {name: num_calls(trace) for name, trace in tracing(num_layers).items()}
    assert calls["ours"] <= calls["theirs"], calls
    assert calls["haiku"] <= 0.65 * calls["theirs"], calls


@pytest.mark.slow
@pytest.mark.parametrize("num_layers", DEPTHS)
def test_time_to_trace(num_layers):
    ratios = median_ratios(tracing(num_layers), "theirs")
    assert ratios["ours"] <= 1.1, ratios
    assert ratios["haiku"] <= 0.55, ratios
