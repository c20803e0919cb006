"""``compat.wrap``: Haiku's constructor gets what the user gave, in value, type and order."""

import copy
import dataclasses
import functools
import inspect
import pickle
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import cloudpickle
import flax
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_identical
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict
from hypothesis import given
from hypothesis import strategies as st

import compat
import haiku_mlp
from compat import nnx as compat_nnx

KEY = jax.random.key(0)
X = np.ones((2, 3), np.float32)


class Keeps(hk.Module):
    """Keeps its arguments as they are."""

    def __init__(self, config=None, *rest, name=None, **more):
        super().__init__(name=name)
        self.got = config, rest, more

    def __call__(self):
        return self.got


Wrapped = compat.wrap(Keeps)


@dataclasses.dataclass
class Config:
    sizes: list
    rate: float = 0.5


@dataclasses.dataclass(frozen=True)
class FrozenConfig:
    sizes: list


def got(model):
    """Returns what the constructor of a wrapped class got."""
    return nn.apply(lambda model: seen.append(model()), model)({}) or seen.pop()


seen: list = []
VALUES = {
    "dict": {"tanh": 1, "relu": 2},
    "dict with keys of two types": {1: "a", "b": [2], (3, "c"): None},
    "dict of dicts in a list": [{"b": {"z": 1, "a": [2]}}, ({},)],
    "list": [4, [5], (6, [7])],
    "tuple": (4, (5,)),
    "set": {1, 2},
    "frozen": FrozenDict(a=[1]),
    "a mapping": types.MappingProxyType({"b": 1, "a": [2]}),
    "ordered": OrderedDict(b=[1], a=2),
    "with a default": defaultdict(list, b=[1], a=2),
    "array": np.arange(3),
    "jax array": jnp.arange(3),
    "data": Config([1, 2]),
    "frozen data": FrozenConfig([1, 2]),
    "function": hk.dropout,
    "named tuple": hk.LSTMState([1], {"a": 2}),
    "named by Flax": {"name": 1, "parent": 2, "copy": 3},
}


def same(a, b):
    """Returns whether two values are equal and of equal types, all the way down."""
    if type(a) is not type(b):
        return False
    if hasattr(a, "items"):
        return len(a) == len(b) and all(map(same, a.items(), b.items()))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray | jax.Array):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return a == b


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_a_value(value):
    """It arrives, in whatever way Flax makes a module of the module; it is read as it was."""
    expected = value, (value,), {"more": value}
    model = Wrapped(value, value, more=value)
    for other in (model, model.clone(), copy.copy(model), copy.deepcopy(model)):
        assert other == model
        assert hash(other) == hash(model)
        assert repr(other) == repr(model)
        assert same((other.config, other.rest, other.more), expected)
        assert same(got(other), expected)
    assert same(got(model.clone(config=value)), expected)
    assert same(got(dataclasses.replace(model, config=3)), (3, *expected[1:]))
    if isinstance(value, types.MappingProxyType):
        return  # Python cannot pickle it
    for package in (pickle, cloudpickle):
        loaded = package.loads(package.dumps(model))
        assert same(got(loaded), expected)
        assert loaded == model or isinstance(value, jax.Array)


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("lift", [nn.jit, nn.remat], ids=["jit", "remat"])
def test_a_value_under_lifts(lift, value):
    model = lift(compat.wrap(Shows))(value)
    model.init(KEY)
    assert same(seen.pop(), value)


class Shows(hk.Module):
    def __init__(self, config, name=None):
        super().__init__(name=name)
        self.config = config

    def __call__(self):
        seen[:] = [self.config]
        return jnp.zeros(())


def test_only_what_is_given_is_passed():
    """Code around a constructor (gin, ...) may have defaults of its own."""

    class Configured(Keeps):
        @functools.wraps(Keeps.__init__)
        def __init__(self, *args, **kwargs):
            super().__init__(*args or ["of gin"], **kwargs)

    wrapped = compat.wrap(Configured)
    assert [got(wrapped())[0], got(wrapped(config=3))[0]] == ["of gin", 3]


def test_one_of_the_positional_arguments():
    class Positional(Keeps):
        def __init__(self, first=1, second=2, /, config=3):
            super().__init__((first, second, config))

    wrapped = compat.wrap(Positional)
    assert got(wrapped(second=5))[0] == got(wrapped().clone(second=5))[0] == (1, 5, 3)


