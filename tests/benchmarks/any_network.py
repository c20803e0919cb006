"""Prints time and memory of the tangent kernel of networks of many kinds, beside NetKet's.

NetKet's is ``empirical_ntk_by_jacobian``, in units of ``compat.tangent_kernel``, both of one
run; what differs between the two kernels; and a step of ``MinSR`` beside ``VMC_SR``'s.

Run: python tests/benchmarks/any_network.py
"""

import contextlib
import functools
import io
import operator
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402  (x64 is on from the start)
import netket as nk  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from flax import linen as nn  # noqa: E402
from netket.jax._ntk import empirical_ntk_by_jacobian  # noqa: E402
from timing import ratios  # noqa: E402

import compat  # noqa: E402
from compat.netket import MinSR  # noqa: E402

Dense = functools.partial(nn.Dense, param_dtype=float)


class Backflow(nn.Module):
    """Logarithm of a Slater determinant whose orbitals depend on all fermions."""

    num_fermions: int
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape[-1], self.num_fermions
        orbitals = self.param("orbitals", nn.initializers.normal(1.0), shape, float)
        h = jnp.tanh(Dense(self.width)(x))
        flow = Dense(orbitals.size)(h).reshape(*x.shape[:-1], *shape)

        def log_determinant(x: jax.Array, flow: jax.Array) -> jax.Array:
            sites = x.nonzero(size=self.num_fermions)[0]
            return jnp.linalg.slogdet((orbitals + 0.1 * flow)[sites])[1]

        return jnp.vectorize(log_determinant, signature="(n),(n,f)->()")(x, flow)


class Transformer(nn.Module):
    """A vision transformer of two blocks."""

    width: int
    patch: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = Dense(self.width)(x.reshape(len(x), -1, self.patch))
        for _ in range(2):
            y = nn.LayerNorm(param_dtype=float)(h)
            h = h + nn.MultiHeadDotProductAttention(4, param_dtype=float)(y)
            y = nn.gelu(Dense(2 * self.width)(nn.LayerNorm(param_dtype=float)(h)))
            h = h + Dense(self.width)(y)
        return Dense(1)(jnp.tanh(h.sum(1)))[:, 0]


class ResNet(nn.Module):
    """Convolutions around which the input goes."""

    channels: int = 8

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = functools.partial(nn.Conv, self.channels, (3,), padding="CIRCULAR")
        h = conv(param_dtype=float)(x[..., None])
        for _ in range(2):
            y = nn.gelu(nn.LayerNorm(param_dtype=float)(h))
            h = h + conv(param_dtype=float)(nn.gelu(conv(param_dtype=float)(y)))
        return Dense(1)(h.mean(1))[:, 0]


def spins(batch: int, sites: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).choice([-1.0, 1.0], (batch, sites)))


def occupations(batch: int) -> jax.Array:
    one = np.repeat([1.0, 0.0], [16, 48])
    return jnp.asarray(np.random.default_rng(0).permuted(np.tile(one, (batch, 1)), axis=1))


CASES: dict[str, tuple[Any, jax.Array]] = {
    "RBM, 64 spins, alpha 4, batch 256": (nk.models.RBM(alpha=4), spins(256, 64)),
    "complex RBM, 64 spins, alpha 1, batch 256": (
        nk.models.RBM(alpha=1, param_dtype=complex),
        spins(256, 64),
    ),
    "MLP, 64 x 256 x 256, batch 256": (nk.models.MLP(hidden_dims=(256, 256)), spins(256, 64)),
    "compat.MLP, 64 x 256 x 256, batch 256": (compat.MLP(hidden_dims=(256, 256)), spins(256, 64)),
    "backflow, 64 sites, 16 fermions, batch 256": (Backflow(16, 64), occupations(256)),
    "transformer, width 64, 16 patches, batch 128": (Transformer(64, 4), spins(128, 64)),
    "transformer, width 128, 8 patches, batch 128": (Transformer(128, 8), spins(128, 64)),
    "residual convolutions, 8 channels, 16 spins, batch 64": (ResNet(), spins(64, 16)),
}


