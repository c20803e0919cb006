"""NetKet's sharding with four devices; ``test_sharding.py`` runs this where there are four."""

import jax
import netket as nk
import numpy as np
import optax
import pytest

import compat
from compat.netket import local_energies, natural_gradient, structured


def train(model):
    """Returns the energies of a short optimisation, and the state."""
    hilbert = nk.hilbert.Spin(0.5, 4)
    hamiltonian = nk.operator.IsingJax(hilbert, nk.graph.Chain(4), h=1.0)
    sampler = nk.sampler.MetropolisLocal(hilbert, n_chains=8)
    state = nk.vqs.MCState(sampler, model, n_samples=64, seed=1, sampler_seed=2)
    optimiser = nk.optimizer.Sgd(0.05)
    driver = nk.driver.VMC_SR(
        hamiltonian, optimiser, diag_shift=0.01, variational_state=state, use_ntk=True
    )
    log = nk.logging.RuntimeLog()
    driver.run(3, out=log, show_progress=False)
    return log.data["Energy"].Mean, state


def test_vmc(monkeypatch):
    assert jax.device_count() == 4
    monkeypatch.setattr(local_energies, "is_ours", lambda state: False)
    with jax.numpy_rank_promotion("allow"):  # NetKet's operators promote ranks
        energies, state = train(compat.MLP(hidden_dims=(8,)))
        expected, _ = train(nk.models.MLP(hidden_dims=(8,)))
    assert {shard.data.shape for shard in state.samples.addressable_shards} == {(2, 8, 4)}
    np.testing.assert_array_equal(energies, expected)


@pytest.mark.parametrize("chunk_size", [None, 8])
def test_local_energies(chunk_size):
    """Each device finds and evaluates its own connected configurations."""
    hilbert = nk.hilbert.Spin(0.5, 16)
    hamiltonian = nk.operator.IsingJax(hilbert, nk.graph.Chain(16), h=1.0)
    sampler = nk.sampler.MetropolisLocal(hilbert, n_chains=8)
    options = {"n_samples": 64, "seed": 1, "sampler_seed": 2, "chunk_size": chunk_size}
    with jax.numpy_rank_promotion("allow"):
        ours, stock = (
            nk.vqs.MCState(sampler, model(hidden_dims=(8,)), **options).expect_and_grad(hamiltonian)
            for model in (compat.MLP, nk.models.MLP)
        )
    np.testing.assert_allclose(ours[0].mean, stock[0].mean, rtol=1e-12)
    for a, b in zip(*map(jax.tree.leaves, (ours[1], stock[1])), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("n_samples", "chunk_size"), [(64, None), (256, None), (256, 24)])
def test_step(n_samples, chunk_size):
    """By the kernel; by the system of the parameters where it is the smaller."""
    hilbert = nk.hilbert.Spin(0.5, 6)
    hamiltonian = nk.operator.IsingJax(hilbert, nk.graph.Chain(6), h=1.0)
    sampler = nk.sampler.MetropolisLocal(hilbert, n_chains=8)
    with jax.numpy_rank_promotion("allow"):
        state = nk.vqs.MCState(sampler, compat.MLP((4,)), n_samples=n_samples, seed=1)
        _, step = natural_gradient(state, hamiltonian, 1e-3, chunk_size=chunk_size)
        driver = nk.driver.VMC_SR(
            hamiltonian, optax.sgd(0.1), diag_shift=1e-3, variational_state=state
        )
        _, expected = driver.compute_loss_and_update()
    for a, b in zip(*map(jax.tree.leaves, (step, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("screened", [False, True])
def test_structured_sampler(screened):
    """The chains are NetKet's, and stay where they are."""
    hilbert = nk.hilbert.Spin(0.5, 6)
    stock = nk.sampler.MetropolisLocal(hilbert, n_chains=8)
    model, options = compat.MLP(hidden_dims=(8, 5)), {"n_samples": 64, "seed": 1, "sampler_seed": 2}
    with jax.numpy_rank_promotion("allow"):
        expected = nk.vqs.MCState(stock, model, **options).samples
        samples = nk.vqs.MCState(structured(stock, screened=screened), model, **options).samples
    assert {shard.data.shape for shard in samples.addressable_shards} == {(2, 8, 6)}
    np.testing.assert_array_equal(samples, expected)
