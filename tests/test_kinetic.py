"""The kinetic energy by the forward Laplacian against NetKet's."""

import itertools
from collections.abc import Callable

import haiku as hk
import jax
import jax.numpy as jnp
import netket as nk
import netket.experimental as nkx
import numpy as np
import pytest
from cases import first
from flax import linen as nn
from flax import nnx

import compat
import haiku_mlp
from compat import nnx as compat_nnx
from compat.netket import KineticEnergy
from haiku_mlp.structure import derivatives


def envelope(x):
    return -jnp.sum(x**2, -1) / 4


def waves(x):
    return jnp.concatenate([jnp.sin(x), jnp.cos(2 * x)], -1)


def products(x):
    return x * jnp.roll(x, 1, -1)


class WithFeatures(nn.Module):
    """An envelope times a network of features, as the documentation says."""

    features: Callable

    def setup(self):
        self.mlp = compat.MLP(hidden_dims=(5, 3), hidden_activations=jnp.tanh)

    def __call__(self, x):
        return envelope(x) + self.mlp(self.features(x))

    def laplacian(self, x, weights=None):
        of_mlp = self.mlp.laplacian(x, features=self.features, weights=weights)
        return jax.tree.map(jnp.add, of_mlp, derivatives(envelope, x, weights=weights))


class Subclass(compat.MLP):
    """Whose Laplacian is not the one that it inherits."""

    def __call__(self, x):
        return super().__call__(x) + envelope(x)


class Inheriting(WithFeatures):
    def __call__(self, x):
        return super().__call__(x) + envelope(x)


def doubled(variables):
    return jax.tree.map(lambda leaf: 2 * leaf, variables)


ALL = ["__call__", "laplacian", "connected", "tangent_kernel"]
DOUBLED = nn.map_variables(compat.MLP, "params", trans_in_fn=doubled, init=True)


class OfAGraph(nn.Module):
    def laplacian(self, x):
        """Something else of the same name."""
        return 2 * x - jnp.roll(x, 1, -1) - jnp.roll(x, -1, -1)

    @nn.compact
    def __call__(self, x):
        return compat.MLP(hidden_dims=(5,), hidden_activations=jnp.tanh)(self.laplacian(x))


class EqualMasses(compat.MLP):
    def laplacian(self, x):
        return super().laplacian(x)


class OfHaiku(hk.Module):
    def __call__(self, x):
        return self._width() * envelope(x)

    def laplacian(self, x):
        width = self._width()
        return jax.tree.map(lambda d: width * d, derivatives(envelope, x))

    def _width(self):
        return hk.get_parameter("width", (), "float64", init=jnp.ones)


class Changed(OfHaiku):
    """As ``Inheriting``, in Haiku."""

    def __call__(self, x):
        return 2 * super().__call__(x)


SPACE = nkx.hilbert.Particle(N=2, geometry=nkx.geometry.FreeSpace(d=2))
MODELS = {
    "mlp": compat.MLP(hidden_dims=(5, 3), hidden_activations=jnp.tanh),
    "real output": compat.MLP((5,), param_dtype=complex, output_activation=jnp.real),
    "waves": WithFeatures(waves),
    "products": WithFeatures(products),
    "equal masses": EqualMasses(hidden_dims=(5,), hidden_activations=jnp.tanh),
    "subclass": Subclass(hidden_dims=(5,), hidden_activations=jnp.tanh),
    "inheriting": Inheriting(waves),
    "lifted subclass": nn.jit(Subclass, methods=ALL)(hidden_dims=(5,)),
    "mapped variables": DOUBLED(hidden_dims=(5,), hidden_activations=jnp.tanh),
    "mixing": compat.MLP(hidden_dims=(5,), hidden_activations=jax.nn.softmax),
    "of batches": compat.MLP(
        hidden_dims=(5,), hidden_activations=lambda z: z / (1 + jnp.sum(z**2, 1, keepdims=True))
    ),
    "of a graph": OfAGraph(),
    "haiku": compat.wrap(OfHaiku)(),
    "inheriting in haiku": compat.wrap(Changed)(),
    "flax activation": compat.MLP(hidden_dims=(5,), hidden_activations=lambda z: nn.PReLU()(z)),
    "netket": nk.models.MLP(hidden_dims=(5,), hidden_activations=jnp.tanh),
}


@pytest.fixture(autouse=True)
def netket_promotes_ranks():
    with jax.numpy_rank_promotion("allow"):
        yield


def state_of(model, **options):
    sampler = nk.sampler.MetropolisGaussian(SPACE, sigma=0.5, n_chains=4, sweep_size=2)
    return nk.vqs.MCState(sampler, model, n_samples=8, n_discard_per_chain=0, seed=1, **options)


