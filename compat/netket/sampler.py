"""NetKet's Metropolis sampler with the first layer of the MLP carried along."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import netket as nk
import numpy as np
from jax import lax
from netket.jax.sharding import sharding_decorator
from netket.utils import struct

from haiku_mlp.structure import Layer

from .layers import bits, is_cpu, layers
from .proposals import EXCHANGES, Proposals, are_by_chain, proposals
from .sweep import keys_of_sweep, sweep_of
from .threads import num_cores, side_by_side

# From so many multiplications of a proposal on, the first layer takes an accelerator time.
_ACCELERATED = 2**25
# Parts of the chains, each in a thread: on 16 cores more parts gained little, or lost.  It is not
# worth them if a part has fewer chains than this, or their layers fewer entries in all.
_PARTS, _CHAINS, _ENTRIES = 2, 8, 2**22


def structured(sampler: Any, *, screened: bool = False) -> Any:
    """Returns a sampler of the same chain that spends less time on a :class:`compat.MLP`.

    A proposal changes few sites, and so the first layer by few rows of its weights: the
    first layer is carried along within a sweep in place of being evaluated for each
    proposal.  Configurations, acceptance and random state are those of ``sampler`` from the
    same seed, after the ``reset`` that NetKet asks for (``MCState`` does it); log-probabilities
    agree up to rounding.

    It gains for ``LocalRule``, ``ExchangeRule`` and ``FermionHopRule`` (and for
    ``MultipleRules``, ``TensorRule`` and ``HamiltonianRule`` up to 2 sites), in proportion to
    the first layer's share of the network.  NetKet's own path runs, with the same result,
    for other rules and models, for activations that own parameters, 16-bit models, a
    sampler with a ``chunk_size``, and on accelerators, but for exchanges and large first layers.

    On a CPU of several cores two halves of the chains of a 64-bit model are swept at the same
    time, each in a thread: the products of few chains are too small for XLA to share them out.

    Decisions in 32 bits differ where rounding decides.  A model of 32 bits is therefore
    decided again by the full network wherever the logarithm of the acceptance is closer to
    that of the random number than 16 times the error measured at the start of the sweep, of
    the chains that are swept together.

    Args:
      sampler: A sampler of NetKet: ``MetropolisLocal(...)``, ``MetropolisExchange(...)``.
        One that is no plain ``MetropolisSampler`` (tempering, exact samplers) is returned
        as it is.
      screened: Whether to decide a model of 64 bits in 32 bits first, and in doubt, by the
        same measure, in 64 bits; on a CPU alone.  The margin is a heuristic: the chain was
        NetKet's in all tests, but no bound is proved.

    Raises:
      TypeError: ``sampler`` is no sampler.

    Source: `MetropolisSampler of NetKet
    <https://netket.readthedocs.io/en/latest/api/_generated/sampler/netket.sampler.MetropolisSampler.html>`_.

    Example::

      >>> import netket as nk
      >>> import compat
      >>> from compat.netket import structured
      >>> hilbert = nk.hilbert.Spin(0.5, 8)
      >>> sampler = nk.sampler.MetropolisLocal(hilbert)
      >>> model = compat.MLP(hidden_dims=(8,))
      >>> stock = nk.vqs.MCState(sampler, model, n_samples=64, seed=1)
      >>> state = nk.vqs.MCState(structured(sampler), model, n_samples=64, seed=1)
      >>> bool((state.samples == stock.samples).all())
      True
    """
    if not isinstance(sampler, nk.sampler.Sampler):
        raise TypeError(
            f"sampler must be a sampler of NetKet, got {sampler!r}: give for instance "
            "netket.sampler.MetropolisLocal(hilbert)"
        )
    if type(sampler) not in (nk.sampler.MetropolisSampler, StructuredMetropolis):
        return sampler
    made = StructuredMetropolis(
        sampler.hilbert,
        sampler.rule,
        sweep_size=sampler.sweep_size,
        reset_chains=sampler.reset_chains,
        n_chains=sampler.n_chains,
        machine_pow=sampler.machine_pow,
        dtype=sampler.dtype,
        screened=screened,
    )
    return made.replace(chunk_size=sampler.chunk_size)  # which the constructor drops


class StructuredMetropolis(nk.sampler.MetropolisSampler):
    """``netket.sampler.MetropolisSampler`` with a sweep of its own: see :func:`structured`."""

    screened: bool = struct.field(pytree_node=False, default=False)
    """Whether proposals are decided in 32 bits where that is clear."""

    def __init__(self, *args: Any, screened: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.screened = bool(screened)

    def _sample_chain(
        self,
        machine: Any,
        parameters: Any,
        state: Any,
        chain_length: int,
        return_log_probabilities: bool = False,
    ) -> Any:
        def part(i: int) -> Any:
            return _sample_part(self, machine, parameters, state, i, chain_length=chain_length)

        parts = None
        if self._is_worth_threads(machine, parameters, state, chain_length):
            parts = side_by_side(part, _PARTS)
        if parts is None:
            options = {"return_log_probabilities": return_log_probabilities}
            return super()._sample_chain(machine, parameters, state, chain_length, **options)
        samples, state = _joined(parts)
        return samples if return_log_probabilities else samples[0], state

    # NetKet asks subclasses to override this and not sample_next.
    def _sample_next(self, machine: Any, parameters: Any, state: Any) -> Any:
        found = None
        if len(state.σ) == self.n_chains:  # else NetKet raises an error
            found = self.structure(machine, parameters, state)
        if found is None:
            return super()._sample_next(machine, parameters, state)
        return self._swept(found, state)

    def _swept(self, found: Any, state: Any, first: jax.Array | None = None) -> Any:
        """Returns what NetKet's ``_sample_next`` does, of all chains or of those from ``first``."""
        network, moves, rng, uniform_keys = found
        draw = jax.vmap(lambda key: jax.random.uniform(key, (self.n_chains,)), out_axes=1)
        draws = moves.draws, draw(uniform_keys)
        if first is not None:
            take = functools.partial(lax.dynamic_slice_in_dim, slice_size=len(state.σ))
            draws = jax.tree.map(lambda a: take(a, first), draws)
        # Chains never meet: each device sweeps its own without a word to the others.
        # A condition makes an accelerator wait for its host.
        is_screened = (self.screened and is_cpu()) or bits(network, state.σ) == 32
        run = sweep_of(network, moves, screened=is_screened)
        if moves.by_chain and jax.device_count() > 1:  # else there may be no mesh
            run = sharding_decorator(run, (False,) * 3 + (True,) * 6, (False,) * 3)
        σ, log_prob, num_accepted = run(
            [(layer.w, layer.b) for layer in network],
            moves.constants,
            self.machine_pow,
            state.σ,
            state.log_prob,
            state.n_accepted_proc,
            moves.notes,
            *draws,
        )
        state = state.replace(
            σ=σ,
            log_prob=log_prob,
            rng=rng,
            n_accepted_proc=num_accepted,
            n_steps_proc=state.n_steps_proc + self.sweep_size * self.n_chains,
        )
        return state, (σ, log_prob)

    def structure(
        self, machine: Any, parameters: Any, state: Any
    ) -> tuple[tuple[Layer, ...], Proposals, jax.Array, jax.Array] | None:
        """Returns layers, proposals, the next random state and the keys of a sweep.

        None where NetKet's own path runs.
        """
        network = layers(machine, parameters)
        if network is None or not self._gains(network, state.σ):
            return None
        rng, move_keys, uniform_keys = keys_of_sweep(state.rng, self.sweep_size)
        moves = proposals(self, machine, parameters, state, move_keys)
        return None if moves is None else (network, moves, rng, uniform_keys)

    def _gains(self, network: tuple[Layer, ...], σ: jax.Array) -> bool:
        # One layer has nothing to save.
        if len(network) == 1 or self.chunk_size is not None or bits(network, σ) < 32:
            return False
        is_large = len(σ) * network[0].w.size >= _ACCELERATED
        return is_cpu() or is_large or type(self.rule) in EXCHANGES

    def _is_worth_threads(
        self, machine: Any, parameters: Any, state: Any, chain_length: int
    ) -> bool:
        """Returns whether parts of the chains are swept side by side, if threads may."""
        num_chains, weights = len(state.σ), jax.tree.leaves(parameters)
        units = sum(np.shape(w)[-1] for w in weights if np.ndim(w) == 2)
        if chain_length * self.sweep_size * num_chains * units < _ENTRIES or not is_cpu():
            return False
        if num_chains != self.n_chains or num_chains % _PARTS or num_chains < _PARTS * _CHAINS:
            return False
        if num_cores() < _PARTS or jax.device_count() > 1:
            return False
        network = layers(machine, parameters)
        if network is None or not self._gains(network, state.σ) or bits(network, state.σ) < 64:
            return False  # of 32 bits a product of half the rows may decide otherwise
        return are_by_chain(self.rule, self.hilbert, state.σ.dtype)


