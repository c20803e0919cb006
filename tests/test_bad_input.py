"""Wrong calls: the exception and the message of each, and nothing changed by any."""

import functools
import re

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors, nnx, traverse_util
from flax import linen as nn

import compat
import haiku_mlp
from compat import nnx as compat_nnx
from haiku_mlp import arguments

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(2, 4))
FIELDS = {"hidden_dims": (3,), "use_output_bias": True}
MODEL = compat.MLP(**FIELDS)
NET = hk.without_apply_rng(hk.transform(lambda x: haiku_mlp.MLP(**FIELDS)(x)))


@pytest.fixture(scope="module")
def variables():
    return MODEL.init(KEY, X)


def snapshot(tree):
    return jax.tree.structure(tree), [np.array(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.fixture(autouse=True)
def unchanged(variables):
    """Fails a test that changes the weights."""
    structure, leaves = snapshot(variables)
    yield
    assert jax.tree.structure(variables) == structure
    for leaf, before in zip(jax.tree.leaves(variables), leaves, strict=True):
        np.testing.assert_array_equal(leaf, before)


def shapes(stored, asked):
    """Both shapes: Flax before 0.12 names them in the other order."""
    return f"(?=.*{re.escape(str(stored))}).*{re.escape(str(asked))}"


# JAX before 0.8, and since.
NOT_NUMBERS = "is not a valid JAX array type|as a JAX value"

INPUTS = {
    "more features": (np.ones((2, 5)), errors.ScopeParamShapeError, shapes((4, 3), (5, 3))),
    "one feature": (np.ones((2, 1)), errors.ScopeParamShapeError, shapes((4, 3), (1, 3))),
    "transposed": (X.T, errors.ScopeParamShapeError, shapes((4, 3), (2, 3))),
    "number": (1.0, IndexError, r"(?s)out of range.*an array \(\.\.\., N\).* axes: 1\.0"),
    "text": ("spins", IndexError, "axes: 'spins'"),
    "texts": (np.full((2, 4), "up"), TypeError, NOT_NUMBERS),
    "objects": (np.full((2, 4), None), TypeError, NOT_NUMBERS),
    "masked": (np.ma.masked_array(X, X > 0), ValueError, "masked"),
    "keys": (jax.random.split(KEY, 4), ValueError, "dtype"),
}


@pytest.mark.parametrize(("x", "error", "message"), INPUTS.values(), ids=INPUTS)
def test_inputs(variables, x, error, message):
    with pytest.raises(error, match=message):
        MODEL.apply(variables, x)
    params, _ = compat.to_haiku(variables)
    # Haiku has no class of its own for a wrong shape.
    with pytest.raises(ValueError if error is errors.ScopeParamShapeError else error):
        NET.apply(params, x)


@pytest.mark.parametrize("dtype", [int, bool])
def test_the_default_initializer_draws_floats(dtype):
    message = f"default kernel_init draws no {jnp.dtype(dtype)}: give one that does"
    with pytest.raises(ValueError, match=message):
        compat.MLP(param_dtype=dtype).init(KEY, X)
    with pytest.raises(ValueError, match=message):
        hk.transform(lambda x: haiku_mlp.MLP(param_dtype=dtype)(x)).init(KEY, X)


def test_several_outputs_are_those_of_the_block():
    """A subclass may have an argument of that name."""

    class Several(haiku_mlp.MLP):
        def __init__(self, output_dim):
            super().__init__(hidden_dims=output_dim)

    def call(module):
        return hk.transform(lambda x: module(output_dim=3)(x)).init(KEY, X)

    with pytest.raises(TypeError, match=r"one output, got output_dim=3: take haiku_mlp\.blocks"):
        call(haiku_mlp.MLP)
    assert "several/block/linear_1" in call(Several)


KEYS = {
    "none": (None, "should be of shape"),
    "number": (5, "should be of shape"),
    "text": ("key", "should be of shape"),
    "three numbers": (jnp.zeros(3, jnp.uint32), "should be of shape"),
    "several": (jax.random.split(KEY, 2), "should be of shape"),
    "another stream": ({"dropout": KEY}, 'needs PRNG for "params"'),
    "no stream": ({}, 'needs PRNG for "params"'),
}


@pytest.mark.parametrize(("key", "message"), KEYS.values(), ids=KEYS)
def test_keys(key, message):
    with pytest.raises(errors.InvalidRngError, match=message):
        MODEL.init(key, X)
    with pytest.raises(errors.InvalidRngError, match=message):
        compat.wrap(hk.Linear)(3).init(key, X)


SHAPES = {
    "bias of one": ("bias", np.ones(1)),
    "bias without axes": ("bias", np.ones(())),
    "bias with an axis more": ("bias", np.ones((1, 3))),
    "kernel of one row": ("kernel", np.ones((1, 3))),
    "kernel of one column": ("kernel", np.ones((4, 1))),
    "kernel without axes": ("kernel", np.ones(())),
    "kernel with an axis in front": ("kernel", np.ones((1, 4, 3))),
    "kernel with an axis behind": ("kernel", np.ones((4, 3, 1))),
    "transposed kernel": ("kernel", np.ones((3, 4))),
    "number": ("bias", 0.0),
    "list": ("bias", [0.0, 0.0, 0.0]),
    "text": ("kernel", "kernel"),
    "dict": ("kernel", {"a": np.ones((4, 3, 1))}),
    "none": ("kernel", None),
}


@pytest.mark.parametrize("mutable", [False, True, ["params"]])
@pytest.mark.parametrize(("name", "value"), SHAPES.values(), ids=SHAPES)
def test_a_leaf_of_the_wrong_shape(variables, name, value, mutable):
    """None is broadcast, and none is replaced by a new one, key or not."""
    layers = variables["params"]["MLP_0"]
    bad = {"params": {"MLP_0": layers | {"Dense_0": layers["Dense_0"] | {name: value}}}}
    with pytest.raises(
        errors.ScopeParamShapeError, match=f'parameter "{name}" in "/MLP_0/Dense_0"'
    ):
        MODEL.apply(bad, X, mutable=mutable, rngs=KEY)
    if isinstance(value, np.ndarray):
        params, _ = compat.to_haiku(bad)
        with pytest.raises(ValueError, match="does not match shape="):
            NET.apply(params, X)


def _without(variables, layer, name):
    layers = dict(variables["params"]["MLP_0"])
    layers[layer] = {key: value for key, value in layers[layer].items() if key != name}
    return {"params": {"MLP_0": layers}}


TREES = {
    "empty": (lambda v: {}, errors.ScopeCollectionNotFound, 'access "kernel"'),
    "without params": (lambda v: v["params"], errors.ScopeCollectionNotFound, 'access "kernel"'),
    "params twice": (
        lambda v: {"params": v},
        errors.ApplyScopeInvalidVariablesStructureError,
        "extra params layer",
    ),
    "params a list": (
        lambda v: {"params": [v]},
        errors.ApplyScopeInvalidVariablesTypeError,
        "dictionary of collections",
    ),
    "array": (lambda v: X, AttributeError, "items"),
    "Haiku's": (
        lambda v: {"params": compat.to_haiku(v)[0]},
        errors.ScopeParamNotFoundError,
        '"kernel" in scope "/MLP_0/Dense_0"',
    ),
    "Haiku's names": (
        lambda v: {"params": {"MLP_0": {"linear_0": v["params"]["MLP_0"]["Dense_0"]}}},
        errors.ScopeParamNotFoundError,
        '"kernel" in scope "/MLP_0/Dense_0"',
    ),
    "without a bias": (
        lambda v: _without(v, "Dense_1", "bias"),
        errors.ScopeParamNotFoundError,
        '"bias" in scope "/MLP_0/Dense_1"',
    ),
    "without a kernel": (
        lambda v: _without(v, "Dense_0", "kernel"),
        errors.ScopeParamNotFoundError,
        '"kernel" in scope "/MLP_0/Dense_0"',
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), TREES.values(), ids=TREES)
def test_trees(variables, change, error, message):
    with pytest.raises(error, match=message):
        MODEL.apply(change(variables), X, rngs=KEY)
    with pytest.raises(error, match=message):
        MODEL.apply(change(variables), X, rngs=KEY, mutable=["intermediates"])


@pytest.mark.parametrize(
    "extra",
    [
        {"MLP_0": {"Dense_0": {"w": np.ones((4, 3))}}},
        {"MLP_0": {"Dense_0": {"b": np.ones(3)}}},
        {"MLP_0": {"Dense_0": {"kernel~": np.ones((4, 3))}}},
        {"MLP_0": {"linear_0": {"kernel": np.ones((4, 3)), "bias": np.ones(3)}}},
        {"block": {"Dense_0": {"kernel": np.ones((4, 3)), "bias": np.ones(3)}}},
        {"/mlp": {"block": {"linear_0": {"w": np.ones((4, 3))}}}},
        {"MLP_0": {"Dense_2": {"kernel": np.ones((1, 1))}}},
    ],
    ids=lambda extra: "/".join(next(iter(traverse_util.flatten_dict(extra)))),
)
def test_extra_parameters_are_ignored(variables, extra):
    """As Flax does; a Haiku name there is no other name for the real one."""
    flat = traverse_util.flatten_dict(variables["params"]) | traverse_util.flatten_dict(extra)
    more = {"params": traverse_util.unflatten_dict(flat)}
    np.testing.assert_array_equal(MODEL.apply(more, X), MODEL.apply(variables, X))


METHODS = {
    "unknown": ("energy", AttributeError, 'no attribute "energy"'),
    "a field": ("hidden_dims", TypeError, "must be a callable"),
    "a number": (3, errors.ApplyModuleInvalidMethodError, "3 is not a valid function"),
    "of another class": (lambda self, x: self.energy(x), AttributeError, 'no attribute "energy"'),
    "without its inputs": (lambda self, x: self.tangent_kernel(), TypeError, "missing 1 required"),
    "of a deep batch": (lambda self, x: self.tangent_kernel(x[None]), ValueError, "must have the"),
}


@pytest.mark.parametrize(("method", "error", "message"), METHODS.values(), ids=METHODS)
def test_methods(variables, method, error, message):
    with pytest.raises(error, match=message):
        MODEL.apply(variables, X, method=method)
    with pytest.raises(error, match=message):
        MODEL.init(KEY, X, method=method)


WRAPPED = {
    "no class": (lambda: compat.wrap(3), TypeError, "subclass of hk.Module, got 3"),
    "no function": (
        lambda: compat.HaikuFunction(3).init(KEY, X),
        TypeError,
        "takes a function, an hk.Transformed",
    ),
    "a class, not a function": (
        lambda: compat.HaikuFunction(hk.Linear),
        TypeError,
        r"got the class Linear: give compat.wrap\(Linear\)",
    ),
    "missing field": (lambda: compat.wrap(hk.Linear)(), TypeError, "'output_size'"),
    "unknown field": (lambda: compat.wrap(hk.Linear)(3, units=4), TypeError, "'units'"),
    "missing parameter": (
        lambda: compat.wrap(hk.Linear)(3).apply({"params": {"b": np.ones(3)}}, X),
        errors.ScopeParamNotFoundError,
        'named "w"',
    ),
    "shape of a parameter": (
        lambda: compat.wrap(hk.Linear)(3).apply({"params": {"w": np.ones((4, 1))}}, X),
        errors.ScopeParamShapeError,
        shapes((4, 1), (4, 3)),
    ),
    "no key for dropout": (
        lambda: compat.HaikuFunction(lambda x: hk.dropout(hk.next_rng_key(), 0.5, x)).apply({}, X),
        errors.InvalidRngError,
        'needs PRNG for "apply"',
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), WRAPPED.values(), ids=WRAPPED)
def test_wrapped(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("fields", [{"hidden_dims": True}, {"hidden_dims": (3, False)}], ids=str)
def test_a_size_is_no_bool(fields):
    """The other wrong fields are in the table of ``cases.py``."""
    with pytest.raises(ValueError, match=r"positive integers, got (True|False)"):
        compat.MLP(**fields)
    with pytest.raises(ValueError, match=r"positive integers, got (True|False)"):
        hk.transform(lambda: haiku_mlp.MLP(**fields)(X)).init(KEY)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_dims": (2**62,)},
        {"hidden_dims": (10**30,)},
        {"hidden_dims": (2**30, 2**30)},
        {"hidden_dims_alpha": 2.0**60},
        {"hidden_dims_alpha": 1e30},
        {"hidden_dims_alpha": float("inf")},
    ],
    ids=str,
)
def test_sizes_that_no_array_has(fields):
    """XLA ends the process over such a size; hence no more than a trace here."""
    with pytest.raises(ValueError, match=r"hidden_dims|layer"):
        jax.eval_shape(lambda: compat.MLP(**fields).init(KEY, X))
    with pytest.raises(ValueError, match=r"hidden_dims|layer"):
        jax.eval_shape(hk.transform(lambda: haiku_mlp.MLP(**fields)(X)).init, KEY)


@pytest.mark.slow
def test_sizes_that_no_memory_holds():
    """More than the address space of a process: an error of JAX's, at once."""
    model, x = compat.MLP(hidden_dims=(2**22, 2**23), use_hidden_bias=False), np.ones((1, 1))
    shapes = jax.eval_shape(model.init, KEY, x)
    assert shapes["params"]["MLP_0"]["Dense_1"]["kernel"].shape == (2**22, 2**23)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Out of memory"):
        jax.block_until_ready(model.init(KEY, x))


def test_nan_stays_where_it_is(variables):
    clean = MODEL.apply(variables, X)
    outputs = MODEL.apply(variables, np.stack([X[0], np.full(4, np.nan)]))
    assert outputs[0] == clean[0]
    assert np.isnan(outputs[1])
    spoiled = jax.tree.map(lambda leaf: leaf * np.nan, variables)
    assert np.isnan(MODEL.apply(spoiled, X)).all()
    _, kept = MODEL.apply(spoiled, X, mutable=["params"], rngs=KEY)
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(kept))