def test_a_traced_argument(check_leaks):
    class Scale(hk.Module):
        def __init__(self, by):
            super().__init__()
            self.by = by

        def __call__(self, x):
            return self.by["scale"] * x

    def scaled(scale):
        model = compat.wrap(Scale)({"scale": scale})
        assert model == model.clone() != compat.wrap(Scale)({"scale": 2.0})
        return model.apply({}, 3.0)

    assert jax.jit(jax.value_and_grad(scaled))(2.0) == (6.0, 3.0)


def test_a_change_among_the_more():
    model = Wrapped(1, 2, a=[1], b=2)
    assert got(model.clone(b=3, c=4)) == (1, (2,), {"a": [1], "b": 3, "c": 4})
    assert got(model.clone(config=0)) == (0, (2,), {"a": [1], "b": 2})


def test_containers_are_copied():
    """What user or constructor do to them later changes no model."""

    class Pops(hk.Module):
        def __init__(self, config, name=None):
            super().__init__(name=name)
            self.size = config.pop("sizes").pop()

        def __call__(self):
            return self.size

    config = {"sizes": [1, 2]}
    model = compat.wrap(Pops)(config)
    before = hash(model)
    config["sizes"] = [3]
    model.config["sizes"].append(4)
    assert [model.apply({}), model.apply({})] == [2, 2]
    assert model.config == {"sizes": [1, 2]}
    assert hash(model) == before


class UserItems:
    """Has entries and no hash, but is no mapping: as ``ml_collections.ConfigDict``."""

    __hash__ = None

    def __init__(self, entries):
        self.entries = entries

    def items(self):
        return enumerate(self.entries)


UNEQUAL = {
    "items": (UserItems([1]), UserItems([2])),
    "order": ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    "list and tuple": ([1], (1,)),
    "list and tuple, deep": ({"a": [(1,)]}, {"a": [[1]]}),
    "dict and frozen": ({"a": 1}, FrozenDict(a=1)),
    "dict and ordered": ({"a": 1}, OrderedDict(a=1)),
    "int and float": (1, 1.0),
    "int and bool": ([1], [True]),
    "dtype": (np.zeros(2, int), np.zeros(2)),
    "shape": (np.zeros(2), np.zeros((2, 1))),
    "entries": (np.zeros(2), np.ones(2)),
    "data": (Config([1]), Config([2])),
    "value": ({"a": 1}, {"a": 2}),
    "key": ({1: 0}, {"1": 0}),
}


@pytest.mark.parametrize(("one", "other"), UNEQUAL.values(), ids=UNEQUAL)
def test_unequal(one, other):
    """As the models differ; Flax's cache of ``nn.jit`` compares hashes alone."""
    assert Wrapped(one) != Wrapped(other)
    assert hash(Wrapped(one)) != hash(Wrapped(other))
    assert Wrapped(one) == Wrapped(copy.deepcopy(one))
    assert Wrapped(one) != Wrapped([one])


def test_equal_by_default():
    linear = compat.wrap(hk.Linear)
    assert linear(3) == linear(output_size=3, with_bias=True) != linear(3, False)
    assert hash(linear(3)) == hash(linear(3, True))
    assert len({linear(3), linear(3, True), linear(4)}) == 2
    assert linear(3) != compat.wrap(type("Linear", (hk.Linear,), {}))(3)


# Signatures.

leaves = st.none() | st.booleans() | st.integers(-2, 2) | st.floats(-2, 2) | st.text("ab")
keys = st.text("ab", max_size=2) | st.integers(0, 2)
values = st.recursive(
    leaves | st.just(jnp.tanh),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(keys, inner, max_size=3)
        | st.dictionaries(keys, inner, max_size=2).map(FrozenDict)
    ),
    max_leaves=5,
)
RESERVED = {"copy", "init", "parent", "scope", "haiku_arguments"}  # by Flax or the field names
WAYS_OF_NAME = [
    ("", "", ""),  # none; last of what is positional; of what is by keyword
    ("", "name=None", ""),
    ("", "", "name=None"),
    ("", "", "name"),
    ("name", "", ""),  # first of all
]


