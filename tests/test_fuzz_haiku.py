"""Random trees of Haiku modules: the Flax faces against plain Haiku, to the bit.

A tree is nested tuples; ``run`` says what each node is.  All map ``(..., 3)`` to itself.
The long run before the first release tried 800 trees without a difference.  Found before
that: two errors about values with the name of a submodule (which Haiku allows and ``init``
refuses), one of them in writing back the state of a tree that ``compat.to_flax`` made.
``pytest --hypothesis-profile=new tests/test_fuzz_haiku.py`` tries 1000 new ones.
"""

import functools
import re

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_identical, outcome, root_key
from hypothesis import given
from hypothesis import strategies as st

import compat
import haiku_mlp

X = np.linspace(-1, 1, 6).reshape(2, 3)
KEY = jax.random.key(5)


class Net(hk.Module):
    """Runs a tree, whose modules become its submodules."""

    def __init__(self, node, name=None):
        super().__init__(name=name)
        self.node = node

    def __call__(self, x):
        return run(self.node, x)


class Holder(hk.Module):
    """Makes two submodules in the constructor, and has two methods beside the call."""

    def __init__(self, node, name=None):
        super().__init__(name=name)
        self.encoder = Net(node)
        self.decoder = hk.Linear(3)

    def __call__(self, x):
        return self.decode(self.encode(x))

    def encode(self, x):
        return self.encoder(x)

    def decode(self, x):
        return self.decoder(x) + hk.get_parameter("offset", (), init=jnp.ones)

    @hk.transparent
    def see_through(self, x):
        return self.encoder(x) + hk.Linear(3)(x)


def twice(node, x, name):
    net = Net(node, name=name)
    return net(net(x))


def methods(node, x, name):
    holder = Holder(node, name=name)
    return holder.see_through(x) + holder.decode(holder.encode(x))


def scan(node, x, name):
    net = Net(node, name=name)
    return hk.scan(lambda carry, _: (net(carry), ()), x, None, length=2)[0]


def fori_loop(node, x, name):
    net = Net(node, name=name)
    if hk.running_init():
        return net(x)
    return hk.fori_loop(0, 2, lambda _, x: net(x), x)


def lifted(node, x, name):
    inner = hk.transform(lambda x: run(node, x))
    params = hk.lift(inner.init, name=name or "lifted")(hk.next_rng_key(), x)
    return inner.apply(params, hk.next_rng_key(), x)


def lifted_with_state(node, x, name):
    return with_state(lambda init: hk.lift_with_state(init, name=name or "lifted"), node, x)


def transparently_lifted_with_state(node, x, name):
    return with_state(hk.experimental.transparent_lift_with_state, node, x)


def with_state(lift, node, x):
    inner = hk.transform_with_state(lambda x: run(node, x))
    init, updater = lift(inner.init)
    output, state = inner.apply(*init(hk.next_rng_key(), x), hk.next_rng_key(), x)
    updater.update(state)
    return output


def choice(choose, node, x, name):
    branches = [Net(node, name=name), hk.Linear(3)]
    if hk.running_init():  # a branch alone makes its own values alone
        return branches[1](branches[0](x))
    return choose(branches, x)


def gradient(node, x, name):
    net = Net(node, name=name)
    return x + hk.grad(lambda x: jnp.sum(net(x) ** 2))(x)


def scope(node, x, name):
    with hk.name_scope(name or "scope"):
        return run(node, x)


def hooks(node, x, name):
    def getter(next_getter, value, context):
        return 2 * next_getter(value)

    def creator(next_creator, shape, dtype, init, context):
        return next_creator(shape, dtype, init) + 1

    def interceptor(next_f, args, kwargs, context):
        output = next_f(*args, **kwargs)
        return output if output is None else 3 * output

    with (
        hk.custom_getter(getter),
        hk.custom_creator(creator),
        hk.intercept_methods(interceptor),
    ):
        return Net(node, name=name)(x)


