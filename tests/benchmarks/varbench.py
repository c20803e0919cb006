"""The MLP on systems of varbench, beside the energies that are listed there.

    python tests/benchmarks/varbench.py             every system
    python tests/benchmarks/varbench.py --system "Heisenberg chain 20 periodic" --steps 100

The ansatz is ``compat.MLP``, summed over the space group by NetKet's ``SymmExpSum``.  The
rows are those of varbench (arXiv:2302.04919), copied to ``varbench.tsv``: total energies in
Pauli units.  The V-score is N var / (E - E_inf)^2, and smaller is better.
"""

import argparse
import contextlib
import csv
import dataclasses
import importlib.metadata
import pathlib
import time
from collections.abc import Callable
from typing import Any

import netket as nk
import optax

import compat

ROWS = pathlib.Path(__file__).with_name("varbench.tsv")
EXACT = ("Exact Solution", "Exact diagonalization")


@dataclasses.dataclass(frozen=True)
class System:
    """A Hamiltonian on a lattice, and what the training takes for it."""

    graph: Any
    hamiltonian: Callable[[Any], Any]
    width: int
    samples: int
    steps: int


def ising(field: float) -> Callable[[Any], Any]:
    """Returns what makes the ferromagnet in a transverse field."""
    return lambda graph: nk.operator.Ising(
        nk.hilbert.Spin(0.5, graph.n_nodes), graph, h=field, J=-1.0
    )


def heisenberg(graph: Any) -> Any:
    """Returns the antiferromagnet after Marshall's rotation: its ground state is positive."""
    hilbert = nk.hilbert.Spin(0.5, graph.n_nodes, total_sz=0)
    return nk.operator.Heisenberg(hilbert, graph, sign_rule=True)


SYSTEMS = {
    "TFIsing chain 32 periodic h=1": System(nk.graph.Chain(32), ising(1.0), 32, 256, 350),
    "Heisenberg chain 20 periodic": System(nk.graph.Chain(20), heisenberg, 32, 256, 900),
}


def state_of(system: System, seed: int) -> tuple[nk.vqs.MCState, Any]:
    """Returns the untrained state and the Hamiltonian."""
    hamiltonian = system.hamiltonian(system.graph)
    model = nk.nn.blocks.SymmExpSum(
        module=compat.MLP(hidden_dims=(system.width,)), symm_group=system.graph.space_group()
    )
    rule = (
        nk.sampler.rules.ExchangeRule(graph=system.graph)
        if hamiltonian.hilbert.constrained
        else nk.sampler.rules.LocalRule()
    )
    sampler = nk.sampler.MetropolisSampler(hamiltonian.hilbert, rule, n_chains=system.samples)
    state = nk.vqs.MCState(
        sampler, model, n_samples=system.samples, n_discard_per_chain=1, seed=seed
    )
    return state, hamiltonian


def train(state: nk.vqs.MCState, hamiltonian: Any, steps: int, show_progress: bool = False) -> None:
    """Takes steps of minSR, whose rate and damping fall."""
    with contextlib.redirect_stdout(None):  # it prints how it averages its diagnostics
        driver = nk.driver.VMC_SR(
            hamiltonian,
            optax.sgd(optax.cosine_decay_schedule(0.05, steps, alpha=0.05)),
            diag_shift=optax.exponential_decay(1e-2, steps, 1e-2),
            variational_state=state,
            use_ntk=state.n_samples < state.n_parameters,
            on_the_fly=False,
        )
    driver.run(steps, out=(), show_progress=show_progress)


def listed(name: str) -> list[dict[str, str]]:
    """Returns the rows of a system, the lowest energy first."""
    lines = [line for line in ROWS.read_text().splitlines() if not line.startswith("# ")]
    rows = [row for row in csv.DictReader(lines, delimiter="\t") if row["system"] == name]
    return sorted(rows, key=lambda row: float(row["energy"]))


def report(name: str, steps: int | None = None, seed: int = 1) -> str:
    """Trains on one system and returns its table."""
    system = SYSTEMS[name]
    steps = steps or system.steps
    state, hamiltonian = state_of(system, seed)
    begin = time.perf_counter()
    train(state, hamiltonian, steps)
    minutes = (time.perf_counter() - begin) / 60
    state.n_samples = 32 * system.samples
    energy = state.expect(hamiltonian)
    rows = listed(name)
    (exact,) = (float(row["energy"]) for row in rows if row["method"] in EXACT)
    sites, zero = int(rows[0]["dof"]), float(rows[0]["e_inf"] or 0)
    mean, variance = float(energy.mean.real), float(energy.variance)
    score = sites * variance / (mean - zero) ** 2
    lines = [
        name,
        "-" * len(name),
        f"{steps} steps of {system.samples} samples, seed {seed}, {state.n_parameters} parameters, "
        f"{minutes:.1f} minutes",
        f"relative error {1 - mean / exact:.1e}, energy per site {mean / sites:.8f}, "
        f"exact {exact / sites:.8f}",
        "",
        f"{'energy':>14}  {'error':>8}  {'variance':>9}  {'V-score':>8}  method",
        _line(
            mean,
            float(energy.error_of_mean),
            variance,
            score,
            "this MLP, summed over the space group",
        ),
    ]
    for row in rows:
        value, spread = float(row["energy"]), row["variance"].partition("(")[0]
        found = float(spread) if spread else None
        lines.append(
            _line(
                value,
                float(row["sigma"]) if row["sigma"] else None,
                found,
                None if found is None else sites * found / (value - zero) ** 2,
                row["method"],
            )
        )
    return "\n".join(lines) + "\n"


def _line(
    energy: float, error: float | None, variance: float | None, score: float | None, method: str
) -> str:
    cells = ("" if value is None else f"{value:.1e}" for value in (error, variance, score))
    return f"{energy:14.6f}  {next(cells):>8}  {next(cells):>9}  {next(cells):>8}  {method}"


def main() -> None:
    """Prints the tables that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--system", choices=SYSTEMS, action="append", help="default: all")
    parser.add_argument("--steps", type=int, help="default: those of the system")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    versions = (f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "netket"))
    print(f"float64, {', '.join(versions)}\n", flush=True)
    for name in arguments.system or SYSTEMS:
        print(report(name, arguments.steps, arguments.seed), flush=True)


if __name__ == "__main__":
    main()