@st.composite
def signatures(draw):
    """Returns parts of a signature: by position alone, by both, by keyword; and the defaults."""
    names = draw(st.permutations(["a", "b", "c", "d", *sorted(RESERVED)]))[:6]
    counts = draw(st.tuples(*[st.integers(0, 2)] * 3))
    groups, start = [], 0
    for count in counts:
        groups.append(names[start : start + count])
        start += count
    num_positional = counts[0] + counts[1]
    first_default = draw(st.integers(0, num_positional))
    by_keyword = [name for name in groups[2] if draw(st.booleans())]
    with_default = [*(groups[0] + groups[1])[first_default:], *by_keyword]
    return groups, {name: draw(values) for name in with_default}


def source(groups, defaults, way, has_rest, has_more):
    """Returns the parameters as they stand in a ``def``."""

    def parts(names):
        return [f"{n}: 'list' = defaults[{n!r}]" if n in defaults else n for n in names]

    first, last, keyword = way
    only, both, by_keyword = map(parts, groups)
    lines = [first, *only, *["/"] * bool(only or first), *both, last]
    lines += ["*rest"] if has_rest else ["*"] * bool(by_keyword or keyword)
    lines += [*by_keyword, keyword, "**more" if has_more else ""]
    return ", ".join(filter(None, lines))


@given(
    signature=signatures(),
    way=st.sampled_from(WAYS_OF_NAME),
    has_rest=st.booleans(),
    has_more=st.booleans(),
    args=st.lists(values, max_size=5),
    by_keyword=st.dictionaries(st.sampled_from(["a", "b", "c", "d", "x", *RESERVED]), values),
    flax_name=st.sampled_from([None, "net"]),
)
def test_any_signature(signature, way, has_rest, has_more, args, by_keyword, flax_name):
    """As Python itself binds the arguments, to the same constructor without a name."""
    groups, defaults = signature
    space = {"defaults": defaults, "hk": hk}
    plain = source(groups, defaults, ("", "", ""), has_rest, has_more)
    exec(f"def bind({plain}): return locals()", space)
    named = source(groups, defaults, way, has_rest, has_more)
    body = "got = {k: v for k, v in locals().items() if k not in ('self', '__class__')}; "
    body += f"super().__init__(name={'name' if any(way) else None}); self.got = got"
    exec(
        f"class Net(hk.Module):\n def __init__(self, {named}): {body}\n"
        " def __call__(self): return self.got",
        space,
    )
    wrapped = compat.wrap(space["Net"])
    known = {*groups[1], *groups[2]} | (
        {"x", "a", "b", "c", "d"} - {*groups[0]} if has_more else set()
    )
    kwargs = {name: value for name, value in by_keyword.items() if name in known}
    flax = {
        n + "_" * (n in RESERVED and n in {*groups[1], *groups[2]}): v for n, v in kwargs.items()
    }
    try:
        expected = space["bind"](*args, **kwargs)
    except TypeError:
        with pytest.raises(TypeError, match="Net takes"):
            wrapped(*args, **flax, name=flax_name)
        return
    model = wrapped(*args, **flax, name=flax_name)
    received = got(model)
    if any(way):
        name = received.pop("name")
        assert name == (None if "=" in "".join(way) else flax_name or "net")
    assert same(received, expected)
    for name, value in expected.items():
        assert same(getattr(model, name + "_" * (name in RESERVED)), value)
    clones = [model.clone(), copy.deepcopy(model), wrapped(*args, **flax, name=flax_name)]
    for clone in clones:
        assert clone == model
        assert hash(clone) == hash(model)
        assert repr(clone) == repr(model)
        assert same(got(clone), got(model))
    changed = got(model.clone(**{name: ["new"] for name in flax}))
    if any(way):
        del changed["name"]
    assert same(changed, space["bind"](*args, **{name: ["new"] for name in kwargs}))


@dataclasses.dataclass
class Data(hk.Module):
    size: int
    sizes: list = dataclasses.field(default_factory=lambda: [1, 2])
    rate: float = 0.5
    name: str | None = None

    def __call__(self):
        return self.size, self.sizes, self.rate, hk.get_parameter("w", (self.size,), init=jnp.ones)