def with_key(node, x, name):
    key = hk.next_rng_key()
    with hk.with_rng(jax.random.fold_in(key, 1)):
        return run(node, x)


def while_loop(node, x, name):
    net = Net(node, name=name)
    if hk.running_init():
        return net(x)
    return hk.while_loop(lambda carry: carry[0] < 2, lambda c: (c[0] + 1, net(c[1])), (0, x))[1]


def transparently_lifted(node, x, name):
    inner = hk.transform(lambda x: run(node, x))
    params = hk.experimental.transparent_lift(inner.init)(hk.next_rng_key(), x)
    return inner.apply(params, hk.next_rng_key(), x)


def unroll(x, name):
    core = hk.GRU(3, name=name)
    return hk.dynamic_unroll(core, jnp.stack([x, x]), jnp.zeros_like(x))[0][-1]


def counted(x, name):
    count = hk.get_state(name or "count", (), init=jnp.zeros)
    hk.set_state(name or "count", count + 1)
    return x + count


def keyed_init(key, shape, dtype=float):
    return jax.random.uniform(key, shape, dtype)


LEAVES = {
    "linear": lambda x, name: hk.Linear(3, name=name)(x),
    "mlp": lambda x, name: haiku_mlp.blocks.MLP(3, (2,), name=name)(x),
    "haiku mlp": lambda x, name: hk.nets.MLP((2, 3), name=name)(x),
    "layer norm": lambda x, name: hk.LayerNorm(-1, True, True, name=name)(x),
    "batch norm": lambda x, name: hk.BatchNorm(True, True, 0.9, name=name)(x, True),
    "average": lambda x, name: hk.ExponentialMovingAverage(0.9, name=name)(x),
    "spectral norm": lambda x, name: x @ hk.SpectralNorm(name=name)(jnp.eye(3)),
    "dropout": lambda x, name: hk.dropout(hk.next_rng_key(), 0.5, x),
    "recurrent": unroll,
    "attention": lambda x, name: hk.MultiHeadAttention(
        2, 2, model_size=3, w_init_scale=1.0, name=name
    )(x, x, x),
    "parameter": lambda x, name: (
        x * hk.get_parameter(name or "p", (), init=hk.initializers.RandomNormal())
    ),
    "keyed parameter": lambda x, name: (
        x * hk.get_parameter(name or "k", (), init=haiku_mlp.JaxInitializer(keyed_init))
    ),
    "count": counted,
    "forced name": lambda x, name: hk.Linear(
        3, name=hk.experimental.force_name(f"forced/{name or 'linear'}")
    )(x),
}
BRANCHES = {
    "net": lambda node, x, name: Net(node, name=name)(x),
    "holder": lambda node, x, name: Holder(node, name=name)(x),
    "methods": methods,
    "twice": twice,
    "residual": lambda node, x, name: x + run(node, x),
    "name scope": scope,
    "remat": lambda node, x, name: hk.remat(Net(node, name=name))(x),
    "scan": scan,
    "fori_loop": fori_loop,
    "layer_stack": lambda node, x, name: hk.experimental.layer_stack(2, name=name)(
        lambda x: run(node, x)
    )(x),
    "vmap": lambda node, x, name: hk.vmap(Net(node, name=name), split_rng=False)(x),
    "cond": functools.partial(choice, lambda nets, x: hk.cond(jnp.sum(x) > 0, *nets, x)),
    "switch": functools.partial(choice, lambda nets, x: hk.switch(1, nets, x)),
    "while_loop": while_loop,
    "hooks": hooks,
    "with_rng": with_key,
    "grad": gradient,
    "lift": lifted,
    "lift_with_state": lifted_with_state,
    "transparent_lift": transparently_lifted,
    "transparent_lift_with_state": transparently_lifted_with_state,
}


