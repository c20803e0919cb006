"""``compat.to_flax`` and ``compat.to_haiku``: whole trees, exact inverses, on real files."""

import haiku as hk
import jax
import jax.numpy as jnp
import netket as nk
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from cases import first
from comparison import assert_identical, outcome, root_key
from flax import linen as nn
from flax import serialization, traverse_util
from flax.core import freeze
from hypothesis import given
from hypothesis import strategies as st
from tables.haiku_modules import MODULES
from tables.haiku_programs import PROGRAMS

import compat
import haiku_mlp

KEY = jax.random.key(5)
X = np.random.default_rng(0).normal(size=(2, 4))
FIELDS = {"hidden_dims": (5, 3), "use_output_bias": True}
MODEL = compat.MLP(**FIELDS)
NET = hk.without_apply_rng(hk.transform(lambda x: haiku_mlp.MLP(**FIELDS)(x)))
VARIABLES = nk.models.MLP(**FIELDS).init(KEY, X)
CASES = MODULES | PROGRAMS

# Trees of Haiku, with the level that is left out, and what they are in Flax.

TREES = {
    "the MLP": (
        {"mlp/block/linear_0": {"w": 1, "b": 2}, "mlp/block/linear_1": {"w": 3}},
        {},
        None,
        {"params": {"MLP_0": {"Dense_0": {"kernel": 1, "bias": 2}, "Dense_1": {"kernel": 3}}}},
    ),
    "nothing": ({}, {}, None, {"params": {}}),
    "state alone": ({}, {"a": {"n": 1}}, None, {"params": {}, "state": {"a": {"n": 1}}}),
    "both": (
        {"a/b": {"w": 1}},
        {"a/b/~/c": {"n": 2}},
        None,
        {"params": {"a": {"b": {"w": 1}}}, "state": {"a": {"b": {"~/c": {"n": 2}}}}},
    ),
    "outside of modules": ({"~": {"w": 1}}, {}, None, {"params": {"~": {"w": 1}}}),
    "root": ({"a": {"w": 1}, "a/b": {"w": 2}}, {}, "a", {"params": {"w": 1, "b": {"w": 2}}}),
    "outside of the root": (
        {"a/b": {"w": 1}, "other/b": {"w": 2}, "ab": {"w": 3}},
        {},
        "a",
        {"params": {"b": {"w": 1}, "/other": {"b": {"w": 2}}, "/ab": {"w": 3}}},
    ),
    "methods": (
        {"a/~encode/b": {"w": 1}, "a/~/~c/b": {"w": 2}},
        {},
        None,
        {"params": {"a": {"~encode/b": {"w": 1}, "~/~c/b": {"w": 2}}}},
    ),
    "a value named as a submodule": (
        {"a": {"b": 1}, "a/b": {"w": 2}},
        {},
        None,
        {"params": {"a": {"b~": 1, "b": {"w": 2}}}},
    ),
    "a tree as a value": ({"a": {"w": {"x": 1}}}, {}, None, {"params": {"a": {"w~": {"x": 1}}}}),
    "names with ~": (
        {"a": {"~": 1, "b~": 2, "b": 3}},
        {},
        None,
        {"params": {"a": {"~~": 1, "b~~": 2, "b": 3}}},
    ),
    "NetKet's names in Haiku": (
        {"MLP_0/Dense_0": {"kernel": 1}},
        {},
        None,
        {"params": {"/MLP_0": {"Dense_0": {"kernel": 1}}}},
    ),
    "an MLP beside another module": (
        {"mlp/block/linear_0": {"w": 1}, "linear": {"w": 2}},
        {},
        None,
        {"params": {"mlp": {"block": {"linear_0": {"w": 1}}}, "linear": {"w": 2}}},
    ),
    "an MLP beside a module without values": (
        {"mlp/block/linear_0": {"w": 1}, "linear": {}},
        {},
        None,
        {"params": {"mlp": {"block": {"linear_0": {"w": 1}}}, "linear": {}}},
    ),
    "no layer of NetKet's": ({"Dense_0": {"w": 1}}, {}, None, {"params": {"Dense_0": {"w": 1}}}),
    "a level without values": ({"a": {}}, {}, None, {"params": {"a": {}}}),
    "all outside of the root": ({"b": {"w": 1}}, {}, "a", {"params": {"/b": {"w": 1}}}),
    "outside of modules, with a root": (
        {"~": {"w": 1}, "net/~call/~": {"w": 2}},
        {},
        "net",
        {"params": {"/~": {"w": 1}, "~call/~": {"w": 2}}},
    ),
}


