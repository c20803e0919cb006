"""``compat.MLP`` and ``haiku_mlp.MLP`` against ``netket.models.MLP``: equal to the bit."""

import inspect

import cases
import haiku as hk
import jax
import netket as nk
import pytest
from comparison import assert_identical, lowered_text

import compat
import haiku_mlp

KEY = jax.random.key(7)
# The programs of all others are the same, too.
RUN = {"default", "two_layers", "float32", "complex64", "activations", "output_bias"}


@pytest.fixture(params=cases.GOOD)
def faces(request):
    """Yields (Flax face, NetKet's, Haiku face) for each good configuration."""
    theirs = nk.models.MLP(**cases.GOOD[request.param])
    fields = {name: getattr(theirs, name) for name in inspect.signature(haiku_mlp.MLP).parameters}
    haiku = hk.without_apply_rng(hk.transform(lambda x: haiku_mlp.MLP(**fields)(x)))
    return compat.MLP(**cases.GOOD[request.param]), theirs, haiku


@pytest.mark.parametrize(
    ("faces", "x"), cases.cover(list(cases.GOOD), list(cases.INPUTS)), indirect=["faces"]
)
def test_programs(faces, x):
    """The same to the letter: from any key and any weights they compute the same."""
    check_programs(faces, cases.INPUTS[x])


def check_programs(faces, x):
    ours, theirs, haiku = faces

    def haiku_apply(variables, x):
        return haiku.apply(compat.to_haiku(variables)[0], x)

    assert lowered_text(ours.init, KEY, x) == lowered_text(theirs.init, KEY, x)
    variables = jax.eval_shape(theirs.init, KEY, x)
    applies = (ours.apply, theirs.apply, haiku_apply)
    texts = {str(jax.make_jaxpr(apply)(variables, x)) for apply in applies}
    assert len(texts) == 1, texts


def check_values(faces, x):
    ours, theirs, haiku = faces
    variables = theirs.init(KEY, x)
    assert_identical(ours.init(KEY, x), variables)
    outputs = theirs.apply(variables, x)
    assert_identical(ours.apply(variables, x), outputs)
    params, _ = compat.to_haiku(variables)
    assert_identical(haiku.apply(params, x), outputs)


@pytest.mark.parametrize("faces", cases.first(RUN, cases.GOOD), indirect=True)
def test_values(faces):
    """Run without ``jit``."""
    check_values(faces, cases.INPUTS["batch"])


@pytest.mark.parametrize("faces", ["two_layers"], indirect=True)
@pytest.mark.parametrize("x", cases.first({"deep_batch", "empty_batch", "int8"}, cases.INPUTS))
def test_values_of_inputs(faces, x):
    check_values(faces, cases.INPUTS[x])
