"""Haiku code that is more than a module: inner transforms, sharing, names, hooks, state."""

import haiku as hk
import jax
import jax.numpy as jnp
import jmp
from flax import linen as nn
from tables.haiku_modules import Case

import haiku_mlp


class Net(hk.Module):
    """A layer that another one made in the constructor feeds, and a parameter of its own."""

    def __init__(self, name=None):
        super().__init__(name=name)
        self.first = hk.Linear(3)
        self.offset = hk.get_parameter("offset", (3,), init=hk.initializers.RandomNormal())

    def __call__(self, x):
        offset = jnp.reshape(self.offset, (1,) * (x.ndim - 1) + (3,))
        return hk.Linear(3, name="second")(jnp.tanh(self.encode(x))) + offset

    def encode(self, x):
        return self.first(x)


class Counter(hk.Module):
    """Counts its calls."""

    def __call__(self, x):
        count = hk.get_state("count", (), init=jnp.zeros)
        hk.set_state("count", count + 1)
        return x + count


class Tree(hk.Module):
    """Calls itself."""

    def __init__(self, depth, name=None):
        super().__init__(name=name)
        self.depth = depth

    def __call__(self, x):
        return hk.Linear(3)(Tree(self.depth - 1)(x) if self.depth else x)


class Methods(hk.Module):
    """Has methods beside the call, one named like it, one transparent."""

    def __call__(self, x):
        return self.encode(x) + self.like_the_call(x) + self.see_through(x)

    def encode(self, x):
        return hk.Linear(3, name="encoder")(x)

    @hk.name_like("__call__")
    def like_the_call(self, x):
        return hk.Linear(3, name="decoder")(x)

    @hk.transparent
    def see_through(self, x):
        return hk.Linear(3, name="third")(x)


def scan(x):
    net = Net()
    return hk.scan(lambda carry, _: (net(carry), net(carry)), x, None, length=3)


def scan_with_state(x):
    counter = Counter()
    return hk.scan(lambda carry, _: (counter(carry), ()), x, None, length=3)


def scan_at_apply(x):
    net = Net()
    if hk.running_init():
        return net(x)
    return jax.lax.scan(lambda carry, _: (net(carry), ()), x, None, length=3)[0]


def fori_loop(x):
    net = Net()
    return net(x) if hk.running_init() else hk.fori_loop(0, 3, lambda _, carry: net(carry), x)


def while_loop(x):
    net = Net()
    if hk.running_init():
        return net(x)
    # It has no gradient backwards.
    carry = hk.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, net(c[1])), (0, x))
    return jax.lax.stop_gradient(carry[1])


def cond(x):
    net, linear = Net(), hk.Linear(3)
    if hk.running_init():
        return net(linear(x))
    return hk.cond(jnp.sum(x) > 0, net, linear, x)


def switch(x):
    branches = [hk.Linear(3), Net(), Counter()]
    if hk.running_init():
        return sum(branch(x) for branch in branches)
    return hk.switch(jnp.argmax(x) % 3, branches, x)


def gradient(x):
    net = Net()
    value, grads = hk.value_and_grad(lambda x: jnp.sum(net(x) ** 2))(x)
    return x + grads, value


def lift(x):
    inner = hk.transform(lambda x: Net()(x))
    params = hk.lift(inner.init, name="lifted")(hk.next_rng_key(), x)
    return inner.apply(params, None, x)


def lift_with_state(x):
    inner = hk.transform_with_state(lambda x: Counter()(Net()(x)))
    init, updater = hk.lift_with_state(inner.init, name="lifted")
    params, state = init(hk.maybe_next_rng_key(), x)
    output, state = inner.apply(params, state, None, x)
    updater.update(state)
    return output


def transparent_lift(x):
    inner = hk.transform(lambda x: Net()(x))
    params = hk.transparent_lift(inner.init)(hk.next_rng_key(), x)
    return inner.apply(params, None, x)


def shared(x):
    net, other = Net(name="shared"), hk.Linear(3)
    return net(other(net(x)))


def names(x):
    with hk.name_scope("outer"):
        x = hk.Linear(3)(x)
        with hk.name_scope("inner"):
            x = hk.Linear(3)(x)
    return hk.Linear(3, name=hk.experimental.force_name("elsewhere/deep/linear"))(x)


def same_names(x):
    """Haiku numbers them."""
    return Net()(Net(name="net_1")(Net()(x)))


def outside(x):
    w = hk.get_parameter("w", (3,), init=hk.initializers.RandomNormal())
    total = hk.get_state("total", (3,), init=jnp.zeros)
    hk.set_state("total", total + x.sum(0))
    return x * jnp.reshape(w, (1, 3)) + hk.Linear(3)(x)


def deep_rnn(x):
    core = hk.DeepRNN([hk.LSTM(3), jnp.tanh, hk.GRU(3)])
    return hk.dynamic_unroll(core, x[:, None], core.initial_state(1))