@pytest.mark.parametrize(("params", "state", "root", "variables"), TREES.values(), ids=TREES)
def test_names(params, state, root, variables):
    """Each way is the inverse of the other, and makes new dictionaries."""
    flax = compat.to_flax(params, state, root=root)
    assert flax == variables
    assert compat.to_haiku(variables, root=root) == (params, state)
    assert compat.to_haiku(freeze(variables), root=root) == (params, state)
    flax["params"]["more"] = 1
    for values in compat.to_haiku(variables, root=root)[0].values():
        values.clear()
    assert compat.to_flax(params, state, root=root) == variables


parts = st.sampled_from(["~", "a", "b", "net", "~call", "MLP_0", "Dense_0", "linear_0", "mlp"])
module_names = st.lists(parts, min_size=1, max_size=4).map("/".join)
# Haiku has a ~ behind the name of a module alone.
module_names = module_names.filter(lambda name: not name.startswith("~/"))
value_names = st.sampled_from(
    ["w", "b", "a", "~", "a~", "w~~", "a/b", "kernel", "net", "/a", "params"]
)
values = st.integers(0, 9) | st.dictionaries(st.sampled_from("xa"), st.integers(0, 3), max_size=2)
levels = st.dictionaries(value_names, values, max_size=3)
trees = st.dictionaries(module_names, levels, max_size=4)


@given(trees, trees, st.sampled_from([None, "net", "a", "a/b", "mlp", "~"]), st.booleans())
def test_any_tree_there_and_back(params, state, root, netket):
    variables = outcome(lambda: compat.to_flax(params, state, root=root, netket=netket))
    if isinstance(variables, ValueError):
        # Layers linear_0 and Dense_0 have one name in NetKet's words.
        assert netket
        assert "no name in Flax" in str(variables)
    else:
        assert compat.to_haiku(variables, root=root, netket=netket) == (params, state)


# Each way from Haiku to Flax of an MLP and of a block: the model, its name, how it is told.

