"""Local energies by the structure of the model, where it has one."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import netket as nk

from haiku_mlp.structure.changes import count, last

from ..flax_adapter import MLP


def local_energies(state: nk.vqs.MCState, hamiltonian: Any) -> jax.Array:
    """Returns the local energies ``(chains, samples of each)`` on the state's samples.

    They are those of ``state.local_estimators(hamiltonian)``.  Where few sites of a
    :class:`compat.MLP` change, they come from ``connected``.

    Args:
      state: A state of any model.
      hamiltonian: The operator.
    """
    samples = state.samples
    is_known = type(state.model) is MLP and state.chunk_size is None
    if is_known and isinstance(hamiltonian, nk.operator.DiscreteJaxOperator):
        flat = samples.reshape(-1, samples.shape[-1])
        num_changes = int(_num_changes(hamiltonian, flat))
        if 1 <= num_changes <= flat.shape[-1] // 8:
            energies = _connected_energies(
                state.model, state.variables, hamiltonian, flat, num_changes=num_changes
            )
            return energies.reshape(samples.shape[:-1])
    return state.local_estimators(hamiltonian)


@jax.jit
def _num_changes(hamiltonian: Any, samples: jax.Array) -> jax.Array:
    """Returns in how many sites a sample and one connected to it differ at most."""
    connected, _ = hamiltonian.get_conn_padded(samples)
    return jnp.max(count(connected != samples[:, None]), initial=0)


@functools.partial(jax.jit, static_argnames=("model", "num_changes"))
def _connected_energies(
    model: MLP, variables: Any, hamiltonian: Any, samples: jax.Array, *, num_changes: int
) -> jax.Array:
    """Returns the local energies ``(B,)`` by :func:`haiku_mlp.structure.connected`."""
    connected, elements = hamiltonian.get_conn_padded(samples)
    present = jnp.broadcast_to(samples[:, None], connected.shape)
    changed = connected != present
    sites, values = [], []
    for _ in range(num_changes):
        site = jnp.maximum(last(changed) - 1, 0)[..., None]  # 0 where no change is left
        is_change, new, old = (
            jnp.take_along_axis(array, site, -1) for array in (changed, connected, present)
        )
        sites.append(site)
        values.append(jnp.where(is_change, new, old))
        changed &= jnp.arange(changed.shape[-1]).reshape(1, 1, -1) != site
    changes = jnp.concatenate(sites, -1), jnp.concatenate(values, -1)
    log_values: Any = model.apply(variables, samples, *changes, method="connected")
    log_value: Any = model.apply(variables, samples)
    return jnp.sum(elements * jnp.exp(log_values - log_value[:, None]), -1)