@pytest.mark.parametrize(
    "through",
    [copy.copy, copy.deepcopy, lambda m: m.clone()]
    + [
        lambda m, package=package: package.loads(package.dumps(m))
        for package in (pickle, cloudpickle)
    ],
    ids=["copy", "deepcopy", "clone", "pickle", "cloudpickle"],
)
def test_a_dataclass(through):
    """What its factories make is made by Haiku, each time."""
    model = through(compat.wrap(Data)(3, rate=0.1))
    assert model == compat.wrap(Data)(3, rate=0.1)
    outputs, variables = model.init_with_output(KEY)
    assert outputs[:3] == (3, [1, 2], 0.1)
    assert_identical(variables, {"params": {"w": jnp.ones(3, "float32")}})
    changed = model.clone(sizes=[3])
    assert changed.init_with_output(KEY)[0][1] == [3]
    assert (model.sizes, changed.sizes) == ([1, 2], [3])


def test_a_default_that_is_a_function():
    """A field of a dataclass, not a method, though the class has it as an attribute."""
    model = compat.wrap(haiku_mlp.Linear)(3, kernel_init=jax.nn.initializers.ones)
    assert model.bias_init is jax.nn.initializers.zeros
    variables = model.init(KEY, jnp.ones((1, 2)))
    assert_identical(variables["params"]["w"], jnp.ones((2, 3)))
    node = compat_nnx.wrap(haiku_mlp.Linear)(
        3, kernel_init=jax.nn.initializers.ones, example=(jnp.ones((1, 2)),), rngs=nnx.Rngs(0)
    )
    assert (node(jnp.ones((1, 2))) == 2).all()


class Doubled(compat.wrap(hk.Linear)):
    """Of a user."""

    def __call__(self, x):
        return 2 * super().__call__(x)


@pytest.mark.parametrize("package", [pickle, cloudpickle])
def test_a_pickled_subclass(package):
    model = package.loads(package.dumps(Doubled(3, name="net")))
    assert type(model) is Doubled
    assert model == Doubled(3, name="net")
    variables = model.init(KEY, X)
    assert_identical(model.apply(variables, X), 2 * compat.wrap(hk.Linear)(3).apply(variables, X))


# Names.


class Named(hk.Module):
    """A class that needs a name, and makes more of it."""

    def __init__(self, size, name, *rest):
        super().__init__(name=name)
        self.sizes = size, rest
        self.linear = hk.Linear(size, name=f"{name}_linear")

    def __call__(self, x):
        return self.linear(x)


@pytest.mark.parametrize(("name", "root"), [(None, "named"), ("net", "net")])
def test_a_required_name(name, root):
    """Flax's, for the Haiku tree to be that of the same name there."""
    model = compat.wrap(Named)(2, 3, 4, name=name)
    variables = model.init(KEY, X)
    assert list(variables["params"]) == [f"~/{root}_linear"]
    assert model.rest == (3, 4)
    net = hk.without_apply_rng(hk.transform(lambda x: Named(2, root, 3, 4)(x)))
    params, _ = compat.to_haiku(variables, root=root)
    assert jax.tree.structure(params) == jax.tree.structure(jax.eval_shape(net.init, KEY, X))
    assert_identical(model.apply(variables, X), net.apply(params, X))


def test_a_required_name_in_flax():
    class Parent(nn.Module):
        @nn.compact
        def __call__(self, x):
            return compat.wrap(Named)(2)(x), compat.wrap(Named)(2, name="head")(x)

    params = Parent().init(KEY, X)["params"]
    assert {name: list(tree) for name, tree in params.items()} == {
        "Named_0": ["~/Named_0_linear"],
        "head": ["~/head_linear"],
    }


class NamesItself(hk.Module):
    def __init__(self, depth):
        super().__init__(name=f"net_of_{depth}")
        self.depth = depth

    def __call__(self, x):
        return hk.Linear(self.depth)(x)


def test_a_name_made_of_arguments():
    for depth in (2, 3):
        model = compat.wrap(NamesItself)(depth)
        variables = model.init(KEY, X)
        assert set(variables["params"]) == {"linear"}
        net = hk.without_apply_rng(hk.transform(lambda x, n=depth: NamesItself(n)(x)))
        params, _ = compat.to_haiku(variables, root=f"net_of_{depth}")
        assert_identical(model.apply(variables, X), net.apply(params, X))


