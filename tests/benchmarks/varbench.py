"""The MLP on systems of varbench, beside the energies that are listed there.

    python tests/benchmarks/varbench.py --system tfim-chain-32 --minutes 15 --output a.json
    python tests/benchmarks/varbench_table.py

The ansatz is an MLP that is summed over the translations of the lattice; after Marshall's
rotation real weights do.  It is trained by stochastic reconfiguration until its share of the
time is over; the rest goes into the energy.  The second command makes ``varbench.txt`` of the
results in the folder ``varbench``.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import netket as nk
import numpy as np
import optax
from flax import linen as nn
from flax import serialization
from netket.utils import HashableArray, struct

import compat
from compat.netket import MinSR

BLOCK = 5  # steps between two looks at the clock
TRUST = 0.1  # how far a step may turn the state


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a state is made and trained; a pair is the value of the first and the last stage."""

    group: str = "translation"  # or "space", with the point group
    features: int = 8  # hidden units an element of the group: the first layer of the MLP
    hidden: tuple[int, ...] = ()  # its other hidden layers
    outputs: int = 1  # 2: modulus and phase
    chains: int = 512
    samples: tuple[int, int] = (512, 2048)
    rate: tuple[float, float] = (0.05, 0.005)
    shift: tuple[float, float] = (1e-2, 3e-4)
    momentum: float = 0.9  # of SPRING
    stages: int = 10
    chunk: int = 64  # samples whose local energies are computed at a time
    driver: str = "MinSR"  # or "VMC_SR", NetKet's: the same steps from another linear system
    share: float = 0.8  # of the time that is for the training


@dataclasses.dataclass(frozen=True)
class System:
    """A Hamiltonian on a lattice, and what the training takes for it."""

    name: str  # that of varbench
    make: Callable[[], tuple[Any, Any]]
    recipe: Recipe = Recipe()


def ising(graph: Any, field: float) -> tuple[Any, Any]:
    """Returns the lattice and the ferromagnet in a transverse field."""
    return graph, nk.operator.Ising(nk.hilbert.Spin(0.5, graph.n_nodes), graph, h=field, J=-1.0)


def heisenberg(graph: Any, *second: float) -> tuple[Any, Any]:
    """Returns the lattice and the antiferromagnet after Marshall's rotation.

    Without a ``second`` coupling the ground state is positive.
    """
    hilbert = nk.hilbert.Spin(0.5, graph.n_nodes, total_sz=0)
    signs = [True, *(False for _ in second)]
    operator = nk.operator.Heisenberg(hilbert, graph, J=[1.0, *second], sign_rule=signs)
    return graph, operator.to_jax_operator()


ISING = Recipe(features=12, rate=(0.05, 0.01), shift=(1e-3, 1e-6), chunk=512, share=0.6)
HEISENBERG = Recipe(rate=(0.02, 0.002), shift=(1e-1, 1e-3))
SYSTEMS = {
    "tfim-chain-32": System(
        "TFIsing chain 32 periodic h=1", lambda: ising(nk.graph.Chain(32), 1.0), ISING
    ),
    "tfim-6x6": System(
        "TFIsing square 6x6 periodic h=3", lambda: ising(nk.graph.Square(6), 3.0), ISING
    ),
    "heisenberg-chain-20": System(
        "Heisenberg chain 20 periodic", lambda: heisenberg(nk.graph.Chain(20)), HEISENBERG
    ),
    "heisenberg-6x6": System(
        "Heisenberg square 6x6 periodic", lambda: heisenberg(nk.graph.Square(6)), HEISENBERG
    ),
    "heisenberg-10x10": System(
        "Heisenberg square 10x10 periodic",
        lambda: heisenberg(nk.graph.Square(10)),
        dataclasses.replace(
            HEISENBERG,
            chains=256,
            samples=(256, 1024),
            rate=(0.01, 0.001),
            shift=(0.5, 1e-2),
            chunk=32,
        ),
    ),
    "j1j2-6x6": System(
        "J1-J2 square 6x6 periodic J2=0.5",
        lambda: heisenberg(nk.graph.Square(6, max_neighbor_order=2), 0.5),
        dataclasses.replace(HEISENBERG, outputs=2),
    ),
}


def log_cosh(z: jax.Array) -> jax.Array:
    """Returns the logarithm of the cosine hyperbolic of real numbers."""
    z = jnp.abs(z)
    return z + jnp.log(1 + jnp.exp(-2 * z)) - math.log(2)  # log1p takes twice the time