def count_and_fail(x, fail):
    count = hk.get_state("count", (), init=jnp.zeros)
    hk.set_state("count", count + 1)
    if fail:
        raise RuntimeError("in the middle")
    return hk.Linear(3)(x) + count


def test_a_call_that_fails_writes_nothing():
    model = compat.HaikuFunction(count_and_fail)
    first = model.init(KEY, X, fail=False)
    before = snapshot(first)
    bound = model.bind(first, mutable=["state"])
    with pytest.raises(RuntimeError, match="in the middle"):
        bound(X, fail=True)
    assert bound.variables["state"]["~"]["count"] == 0
    assert snapshot(first)[0] == before[0]
    outputs = bound(X, fail=False)
    assert bound.variables["state"]["~"]["count"] == 1
    np.testing.assert_array_equal(outputs, model.apply(first, X, fail=False, mutable=["state"])[0])


def test_an_init_that_fails_leaves_the_next_alone():
    expected = MODEL.init(KEY, X)
    with pytest.raises(TypeError):
        MODEL.init(KEY, np.full((2, 4), "up"))
    jax.tree.map(np.testing.assert_array_equal, MODEL.init(KEY, X), expected)


def test_the_largest_sizes():
    assert arguments.size(2**31 - 1) == 2**31 - 1
    arguments.check_weights(2**24, 2**24)
    with pytest.raises(ValueError, match="at most 2147483647, got 2147483648"):
        arguments.size(2**31)
    with pytest.raises(ValueError, match="give fewer hidden_dims"):
        arguments.check_weights(2**24, 2**24 + 1)


