"""A whole iteration of variational Monte Carlo and its parts: float64, all cores.

NetKet's model, sampler and driver, in units of ours on the same samples.  What a part takes at
least, its floor, is the time of its products at the rate of the machine plus that of its
activations at theirs, both measured in the run.
"""

import contextlib
import functools
import io
import itertools
import os
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import netket as nk
import netket.experimental as nkx
import numpy as np
import optax
from jax import lax
from timing import ratio, seconds

import compat
from compat.netket import KineticEnergy, MinSR, structured
from haiku_mlp.structure import derivatives

Calls = dict[str, Callable[[], object]]
NUM_SAMPLES, NUM_CHAINS = 1024, 64


class Case(NamedTuple):
    """A chain of spins and the hidden layers of the model."""

    kind: str
    num_spins: int
    hidden: tuple[int, ...]
    num_chains: int = NUM_CHAINS

    def __str__(self) -> str:
        chains = "" if self.num_chains == NUM_CHAINS else f", {self.num_chains} chains"
        return f"{self.kind} {self.num_spins}, hidden {' x '.join(map(str, self.hidden))}{chains}"


ITERATIONS = [
    Case("Ising", 64, (256, 256)),
    Case("Ising", 128, (512,)),
    Case("Ising", 128, (128,)),
    Case("Ising", 64, (64,)),
    Case("Heisenberg", 64, (256, 256)),
]
LOCAL_ENERGIES = [
    Case("Ising", 64, (64,)),
    Case("Ising", 64, (256, 256)),
    Case("Ising", 128, (128,)),
    Case("Ising", 128, (512,)),
    Case("Heisenberg", 64, (64,)),
    Case("Heisenberg", 64, (256,)),
    Case("Heisenberg", 64, (256, 256)),
]
PROPOSALS = [
    Case("Ising", 64, (64,)),
    Case("Ising", 64, (256,)),
    Case("Ising", 128, (512,)),
    Case("Ising", 256, (256,)),
    Case("Ising", 128, (512,), num_chains=1024),
    Case("Ising", 64, (256, 256)),
    Case("Heisenberg", 64, (64,)),
    Case("Heisenberg", 64, (256, 256)),
]
GROWTH = {
    "N": [Case("Ising", n, (128,)) for n in (32, 64, 128)],
    "width": [Case("Ising", 64, (n,)) for n in (64, 128, 256)],
}


def system(case: Case) -> tuple[Any, Any]:
    """Returns the Hamiltonian and NetKet's sampler."""
    chain = nk.graph.Chain(case.num_spins)
    if case.kind == "Ising":
        hilbert = nk.hilbert.Spin(0.5, case.num_spins)
        sampler = nk.sampler.MetropolisLocal(hilbert, n_chains=case.num_chains)
        return nk.operator.IsingJax(hilbert, chain, h=1.0), sampler
    hilbert = nk.hilbert.Spin(0.5, case.num_spins, total_sz=0)
    sampler = nk.sampler.MetropolisExchange(hilbert, graph=chain, n_chains=case.num_chains)
    return nk.operator.Heisenberg(hilbert, chain).to_jax_operator(), sampler


def state_of(model: Any, sampler: Any, num_samples: int = NUM_SAMPLES) -> nk.vqs.MCState:
    """Returns a state whose samples are drawn, without steps that are thrown away."""
    state = nk.vqs.MCState(
        sampler, model, n_samples=num_samples, n_discard_per_chain=0, seed=1, sampler_seed=2
    )
    state.sample()
    return state


def iterations(case: Case, num_samples: int = NUM_SAMPLES) -> Calls:
    """Returns whole iterations, sampling and step, without the change of the parameters."""
    hamiltonian, sampler = system(case)
    ours, stock = compat.MLP(hidden_dims=case.hidden), nk.models.MLP(hidden_dims=case.hidden)
    options: dict[str, Any] = {"diag_shift": 1e-3}
    dense = functools.partial(nk.driver.VMC_SR, use_ntk=True, on_the_fly=False)
    made = {
        "ours": (MinSR, ours, structured(sampler)),
        "ours, screened": (MinSR, ours, structured(sampler, screened=True)),
        "default": (nk.driver.VMC_SR, stock, sampler),
        "dense kernel": (dense, stock, sampler),
    }

    def iteration(driver: Any) -> object:
        driver.state.reset()
        return driver.compute_loss_and_update()[1]

    calls: Calls = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for name, (driver, model, sampler_) in made.items():
            state = state_of(model, sampler_, num_samples)
            made_driver = driver(hamiltonian, optax.sgd(0.1), variational_state=state, **options)
            calls[name] = functools.partial(iteration, made_driver)
    return calls