class LooksAtEntries(hk.Module):
    """Whose constructor cannot be traced."""

    def __init__(self):
        super().__init__(name="looks")
        self.order = np.asarray(hk.get_state("order", [3], jnp.int32, init=descending))

    def __call__(self, x):
        return x[:, self.order]


def descending(shape, dtype):
    return jnp.arange(*shape, dtype=dtype)[::-1]


def test_a_constructor_that_looks_at_entries():
    model = compat.wrap(LooksAtEntries)()
    variables = model.init(KEY, X)
    assert variables["state"]["order"].tolist() == [2, 1, 0]
    assert_identical(model.apply(variables, X), X[:, ::-1])


# Modules as arguments.


class Outer(hk.Module):
    def __init__(self, inner, more=(), name=None):
        super().__init__(name=name)
        self.layers = [inner, *more]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return hk.Linear(3)(x)


def linear(x):
    return hk.Linear(3, name="inner")(x)


class Pair(NamedTuple):
    first: Any
    second: Any


@flax.struct.dataclass
class Struct:
    entries: Any

    def __iter__(self):
        return iter(self.entries)


SHAPES = {"bias": (3,), "kernel": (3, 3)}
HAIKU_SHAPES = {"b": (3,), "w": (3, 3)}
INNER = {
    "a function": ((linear,), {"inner": HAIKU_SHAPES}),
    "a wrapped module": ((compat.wrap(hk.Linear)(3),), {"flax_modules_inner_0": HAIKU_SHAPES}),
    "a Flax module": ((nn.Dense(3),), {"flax_modules_inner_0": SHAPES}),
    "several": (
        (nn.Dense(3), [linear, nn.Dense(3), nn.Dense(3)]),
        {
            "inner": HAIKU_SHAPES,
            "flax_modules_inner_0": SHAPES,
            "flax_modules_more_0": SHAPES,
            "flax_modules_more_1": SHAPES,
        },
    ),
    "a named tuple": (
        (linear, Pair(nn.Dense(3), nn.Dense(3))),
        {"inner": HAIKU_SHAPES, "flax_modules_more_0": SHAPES, "flax_modules_more_1": SHAPES},
    ),
    "a struct": (
        (linear, Struct((nn.Dense(3),))),
        {"inner": HAIKU_SHAPES, "flax_modules_more_0": SHAPES},
    ),
}


@pytest.mark.parametrize("lift", [lambda cls: cls, nn.jit, nn.remat], ids=["none", "jit", "remat"])
@pytest.mark.parametrize(("args", "shapes"), INNER.values(), ids=INNER)
def test_modules_as_arguments(args, shapes, lift):
    """A function makes Haiku modules, a Flax module is a submodule."""
    model = lift(compat.wrap(Outer))(*args)
    assert model == model.clone()
    variables = model.init(KEY, X)
    assert jax.tree.map(jnp.shape, variables["params"]) == {"linear": HAIKU_SHAPES, **shapes}
    order = [
        "flax_modules_inner_0",
        "inner",
        "flax_modules_more_0",
        "flax_modules_more_1",
        "linear",
    ]
    expected = X
    for name in (name for name in order if name in variables["params"]):
        bias, kernel = (np.asarray(leaf) for _, leaf in sorted(variables["params"][name].items()))
        expected = expected @ kernel + bias
    np.testing.assert_allclose(model.apply(variables, X), expected, 1e-4)


class Adding(compat.wrap(Outer)):
    """With fields of its own, as any Flax class may have."""

    scale: float = 2.0
    shift: nn.Module | None = None
    tags: tuple = dataclasses.field(default_factory=tuple)

    def __call__(self, x):
        y = self.scale * super().__call__(x)
        return y if self.shift is None else y + self.shift(x)