@pytest.mark.parametrize(
    "cls", [haiku_mlp.MLP, haiku_mlp.blocks.MLP, functools.partial(haiku_mlp.Linear, 1)]
)
def test_haiku_modules_are_themselves_alone(cls):
    """Dataclasses without an ``==`` of their own."""

    def same():
        one, other = cls(), cls()
        assert one != other
        assert {one: 1, other: 2}[one] == 1

    hk.transform(same).init(KEY)


def changed(base):
    """A subclass whose own ``__call__`` inherited methods do not know."""

    def call(self, x):
        return 2 * base.__call__(self, x)

    return type("Changed", (base,), {"__call__": call})


ARGUMENTS = {"connected": (X, np.zeros((2, 1, 1), int), np.ones((2, 1, 1))), "laplacian": (X,)}


@pytest.mark.parametrize("method", ARGUMENTS)
@pytest.mark.parametrize("package", [haiku_mlp, haiku_mlp.blocks, compat, compat.blocks])
def test_methods_of_another_call(package, method):
    cls = changed(package.MLP)
    message = f"Changed overrides __call__ but inherits {method}"
    if issubclass(cls, hk.Module):
        net = hk.transform(lambda *args: getattr(cls(hidden_dims=(3,)), method)(*args))
        with pytest.raises(TypeError, match=message):
            net.init(KEY, *ARGUMENTS[method])
    else:
        with pytest.raises(TypeError, match=message):
            cls(hidden_dims=(3,)).init(KEY, *ARGUMENTS[method], method=method)


