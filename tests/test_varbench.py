"""The benchmark on varbench's systems: its ansatz, a short run, the results in the repository."""

import itertools
import pathlib
import sys

import jax
import jax.numpy as jnp
import netket as nk
import numpy as np
import pytest

import compat

FOLDER = pathlib.Path(__file__).parent / "benchmarks"
sys.path.insert(0, str(FOLDER))
import varbench  # noqa: E402
import varbench_table  # noqa: E402


@pytest.mark.slow
def test_the_ansatz_is_an_mlp_summed_over_translations():
    graph, hamiltonian = varbench.heisenberg(nk.graph.Square(4))
    state = varbench.state_of(graph, hamiltonian, varbench.Recipe(features=3, hidden=(5,)), 1)
    x = hamiltonian.hilbert.random_state(jax.random.key(0), 7)
    first, rest = state.parameters["kernel"], state.parameters["MLP_0"]
    mlp = compat.MLP(hidden_dims=(3, 5), hidden_activations=varbench.log_cosh)
    layers = {
        "Dense_0": {"kernel": first.T, "bias": jnp.zeros(3)},
        "Dense_1": rest["Dense_0"],
        "Dense_2": rest["Dense_1"],
    }
    images = x[:, np.asarray(graph.translation_group())]
    expected = mlp.apply({"params": {"MLP_0": layers}}, images).sum(-1)
    np.testing.assert_allclose(state.log_value(x), expected, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(state.log_value(-x), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.slow
def test_marshalls_rotation_keeps_the_energy():
    hilbert, graph = nk.hilbert.Spin(0.5, 8, total_sz=0), nk.graph.Chain(8, max_neighbor_order=2)
    plain = nk.operator.Heisenberg(hilbert, graph, J=[1.0, 0.5], sign_rule=[False, False])
    energies = [
        nk.exact.lanczos_ed(operator)[0] for operator in (varbench.heisenberg(graph, 0.5)[1], plain)
    ]
    np.testing.assert_allclose(*energies, rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "outputs"),
    [
        (lambda: varbench.ising(nk.graph.Chain(8), 1.0), 1),
        (lambda: varbench.heisenberg(nk.graph.Square(4)), 1),
        (lambda: varbench.heisenberg(nk.graph.Square(4, max_neighbor_order=2), 0.5), 2),
    ],
    ids=["ising", "heisenberg", "j1j2"],
)
def test_a_short_run_finds_the_exact_energy(make, outputs):
    graph, hamiltonian = make()
    recipe = varbench.Recipe(
        features=4,
        outputs=outputs,
        chains=256,
        samples=(256, 256),
        rate=(0.02, 0.01),
        shift=(1e-1, 1e-2),
        stages=3,
    )
    blocks = itertools.count()
    with jax.numpy_rank_promotion("allow"):  # NetKet's Ising promotes
        state = varbench.state_of(graph, hamiltonian, recipe, 1)
        varbench.train(state, hamiltonian, recipe, lambda: next(blocks) / 30)
        energy, error, _, samples = varbench.estimate(state, hamiltonian, 2.0)
        (exact,) = nk.exact.lanczos_ed(hamiltonian)
    assert samples >= 512
    assert error < 0.005 * abs(exact)
    assert -4 * error < energy - exact < 0.02 * abs(exact)


def test_the_table_is_that_of_the_results():
    found = varbench_table.results()
    assert "TFIsing chain 32 periodic h=1" in found
    text = (FOLDER / "varbench.txt").read_text()
    assert text == "\n".join(varbench_table.report(found)) + "\n"
    for row in varbench_table.listed():
        assert row["system"] not in found or row["method"] in text
