"""Local energies by the structure of the model, by NetKet's own dispatch.

NetKet asks ``netket.vqs.get_local_kernel`` how to compute local values, for ``expect``,
gradients, variances and its drivers alike.  The methods registered here answer for a state
whose model is a :class:`compat.MLP`: the same values, from
:func:`haiku_mlp.structure.at_configurations`.  On an accelerator NetKet's own are faster, and run.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from netket.jax import HashablePartial, apply_chunked
from netket.jax.sharding import sharding_decorator
from netket.operator import DiscreteJaxOperator, DiscreteOperator
from netket.vqs import MCState, get_local_kernel
from plum import Signature

from haiku_mlp.structure import at_configurations, forward

from ..flax_adapter import MLP
from .layers import bits, is_cpu, layers, log_psi, mlp_of

# Entries of the connected configurations that are in the cache at once.
_ENTRIES = 2**21
# Configurations at once for another model, whose widths are not known.
_CONFIGURATIONS = 2**11


def local_energies(state: MCState, hamiltonian: Any) -> jax.Array:
    """Returns the local energies ``(chains, samples of each)`` on the state's samples.

    On a CPU chunks are faster: what a network computes of all configurations leaves the cache.
    """
    is_one_cpu = is_cpu() and jax.device_count() == 1
    if state.chunk_size is None and is_one_cpu and _is_netkets(state, hamiltonian):
        kernel = get_local_kernel(state, hamiltonian)
        return _in_chunks(kernel, log_psi(state), state.variables, state.samples, hamiltonian)
    return state.local_estimators(hamiltonian, chunk_size=state.chunk_size).data


@functools.partial(jax.jit, static_argnums=(0, 1))
def _in_chunks(
    kernel: Callable, log_psi: Callable, variables: Any, samples: jax.Array, operator: Any
) -> jax.Array:
    """Returns local values as NetKet's chunks do, but for models too that start a scan with
    constants, which JAX refuses where chunks are spread over devices.
    """
    chunk_size = max(1, _CONFIGURATIONS // max(1, operator.max_conn_size))
    chunked = apply_chunked(
        lambda samples: kernel(log_psi, variables, samples, operator),
        chunk_size=chunk_size,
        axis_0_is_sharded=False,
    )
    return chunked(samples.reshape(-1, samples.shape[-1])).reshape(samples.shape[:-1])


def _is_netkets(state: MCState, operator: Any) -> bool:
    """Returns whether the dispatch leads to NetKet's own method for operators in JAX."""
    if not isinstance(operator, DiscreteJaxOperator) or is_ours(state):
        return False
    stock = get_local_kernel.invoke(MCState, DiscreteJaxOperator)
    return get_local_kernel(state, operator) is stock(state, operator)


def is_ours(state: Any) -> bool:
    """Returns whether the dispatch leads to the methods registered here."""
    return isinstance(state, MCState) and mlp_of(state) is not None


class _ByModel(type(MCState)):  # type: ignore[misc]
    def __instancecheck__(cls, state: Any) -> bool:
        return is_ours(state)


class _StateOfMLP(MCState, metaclass=_ByModel):
    """What a state of a :class:`compat.MLP` is an instance of, for the dispatch."""

    __faithful__ = False  # for plum: two states of one type may differ in this


def _signatures(*more: type) -> list[Signature]:
    # Below NetKet's precedence, so that methods for a kind of operator or state go first.
    kinds = (DiscreteOperator, DiscreteJaxOperator)
    return [Signature(_StateOfMLP, kind, *more, precedence=-1) for kind in kinds]


@get_local_kernel.dispatch_multi(*_signatures(), *_signatures(int))
def _kernel(state: Any, operator: Any, *chunk_size: int) -> Callable:
    netkets = get_local_kernel.invoke(MCState, type(operator), *map(type, chunk_size))
    return HashablePartial(_local_values, mlp_of(state), netkets(state, operator, *chunk_size))


def _local_values(
    model: MLP,
    stock: Callable,
    logpsi: Callable,
    variables: Any,
    samples: jax.Array,
    connected: Any,
    **options: int,
) -> jax.Array:
    """Returns the local values ``(B,)``, as NetKet's own kernel ``stock`` does.

    Args:
      model: The model.
      stock: Takes the other arguments.
      logpsi: The model's call.
      variables: Its variables.
      samples: ``(B, N)``.
      connected: An operator, or configurations ``(B, K, N)`` and their elements ``(B, K)``.
      options: ``chunk_size``, the number of configurations in memory at once, or none.
    """
    if not _takes_layers(model, variables, samples):
        return stock(logpsi, variables, samples, connected, **options)
    if not isinstance(connected, DiscreteJaxOperator):
        configurations, elements = connected
        configurations = jnp.reshape(configurations, (len(samples), -1, samples.shape[-1]))
        connected = configurations, jnp.reshape(elements, configurations.shape[:-1])
    return _values(model, options.get("chunk_size"), variables, samples, connected)


def _takes_layers(model: Any, variables: Any, samples: Any) -> bool:
    network = layers(model, variables)
    return network is not None and bits(network, samples) >= 32 and is_cpu()


def are_by_layers(state: MCState, operator: Any) -> bool:
    """Returns whether the local values of a discrete operator come from a model's layers."""
    kernel: Any = get_local_kernel(state, operator)
    sample = jax.ShapeDtypeStruct((1, state.hilbert.size), state.sampler.dtype)
    is_ours = getattr(kernel, "func", None) is _local_values
    return is_ours and _takes_layers(mlp_of(state), state.variables, sample)


@functools.partial(jax.jit, static_argnums=(0, 1))  # JAX 0.7 has no jax.jit(static_argnums=...)
def _values(
    model: MLP, chunk_size: int | None, variables: Any, samples: jax.Array, connected: Any
) -> jax.Array:
    is_operator = isinstance(connected, DiscreteJaxOperator)
    axes = (None, 0, None if is_operator else 0)

    def values(variables: Any, samples: jax.Array, connected: Any) -> jax.Array:
        network: Any = layers(model, variables)
        if is_operator:
            connected = connected.get_conn_padded(samples)
        configurations, elements = connected
        at_samples = forward(network, samples)[:, 0]
        others = at_configurations(network, samples, configurations, block_size=chunk_size)
        return jnp.sum(elements * jnp.exp(others[..., 0] - at_samples[:, None]), -1)

    def of_one_device(variables: Any, samples: jax.Array, connected: Any) -> jax.Array:
        num_connected = connected.max_conn_size if is_operator else connected[0].shape[1]
        num_samples, num_sites = samples.shape
        size = _chunk(num_samples, num_sites, num_connected, chunk_size)
        chunked = apply_chunked(values, axes, chunk_size=size, axis_0_is_sharded=False)
        return chunked(variables, samples, connected)

    if jax.device_count() == 1:  # where there may be no mesh
        return of_one_device(variables, samples, connected)
    by_device = tuple(axis == 0 for axis in axes)
    run = sharding_decorator(of_one_device, by_device, pvary_args_tree=(True, False, False))
    return run(variables, samples, connected)


def _chunk(num_samples: int, num_sites: int, num_connected: int, chunk_size: int | None) -> int:
    """Returns the number of samples at a time: a power of two times fewer than all."""
    most = _ENTRIES // num_sites
    if chunk_size is not None:
        most = min(most, chunk_size)
    parts = num_samples * num_connected / max(most, 1)
    return max(1, -(-num_samples // 2 ** max(0, math.ceil(math.log2(max(parts, 1))))))
