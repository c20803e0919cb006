"""What a Metropolis rule of NetKet proposes, with the random numbers that NetKet draws."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import netket as nk
from netket.sampler import rules
from netket.sampler.rules.hamiltonian import HamiltonianRuleJax

from haiku_mlp.structure import changes

# Spaces of which it is known how NetKet flips one of their sites.
_SPACES = (nk.hilbert.Spin, nk.hilbert.Qubit, nk.hilbert.Fock, nk.hilbert.SpinOrbitalFermions)
EXCHANGES = (rules.ExchangeRule, rules.FermionHopRule)


class Move(NamedTuple):
    """One proposal for each of ``C`` chains.

    Attributes:
      proposed: Configurations ``(C, N)``.
      sites: Entries that change, each ``(C,)``.
      changes: By how much, each ``(C,)``.
      is_complete: Whether these are all changes of all chains; None: always.
      correction: ``(C,)``, or None: what the rule adds to the logarithm of the acceptance.
      notes: What the next proposal needs beside them, each ``(C, ...)``.
    """

    proposed: jax.Array
    sites: list[jax.Array]
    changes: list[jax.Array]
    is_complete: jax.Array | None = None
    correction: jax.Array | None = None
    notes: Any = ()


class Proposals(NamedTuple):
    """The proposals of a sweep.

    Attributes:
      propose: Of constants, configurations, notes and the draws of one step, a :class:`Move`.
      constants: Arrays that all chains share.
      notes: Those of the present configurations.
      draws: Random numbers of all chains of the sampler, ``(C, sweep, ...)``.
      by_chain: Whether each chain's proposal needs its own row of all these alone.
    """

    propose: Callable[[Any, jax.Array, Any, Any], Move]
    constants: Any
    notes: Any
    draws: Any
    by_chain: bool


def proposals(sampler: Any, machine: Any, variables: Any, state: Any, keys: jax.Array) -> Any:
    """Returns the :class:`Proposals` of a sweep from its keys ``(sweep,)``.

    None for a rule of which it is not known that it changes few sites.
    """
    rule = sampler.rule
    if are_by_chain(rule, sampler.hilbert, state.σ.dtype):
        if type(rule) is rules.LocalRule:
            return _flips(sampler.hilbert, sampler.n_chains, keys)
        return _exchanges(rule.clusters, sampler.n_chains, state.σ, keys)
    max_changes = _max_changes(rule)
    if max_changes is None:
        return None
    return _transitions(sampler, machine, variables, state, keys, max_changes)


def are_by_chain(rule: Any, hilbert: Any, dtype: Any) -> bool:
    """Returns whether a chain's proposals need its own random numbers alone."""
    if type(rule) is rules.LocalRule:
        return type(hilbert) in _SPACES and hilbert.local_size > 1
    is_integer = jnp.issubdtype(dtype, jnp.integer)
    return type(rule) in EXCHANGES and rule.probabilities is None and is_integer


def _flips(hilbert: Any, num_chains: int, keys: jax.Array) -> Proposals:
    """``LocalRule``: another value at one site."""
    num_sites = hilbert.size
    site_keys, value_keys = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, 2))(keys), 1, 0)
    sites = jax.vmap(lambda key: jax.random.randint(key, (num_chains,), 0, num_sites), out_axes=1)
    draws = [sites(site_keys)]
    if hilbert.local_size > 2:
        draws.append(_one_for_each_chain(value_keys, num_chains, float))

    def propose(_: Any, σ: jax.Array, notes: Any, draws: list[jax.Array]) -> Move:
        site, *values = draws
        old = changes.entry(σ, site)
        index = hilbert.states_to_local_indices(old)
        if values:
            other = jnp.floor(values[0] * (hilbert.local_size - 1))
            other = (other + (other >= index)).astype(index.dtype)
        else:
            other = jnp.where(index == 1, 0, 1).astype(index.dtype)
        new = hilbert.local_indices_to_states(other, dtype=σ.dtype)
        here = site[:, None] == jnp.arange(num_sites, dtype=site.dtype)[None]
        change = new.astype(float) - old.astype(float)
        return Move(jnp.where(here, new[:, None], σ), [site], [change])

    return Proposals(propose, (), (), draws, by_chain=True)


