"""The proposals of one sweep, with the first layer carried along."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from haiku_mlp.structure import Layer, changes, forward
from haiku_mlp.structure.layers import with_weights

from .proposals import Move, Proposals

# How many times the error at the start of a sweep is in doubt.
_MARGIN = 16


def keys_of_sweep(rng: jax.Array, sweep_size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns what NetKet's loop draws its numbers with: the last state, two keys a step."""

    def split(rng: jax.Array, _: None) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        rng, move_key, uniform_key = jax.random.split(rng, 3)
        return rng, (move_key, uniform_key)

    rng, (move_keys, uniform_keys) = lax.scan(split, rng, None, length=sweep_size)
    return rng, move_keys, uniform_keys


def sweep_of(network: tuple[Layer, ...], moves: Proposals, *, screened: bool) -> Any:
    """Returns the sweep as a function of arrays alone: each device can sweep its own part."""

    def sweep(
        weights: Any,
        constants: Any,
        machine_pow: jax.Array,
        σ: jax.Array,
        log_prob: jax.Array,
        num_accepted: jax.Array,
        notes: Any,
        draws: Any,
        uniforms: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        full = with_weights(network, weights)
        first, *rest = map(_single, full) if screened else full

        def affine(σ: jax.Array) -> jax.Array:
            return first.affine(σ.astype(first.w.real.dtype) if screened else σ)

        def follow(z: jax.Array) -> jax.Array:
            return machine_pow * forward(tuple(rest), first.activate(z))[:, 0].real

        def evaluate(σ: jax.Array) -> jax.Array:
            return machine_pow * forward(full, σ)[:, 0].real

        def accepts(
            move: Move, σ: jax.Array, difference: jax.Array, uniform: jax.Array
        ) -> jax.Array:
            def below(difference: jax.Array) -> jax.Array:
                correction = 0 if move.correction is None else move.correction
                return uniform < jnp.exp(difference + correction)

            if not screened:
                return below(difference)
            logarithm = jnp.log(uniform) - (0 if move.correction is None else move.correction)
            return lax.cond(
                jnp.all(jnp.abs(difference - logarithm) > margin),
                lambda: below(difference),
                lambda: below(evaluate(move.proposed) - evaluate(σ)),
            )

        def step(carry: Any, numbers: Any) -> tuple[Any, None]:
            σ, notes, z, log_prob, num_accepted = carry
            draw, uniform = numbers
            move = moves.propose(constants, σ, notes, draw)
            moved = changes.shift(first, z, move.sites, move.changes)
            if move.is_complete is not None:
                moved = lax.cond(move.is_complete, lambda: moved, lambda: affine(move.proposed))
            proposed = follow(moved)
            accept = accepts(move, σ, proposed - log_prob, uniform)

            def choose(new: jax.Array, old: jax.Array) -> jax.Array:
                return jnp.where(jnp.expand_dims(accept, range(1, new.ndim)), new, old)

            new = (move.proposed, move.notes, moved, proposed)
            old = (σ, notes, z, log_prob)
            return (*jax.tree.map(choose, new, old), num_accepted + accept), None

        z = affine(σ)
        start = log_prob
        if screened:
            start = follow(z)
            margin = _MARGIN * _error(tuple(rest), first.activate(z), start, log_prob, machine_pow)
        by_step = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), draws) if moves.by_chain else draws
        carry = (σ, notes, z, start, num_accepted)
        (σ, _, _, log_prob, num_accepted), _ = lax.scan(step, carry, (by_step, uniforms.T))
        return σ, evaluate(σ) if screened else log_prob, num_accepted

    return sweep


def _single(layer: Layer) -> Layer:
    """Returns the layer in 32 bits."""
    dtype = jnp.complex64 if jnp.iscomplexobj(layer.w) else jnp.float32
    b = None if layer.b is None else layer.b.astype(dtype)
    return layer._replace(w=layer.w.astype(dtype), b=b)


def _error(
    rest: tuple[Layer, ...], h: jax.Array, single: jax.Array, full: jax.Array, power: jax.Array
) -> jax.Array:
    """Returns how far a log-probability in 32 bits is off: measured, and at least a rounding."""
    terms = jnp.abs(forward(rest[:-1], h)) @ jnp.abs(rest[-1].w)
    rounding = jnp.finfo(jnp.float32).eps * jnp.max(power * terms)
    return jnp.max(jnp.abs(single - full)) + rounding