def run(node, x):
    """Runs a node on ``x``."""
    kind, name, *children = node
    if kind == "chain":
        for child in children:
            x = run(child, x)
        return x
    return LEAVES[kind](x, name) if kind in LEAVES else BRANCHES[kind](*children, x, name)


names = st.sampled_from([None, None, "a", "b", "linear_1"])
leaves = st.tuples(st.sampled_from(sorted(LEAVES)), names)
TREES = st.recursive(
    leaves,
    lambda nodes: st.one_of(
        st.tuples(st.just("chain"), st.none(), nodes, nodes),
        st.tuples(st.just("chain"), st.none(), nodes, nodes, nodes),
        st.tuples(st.sampled_from(sorted(BRANCHES)), names, nodes),
        st.tuples(st.sampled_from(sorted(BRANCHES)), names, nodes),
    ),
    max_leaves=6,
)


KEYED = {"keyed parameter", "mlp"}  # with JAX initializers


def describe(leaf):
    return leaf.shape, leaf.dtype


FACES = {
    "HaikuFunction": (lambda node: compat.HaikuFunction(lambda x: Net(node)(x)), None),
    "function": (lambda node: compat.HaikuFunction(lambda x: run(node, x)), None),
    "wrap": (compat.wrap(Net), "net"),
}


def kinds(node):
    return {node[0]}.union(*map(kinds, node[2:]))


CLASH = "is both a value and a submodule"


def both_raised(ours, theirs):
    raised = [isinstance(outcome, Exception) for outcome in (ours, theirs)]
    assert raised[0] == raised[1], (ours, theirs)
    return all(raised)


@pytest.mark.parametrize("branch", BRANCHES)
def test_branches_run_in_haiku(branch):
    """Where Haiku refuses a tree, its test asks no more than that we do."""
    net = hk.transform_with_state(lambda x: run((branch, None, ("linear", None)), x))

    def both(key, x):
        return net.apply(*net.init(key, x), key, x)[0]

    assert jax.eval_shape(both, KEY, X).shape == X.shape


@given(node=TREES, face=st.sampled_from(sorted(FACES)), jit=st.booleans())
def test_haiku_tree(node, face, jit):
    make, root = FACES[face]
    model = make(node)
    net = hk.transform_with_state(lambda x: run(node, x) if face == "function" else Net(node)(x))

    variables = outcome(model.init, KEY, X)
    plain = outcome(net.init, root_key(KEY, "params"), X)
    clash = isinstance(variables, ValueError) and CLASH in str(variables)
    if clash and not isinstance(plain, Exception):
        # Haiku allows it, and Flax takes the tree that to_flax makes.
        variables = compat.to_flax(*plain, root=root)
    if both_raised(variables, plain):
        return
    params, state = compat.to_haiku(variables, root=root)
    if kinds(node) & KEYED:
        # From the same key Flax's values, which are not Haiku's.
        assert jax.tree.map(describe, (params, state)) == jax.tree.map(describe, plain)
    else:
        assert_identical((params, state), plain)
    assert_identical(compat.to_flax(params, state, root=root), {"params": {}, **variables})

    def apply(variables, key, x):
        return model.apply(variables, x, rngs={"apply": key}, mutable=["state"])

    maybe_jit = jax.jit if jit else lambda function: function
    ours = outcome(maybe_jit(apply), variables, KEY, X)
    theirs = outcome(maybe_jit(net.apply), params, state, root_key(KEY, "apply"), X)
    if both_raised(ours, theirs):
        return
    outputs, changed = ours
    _, new_state = compat.to_haiku({**variables, **changed}, root=root)
    assert_identical((outputs, new_state), theirs)

    if clash:
        return
    table = model.tabulate(KEY, X, console_kwargs={"width": 300})
    (total,) = re.findall(r"Total Parameters: ([\d,]+)", table) or ["0"]
    assert int(total.replace(",", "")) == sum(leaf.size for leaf in jax.tree.leaves(variables))
