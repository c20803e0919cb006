"""The private names of Haiku and Flax that ``compat.mirror.private`` uses, and what it promises."""

import functools
import gc
import pathlib
import re
import traceback
import weakref
from unittest import mock

import haiku as hk
import jax
import netket as nk
import pytest
from flax import linen as nn

import compat
import haiku_mlp
from compat.mirror import private as internals
from compat.mirror.run import is_missing_key, is_missing_parameter

KEY = jax.random.key(0)
ROOT = pathlib.Path(__file__).parent.parent


def test_the_context_is_one_for_a_run():
    seen = []

    def inner():
        seen.append(internals.haiku_context())

    def outer():
        seen.append(internals.haiku_context())
        hk.transform(inner).apply({}, None)
        hk.remat(lambda: inner())()
        hk.cond(True, lambda: (inner(), 0)[1], lambda: (inner(), 0)[1])
        seen.append(internals.haiku_context())

    hk.transform(outer).init(KEY)
    first, transform, *same = seen
    assert transform is not first
    assert len(same) == 4
    assert all(context is first for context in same)
    seen.clear()
    hk.transform(outer).apply({}, KEY)
    assert seen[0] is not first


def test_missing_key():
    def by_initializer(x):
        return hk.get_parameter("w", (), init=hk.initializers.RandomNormal())

    for function in (lambda x: hk.next_rng_key(), by_initializer):
        with pytest.raises(ValueError, match="PRNGKey") as caught:
            hk.transform(function).init(None, 1.0)
        assert is_missing_key(caught.value)
    for error in (ValueError("a non-None PRNGKey"), KeyError()):
        assert not is_missing_key(error)


def test_missing_parameter():
    net = hk.transform(lambda: hk.get_parameter("w", (), init=jax.numpy.zeros))
    with pytest.raises(ValueError, match="parameter") as caught:
        net.apply({}, None)
    assert is_missing_parameter(caught.value)
    assert not is_missing_parameter(ValueError("another"))


def function(x):
    return hk.Linear(3)(x)


class Parent(nn.Module):
    orphan: bool

    @nn.compact
    def __call__(self):
        if not self.orphan:
            return nn.Dense(1).parent is self
        with internals.no_flax_parent():
            inside = nn.Dense(1).parent
        return inside is None and nn.Dense(1).parent is self


@pytest.mark.parametrize("orphan", [False, True])
def test_no_flax_parent(orphan):
    assert Parent(orphan).apply({})


def test_no_flax_parent_after_an_error():
    with pytest.raises(KeyError), internals.no_flax_parent():
        raise KeyError
    assert Parent(False).apply({})


def test_is_flax_looking():
    def interceptor(next_f, args, kwargs, context):
        return next_f(*args, **kwargs)

    class Model(nn.Module):
        def __call__(self):
            seen.append(internals.is_flax_looking())

    seen = []
    Model().apply({})
    with nn.intercept_methods(interceptor):
        Model().apply({})
    Model().tabulate(KEY)
    Model().apply({}, mutable=["intermediates"], capture_intermediates=True)
    Model().bind({})()
    Model().init({})
    assert seen == [False, True, True, True, True, False]


def frames(model, x):
    """Returns the frames between ``apply`` and the product of the last layer."""
    stacks, variables = [], model.init(KEY, x)

    def promote(*args):
        stacks.append([frame.name for frame in traceback.extract_stack()])
        return promoted(*args)

    promoted = haiku_mlp.linear.promote
    with mock.patch.object(haiku_mlp.linear, "promote", promote):
        model.apply(variables, x)
    starts = [name.startswith("apply") for name in stacks[-1]]  # Haiku's is apply_fn
    return len(starts) - starts.index(True) - 1


@pytest.mark.parametrize("face", [compat.MLP, compat.wrap(haiku_mlp.MLP)])
def test_calls_at_which_flax_does_not_look_are_those_of_haiku(face):
    """JAX looks at the whole stack for each operation."""

    def interceptor(next_f, args, kwargs, context):
        return next_f(*args, **kwargs)

    x = jax.numpy.ones(3)
    # Once a policy of mixed precision has been set, each call of Haiku's takes 3 more.
    plain = hk.without_apply_rng(hk.transform(lambda x: haiku_mlp.MLP()(x)))
    of_haiku = frames(plain, x)
    assert frames(face(), x) < of_haiku + 10  # 24 to 17 without such a policy
    with nn.intercept_methods(interceptor):
        assert frames(face(), x) > of_haiku + 20


def test_calls_go_through_flax_where_an_activation_may_make_modules():
    """Flax names these beside the layers.  JAX's and NetKet's activations make none."""

    def depth(activation):
        fields = {"hidden_dims": 2, "hidden_activations": activation}
        return frames(compat.MLP(**fields), jax.numpy.ones(3))

    unknown = (
        lambda z: jax.nn.tanh(z),
        jax.tree_util.Partial(lambda z: jax.nn.tanh(z)),
        functools.wraps(jax.nn.tanh)(lambda z: jax.nn.tanh(z)),
        functools.wraps(nk.nn.activation.log_cosh)(lambda z: jax.nn.tanh(z)),
    )
    known = depth(jax.nn.tanh)
    assert depth(nk.nn.activation.log_cosh) == known
    assert all(known + 5 < depth(activation) for activation in unknown)


def test_what_an_activation_is_is_not_kept_longer_than_itself():
    class Activation:
        def __call__(self, z):
            return z

    def init():
        activation = Activation()
        compat.MLP(hidden_dims=2, hidden_activations=activation).init(KEY, jax.numpy.ones(3))
        return weakref.ref(activation)

    reference = init()
    gc.collect()
    assert reference() is None


PRIVATE = re.compile(r"haiku\._src|flax\.\w+\._|\bflax_module\._|\bhaiku_base\.")


@pytest.mark.parametrize("package", ["compat", "haiku_mlp"])
def test_private_names_stand_in_one_place(package):
    found = {
        path.name for path in (ROOT / package).rglob("*.py") if PRIVATE.search(path.read_text())
    }
    assert found == ({"private.py"} if package == "compat" else set())


def test_the_public_names():
    public = {name for name in vars(compat) if not name.startswith("_")}
    modules = {path.stem for path in (ROOT / "compat").iterdir()}
    assert public - modules == {
        "MLP",
        "HaikuFunction",
        "haiku_method",
        "kernel_plan",
        "perturb",
        "perturb_outputs",
        "sow",
        "tangent_kernel",
        "to_flax",
        "to_haiku",
        "wrap",
    }