def test_fields_of_a_subclass():
    base, model = compat.wrap(Outer)(linear), Adding(linear, scale=3.0)
    variables = base.init(KEY, X)
    assert_identical(model.init(KEY, X), variables)
    assert_identical(model.apply(variables, X), 3 * base.apply(variables, X))
    assert model.clone(scale=4.0).scale == 4
    assert model.clone(more=[linear]).scale == 3
    assert model.tags == ()
    assert model == Adding(linear, scale=3.0) != Adding(linear)
    assert "scale = 3.0" in repr(model)
    assert model == pickle.loads(pickle.dumps(model)) == copy.deepcopy(model)
    with_module = Adding(linear, shift=nn.Dense(3))
    params = with_module.init(KEY, X)["params"]
    shapes = {"inner": HAIKU_SHAPES, "linear": HAIKU_SHAPES, "shift": SHAPES}
    assert jax.tree.map(jnp.shape, params) == shapes


def test_signature_of_a_subclass_with_fields():
    class Needing(compat.wrap(Outer)):
        size: int

    ending = "parent=None, name=None, scale=2.0, shift=None, tags=<class 'tuple'>)"
    assert str(inspect.signature(Adding)) == f"(inner, more=(), *, {ending}"
    assert str(inspect.signature(Needing)) == "(inner, more=(), *, parent=None, name=None, size)"
    assert Needing(linear, size=3).clone(size=4).size == 4
    with pytest.raises(TypeError, match=r"'size'.*takes inner, more, parent, name, size"):
        Needing(linear)
    with pytest.raises(TypeError, match="unexpected keyword argument 'width'"):
        Needing(linear, size=3, width=4)


def test_a_field_is_made_where_it_is_not_given():
    made = []

    class Making(compat.wrap(Outer)):
        entries: list = dataclasses.field(default_factory=lambda: made.append(None) or [])

    model = Making(linear)
    assert len(made) == 1
    assert (model.clone().entries, Making(linear, entries=[3]).entries) == ([], [3])
    assert len(made) == 1


def test_a_constructor_of_its_own():
    class Counting(compat.wrap(Outer)):
        count: int

        def __init__(self, *args, count=1, **kwargs):
            self.count = count
            super().__init__(*args, **kwargs)

    assert (Counting(linear, count=5).count, Counting(linear).clone(count=3).count) == (5, 3)


def test_arguments_of_any_number_change_by_their_name():
    for cls in (Sizes, MoreSizes):
        model = compat.wrap(cls)(3, 4).clone(sizes=(5,))
        assert model.sizes == (5,)
        assert model == compat.wrap(cls)(5)


class Sizes(hk.Module):
    def __init__(self, *sizes, name=None):
        super().__init__(name=name)


class MoreSizes(hk.Module):
    def __init__(self, *sizes, name=None, **more):
        super().__init__(name=name)


def test_a_haiku_module_as_an_argument():
    """Made in Haiku code, where alone it can be: it keeps its name, outside of the wrapped one."""

    def function(x):
        model = compat.wrap(Outer)(hk.Linear(3, name="inner"))
        variables = model.init(KEY, x)
        return model.apply(variables, x), model.apply(variables, x), variables["params"]

    first, second, params = hk.transform(function).apply({}, None, X)
    assert jax.tree.map(jnp.shape, params) == {"/inner": HAIKU_SHAPES, "linear": HAIKU_SHAPES}
    h = X @ params["/inner"]["w"]
    np.testing.assert_allclose(first, h @ params["linear"]["w"], 1e-5)
    assert_identical(first, second)


def test_a_module_as_an_argument_is_shared():
    class Parent(nn.Module):
        @nn.compact
        def __call__(self, x):
            inner = nn.Dense(3)
            return compat.wrap(Outer)(inner, [inner])(inner(x))

    params = Parent().init(KEY, X)["params"]
    assert jax.tree.map(jnp.shape, params) == {
        "Dense_0": SHAPES,
        "Outer_0": {"linear": HAIKU_SHAPES},
    }


