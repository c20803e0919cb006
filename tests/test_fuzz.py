"""Random models, weights, inputs, lifts and calls: ours against NetKet's, to the bit.

The long run before the first release tried 1000 models of the Flax faces and 1000 of the
Haiku face, 5 in 6 comparisons of values and 1 in 6 of exceptions, without a difference.
Found before that: a leaf or level of the Flax tree with a Haiku name (``w`` beside
``kernel``, ``block`` beside ``MLP_0``) was taken for the real one.  What may differ is
``REFUSED``.  ``pytest --hypothesis-profile=new tests/test_fuzz.py`` tries 1000 new ones a test.
"""

import warnings

import cases
import haiku as hk
import jax
import jax.numpy as jnp
import netket as nk
import numpy as np
from comparison import assert_identical, outcome
from flax import errors, traverse_util
from flax import linen as nn
from flax.core import freeze
from hypothesis import given
from hypothesis import strategies as st

import compat
import haiku_mlp

# Fields.


def telling(key, shape, dtype=float):
    """An initializer whose values show the key, the shape and the dtype that it got."""
    return (jax.random.normal(key, shape) * len(shape)).astype(dtype)


def wrong_shape(key, shape, dtype=float):
    return jnp.ones((*shape[:-1], 1), dtype)


INITIALIZERS = (
    jax.nn.initializers.zeros,
    jax.nn.initializers.normal(0.3),
    nn.with_partitioning(jax.nn.initializers.normal(), (None,)),
    telling,
    wrong_shape,
)
ACTIVATIONS = (None, jax.nn.gelu, jnp.tanh, jax.nn.softmax, jnp.abs, cases.split_gelu, jnp.sum)
DTYPES = (float, complex, "float32", jnp.bfloat16, jnp.complex64, np.dtype("float64"), int)

sizes = st.lists(st.integers(1, 3), max_size=2).map(tuple)
ratios = st.lists(st.sampled_from([1, 2, 0.5]), max_size=2).map(tuple)
activation = st.sampled_from(ACTIVATIONS)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "hidden_dims": st.none() | sizes | sizes | sizes | st.sampled_from([3, (2, 0), (-1,)]),
        "hidden_dims_alpha": st.none() | ratios | st.sampled_from([2, (0.1,)]),
        "param_dtype": st.sampled_from(DTYPES),
        "hidden_activations": activation | st.lists(activation, max_size=2).map(tuple),
        "output_activation": activation,
        "use_hidden_bias": st.booleans(),
        "use_output_bias": st.booleans(),
        "precision": st.sampled_from([None, "highest", jax.lax.Precision.HIGH, ("high",) * 2]),
        "kernel_init": st.sampled_from(INITIALIZERS),
        "bias_init": st.sampled_from(INITIALIZERS),
    },
)


def for_netket(fields):
    """NetKet documents one number for all sizes, and takes a tuple only."""
    names = {"hidden_dims", "hidden_dims_alpha"} & fields.keys()
    return fields | {
        name: (fields[name],) for name in names if isinstance(fields[name], int | float)
    }


# Lifts: functions of the class and the fields.


def in_setup(cls, fields):
    class Parent(nn.Module):
        def setup(self):
            self.first = cls(**fields)
            self.second = cls(**fields)

        def __call__(self, x):
            return self.first(x) + self.second(x) + self.first(2 * x)

    return Parent()


def in_compact(cls, fields):
    class Parent(nn.Module):
        @nn.compact
        def __call__(self, x):
            shared = cls(**fields, name="shared")
            return shared(x) + shared(x + 1) + cls(**fields)(x)

    return Parent()