@functools.partial(jax.jit, static_argnames=("machine", "chain_length"))
def _sample_part(
    sampler: StructuredMetropolis,
    machine: Any,
    parameters: Any,
    state: Any,
    part: int | jax.Array,
    *,
    chain_length: int,
) -> tuple[Any, Any]:
    """Returns what NetKet's ``_sample_chain`` does, of a part of the chains."""
    size = len(state.σ) // _PARTS
    first = jnp.asarray(part * size)

    def sweep(state: Any, _: None) -> Any:
        found = sampler.structure(machine, parameters, state)
        return sampler._swept(found, state, first)

    mine = [lax.dynamic_slice_in_dim(a, first, size) for a in _of_chains(state)]
    state, samples = lax.scan(sweep, _with(state, *mine), None, length=chain_length)
    return jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), samples), state


@jax.jit
def _joined(parts: list[tuple[Any, Any]]) -> tuple[Any, Any]:
    """Returns what :func:`_sample_part` would for all chains."""
    samples, states = zip(*parts, strict=True)
    together = functools.partial(jax.tree.map, lambda *a: jnp.concatenate(a))
    return together(*samples), _with(states[0], *together(*map(_of_chains, states)))


def _of_chains(state: Any) -> tuple[jax.Array, ...]:
    """Returns the parts of NetKet's state that have an entry for each chain."""
    return state.σ, state.log_prob, state.n_accepted_proc


def _with(state: Any, σ: jax.Array, log_prob: jax.Array, num_accepted: jax.Array) -> Any:
    return state.replace(σ=σ, log_prob=log_prob, n_accepted_proc=num_accepted)
