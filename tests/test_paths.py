"""``compat.netket.plan`` says what runs."""

from unittest import mock

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import netket as nk
import netket.experimental as nkx
import pytest
from netket.vqs import get_local_kernel

import compat
from compat.netket import KineticEnergy, plan, step, structured

SPINS = nk.hilbert.Spin(0.5, 6)
ISING = nk.operator.Ising(SPINS, nk.graph.Chain(6), h=1.0)
LOCAL = nk.sampler.MetropolisLocal(SPINS, n_chains=4)
MODEL = compat.MLP(hidden_dims=(9, 8))


@pytest.fixture(autouse=True)
def netket_promotes_ranks():
    with jax.numpy_rank_promotion("allow"):
        yield


class Subclass(compat.MLP):
    """Which may be more than its layers."""


class OwnRule(nk.sampler.rules.LocalRule):
    """Which may propose anything."""


def state(model=MODEL, sampler=None, hilbert=SPINS, **options):
    sampler = structured(LOCAL) if sampler is None else sampler
    return nk.vqs.MCState(sampler, model, n_samples=64, seed=1, **options)


def flips_of_a_block():
    return nk.sampler.MetropolisSampler(
        SPINS,
        rule=nk.sampler.rules.MultipleRules([nk.sampler.rules.LocalRule()], probabilities=[1.0]),
        n_chains=4,
    )


STATES = {
    "all": (lambda: state(), ("layers", "layers", "layers")),
    "stock sampler": (lambda: state(sampler=LOCAL), ("netket", "layers", "layers")),
    "a chunk of the sampler": (
        lambda: state(sampler=structured(LOCAL.replace(chunk_size=2))),
        ("netket", "layers", "layers"),
    ),
    "one layer": (lambda: state(compat.MLP(hidden_dims=())), ("netket", "layers", "parameters")),
    "several rules": (
        lambda: state(sampler=structured(flips_of_a_block())), ("layers", "layers", "layers")
    ),
    "own rule": (
        lambda: state(
            sampler=structured(nk.sampler.MetropolisSampler(SPINS, rule=OwnRule(), n_chains=4))
        ),
        ("netket", "layers", "layers"),
    ),
    "subclass": (
        lambda: state(Subclass(hidden_dims=(9, 8))), ("netket", "netket", "tangent_kernel")
    ),
    "lifted": (
        lambda: state(nn.remat(compat.MLP)(hidden_dims=(9, 8))),
        ("netket", "netket", "tangent_kernel"),
    ),
    "own parameters": (
        lambda: state(compat.MLP(hidden_dims=(9, 8), hidden_activations=lambda z: nn.Dense(8)(z))),
        ("netket", "netket", "tangent_kernel"),
    ),
    "half precision": (
        lambda: state(compat.MLP(hidden_dims=(9, 8), param_dtype=jnp.bfloat16)),
        ("netket", "netket", "layers"),
    ),
    "single precision": (
        lambda: state(compat.MLP(hidden_dims=(9, 8), param_dtype=jnp.float32)),
        ("layers", "layers", "layers"),
    ),
    "complex": (
        lambda: state(compat.MLP(hidden_dims=(9, 8), param_dtype=complex)),
        ("layers", "layers", "tangent_kernel"),
    ),
    "another model": (
        lambda: state(nk.models.RBM(alpha=4)),
        ("netket", "netket", "tangent_kernel"),
    ),
    "haiku": (
        lambda: state(hk.transform(lambda x: hk.nets.MLP((9, 8, 1))(1.0 * x)[..., 0])),
        ("netket", "netket", "tangent_kernel"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_plan(name):
    make, expected = STATES[name]
    assert tuple(plan(make(), ISING)) == expected


@pytest.mark.parametrize(
    ("width", "mode", "expected"),
    [(5, "real", "layers"), (5, "complex", "parameters"), (9, "complex", "tangent_kernel")],
)
def test_complex_outputs_count_twice(width, mode, expected):
    """Of 64 samples 128, which are more than twice as many as 40 parameters, but not as 72."""
    assert plan(state(compat.MLP(hidden_dims=(width,))), ISING, mode=mode).step == expected


RUN = ["all", "stock sampler", "several rules", "own rule", "subclass", "one layer"]


@pytest.mark.parametrize("name", RUN)
def test_what_runs_is_what_it_says(name):
    make, (sampling, energies, _) = STATES[name]
    made = make()
    stock, invoked = nk.sampler.MetropolisSampler._sample_next, []

    def noted(*args):
        invoked.append("netket")
        return stock(*args)

    with mock.patch.object(nk.sampler.MetropolisSampler, "_sample_next", noted):
        model, variables, sampler_state = made.model, made.variables, made.sampler_state
        jax.eval_shape(
            lambda v, s: made.sampler._sample_next(model, v, s), variables, sampler_state
        )
    assert (invoked == ["netket"]) == (sampling == "netket")
    netkets = get_local_kernel.invoke(nk.vqs.MCState, type(ISING))(made, ISING)
    assert (get_local_kernel(made, ISING) is netkets) == (energies == "netket")


def test_the_route_of_the_step_is_taken():
    made = state()
    with mock.patch.object(step, "Linearized", side_effect=KeyError("layers")):
        with pytest.raises(KeyError, match="layers"):
            step.natural_gradient(made, ISING, 1e-3)
        step.natural_gradient(state(Subclass(hidden_dims=(9, 8))), ISING, 1e-3)


SPACE = nkx.hilbert.Particle(N=2, geometry=nkx.geometry.FreeSpace(d=1))
TRAP = nk.operator.PotentialEnergy(SPACE, lambda x: jnp.sum(x**2))
SMOOTH = compat.MLP(hidden_dims=(9, 8), hidden_activations=jnp.tanh)


@pytest.mark.parametrize(
    ("hamiltonian", "model", "expected"),
    [
        (KineticEnergy(SPACE, 1.0), SMOOTH, "laplacian"),
        (KineticEnergy(SPACE, 1.0) + TRAP, SMOOTH, "laplacian"),
        (TRAP, SMOOTH, "netket"),
        (nk.operator.KineticEnergy(SPACE, 1.0) + TRAP, SMOOTH, "netket"),
        (KineticEnergy(SPACE, 1.0), nk.models.MLP(hidden_dims=(5,)), "netket"),
        (KineticEnergy(SPACE, 1.0), nn.remat(compat.MLP)(hidden_dims=(5,)), "netket"),
    ],
    ids=["kinetic", "sum", "potential", "NetKet's", "NetKet's model", "lifted"],
)
def test_continuous_spaces(hamiltonian, model, expected):
    sampler = nk.sampler.MetropolisGaussian(SPACE, sigma=0.5, n_chains=4)
    made = state(model, sampler=sampler)
    assert plan(made, hamiltonian).local_energies == expected


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"must be a netket\.vqs\.MCState"):
        plan(nk.vqs.FullSumState(SPINS, MODEL), ISING)
    with pytest.raises(ValueError, match="mode must be one of"):
        plan(state(), ISING, mode="imaginary")