@pytest.mark.parametrize(
    "activation",
    [
        lambda z: nn.PReLU()(z),
        lambda z: nn.Sequential([nn.tanh, nn.Dense(4)])(z),
        lambda z: nn.PReLU()(z + jnp.broadcast_to(jnp.arange(4.0), z.shape)),
    ],
    ids=["PReLU", "Dense", "of this width"],
)
@pytest.mark.parametrize("method", ARGUMENTS)
@pytest.mark.parametrize("package", [compat, pytest.param(compat.blocks, marks=pytest.mark.slow)])
def test_methods_that_know_no_flax_modules(package, method, activation):
    """Those that an activation makes; one that is a field is known."""
    model = package.MLP(hidden_dims=(4,), hidden_activations=activation)
    variables = model.init(KEY, X)
    for call in (
        lambda: model.init(KEY, *ARGUMENTS[method], method=method),
        lambda: model.apply(variables, *ARGUMENTS[method], method=method),
    ):
        with pytest.raises(TypeError, match=f"{method} knows no activations that make Flax"):
            call()
    with_field = model.clone(hidden_activations=nn.PReLU())
    variables = with_field.init(KEY, X)
    with_field.apply(variables, *ARGUMENTS[method], method=method)


@pytest.mark.parametrize("method", [*ARGUMENTS, "tangent_kernel"])
def test_nnx_methods_of_another_call(method):
    model = changed(compat_nnx.MLP)(4, hidden_dims=(3,), rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=f"it may use super\\(\\).{method}"):
        getattr(model, method)(*ARGUMENTS.get(method, (X,)))


@pytest.mark.parametrize("lift", [nn.remat, nn.jit])
def test_a_lifted_class_has_the_same_call(lift):
    variables = MODEL.init(KEY, X)
    lifted = lift(compat.MLP)(**FIELDS).apply(variables, X, method="laplacian")
    jax.tree.map(
        np.testing.assert_array_equal, lifted, MODEL.apply(variables, X, method="laplacian")
    )


def test_a_method_with_its_call():
    class Doubled(compat.MLP):
        def __call__(self, x):
            return 2 * super().__call__(x)

        def laplacian(self, x):
            return jax.tree.map(lambda a: 2 * a, super().laplacian(x))

    model, plain = (cls(hidden_dims=(3,)) for cls in (Doubled, compat.MLP))
    variables = plain.init(KEY, X)
    value, _, _ = model.apply(variables, X, method="laplacian")
    np.testing.assert_allclose(value, model.apply(variables, X), rtol=1e-13)
