"""``compat.MLP`` and ``haiku_mlp.MLP`` against ``netket.models.MLP``: equal to the bit."""

import cases
import haiku as hk
import jax
import netket as nk
import pytest
from comparison import assert_identical

import compat
import haiku_mlp

KEY = jax.random.key(7)
X = cases.INPUTS["batch"]


@pytest.fixture(params=cases.GOOD)
def pair(request):
    """Yields (ours, NetKet's) for each good configuration."""
    fields = cases.GOOD[request.param]
    return compat.MLP(**fields), nk.models.MLP(**fields)


@pytest.mark.parametrize("x", cases.INPUTS.values(), ids=cases.INPUTS)
def test_init_and_apply(pair, x):
    ours, theirs = pair
    variables = theirs.init(KEY, x)
    assert_identical(ours.init(KEY, x), variables)
    assert_identical(ours.apply(variables, x), theirs.apply(variables, x))
    params, _ = compat.to_haiku(variables)
    fields = {name: getattr(theirs, name) for name in compat.blocks.FIELDS}
    haiku = hk.without_apply_rng(hk.transform(lambda x: haiku_mlp.MLP(**fields)(x)))
    assert_identical(haiku.apply(params, x), theirs.apply(variables, x))