class NoHash:
    __hash__ = None

    def __call__(self, key, shape, dtype):
        return jnp.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("init", "wants_key"),
    [
        (jax.nn.initializers.normal(), True),
        (jax.nn.initializers.zeros, True),
        (haiku_mlp.JaxInitializer(jax.nn.initializers.zeros), False),  # draws one itself
        (hk.initializers.Constant(1), False),
        (jnp.zeros, False),
        (lambda key, shape: jnp.zeros(shape), True),
        (lambda rng, shape: jnp.zeros(shape), True),
        (lambda k, s, d: jnp.zeros(s, d), True),
        (lambda s, d: jnp.zeros(s, d), False),
        (lambda shape, dtype, more=None: jnp.zeros(shape, dtype), False),
        (lambda *args: jnp.zeros(*args[1:]), True),
        (lambda shape, *, key=None, more=None: jnp.zeros(shape), False),
        (lambda: None, False),
        (max, True),  # has no signature
        (NoHash(), True),
    ],
)
def test_which_initializers_want_a_key(init, wants_key):
    for _ in range(2):  # the second time it is known
        made = haiku_mlp.initializers.as_haiku_initializer(init)
        assert made == (haiku_mlp.JaxInitializer(init) if wants_key else init)


def test_repr_of_haiku_models():
    def reprs(x):
        return repr(haiku_mlp.MLP(8)), repr(haiku_mlp.blocks.MLP(2)), repr(haiku_mlp.Linear(3))

    mlp, block, linear = hk.transform(reprs).apply({}, None, X)
    assert mlp.startswith("MLP(hidden_dims=(8,), hidden_dims_alpha=None, param_dtype=")
    assert block.startswith("MLP(output_dim=2, hidden_dims=None, ")
    assert linear == "Linear(output_size=3, name='linear')"


# Values that are more than their entries.


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass
class Doubling:
    """Its constructor must not run again."""

    size: int
    sizes: list = dataclasses.field(default_factory=list)
    unset: int = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        self.size *= 2

    def tree_flatten(self):
        return (self.size, self.sizes), None

    @classmethod
    def tree_unflatten(cls, _, children):
        raise NotImplementedError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(init=False)
class Halves:
    """Its constructor takes something else."""

    size: int = dataclasses.field(metadata={"static": True})

    def __init__(self, half):
        self.size = 2 * half


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Noted:
    size: int

    def __eq__(self, other):
        return vars(self) == vars(other)


class ReadOnly(dict):
    """As ``frozendict``."""

    def update(self, *args, **kwargs):
        raise AttributeError("read-only")

    __setitem__ = update

    def __copy__(self):
        return self


def noted():
    value = Noted(3)
    value.remark = "more than its fields"
    return value


@pytest.mark.parametrize(
    "make",
    [
        lambda: Doubling(3, [1]),
        lambda: Halves(3),
        noted,
        lambda: ReadOnly(size=3),
        lambda: ReadOnly(sizes=[3]),
    ],
    ids=["post_init", "init", "attributes", "read-only", "read-only with a list"],
)
def test_values_that_are_more_than_their_entries(make):
    value = make()
    model = Wrapped(value)
    for got in (model.config, model.init_with_output(KEY)[0][0]):
        assert type(got) is type(value)
        assert getattr(got, "__dict__", got) == getattr(value, "__dict__", value)
    assert model == model.clone()
    assert hash(model) == hash(model.clone())


def test_attributes_beside_the_fields_count():
    one, other = noted(), noted()
    assert Wrapped(one) == Wrapped(other)
    other.remark = "another"
    assert Wrapped(one) != Wrapped(other)


def test_lists_in_a_dataclass_are_copied():
    value = Doubling(3, [1])
    model = Wrapped(value)
    value.sizes.append(2)
    assert model.config.sizes == [1]


@pytest.mark.parametrize(
    "make",
    [
        lambda: map(int, "81"),
        lambda: (size for size in (8, 1)),
        lambda: iter([8, 1]),
        lambda: filter(None, (0, 8, 1)),
        lambda: iter({8: 0, 1: 0}),
        lambda: iter(deque([8, 1])),
    ],
    ids=["map", "generator", "list", "filter", "dict", "deque"],
)
def test_iterators_may_be_read_again(make):
    """As plain Haiku makes new ones in each call."""
    model = compat.wrap(hk.nets.MLP)(make())
    expected = compat.wrap(hk.nets.MLP)([8, 1]).init(KEY, X)
    for again in (model, model, model.clone(), model.clone(activate_final=True)):
        assert_identical(again.init(KEY, X), expected)
    assert list(model.output_sizes) == list(model.output_sizes) == [8, 1]
    assert model == model.clone()
    node = compat_nnx.wrap(hk.nets.MLP)(make(), example=(X,), rngs=nnx.Rngs(0))
    assert node.linear_1.w.shape == (8, 1)