def hooks(x):
    def getter(next_getter, value, context):
        return 2 * next_getter(value)

    def creator(next_creator, shape, dtype, init, context):
        return next_creator(shape, dtype, init) + 1

    def setter(next_setter, value, context):
        return next_setter(value + 1)

    def interceptor(next_f, args, kwargs, context):
        output = next_f(*args, **kwargs)
        return 3 * output if context.method_name == "__call__" else output

    with (
        hk.custom_getter(getter),
        hk.custom_creator(creator),
        hk.custom_setter(setter),
        hk.intercept_methods(interceptor),
    ):
        return Counter()(Net()(x))


def padded(x):
    """Parameters that are stored in another shape."""

    def creator(next_creator, shape, dtype, init, context):
        return jnp.pad(next_creator(shape, dtype, init), [(0, 1)] * len(shape))

    def getter(next_getter, value, context):
        return next_getter(value)[tuple(map(slice, context.original_shape))]

    with hk.custom_creator(creator), hk.custom_getter(getter):
        return hk.Linear(3)(x)


def quantised(x):
    """Parameters that are stored as trees."""

    def creator(next_creator, shape, dtype, init, context):
        value = next_creator(shape, dtype, init)
        return {"steps": jnp.round(127 * value), "unit": jnp.full((), 1 / 127, dtype)}

    def getter(next_getter, value, context):
        return next_getter(value["steps"] * value["unit"])

    with hk.custom_creator(creator), hk.custom_getter(getter):
        return hk.Linear(3)(x)


def mixed_precision(x):
    policy = jmp.get_policy("params=float32,compute=bfloat16,output=float32")
    cls = type("Mixed", (Net,), {})
    with hk.mixed_precision.push_policy(cls, policy):
        return cls()(x)


def keys(x):
    key = hk.next_rng_key()
    with hk.with_rng(jax.random.fold_in(key, 1)):
        x = hk.dropout(hk.next_rng_key(), 0.5, x)
    return hk.dropout(hk.next_rng_keys(3)[1], 0.5, x)


def reserved_keys(x):
    hk.reserve_rng_keys(4)
    return hk.dropout(hk.next_rng_key(), 0.5, Net()(x))


def mapping(x):
    """A value that is a tree."""

    def tree(shape, dtype):
        return {"a": jnp.ones(shape, dtype), "b": [jnp.zeros(shape, dtype)]}

    state = hk.get_state("tree", (3,), x.dtype, init=tree)
    hk.set_state("tree", jax.tree.map(lambda leaf: leaf + 1, state))
    return x + jnp.reshape(state["a"], (1, 3))


def average(x):
    w = hk.get_parameter("w", (3,), init=jnp.ones)
    return x * jnp.reshape(hk.ExponentialMovingAverage(0.9)(w), (1, 3))


def keyed(x):
    """JAX initializers beside Haiku's."""
    init = haiku_mlp.JaxInitializer(jax.nn.initializers.normal())
    return hk.Linear(3, b_init=init)(hk.Linear(3)(x))


_PROGRAMS = {
    "net": lambda x: Net()(x),
    "scan": scan,
    "scan with state": scan_with_state,
    "lax.scan at apply": scan_at_apply,
    "fori_loop": fori_loop,
    "while_loop": while_loop,
    "vmap": lambda x: hk.vmap(Net(), split_rng=False)(x),
    "vmap, split": lambda x: hk.vmap(
        lambda x: hk.dropout(hk.next_rng_key(), 0.5, x), split_rng=not hk.running_init()
    )(x),
    "remat": lambda x: hk.remat(Net())(x),
    "grad": gradient,
    "cond": cond,
    "switch": switch,
    "layer_stack": lambda x: hk.layer_stack(3)(lambda x: Net()(x))(x),
    "layer_stack of layer_stack": lambda x: hk.layer_stack(2)(
        lambda x: hk.layer_stack(2)(lambda x: hk.Linear(3)(x))(x)
    )(x),
    "remat of scan": lambda x: hk.remat(scan)(x),
    "lift": lift,
    "lift_with_state": lift_with_state,
    "transparent_lift": transparent_lift,
    "Flax lift": lambda x: hk.experimental.flax.lift(nn.Dense(3), name="dense")(x),
    "shared": shared,
    "names": names,
    "same names": same_names,
    "outside of modules": outside,
    "methods": lambda x: Methods()(x),
    "recursion": lambda x: Tree(3)(x),
    "Sequential": lambda x: hk.Sequential([Net(), jax.nn.relu, hk.Linear(3)])(x),
    "to_module": lambda x: hk.to_module(Net())("made")(x),
    "BatchApply": lambda x: hk.BatchApply(Net())(x[None]),
    "DeepRNN": deep_rnn,
    "hooks": hooks,
    "padded parameters": padded,
    "trees as parameters": quantised,
    "mixed precision": mixed_precision,
    "keys": keys,
    "reserved keys": reserved_keys,
    "a tree as state": mapping,
    "average": average,
    "keyed initializers": keyed,
}

PROGRAMS = {name: Case(function, (2, 3)) for name, function in _PROGRAMS.items()}