def _exchanges(clusters: jax.Array, num_chains: int, σ: jax.Array, keys: jax.Array) -> Proposals:
    """``ExchangeRule``: two sites of a cluster, of those that differ, exchange their values.

    NetKet gathers both ends of all clusters, before and after, at each step.  Here they are
    carried along, and what a step changes in them is found by comparing sites.
    """
    num_clusters, num_sites = len(clusters), σ.shape[-1]
    index = jnp.int16 if num_sites < 2**15 else jnp.int32
    sites = jnp.where(clusters < 0, clusters + num_sites, clusters)[:, :2]  # as an index, -1 too
    ends = tuple(sites.astype(index).T)
    notes = tuple(σ[:, end] for end in ends)

    def propose(ends: Any, σ: jax.Array, notes: Any, draw: jax.Array) -> Move:
        (left, right), (a, b) = ends, notes
        differ = a != b
        number = changes.count(differ)
        # jax.random.choice: the first cluster at which the cumulated number reaches the
        # draw.  Numbers are integers, so that the draw may be rounded up.
        reach = jnp.ceil(number.astype(jnp.float32) * (1 - draw))
        chosen = changes.count(_cumulated(differ) < reach[:, None])
        chosen = jnp.minimum(chosen, num_clusters - 1)
        i, j = left[chosen], right[chosen]
        at_i, at_j = changes.entry(a, chosen), changes.entry(b, chosen)

        def exchanged(values: jax.Array, sites: jax.Array) -> jax.Array:
            is_i, is_j = (site[:, None] == sites[None] for site in (i, j))
            return jnp.where(is_i, at_j[:, None], jnp.where(is_j, at_i[:, None], values))

        a, b = exchanged(a, left), exchanged(b, right)
        logs = [jnp.log(n.astype(float)) for n in (number, changes.count(a != b))]
        change = at_j.astype(float) - at_i.astype(float)
        return Move(
            exchanged(σ, jnp.arange(num_sites, dtype=index)),
            [i, j],
            [change, -change],
            correction=logs[0] - logs[1],
            notes=(a, b),
        )

    draws = _one_for_each_chain(keys, num_chains, jnp.float32)
    return Proposals(propose, ends, notes, draws, by_chain=True)


def _cumulated(mask: jax.Array) -> jax.Array:
    """Returns the cumulated number of true entries, exact in float32."""
    numbers = mask.astype(jnp.float32)
    size = mask.shape[-1]
    if size > 128:
        return jnp.cumsum(numbers, -1)
    return numbers @ jnp.triu(jnp.ones((size, size), jnp.float32))


def _transitions(
    sampler: Any, machine: Any, variables: Any, state: Any, keys: jax.Array, max_changes: int
) -> Proposals:
    """The rule's own transitions, compared with the present configurations."""

    def propose(_: Any, σ: jax.Array, notes: Any, key: jax.Array) -> Move:
        present = state.replace(σ=σ)
        proposed, correction = sampler.rule.transition(sampler, machine, variables, present, key, σ)
        sites, differences = changes.differences(σ, proposed, max_changes, float)
        is_complete = jnp.all(changes.count(σ != proposed) <= max_changes)
        return Move(proposed, sites, differences, is_complete, correction)

    return Proposals(propose, (), (), keys, by_chain=False)


def _max_changes(rule: Any) -> int | None:
    """Returns in how many sites a proposal differs, as a rule; None: not known, or many."""
    if type(rule) in (rules.FixedRule, rules.LocalRule):
        return 1
    if type(rule) in (*EXCHANGES, HamiltonianRuleJax):
        return 2
    if type(rule) in (rules.MultipleRules, rules.TensorRule):
        members = [_max_changes(member) for member in rule.rules]
        known = [number for number in members if number is not None]
        if len(known) == len(members):
            return sum(known) if type(rule) is rules.TensorRule else max(known)
    return None


def _one_for_each_chain(keys: jax.Array, num_chains: int, dtype: Any) -> jax.Array:
    """Returns uniform numbers ``(C, sweep)``, each drawn with a key of its chain's own."""
    draw = jax.vmap(lambda key: jax.random.uniform(key, (), dtype))
    return jax.vmap(lambda key: draw(jax.random.split(key, num_chains)), out_axes=1)(keys)