class SymmetricMLP(nn.Module):
    """The outputs of an MLP, summed over the images of a configuration.

    The images of the first layer's input are images of its weights, which is less work.
    Without bias and with an even activation the sum does not change when all spins flip.
    """

    images: HashableArray  # (images, sites), a group of permutations
    features: int
    hidden: tuple[int, ...] = ()
    outputs: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logarithm of the wave function at ``(B, sites)``."""
        images = np.asarray(self.images)
        shape = self.features, images.shape[-1]
        kernel = self.param("kernel", nn.initializers.normal(0.05), shape)
        # A product with the permutations, because the derivative of a gather is slow.
        permutations = jnp.eye(shape[-1], dtype=kernel.dtype)[images]
        weights = jnp.einsum("ft,gst->fgs", kernel, permutations)
        hidden = log_cosh(jnp.einsum("...s,fgs->...fg", x.astype(kernel.dtype), weights))
        if not self.hidden:  # what follows is linear, so the sum may come first
            hidden = hidden.sum(-1, keepdims=True)
        rest = compat.blocks.MLP(self.outputs, hidden_dims=self.hidden, hidden_activations=log_cosh)
        outputs = rest(hidden.swapaxes(-1, -2)).sum(-2)
        return outputs[..., 0] if self.outputs == 1 else outputs[..., 0] + 1j * outputs[..., 1]


class RegionRule(nk.sampler.rules.MetropolisRule):
    """Turns all spins of a box on a periodic lattice.

    Near a critical point the magnetisation moves slowly by single spins; a box turns many of
    them and has few neighbours.
    """

    extent: tuple[int, ...] = struct.field(pytree_node=False)

    def __init__(self, extent: Sequence[int]):
        self.extent = tuple(map(int, extent))

    def transition(
        self, sampler: Any, machine: Any, params: Any, state: Any, key: Any, σ: jax.Array
    ) -> tuple[jax.Array, None]:
        """Returns the proposals; the reverse is as likely."""
        shape, extent = (len(σ), len(self.extent)), jnp.array(self.extent)[None]
        corner, size = (jax.random.randint(k, shape, 0, extent) for k in jax.random.split(key))
        place = jnp.indices(self.extent).reshape(1, len(self.extent), -1)
        is_inside = (place - corner[..., None]) % extent[..., None] <= size[..., None]
        return jnp.where(is_inside.all(1), -σ, σ), None


def state_of(graph: Any, hamiltonian: Any, recipe: Recipe, seed: int) -> nk.vqs.MCState:
    """Returns the untrained state."""
    hilbert = hamiltonian.hilbert
    images = HashableArray(np.asarray(getattr(graph, f"{recipe.group}_group")()))
    model = SymmetricMLP(images, recipe.features, recipe.hidden, recipe.outputs)
    rule = (
        nk.sampler.rules.ExchangeRule(graph=graph)
        if hilbert.constrained
        else nk.sampler.rules.MultipleRules(
            [nk.sampler.rules.LocalRule(), RegionRule(graph.extent)], [0.5, 0.5]
        )
    )
    return nk.vqs.MCState(
        nk.sampler.MetropolisSampler(hilbert, rule, n_chains=recipe.chains),
        model,
        n_samples=recipe.samples[0],
        n_discard_per_chain=0,  # the chains go on from step to step
        chunk_size=recipe.chunk,
        seed=seed,
    )


def train(
    state: nk.vqs.MCState, hamiltonian: Any, recipe: Recipe, progress: Callable[[], float]
) -> list[tuple[float, int, float, float]]:
    """Trains until ``progress()`` is 1 and returns the curve: seconds, steps, energy, variance."""
    begin = time.perf_counter()
    curve: list[tuple[float, int, float, float]] = []
    good, brake = state.parameters, 0
    variance = float(np.var(state.local_estimators(hamiltonian).data))
    stages = (np.geomspace(*pair, recipe.stages) for pair in (recipe.rate, recipe.shift))
    for stage, (samples, rate, shift) in enumerate(zip(_samples(recipe), *stages, strict=True), 1):
        state.n_samples = samples
        driver, halvings, brake = None, -1, max(0, brake - 1)
        while progress() < stage / recipe.stages:
            # A step turns the state by about 2 rate sqrt(variance).
            needed = brake + max(0, math.ceil(math.log2(rate * math.sqrt(variance) / TRUST)))
            if driver is None or needed != halvings:
                halvings = needed
                driver = _driver(state, hamiltonian, recipe, rate / 2**halvings, shift)
            log, before = nk.logging.RuntimeLog(), state.parameters
            driver.run(BLOCK, out=log, show_progress=False)
            values = (log.data["Energy"][name] for name in ("Mean", "Variance"))
            mean, found = (float(np.mean(np.real(value))) for value in values)
            if not found < 10 * variance:  # the last step was too long
                state.parameters, brake = good, brake + 1
                for _ in range(BLOCK):  # the chains come back from where it led them
                    state.sample()
                continue
            good, variance = before, found
            steps = BLOCK + (curve[-1][1] if curve else 0)
            curve.append((time.perf_counter() - begin, steps, mean, variance))
    return curve


def _samples(recipe: Recipe) -> list[int]:
    """Returns how many samples each stage takes: a power of two for each chain."""
    numbers = np.geomspace(*recipe.samples, recipe.stages) / recipe.chains
    return [recipe.chains * 2 ** math.floor(math.log2(number) + 0.5) for number in numbers]


def _driver(
    state: nk.vqs.MCState, hamiltonian: Any, recipe: Recipe, rate: float, shift: float
) -> Any:
    options = {
        "diag_shift": shift,
        "momentum": recipe.momentum or None,
        "variational_state": state,
        "mode": "real" if recipe.outputs == 1 else "complex",
    }
    if recipe.driver == "MinSR":
        return MinSR(hamiltonian, optax.sgd(rate), **options)
    with contextlib.redirect_stdout(None):  # it prints how it averages its diagnostics
        return nk.driver.VMC_SR(
            hamiltonian,
            optax.sgd(rate),
            use_ntk=state.n_samples < state.n_parameters,
            on_the_fly=False,
            **options,
        )


def estimate(
    state: nk.vqs.MCState, hamiltonian: Any, seconds: float
) -> tuple[float, float, float, int]:
    """Samples for so long; returns energy, its error, the variance, the number of samples.

    The chains are independent, so their means show the error.
    """
    begin, energies = time.perf_counter(), []
    state.reset()
    while time.perf_counter() - begin < seconds or len(energies) < 2:
        state.sample()
        energies.append(np.real(state.local_estimators(hamiltonian).data))
    values = np.concatenate(energies, axis=1)  # (chains, samples of each)
    chains = values.mean(axis=1)
    error = chains.std(ddof=1) / math.sqrt(len(chains))
    return float(values.mean()), float(error), float(values.var()), values.size


def run(
    name: str, recipe: Recipe, minutes: float, seed: int
) -> tuple[dict[str, Any], nk.vqs.MCState]:
    """Trains on one system; returns what there is to say about it, and the state."""
    begin = time.perf_counter()
    graph, hamiltonian = SYSTEMS[name].make()
    state = state_of(graph, hamiltonian, recipe, seed)
    curve = train(
        state,
        hamiltonian,
        recipe,
        lambda: (time.perf_counter() - begin) / (60 * minutes * recipe.share),
    )
    left = 60 * minutes - (time.perf_counter() - begin)
    energy, error, variance, samples = estimate(state, hamiltonian, left)
    result = {
        "system": SYSTEMS[name].name,
        "energy": energy,
        "error": error,
        "variance": variance,
        "samples": samples,
        "steps": curve[-1][1] if curve else 0,
        "parameters": state.n_parameters,
        "minutes": (time.perf_counter() - begin) / 60,
        "seed": seed,
        "recipe": dataclasses.asdict(recipe),
        "device": _device(),
        "versions": {key: importlib.metadata.version(key) for key in ("jax", "flax", "netket")},
        "curve": curve,
    }
    return result, state


def _device() -> str:
    if jax.default_backend() == "cpu":
        return f"{len(os.sched_getaffinity(0))} core(s)"
    return jax.devices()[0].device_kind


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--system", choices=SYSTEMS)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=pathlib.Path, help="NAME.json; beside it the weights")
    for field in dataclasses.fields(Recipe):
        many = isinstance(field.default, tuple)
        kind = int if field.name == "hidden" else type(field.default[0] if many else field.default)
        parser.add_argument(f"--{field.name}", type=kind, nargs="*" if many else None)
    arguments = vars(parser.parse_args())
    given = {
        field.name: tuple(value) if isinstance(value, list) else value
        for field in dataclasses.fields(Recipe)
        if (value := arguments[field.name]) is not None
    }
    recipe = dataclasses.replace(SYSTEMS[arguments["system"]].recipe, **given)
    result, state = run(arguments["system"], recipe, arguments["minutes"], arguments["seed"])
    text = json.dumps(result)
    if output := arguments["output"]:
        output.write_text(text + "\n")
        output.with_suffix(".msgpack").write_bytes(serialization.to_bytes(state.variables))
    else:
        print(text)


if __name__ == "__main__":
    main()