def kernel_rows(budget: float) -> Iterator[tuple[str, ...]]:
    """Yields time and memory of NetKet's kernel in units of ours, and how they differ."""
    for name, (model, x) in CASES.items():
        params = model.init(jax.random.key(1), x[:1])["params"]

        def log_psi(params: Any, x: jax.Array, model: Any = model) -> jax.Array:
            return model.apply({"params": params}, x).real

        def ours(params: Any, x: jax.Array, log_psi: Any = log_psi) -> jax.Array:
            return compat.tangent_kernel(log_psi, params, x)

        def theirs(params: Any, x: jax.Array, log_psi: Any = log_psi) -> jax.Array:
            flat = nk.jax.tree_to_real(params)
            return empirical_ntk_by_jacobian(
                lambda real, x: log_psi(flat[1](real), x), trace_axes=(), vmap_axes=0
            )(x, None, flat[0])

        compiled = [jax.jit(f).lower(params, x).compile() for f in (ours, theirs)]
        kernels = [np.asarray(function(params, x)) for function in compiled]
        memory = [f.memory_analysis().temp_size_in_bytes for f in compiled]
        calls = {
            side: functools.partial(function, params, x)
            for side, function in zip(("ours", "theirs"), compiled, strict=True)
        }
        time = ratios(calls, "ours", budget=budget, least=5)["theirs"]
        error = np.max(np.abs(kernels[0] - kernels[1])) / np.max(np.abs(kernels[1]))
        what, who = f"tangent kernel, {name}", "NetKet, by its Jacobian"
        yield f"{what}: time", who, str(time)
        yield f"{what}: temporary memory", who, f"{memory[1] / memory[0]:.3g}"
        yield f"{what}: relative difference", who, f"{error:.1e}"


def step_rows(budget: float) -> Iterator[tuple[str, ...]]:
    """Yields a step of ``VMC_SR``, by default settings, in units of ``MinSR``'s.

    In a process with more threads: with two JAX's decompositions, of which ``VMC_SR`` has several
    in one program, wait for each other for ever.
    """
    script = pathlib.Path(__file__)
    options = {"env": {**os.environ, "NPROC": "8"}, "cwd": script.parent}
    program = f"import any_network as a; print(a.step_ratio({budget}))"
    lines = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True, **options
    ).stdout.splitlines()
    yield "SR step, backflow, 64 sites, 16 fermions, 512 samples", "VMC_SR", lines[-1]


def step_ratio(budget: float) -> str:
    """Returns a step of ``VMC_SR`` in units of ``MinSR``'s."""
    chain = nk.graph.Chain(64)
    hilbert = nk.hilbert.SpinOrbitalFermions(64, n_fermions=16)
    sampler = nk.sampler.MetropolisFermionHop(hilbert, graph=chain, n_chains=64)
    state = nk.vqs.MCState(sampler, Backflow(16, 64), n_samples=512, n_discard_per_chain=1, seed=0)
    create, destroy = nk.operator.fermion.create, nk.operator.fermion.destroy
    hops = [
        -create(hilbert, i) * destroy(hilbert, j)
        for a, b in chain.edges()
        for i, j in ((a, b), (b, a))
    ]
    conserving = nk.experimental.operator.ParticleNumberConservingFermioperator2nd
    hamiltonian = conserving.from_fermionoperator2nd(functools.reduce(operator.add, hops))
    options: dict[str, Any] = {"diag_shift": 1e-3, "variational_state": state}
    with contextlib.redirect_stdout(io.StringIO()):
        drivers = {
            "ours": MinSR(hamiltonian, optax.sgd(0.1), **options),
            "VMC_SR": nk.driver.VMC_SR(hamiltonian, optax.sgd(0.1), **options),
        }
    calls = {
        name: functools.partial(lambda driver: driver.compute_loss_and_update()[1], driver)
        for name, driver in drivers.items()
    }
    return str(ratios(calls, "ours", budget=budget, least=3)["VMC_SR"])


def rows(budget: float) -> Iterator[tuple[str, ...]]:
    """Yields all rows."""
    yield from kernel_rows(budget)
    yield from step_rows(budget)


if __name__ == "__main__":
    for row in rows(2.0):
        print(*row, sep="; ", flush=True)