def test_an_iterator_of_its_own_class_is_given_as_it_is():
    keys = hk.PRNGSequence(0)
    assert Wrapped(keys).config is keys


def test_an_argument_whose_hash_raises():
    class Unhashable:
        def __hash__(self):
            raise TypeError("not today")

    model = Wrapped(Unhashable())
    assert hash(model) == hash(model.clone())
    assert model == model.clone()
    assert model != Wrapped(Unhashable())


def filling(init):
    """As ``gin.configurable``: arguments that are not given come from elsewhere."""

    @functools.wraps(init)
    def filled(self, *args, **kwargs):
        given = inspect.signature(init).bind_partial(self, *args, **kwargs).arguments
        init(self, *args, **({} if "size" in given else {"size": 5}), **kwargs)

    return filled


class Filled(hk.Module):
    @filling
    def __init__(self, size, name=None):
        super().__init__(name=name)
        self.size = size

    def __call__(self, x):
        return hk.Linear(self.size)(x)


def test_a_constructor_that_fills_in_what_is_missing():
    model = compat.wrap(Filled)()
    for filled, size in ((model, 5), (model.clone(size=2), 2), (compat.wrap(Filled)(3), 3)):
        assert filled.init(KEY, X)["params"]["linear"]["b"].shape == (size,)
    node = compat_nnx.wrap(Filled)(example=(X,), rngs=nnx.Rngs(0))
    assert node.linear.b.shape == (5,)
    assert not hasattr(model, "size")
    with pytest.raises(TypeError, match="missing a required argument: 'output_size'"):
        compat_nnx.wrap(hk.Linear)(example=(X,), rngs=nnx.Rngs(0))


class Pool(hk.Module):
    def __init__(self, method="max", example=1, name=None):
        super().__init__(name=name)
        self.got = method, example

    def __call__(self, x):
        return self.got


def test_arguments_named_as_those_of_the_nnx_face():
    node = compat_nnx.wrap(Pool)(method_="min", example_=3, example=(X,), rngs=nnx.Rngs(0))
    assert node(X) == ("min", 3)
    assert compat.wrap(Pool)(method="min", example=3).apply({}, X) == ("min", 3)


class Underscored(hk.Module):
    def __init__(self, method_, name=None):
        super().__init__(name=name)
        self.got = method_

    def __call__(self, x):
        return self.got


def test_an_argument_that_has_such_a_name_itself():
    node = compat_nnx.wrap(Underscored)(method_=3, example=(X,), rngs=nnx.Rngs(0))
    assert node(X) == 3


class Generating(hk.Module):
    def __init__(self, function, name=None):
        super().__init__(name=name)
        self.function = function

    def __call__(self, x):
        return hk.Linear(2)(self.function(x))


class Surrounding(nn.Module):
    def setup(self):
        self.dense = nn.Dense(3)
        self.inner = compat.wrap(Generating)(self.function)

    def function(self, x):
        return self.dense(x)

    def __call__(self, x):
        return self.inner(x)


def test_a_method_of_the_surrounding_module():
    """Whose text has that of the wrapped one in it."""
    params = Surrounding().init(KEY, X)["params"]
    assert jax.tree.map(jnp.shape, params) == {
        "dense": SHAPES,
        "inner": {"linear": {"b": (2,), "w": (3, 2)}},
    }


@dataclasses.dataclass
class Activated(hk.Module):
    size: int = 3
    act: Callable = dataclasses.field(default=jnp.tanh)
    power: ClassVar[Callable] = lambda self, x: x**self.size

    def __call__(self, x):
        return self.act(x)


class OfItsOwn(Activated):
    def __init__(self, size, name=None):
        hk.Module.__init__(self, name=name)
        self.size = size

    def act(self, x):
        return hk.Linear(self.size)(x)


def test_methods_of_a_dataclass():
    """One in place of a field, and one that is held as a class variable."""
    model = compat.wrap(OfItsOwn)(2)
    assert model.init(KEY, X, method="act")["params"]["~act/linear"]["b"].shape == (2,)
    assert_identical(model.apply({}, X, method="power"), X**2)
    assert "act" not in dir(compat.wrap(Activated))