def iteration_rows(budget: float) -> Iterator[tuple[str, ...]]:
    """Yields NetKet's iteration in its faster setting, in units of ours."""
    for case in ITERATIONS:
        calls = iterations(case)
        rivals = {name: calls[name] for name in ("default", "dense kernel")}
        once = seconds(rivals, budget=0, least=1)
        rival = min(once, key=lambda name: once[name][0])
        names = ("ours", "ours, screened", rival)
        times = seconds({name: calls[name] for name in names}, budget=budget, least=5)
        for name in names[:2]:
            what = f"iteration, {case}{name.removeprefix('ours')}"
            yield what, "ours", milliseconds(times[name])
            yield what, f"VMC_SR, {rival}", str(ratio(times[rival], times[name]))


def dispatch_rows(budget: float) -> Iterator[tuple[str, ...]]:
    """Yields iterations whose arithmetic is of no account."""
    case = Case("Ising", 4, (64,))
    calls = iterations(case, NUM_CHAINS)
    times = seconds({name: calls[name] for name in ("ours", "default")}, budget=budget)
    for name, series in times.items():
        yield f"iteration, {case}, {NUM_CHAINS} samples", name, milliseconds(series)


def lapack_rows(rounds: int = 3) -> Iterator[tuple[str, ...]]:
    """Yields how an iteration slows down if OpenBLAS, which decomposes, has threads of its own."""
    names, case = ("ours", "dense kernel"), Case("Ising", 64, (64,))
    code = f"from iteration import *; print_times({names}, Case{tuple(case)})"
    times: dict[str, list[list[float]]] = {"1": [], str(os.cpu_count()): []}
    for _, (threads, series) in itertools.product(range(rounds), times.items()):
        environment = {"JAX_ENABLE_X64": "1", "OPENBLAS_NUM_THREADS": threads}
        output = subprocess.check_output(
            [sys.executable, "-c", code],
            env={**os.environ, **environment},
            cwd=pathlib.Path(__file__).parent,
            text=True,
        )
        series.append([float(value) for value in output.split()])
    what = f"iteration, {case}, {os.cpu_count()} threads of OpenBLAS"
    for i, who in enumerate(names):
        one, all_cores = ([found[i] for found in series] for series in times.values())
        yield what, who, str(ratio(all_cores, one))


def print_times(names: tuple[str, ...], case: Case) -> None:
    """Prints the median times (s) of iterations."""
    calls = iterations(case)
    times = seconds({name: calls[name] for name in names}, least=15)
    print(*(statistics.median(times[name]) for name in names))


def growth_rows(budget: float) -> Iterator[tuple[str, ...]]:
    """Yields the slopes on log axes of the time of an iteration."""
    for name, cases in GROWTH.items():
        times: dict[str, list[float]] = {"ours": [], "default": []}
        sizes = [case.num_spins if name == "N" else case.hidden[0] for case in cases]
        for case in cases:
            calls = iterations(case)
            found = seconds({who: calls[who] for who in times}, budget=budget, least=3)
            for who, series in found.items():
                times[who].append(statistics.median(series))
        for who, series in times.items():
            slope = np.polyfit(np.log(sizes), np.log(series), 1)[0]
            yield f"iteration, growth with {name} {tuple(sizes)}: exponent", who, f"{slope:.2f}"


def local_energy_rows(budget: float) -> Iterator[tuple[str, ...]]:
    """Yields NetKet's two kernels in units of ours, and ours beside the floor."""
    machine = Machine()
    for case in LOCAL_ENERGIES:
        hamiltonian, sampler = system(case)
        ours, stock = (
            state_of(model(hidden_dims=case.hidden), sampler)
            for model in (compat.MLP, nk.models.MLP)
        )

        def packed(state: Any = stock, hamiltonian: Any = hamiltonian) -> object:
            nk.config.netket_experimental_packed_kernel = True
            try:
                return state.local_estimators(hamiltonian).data
            finally:
                nk.config.netket_experimental_packed_kernel = False

        calls: Calls = {
            "ours": lambda s=ours, h=hamiltonian: s.local_estimators(h).data,
            "default": lambda s=stock, h=hamiltonian: s.local_estimators(h).data,
            "packed kernel": packed,
        }
        np.testing.assert_allclose(calls["ours"](), calls["default"](), rtol=1e-8)
        x = ours.samples.reshape(-1, case.num_spins)
        y, _ = hamiltonian.get_conn_padded(x)
        num_real = int(jnp.sum(jnp.any(y != x[:, None], -1)))
        times = seconds(calls, budget=budget, least=5)
        for name in ("default", "packed kernel"):
            yield f"local energies, {case}", name, str(ratio(times[name], times["ours"]))
        floor = machine.after_the_first_layer(num_real, case.hidden)
        yield f"local energies, {case}", "ours", share(times["ours"], floor)