ONE, TWO = {"hidden_dims": (5,)}, {"output_dim": 2, "hidden_dims": (5,)}
BLOCK = haiku_mlp.blocks.MLP
WAYS = {
    "MLP": (haiku_mlp.MLP, ONE, "mlp", compat.MLP, {}),
    "MLP, told": (haiku_mlp.MLP, ONE, "mlp", compat.MLP, {"netket": True}),
    "named MLP": (haiku_mlp.MLP, ONE, "psi", compat.MLP, {"root": "psi", "netket": True}),
    "MLP in a module": (haiku_mlp.MLP, ONE, "a/b", compat.MLP, {"root": "a/b", "netket": True}),
    "wrapped MLP": (haiku_mlp.MLP, ONE, "psi", compat.wrap(haiku_mlp.MLP), {"root": "psi"}),
    "block": (BLOCK, TWO, "mlp", compat.blocks.MLP, {"netket": True}),
    "named block": (BLOCK, TWO, "head", compat.blocks.MLP, {"root": "head", "netket": True}),
    "wrapped block": (BLOCK, TWO, "head", compat.wrap(BLOCK), {"root": "head"}),
    "MLP in a function": (haiku_mlp.MLP, ONE, "mlp", None, {"netket": False}),
    "named MLP in a function": (haiku_mlp.MLP, ONE, "psi", None, {}),
    "block in a function": (BLOCK, TWO, "head", None, {}),
    "MLP with an activation": (
        haiku_mlp.MLP,
        ONE | {"hidden_activations": lambda z: z * hk.get_parameter("a", (), init=jnp.ones)},
        "psi",
        compat.MLP,
        {"root": "psi", "netket": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("hk_cls", "fields", "name", "flax_cls", "told"), WAYS.values(), ids=WAYS)
def test_weights_cross(hk_cls, fields, name, flax_cls, told):
    """Trained in one face, used in the other, and back."""

    def function(x):
        return hk_cls(**fields, name=hk.experimental.force_name(name))(x)

    net = hk.without_apply_rng(hk.transform(function))
    model = compat.HaikuFunction(function) if flax_cls is None else flax_cls(**fields)
    params = net.init(KEY, X)
    variables = compat.to_flax(params, **told)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, model.init(KEY, X))
    assert_identical(model.apply(variables, X), net.apply(params, X))
    assert_identical(compat.to_haiku(variables, **told), (params, {}))


NETKET = {"params": {"Dense_0": {"kernel": 1, "bias": 2}}}
BAD = {
    "a value for a module": (
        lambda: compat.to_flax({"linear": 1}),
        "params must be .* got {'linear': 1}",
    ),
    "a pair of trees": (
        lambda: compat.to_flax(({"linear": {"w": 1}}, {})),
        r"params .* got \({'linear': {...}}, {}\): give .* or to_flax\(params, state\)",
    ),
    "Flax variables": (
        lambda: compat.to_flax(VARIABLES),
        "params must be .* got {'params': {'MLP_0': .* to_haiku takes Flax variables",
    ),
    "state": (
        lambda: compat.to_flax({}, {"a": {}, "b": 1}),
        "state must be .* got {'a': {}, 'b': 1}",
    ),
    "more in an MLP": (
        lambda: compat.to_flax({"mlp/block/linear_0": {"w": 1}, "mlp/block/prelu": {"a": 1}}),
        "'mlp/block/linear_0/w' may be .* give netket=True",
    ),
    "more in a layer": (
        lambda: compat.to_flax({"mlp/block/linear_0": {"w": 1, "scale": 2}}),
        "'mlp/block/linear_0/w' may be .* or netket=False",
    ),
    "two of a name": (
        lambda: compat.to_flax({"a/linear_0": {"w": 1}, "a/Dense_0": {}}, root="a", netket=True),
        "'a/Dense_0' in 'params' has no name in Flax",
    ),
    "collection": (
        lambda: compat.to_haiku({"params": {}, "cache": {}}),
        r"{'params': ..., 'state': ...} and no more, got {'cache': {}, 'params': {}}",
    ),
    "no collection": (
        lambda: compat.to_haiku({"MLP_0": {"Dense_0": {"kernel": 1}}}),
        "and no more, got {'MLP_0': {'Dense_0': {...}}}",
    ),
    "no variables": (lambda: compat.to_haiku(({}, {})), r"and no more, got \({}, {}\)"),
    "a module's own tree": (
        lambda: compat.to_haiku({"params": {"~/linear_0": {"w": 1}}}),
        "unknown key '~/linear_0' in 'params'.* as root",
    ),
    "a block": (lambda: compat.to_haiku(NETKET), "'Dense_0' may be .* Haiku name as root"),
    "a block under a name": (lambda: compat.to_haiku(NETKET, root="a"), "'Dense_0' may be"),
    "an MLP under a name": (lambda: compat.to_haiku(VARIABLES, root="nope"), "'MLP_0' may be"),
    "two names of a value": (
        lambda: compat.to_haiku({"params": {"MLP_0": {"Dense_0": {"kernel": 1, "w": 1}}}}),
        "unknown key 'MLP_0/Dense_0/w' in 'params'",
    ),
    "top level": (
        lambda: compat.to_haiku({"params": {"w": 1}}),
        "unknown key 'w' in 'params'.*as root",
    ),
    "no name of compat's": (
        lambda: compat.to_haiku({"params": {"a": {"w~": 1}}}),
        "unknown key 'a/w~' in 'params'",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_errors_name_the_key(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_error_of_a_large_tree_is_short():
    level = {f"layer_{i}": jnp.ones((9, 9)) for i in range(9)}
    with pytest.raises(ValueError, match=r"no more, got {'intermediates'") as info:
        compat.to_haiku({key: {"net": {"block": level}} for key in ["params", "intermediates"]})
    assert len(str(info.value)) < 200


@pytest.mark.parametrize("name", first(CASES.keys() - {"nets.ResNet"}, CASES))
def test_any_module(name):
    """Inverses, and the tree that the adapter has."""
    case = CASES[name]
    net, model = hk.transform_with_state(case.function), compat.HaikuFunction(case.function)
    params, state = jax.eval_shape(net.init, KEY, case.input())
    variables = compat.to_flax(params, state)
    assert compat.to_haiku(variables) == (params, state)
    ours = jax.eval_shape(model.init, KEY, case.input())
    assert {"params": {}, **ours} == variables


def test_the_mlp():
    params, state = compat.to_haiku(VARIABLES)
    assert state == {}
    assert list(params) == [f"mlp/block/linear_{i}" for i in range(3)]
    assert jax.tree.structure(params) == jax.tree.structure(jax.eval_shape(NET.init, KEY, X))
    assert_identical(NET.apply(params, X), MODEL.apply(VARIABLES, X))
    assert_identical(compat.to_flax(params), VARIABLES)


LEAVES = {
    "shapes": jax.ShapeDtypeStruct((4, 5), float),
    "sharded": jax.device_put(np.ones((4, 5)), jax.devices()[0]),
    "boxes": nn.Partitioned(jnp.ones((4, 5)), ("in", "out")),
    "specs": jax.sharding.PartitionSpec("in", None),
    "numbers": 3.0,
    "none": None,
}


@pytest.mark.parametrize("leaf", LEAVES.values(), ids=LEAVES)
def test_leaves_stay_the_objects_that_they_are(leaf):
    flat = dict.fromkeys(traverse_util.flatten_dict(VARIABLES), leaf)
    variables = traverse_util.unflatten_dict(flat)
    params, _ = compat.to_haiku(variables)
    assert all(value is leaf for values in params.values() for value in values.values())
    again = traverse_util.flatten_dict(compat.to_flax(params))
    assert again.keys() == flat.keys()
    assert all(value is leaf for value in again.values())


def test_optimiser_state_goes_along():
    """Each tree of it that is like the parameters; training goes on as if nothing had been."""
    optimiser = optax.adam(0.1)

    def step(apply, params, state):
        grads = jax.jit(jax.grad(lambda params: (apply(params) ** 2).sum()))(params)
        updates, state = optimiser.update(grads, state)
        return optax.apply_updates(params, updates), state

    def of_flax(params):
        return MODEL.apply({"params": params}, X)

    def of_haiku(params):
        return NET.apply(params, X)

    def as_haiku(tree):
        return compat.to_haiku({"params": tree})[0]

    params = VARIABLES["params"]
    params, state = step(of_flax, params, optimiser.init(params))
    haiku_state = optax.tree_utils.tree_map_params(
        optimiser, lambda leaf: leaf, optimiser.init(as_haiku(params))
    )
    adam, *rest = state
    haiku_state = (adam._replace(mu=as_haiku(adam.mu), nu=as_haiku(adam.nu)), *rest)
    ours, our_state = step(of_flax, params, state)
    theirs, their_state = step(of_haiku, as_haiku(params), haiku_state)
    assert_identical(ours, compat.to_flax(theirs)["params"])
    assert_identical(compat.to_flax(their_state[0].nu)["params"], our_state[0].nu)


# Trees of haiku.experimental.flax.


# Which look there like modules.
VALUES_THAT_ARE_TREES = {"a tree as state", "trees as parameters"}


@pytest.mark.parametrize(
    "name",
    first(
        CASES.keys() - {"nets.ResNet"},
        [name for name in CASES if name not in VALUES_THAT_ARE_TREES],
    ),
)
def test_trees_of_haikus_own_adapter(name):
    case = CASES[name]
    net = hk.transform_with_state(case.function)
    rngs = {"params": KEY, "apply": KEY}
    theirs = jax.eval_shape(hk.experimental.flax.Module(net).init, rngs, case.input())
    plain = jax.eval_shape(net.init, KEY, case.input())
    assert compat.to_haiku(theirs) == plain


def test_values_of_haikus_own_adapter():
    """Read, and applied by ours."""
    function = MODULES["BatchNorm"].function
    x = MODULES["BatchNorm"].input()
    theirs = hk.experimental.flax.Module(hk.transform_with_state(function))
    variables = theirs.init(KEY, x)
    ours = compat.to_flax(*compat.to_haiku(variables))
    outputs, changed = compat.HaikuFunction(function).apply(ours, x, mutable=["state"])
    expected, their_changed = theirs.apply(variables, x, mutable=["state"])
    assert_identical(outputs, expected)
    assert_identical(
        compat.to_haiku(changed)[1], compat.to_haiku({"state": their_changed["state"]})[1]
    )
    # From one key both have the same values.
    assert_identical(compat.HaikuFunction(function).init(KEY, x), ours)


# Files.


def by_msgpack(tree, like, path):
    path.write_bytes(serialization.to_bytes(tree))
    return serialization.from_bytes(like, path.read_bytes())


def by_orbax(tree, like, path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path, like)


def by_safetensors(tree, like, path):
    flat = traverse_util.flatten_dict(tree, sep="|")
    safetensors.numpy.save_file({name: np.asarray(leaf) for name, leaf in flat.items()}, path)
    return traverse_util.unflatten_dict(safetensors.numpy.load_file(path), sep="|")


FILES = [by_msgpack, by_orbax, by_safetensors]


@pytest.mark.parametrize("through", FILES, ids=lambda f: f.__name__)
def test_files(through, tmp_path):
    """Saved in one face, loaded in the other, with state."""
    case = MODULES["BatchNorm"]
    net, model = hk.transform_with_state(case.function), compat.HaikuFunction(case.function)
    variables, x = model.init(KEY, case.input()), case.input()
    loaded = through(variables, model.init(jax.random.key(9), x), tmp_path / "flax")
    params, state = net.init(root_key(KEY, "params"), x)
    assert_identical(jax.tree.map(jnp.asarray, compat.to_haiku(loaded)), (params, state))

    haiku_params, _ = compat.to_haiku(VARIABLES)
    like = NET.init(jax.random.key(9), X)
    loaded = through(haiku_params, like, tmp_path / "haiku")
    assert_identical(MODEL.apply(compat.to_flax(loaded), X), MODEL.apply(VARIABLES, X))


def test_one_module_cut_in_two_ways_is_refused():
    """Beside ours, the cut of ``haiku.experimental.flax`` is an unknown key, and is not used."""
    ours, other = {"w": np.ones((3, 2)), "b": np.ones(2)}, {"w": np.zeros((3, 2))}
    variables = {"params": {"net": {"~": {"linear": other}, "~/linear": ours}}}
    with pytest.raises(ValueError, match="unknown key 'net/~/linear/w'"):
        compat.to_haiku(variables)

    class Net(hk.Module):
        def __init__(self):
            super().__init__()
            self.linear = hk.Linear(2)

        def __call__(self, x):
            return self.linear(x)

    outputs = compat.HaikuFunction(lambda x: Net()(x)).apply(variables, np.ones((1, 3)))
    assert outputs.tolist() == [[4.0, 4.0]]