def in_scan(cls, fields):
    class Parent(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(
                lambda model, total, x: (total + 1, model(x)),
                variable_broadcast="params",
                split_rngs={"params": False},
            )
            return scan(cls(**fields), 0, x)

    return Parent()


def vmapped(axis):
    def lift(cls, fields):
        lifted = nn.vmap(cls, variable_axes={"params": axis}, split_rngs={"params": axis == 0})
        return lifted(**fields)

    return lift


def doubled(tree):
    return jax.tree.map(lambda leaf: 2 * leaf, tree)


LIFTS = {
    "none": lambda cls, fields: cls(**fields),
    "jit": lambda cls, fields: nn.jit(cls)(**fields),
    "remat": lambda cls, fields: nn.remat(cls)(**fields),
    "vmap, shared": vmapped(None),
    "vmap, split": vmapped(0),
    "map_variables": lambda cls, fields: nn.map_variables(
        cls, "params", trans_in_fn=doubled, init=True
    )(**fields),
    "sequential": lambda cls, fields: nn.Sequential([cls(**fields), jnp.tanh]),
    "setup": in_setup,
    "compact": in_compact,
    "scan": in_scan,
}

# Weights: what becomes of the tree that NetKet's model made.


def all_leaves(change):
    return lambda variables, which: jax.tree.map(change, variables)


def one_leaf(change):
    def edit(variables, which):
        flat = traverse_util.flatten_dict(nn.unbox(variables))
        path = sorted(flat)[which % len(flat)]
        value = flat.pop(path)
        return traverse_util.unflatten_dict(flat | change(path, value))

    return edit


EDITS = {
    "none": lambda variables, which: variables,
    "frozen": lambda variables, which: freeze(variables),
    "numpy": all_leaves(np.asarray),
    "float32": all_leaves(lambda leaf: leaf.real.astype(jnp.float32)),
    "complex": all_leaves(lambda leaf: leaf.astype(complex) * 1j),
    "nan": one_leaf(lambda path, leaf: {path: leaf * np.nan}),
    "missing": one_leaf(lambda path, leaf: {}),
    "extra": one_leaf(lambda path, leaf: {path: leaf, (*path[:-1], "extra"): leaf}),
    "extra w": one_leaf(lambda path, leaf: {path: leaf, (*path[:-1], "w"): 2 * leaf}),
    "extra ~": one_leaf(lambda path, leaf: {path: leaf, (*path[:-1], path[-1] + "~"): 2 * leaf}),
    "number": one_leaf(lambda path, leaf: {path: 1.0}),
    "length 1": one_leaf(lambda path, leaf: {path: leaf[..., :1]}),
    "transposed": one_leaf(lambda path, leaf: {path: leaf.T}),
    "one axis more": one_leaf(lambda path, leaf: {path: leaf[None]}),
    "renamed": one_leaf(lambda path, leaf: {(*path[:-1], "w"): leaf}),
    "another collection": lambda variables, which: {**variables, "cache": {"MLP_0": 1.0}},
    "twice params": lambda variables, which: {"params": variables},
    "no collection": lambda variables, which: variables["params"],
}

# Calls.


def norm(outputs):
    return sum(jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(outputs))


INIT = {
    "init": lambda model, key, x: model.init(key, x),
    "init_with_output": lambda model, key, x: model.init_with_output({"params": key}, x),
    "jit": lambda model, key, x: jax.jit(model.init)(key, x),
    "lazy_init": lambda model, key, x: model.lazy_init(key, jax.ShapeDtypeStruct(x.shape, x.dtype)),
    "captured": lambda model, key, x: model.init(key, x, capture_intermediates=True),
    "apply": lambda model, key, x: model.apply({}, x, rngs=key, mutable=["params"]),
    "tabulate": lambda model, key, x: model.tabulate(key, x, console_kwargs={"width": 200}),
}
APPLY = {
    "apply": lambda model, variables, x: model.apply(variables, x),
    "jit": lambda model, variables, x: jax.jit(model.apply)(variables, x),
    "vmap": lambda model, variables, x: jax.vmap(model.apply, (None, 0))(variables, x),
    "grad": lambda model, variables, x: jax.grad(lambda v: norm(model.apply(v, x)))(variables),
    "grad by inputs": lambda model, variables, x: jax.grad(
        lambda x: norm(model.apply(variables, x))
    )(x),
    "eval_shape": lambda model, variables, x: jax.eval_shape(model.apply, variables, x),
    "captured": lambda model, variables, x: model.apply(
        variables, x, capture_intermediates=True, mutable=["intermediates"]
    ),
    "mutable": lambda model, variables, x: model.apply(variables, x, mutable=True),
    "bind": lambda model, variables, x: model.bind(variables)(x),
}

SHAPES = ((3, 4), (4,), (2, 1, 4), (0, 4), (3, 1), (4, 0), ())
INPUTS = st.builds(
    lambda shape, dtype, seed: np.random.default_rng(seed).normal(size=shape).astype(dtype),
    st.sampled_from(SHAPES[:1] * 3 + SHAPES),
    st.sampled_from([float, np.float32, np.int8, bool, complex, jnp.bfloat16]),
    st.integers(0, 3),
)


# What may differ: errors of ours, and why NetKet has none or another.
REFUSED = (
    (ValueError, "must be positive integers", "NetKet has layers without units, or divides by 0"),
    (ValueError, "each must have at least 1", "the same, by hidden_dims_alpha"),
    (ValueError, "are both given", "NetKet looks only after the input, which may be bad too"),
    (ValueError, "entries for", "the same"),
    (
        errors.ScopeParamShapeError,
        "the given initializer is expected to generate shape",
        "NetKet keeps the wrong shape of an initializer and broadcasts or fails in the product",
    ),
)


def is_refused(ours, theirs, fields):
    """Returns whether ours is a documented refusal."""
    if isinstance(ours, errors.ScopeParamShapeError):
        # The same error about weights is NetKet's too.
        asked_for = {fields.get("kernel_init"), fields.get("bias_init")}
        return wrong_shape in asked_for and type(theirs) is not type(ours)
    return any(type(ours) is kind and message in str(ours) for kind, message, _ in REFUSED)


def assert_same(ours, theirs, fields):
    """Asserts identical values, or exceptions of one type, where ours may not differ."""
    if is_refused(ours, theirs, fields):
        return
    if isinstance(ours, Exception) or isinstance(theirs, Exception):
        assert type(ours) is type(theirs), (ours, theirs)
    else:
        assert_identical(ours, theirs)


@given(
    cls=st.sampled_from(["MLP", "MLP", "block"]),
    fields=FIELDS,
    lift=st.sampled_from(["none"] * 5 + list(LIFTS)),
    x=INPUTS,
    init=st.sampled_from(list(INIT)),
    edit=st.sampled_from(["none"] * 5 + list(EDITS)),
    which=st.integers(0, 5),
    apply=st.sampled_from(list(APPLY)),
    x64=st.sampled_from([True, True, True, False]),
)
def test_flax_faces(cls, fields, lift, x, init, edit, which, apply, x64):
    with cases.x64(x64), warnings.catch_warnings():
        # Without x64 NetKet warns of each parameter, and ours of none.
        warnings.filterwarnings("ignore", "Explicitly requested dtype")
        check_flax_face(cls, fields, lift, x, init, edit, which, apply)


def check_flax_face(cls, fields, lift, x, init, edit, which, apply):
    our_cls, their_cls = cases.FACES[cls]
    ours = outcome(LIFTS[lift], our_cls, fields)
    theirs = outcome(LIFTS[lift], their_cls, for_netket(fields))
    key = jax.random.key(which)
    assert_same(outcome(INIT[init], ours, key, x), outcome(INIT[init], theirs, key, x), fields)
    variables = outcome(INIT["init"], theirs, key, x)
    variables = outcome(EDITS[edit], variables, which)
    if not isinstance(variables, Exception):
        expected = outcome(APPLY[apply], theirs, variables, x)
        assert_same(outcome(APPLY[apply], ours, variables, x), expected, fields)


HAIKU_APPLY = ("apply", "jit", "vmap", "grad", "grad by inputs", "eval_shape")
HAIKU_EDITS = ("none", "numpy", "float32", "complex", "nan", "length 1", "transposed", "renamed")


@given(
    fields=FIELDS,
    x=INPUTS,
    edit=st.sampled_from(HAIKU_EDITS),
    which=st.integers(0, 5),
    apply=st.sampled_from(HAIKU_APPLY),
)
def test_haiku_face(fields, x, edit, which, apply):
    """From NetKet's weights NetKet's values; where it raises, an error of Haiku's."""
    theirs = nk.models.MLP(**for_netket(fields))
    variables = outcome(INIT["init"], theirs, jax.random.key(which), x)
    variables = outcome(EDITS[edit], outcome(nn.unbox, variables), which)
    if isinstance(variables, Exception):
        return
    params = outcome(lambda: compat.to_haiku(variables)[0])
    net = hk.without_apply_rng(hk.transform(lambda x: haiku_mlp.MLP(**fields)(x)))
    ours = outcome(APPLY[apply], net, params, x)
    expected = outcome(APPLY[apply], theirs, variables, x)
    if apply == "grad" and not isinstance(ours, Exception):
        ours = compat.to_flax(ours)
    if isinstance(ours, Exception) and isinstance(expected, Exception):
        return
    if isinstance(ours, ValueError) and wrong_shape in fields.values():
        return
    assert_same(ours, expected, fields)