def proposal_rows(budget: float) -> Iterator[tuple[str, ...]]:
    """Yields the time of a proposal of all chains, and the share of its floor."""
    machine = Machine()
    for case in PROPOSALS:
        _, sampler = system(case)
        model = compat.MLP(hidden_dims=case.hidden)
        samplers = {
            "NetKet": sampler,
            "ours": structured(sampler),
            "ours, screened": structured(sampler, screened=True),
        }
        states = {name: state_of(model, sampler_) for name, sampler_ in samplers.items()}
        times = seconds({name: state.sample for name, state in states.items()}, budget=budget)
        proposals = sampler.sweep_size * NUM_SAMPLES // case.num_chains
        floor = proposals * machine.after_the_first_layer(case.num_chains, case.hidden)
        for name, series in times.items():
            micro = 1e6 * statistics.median(series) / proposals
            what = f"{micro:.0f} us a proposal"
            ours = "" if name == "NetKet" else f", {share(series, floor)}"
            gain = "" if name == "NetKet" else f", {ratio(times['NetKet'], series)} times"
            yield f"sampling, {case}", name, what + gain + ours


def envelope(x: jax.Array) -> jax.Array:
    """Returns the logarithm of a Gaussian."""
    return -jnp.sum(x**2, -1) / 4


def waves(x: jax.Array) -> jax.Array:
    """Returns periodic features, two of each coordinate."""
    return jnp.concatenate([jnp.sin(2 * x), jnp.cos(2 * x)], -1)


class EnvelopeAndWaves(nn.Module):
    """An envelope times a network of periodic features."""

    hidden: tuple[int, ...]

    def setup(self) -> None:
        self.mlp = compat.MLP(hidden_dims=self.hidden, hidden_activations=jnp.tanh)

    def __call__(self, x: jax.Array) -> jax.Array:
        return envelope(x) + self.mlp(waves(x))

    def laplacian(self, x: jax.Array, weights: jax.Array | None = None) -> Any:
        of_mlp = self.mlp.laplacian(x, features=waves, weights=weights)
        return jax.tree.map(jnp.add, of_mlp, derivatives(envelope, x, weights=weights))


def kinetic_rows(budget: float) -> Iterator[tuple[str, ...]]:
    """Yields NetKet's kinetic energy, with a potential, in units of ours."""
    machine, hidden, num_particles = Machine(jnp.tanh), (128, 128), 20
    space = nkx.hilbert.Particle(N=num_particles, geometry=nkx.geometry.FreeSpace(d=3))
    trap = nk.operator.PotentialEnergy(space, lambda x: 0.5 * jnp.sum(x**2))
    sampler = nk.sampler.MetropolisGaussian(space, sigma=0.1, n_chains=NUM_CHAINS, sweep_size=4)
    models = {
        "MLP": compat.MLP(hidden_dims=hidden, hidden_activations=jnp.tanh),
        "envelope and periodic features": EnvelopeAndWaves(hidden),
    }
    for (name, model), num_samples in itertools.product(models.items(), (256, 1024)):
        state = state_of(model, sampler, num_samples)
        operators = {
            "ours": KineticEnergy(space, 1.0),
            "NetKet": nk.operator.KineticEnergy(space, 1.0),
        }
        calls: Calls = {
            who: lambda state=state, h=kinetic + trap: state.local_estimators(h).data
            for who, kinetic in operators.items()
        }
        np.testing.assert_allclose(calls["ours"](), calls["NetKet"](), rtol=1e-6)
        times = seconds(calls, budget=budget)
        what = f"kinetic energy, 60 coordinates, hidden 128 x 128, {name}, {num_samples} samples"
        yield what, "NetKet", str(ratio(times["NetKet"], times["ours"]))
        floor = machine.products(num_samples * 3 * num_particles, [hidden])
        yield what, "ours", share(times["ours"], floor)


class Machine:
    """The machine's own rates: of products, and of an activation in the cache."""

    def __init__(self, activation: Callable[[jax.Array], jax.Array] = jax.nn.gelu):
        a, blocks = jnp.ones((1024, 1024)), jnp.ones((64, 512, 128))
        product = jax.jit(jnp.matmul)
        activate = jax.jit(lambda z: lax.map(lambda z: jnp.sum(activation(z), 0), z))
        times = seconds({"product": lambda: product(a, a), "activation": lambda: activate(blocks)})
        self.of_product = min(times["product"]) / len(a) ** 3
        self.of_activation = min(times["activation"]) / blocks.size

    def products(self, rows: int, shapes: list[tuple[int, ...]]) -> float:
        """Returns the time (s) of products of so many rows with matrices."""
        return rows * self.of_product * sum(n * m for n, m in shapes)

    def after_the_first_layer(self, rows: int, hidden: tuple[int, ...]) -> float:
        """Returns the time (s) of a network whose first pre-activations are given."""
        shapes = list(itertools.pairwise((*hidden, 1)))
        return self.products(rows, shapes) + rows * self.of_activation * sum(hidden)


def share(times: list[float], floor: float) -> str:
    """Returns the time; on a CPU with the share of the floor, which a GPU has no such rates for."""
    if jax.default_backend() != "cpu":
        return milliseconds(times)
    return f"{floor / statistics.median(times):.0%} of {milliseconds(times)} is floor"


def milliseconds(times: list[float]) -> str:
    return f"{1e3 * statistics.median(times):.3g} ms"