MASSES = {"equal": 2.0, "unequal": [1.0, 2.0, -3.0, 4.0]}


def assert_same(state, ours, stock):
    (energy, gradient), (expected, expected_gradient) = map(state.expect_and_grad, (ours, stock))
    assert energy.mean.dtype == expected.mean.dtype
    np.testing.assert_allclose(energy.mean, expected.mean, rtol=1e-10)
    np.testing.assert_allclose(energy.variance, expected.variance, rtol=1e-10)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "mass"),
    first(
        {
            ("waves", "unequal"),
            ("real output", "unequal"),
            ("of batches", "equal"),
            ("subclass", "equal"),
            ("of a graph", "equal"),
            ("flax activation", "equal"),
            ("inheriting in haiku", "equal"),
        },
        itertools.product(MODELS, MASSES),
    ),
)
def test_equals_netkets(name, mass):
    operators = (of(SPACE, MASSES[mass]) for of in (KineticEnergy, nk.operator.KineticEnergy))
    assert_same(state_of(MODELS[name]), *operators)


def test_complex_masses():
    state, mass = state_of(MODELS["mlp"]), [1.0, 2j, 1 - 3j, 4.0]
    ours, theirs = (
        state.local_estimators(of(SPACE, mass)).data
        for of in (KineticEnergy, nk.operator.KineticEnergy)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-10)


@pytest.mark.parametrize(
    ("name", "chunk_size"),
    first({("mlp", 4), ("waves", 4)}, [("mlp", None), *((name, 4) for name in MODELS)]),
)
def test_in_a_sum_with_a_potential(name, chunk_size):
    potential = nk.operator.PotentialEnergy(SPACE, lambda x: 0.5 * jnp.sum(x**2))
    assert_same(
        state_of(MODELS[name], chunk_size=chunk_size),
        KineticEnergy(SPACE, 1.0) + potential,
        nk.operator.KineticEnergy(SPACE, 1.0) + potential,
    )


def haiku_model(x):
    return haiku_mlp.MLP(hidden_dims=(5,), hidden_activations=jnp.tanh)(x)


OTHERS = {
    "haiku": lambda: {"model": hk.transform(haiku_model)},
    "nnx": lambda: {
        "model": compat_nnx.MLP(4, hidden_dims=(5,), hidden_activations=jnp.tanh, rngs=nnx.Rngs(0))
    },
    "function": lambda: {
        "model": None,
        "apply_fun": lambda variables, x, **_: MODELS["mlp"].apply(variables, x),
        "variables": MODELS["mlp"].init(jax.random.key(0), jnp.ones((1, 4))),
    },
    "function of a model": lambda: {
        "model": None,
        "apply_fun": lambda variables, x, **options: (
            envelope(x) + MODELS["mlp"].apply(variables, x, **options)
        ),
        "variables": MODELS["mlp"].init(jax.random.key(0), jnp.ones((1, 4))),
    },
}


@pytest.mark.parametrize("name", first({"function", "function of a model"}, OTHERS))
def test_models_of_other_frameworks(name):
    """To which NetKet gives no method, in part without a word."""
    operators = (of(SPACE, 2.0) for of in (KineticEnergy, nk.operator.KineticEnergy))
    assert_same(state_of(**OTHERS[name]()), *operators)


def test_takes_the_laplacian_of_a_mixin():
    class Squares:
        def laplacian(self, x):
            return jnp.zeros(len(x)), jnp.zeros_like(x), jnp.full(len(x), -2.0)

    class Psi(Squares, nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.zeros(len(x)) + self.param("constant", nn.initializers.zeros, ())

    assert state_of(Psi()).expect(KineticEnergy(SPACE, 0.5)).mean == 2.0


def test_takes_the_laplacian_of_the_model():
    class Psi(compat.MLP):
        def laplacian(self, x):
            return jnp.zeros(len(x)), jnp.zeros_like(x), jnp.full(len(x), -2.0)

    state = state_of(Psi(hidden_dims=(5,)))
    assert state.expect(KineticEnergy(SPACE, 0.5)).mean == 2.0


def test_unequal_masses_take_one_pass():
    x = jnp.ones((2, 4))
    variables = MODELS["waves"].init(jax.random.key(0), x)
    operator = KineticEnergy(SPACE, [1.0, 2.0, 3.0, 4.0])

    def energy(kinetic):
        return str(jax.make_jaxpr(lambda x: kinetic(MODELS["waves"].apply, variables, x))(x))

    assert energy(operator._expect_kernel) != energy(super(KineticEnergy, operator)._expect_kernel)


def test_equal_operators_are_equal():
    assert KineticEnergy(SPACE, 1.0) == KineticEnergy(SPACE, 1.0)
    assert hash(KineticEnergy(SPACE, 1.0)) == hash(KineticEnergy(SPACE, 1.0))
