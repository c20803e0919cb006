"""A step of stochastic reconfiguration in NetKet, by the tangent kernel of any model."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import netket as nk

import haiku_mlp
from haiku_mlp.structure import Linearized, forward
from haiku_mlp.structure.contraction import is_coarse

from ..flax_adapter import MLP
from .few_parameters import are_few, parameter_step
from .layers import layers, log_psi, mlp_of
from .local_energies import local_energies

MODES = ("real", "complex", "holomorphic")


def natural_gradient(
    state: nk.vqs.MCState,
    hamiltonian: Any,
    diag_shift: float | jax.Array,
    *,
    mode: str | None = None,
    momentum: float | jax.Array = 0.0,
    previous: Any = None,
    chunk_size: int | None = None,
) -> tuple[Any, Any]:
    r"""Returns the energy and the step of stochastic reconfiguration, on the state's samples.

    The step is that of ``netket.driver.VMC_SR(use_ntk=True)``, but its kernel comes from
    :func:`haiku_mlp.tangent_kernel`, without a Jacobian wherever products are cheaper.  As
    there, with :math:`X` the centred Jacobian divided by :math:`\sqrt{B}` and
    :math:`\epsilon` the centred local energies likewise,

    .. math:: \delta = 2 X^\dagger (X X^\dagger + \lambda)^{-1} \epsilon

    For less than half as many real parameters as outputs the system of the parameters is
    solved, which is the smaller: :math:`2 (X^\dagger X + \lambda)^{-1} X^\dagger \epsilon` is
    the same step.

    Args:
      state: A state of any model, the logarithm of the wave function.
      hamiltonian: The operator whose expectation value is minimised.
      diag_shift: :math:`\lambda`, not negative (which is not checked).
      mode: ``"real"``: the real part of the logarithm and of the local energies.
        ``"complex"``: real and imaginary part as two real outputs, right for every
        network.  ``"holomorphic"``: the same step in less time, if the output is a
        holomorphic function of complex parameters.  None: complex if the output is.
      momentum: :math:`\mu` of SPRING, see :func:`haiku_mlp.natural_gradient`.
      previous: The step before this one, for SPRING.
      chunk_size: Samples whose derivatives are formed, and rows of the kernel, at a time.
        None: ``state.chunk_size``, or all; for a real ``compat.MLP``, of which no derivatives
        are formed, all.

    Returns:
      The energy, a ``netket.stats.Stats``, and the step to be subtracted, a tree like
      ``state.parameters``.

    Raises:
      TypeError: ``state`` is no ``MCState``, or its Hilbert space is not the operator's.
      ValueError: The mode is unknown, or does not fit the parameters.

    Source: `VMC_SR of NetKet
    <https://netket.readthedocs.io/en/latest/api/_generated/driver/netket.driver.VMC_SR.html>`_.

    Example::

      >>> import jax, netket as nk
      >>> import compat
      >>> from compat.netket import natural_gradient
      >>> hilbert = nk.hilbert.Spin(0.5, 4)
      >>> hamiltonian = nk.operator.Ising(hilbert, nk.graph.Chain(4), h=1.0)
      >>> sampler = nk.sampler.MetropolisLocal(hilbert)
      >>> state = nk.vqs.MCState(sampler, compat.MLP(hidden_dims=(8,)), n_samples=64, seed=1)
      >>> energy, step = natural_gradient(state, hamiltonian, 1e-3)
      >>> state.parameters = jax.tree.map(lambda p, d: p - 0.1 * d, state.parameters, step)
    """
    check_state(state, hamiltonian)
    mode = checked_mode(mode, state)
    energies = local_energies(state, hamiltonian)
    step = _step(
        log_psi(state),
        mlp_of(state) if chunk_size is None else None,
        state.parameters,
        state.model_state,
        state.samples.reshape(-1, state.hilbert.size),
        energies.reshape(-1),
        diag_shift,
        momentum,
        previous,
        mode=mode,
        chunk_size=state.chunk_size if chunk_size is None else chunk_size,
    )
    return nk.stats.statistics(energies), step


def _outputs(values: jax.Array, mode: str) -> jax.Array:
    """Returns what a mode differentiates: ``(B,)``, or the two parts ``(B, 2)``."""
    if mode == "complex":
        return jnp.stack([values.real, values.imag], -1)
    return values if mode == "holomorphic" else values.real


@functools.partial(jax.jit, static_argnames=("log_psi", "mlp", "mode", "chunk_size"))
def _step(
    log_psi: Callable[[Any, jax.Array], jax.Array],
    mlp: MLP | None,
    params: Any,
    model_state: Any,
    samples: jax.Array,
    local_energies: jax.Array,
    diag_shift: float | jax.Array,
    momentum: float | jax.Array,
    previous: Any,
    *,
    mode: str,
    chunk_size: int | None,
) -> Any:
    route = step_route(mlp, params, model_state, samples, mode)
    if route == "parameters" and mode == "holomorphic":
        mode = "complex"  # the same step, of real numbers

    def outputs(params: Any, samples: jax.Array) -> jax.Array:
        return _outputs(log_psi({**model_state, "params": params}, samples), mode)

    network = functools.partial(_network, mlp, model_state)
    residuals = _outputs(2 * local_energies, mode)
    options: Any = {"momentum": momentum, "previous": previous}
    if route == "parameters":
        return parameter_step(
            outputs, params, samples, residuals, diag_shift, chunk_size=chunk_size, **options
        )
    if route == "layers":
        linearized = Linearized(network(params), samples)
        # natural_gradient centres the kernel; in 32 bits its factors must be centred before.
        kernel = linearized.kernel(centered=is_coarse(linearized.signals[0]))

        def function(params: Any) -> jax.Array:
            return linearized(network(params))
    else:
        chunked = nk.jax.apply_chunked(outputs, in_axes=(None, 0), chunk_size=chunk_size)
        kernel = haiku_mlp.tangent_kernel(
            outputs, params, samples, chunk_size=chunk_size, centered=True
        )

        def function(params: Any) -> jax.Array:
            return chunked(params, samples)

    return haiku_mlp.natural_gradient(function, params, kernel, residuals, diag_shift, **options)


def _network(mlp: MLP | None, model_state: Any, params: Any) -> Any:
    return None if mlp is None else layers(mlp, {**model_state, "params": params})


def step_route(mlp: MLP | None, params: Any, model_state: Any, samples: Any, mode: str) -> str:
    """Returns how a step is computed: see :class:`Plan`."""
    if are_few(params, len(samples) * (1 if mode == "real" else 2)):
        return "parameters"
    is_linearized = _is_linearized(_network(mlp, model_state, params), samples, mode)
    return "layers" if is_linearized else "tangent_kernel"


def _is_linearized(network: Any, samples: Any, mode: str) -> bool:
    """Returns whether the derivatives are products of two real factors, on one device."""
    if network is None or mode != "real" or jax.device_count() > 1:
        return False
    outputs = jax.eval_shape(lambda x: forward(network, x), samples)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves((network, outputs)) if hasattr(leaf, "dtype")}
    return len(dtypes) == 1 and jnp.issubdtype(dtypes.pop(), jnp.floating)


def check_state(state: Any, hamiltonian: Any) -> None:
    """Raises a TypeError unless there is a step of this state for this operator."""
    if not isinstance(state, nk.vqs.MCState):
        raise TypeError(
            f"the state must be a netket.vqs.MCState, got a {type(state).__name__}: give "
            "nk.vqs.MCState(sampler, model)"
        )
    if not isinstance(hamiltonian, nk.operator.AbstractOperator):
        raise TypeError(
            f"the hamiltonian must be an operator, got a {type(hamiltonian).__name__}: give for "
            "instance nk.operator.Ising(...)"
        )
    if state.hilbert != hamiltonian.hilbert:
        raise TypeError(
            f"the state is of {state.hilbert}, the operator of {hamiltonian.hilbert}: give both "
            "the same Hilbert space"
        )


def checked_mode(mode: Any, state: nk.vqs.MCState) -> str:
    """Returns the mode, that of the state's outputs if it is None."""
    if mode is None:
        sample = jax.ShapeDtypeStruct((1, state.hilbert.size), state.sampler.dtype)
        output = jax.eval_shape(log_psi(state), state.variables, sample)
        mode = "complex" if jnp.iscomplexobj(output) else "real"
    if str(mode) not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)} or None, got {mode!r}")
    are_complex = map(jnp.iscomplexobj, jax.tree.leaves(state.parameters))
    if str(mode) == "holomorphic" and not all(are_complex):
        raise ValueError("mode holomorphic needs complex parameters: give mode='complex'")
    return str(mode)
