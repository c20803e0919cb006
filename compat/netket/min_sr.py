"""Stochastic reconfiguration as a driver of NetKet."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import netket as nk
from netket.utils import struct

from .step import check_state, checked_mode, natural_gradient

Schedule = float | jax.Array | Callable[[int], Any]


class MinSR(nk.driver.AbstractOptimizationDriver):
    """Energy minimisation: :func:`natural_gradient` as a NetKet driver.

    It takes the steps of ``netket.driver.VMC_SR``, and runs, logs and calls back as every
    driver of NetKet, but for ``AutoChunkSize``, which knows NetKet's own alone.  It has no
    ``info`` and logs no ``Energy_ema``, which only ``VMC_SR`` has.  ``diag_shift``,
    ``momentum``, ``mode`` and ``chunk_size`` may be set between steps.  A part of a natural
    step is not the natural step of that part: to freeze layers by path, take
    ``netket.driver.VMC``.

    Args:
      hamiltonian: The operator whose expectation value is minimised.
      optimizer: Makes the change of the parameters from the step: ``optax.sgd``.
      diag_shift: As for :func:`natural_gradient`, or a function of the number of the step.
      variational_state: As for :func:`natural_gradient`.
      mode: As for :func:`natural_gradient`.
      momentum: As for :func:`natural_gradient`, or a function of the number of the step.
        None: no momentum.
      chunk_size: As for :func:`natural_gradient`.
      stop_if_not_finite: Whether an energy or a step that is not finite is an error; else it
        goes into the parameters.

    Raises:
      TypeError: The state is no ``MCState``, or its Hilbert space is not the operator's.
      ValueError: The mode is unknown, or does not fit the parameters.
      FloatingPointError: At a step, the energy or the step is not finite.

    Example::

      >>> import netket as nk, optax
      >>> import compat
      >>> from compat.netket import MinSR
      >>> hilbert = nk.hilbert.Spin(0.5, 4)
      >>> hamiltonian = nk.operator.Ising(hilbert, nk.graph.Chain(4), h=1.0)
      >>> sampler = nk.sampler.MetropolisLocal(hilbert)
      >>> state = nk.vqs.MCState(sampler, compat.MLP(hidden_dims=(8,)), n_samples=256, seed=1)
      >>> driver = MinSR(hamiltonian, optax.sgd(0.1), diag_shift=1e-3, variational_state=state)
      >>> _ = driver.run(40, show_progress=False)
      >>> exact = nk.exact.lanczos_ed(hamiltonian)[0]
      >>> bool(abs(driver.energy.mean - exact) < 0.05)
      True
    """

    _hamiltonian: Any = struct.field(pytree_node=False, serialize=False)
    diag_shift: Any = struct.field(pytree_node=False, serialize=False)
    momentum: Any = struct.field(pytree_node=False, serialize=False)
    mode: str = struct.field(pytree_node=False, serialize=False)
    chunk_size: int | None = struct.field(pytree_node=False, serialize=False)
    _stop_if_not_finite: bool = struct.field(pytree_node=False, serialize=False)
    _previous: Any = None

    def __init__(
        self,
        hamiltonian: Any,
        optimizer: Any,
        *,
        diag_shift: Schedule,
        variational_state: nk.vqs.MCState,
        mode: str | None = None,
        momentum: Schedule | None = None,
        chunk_size: int | None = None,
        stop_if_not_finite: bool = True,
    ):
        check_state(variational_state, hamiltonian)
        super().__init__(variational_state, optimizer, minimized_quantity_name="Energy")
        self._hamiltonian = hamiltonian
        self.diag_shift = diag_shift
        self.momentum = momentum
        self.mode = checked_mode(mode, variational_state)
        self.chunk_size = chunk_size
        self._stop_if_not_finite = stop_if_not_finite
        if momentum is not None:  # now, so that all steps are one program
            self._previous = jax.tree.map(jnp.zeros_like, variational_state.parameters)

    def compute_loss_and_update(self) -> tuple[Any, Any]:
        """Returns the energy and the step, on the state's samples."""
        momentum = None if self.momentum is None else self._at_this_step(self.momentum)
        self._loss_stats, self._dp = natural_gradient(
            self.state,
            self._hamiltonian,
            self._at_this_step(self.diag_shift),
            mode=self.mode,
            momentum=0.0 if momentum is None else momentum,
            previous=self._previous,
            chunk_size=self.chunk_size,
        )
        if self._stop_if_not_finite:
            self._check_finite()
        if momentum is not None:
            self._previous = self._dp
        return self._loss_stats, self._dp

    @property
    def energy(self) -> Any:
        """The energy at the last step, a ``netket.stats.Stats``."""
        return self._loss_stats

    def _check_finite(self) -> None:
        results = {"energy": self._loss_stats.mean, "step": self._dp}
        wrong = [name for name, value in results.items() if not _is_finite(value)]
        if wrong:
            hint = ": complex gelu has poles, see haiku_mlp.MLP" * _has_complex_gelu(self.state)
            raise FloatingPointError(
                f"{' and '.join(wrong)} not finite at step {self.step_count}{hint}"
            )

    def _at_this_step(self, value: Schedule) -> Any:
        return value(self.step_count) if callable(value) else value


@jax.jit
def _is_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _has_complex_gelu(state: nk.vqs.MCState) -> bool:
    fields = jax.tree.leaves(getattr(state.model, "__dict__", {}))
    is_complex = any(map(jnp.iscomplexobj, jax.tree.leaves(state.parameters)))
    return is_complex and any(field is jax.nn.gelu for field in fields)
