"""NetKet's sharding with four devices; ``test_sharding.py`` runs this where there are four."""

import jax
import netket as nk
import numpy as np

import compat


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


def test_vmc():
    assert jax.device_count() == 4
    with jax.numpy_rank_promotion("allow"):  # NetKet's operators promote ranks
        energies, state = train(compat.MLP(hidden_dims=(8,)))
        expected, _ = train(nk.models.MLP(hidden_dims=(8,)))
    assert {shard.data.shape for shard in state.samples.addressable_shards} == {(2, 8, 4)}
    np.testing.assert_array_equal(energies, expected)
