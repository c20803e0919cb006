"""How an iteration is computed: which parts know the structure of the model."""

from typing import Any, NamedTuple

import jax
import netket as nk

from .kinetic_energy import KineticEnergy
from .layers import log_psi, mlp_of
from .local_energies import are_by_layers
from .sampler import StructuredMetropolis
from .step import check_state, checked_mode, step_route


class Plan(NamedTuple):
    """How each part of an iteration is computed.

    Attributes:
      sampling: ``"layers"``, the first layer carried along, or ``"netket"``.
      local_energies: ``"layers"``: what changes passes the first layer alone.  ``"laplacian"``:
        the kinetic energy by the model's method.  ``"netket"``.
      step: That of :func:`natural_gradient` and :class:`MinSR` without a ``chunk_size``, which
        makes ``"tangent_kernel"`` of ``"layers"``.  ``"layers"``: the kernel is
        the product of two factors a layer.  ``"tangent_kernel"``: as
        :func:`haiku_mlp.kernel_plan` says.  ``"parameters"``: there are so few that their own
        system is smaller.
    """

    sampling: str
    local_energies: str
    step: str


def plan(state: nk.vqs.MCState, hamiltonian: Any, *, mode: str | None = None) -> Plan:
    """Returns how an iteration is computed, without computing it.

    Every part falls back to NetKet's own path, with the same result, where the structure of
    the model does not help; here it says so.

    Args:
      state: As for :func:`natural_gradient`.
      hamiltonian: As for :func:`natural_gradient`.
      mode: As for :func:`natural_gradient`.

    Raises:
      TypeError: ``state`` is no ``MCState``, or its Hilbert space is not the operator's.
      ValueError: The mode is unknown, or does not fit the parameters.

    Example::

      >>> import netket as nk
      >>> import compat
      >>> from compat.netket import plan, structured
      >>> hamiltonian = nk.operator.Ising(nk.hilbert.Spin(0.5, 8), nk.graph.Chain(8), h=1.0)
      >>> sampler = structured(nk.sampler.MetropolisLocal(hamiltonian.hilbert))
      >>> state = nk.vqs.MCState(sampler, compat.MLP(hidden_dims=(8, 8)), n_samples=64)
      >>> plan(state, hamiltonian)
      Plan(sampling='layers', local_energies='layers', step='layers')
      >>> state = nk.vqs.MCState(sampler, nk.models.RBM(), n_samples=64)
      >>> plan(state, hamiltonian)
      Plan(sampling='netket', local_energies='netket', step='tangent_kernel')
    """
    check_state(state, hamiltonian)
    shape = state.n_samples, state.hilbert.size
    samples = jax.ShapeDtypeStruct(shape, state.sampler.dtype)
    mlp = mlp_of(state)
    mode = checked_mode(mode, state)
    return Plan(
        "layers" if _is_structured(state) else "netket",
        _of_local_energies(state, hamiltonian, samples),
        step_route(mlp, state.parameters, state.model_state, samples, mode),
    )


def _is_structured(state: nk.vqs.MCState) -> bool:
    if not isinstance(state.sampler, StructuredMetropolis):
        return False
    found: list[bool] = []

    def sweep(variables: Any, sampler_state: Any) -> None:
        structure = state.sampler.structure(mlp_of(state), variables, sampler_state)
        found.append(structure is not None)

    jax.eval_shape(sweep, state.variables, state.sampler_state)
    return all(found)


def _of_local_energies(state: nk.vqs.MCState, hamiltonian: Any, samples: Any) -> str:
    if isinstance(hamiltonian, nk.operator.DiscreteOperator):
        return "layers" if are_by_layers(state, hamiltonian) else "netket"
    found: list[bool] = []

    def kinetic(operator: KineticEnergy, variables: Any, samples: Any) -> None:
        values = operator.by_laplacian(log_psi(state), variables, samples)
        found.append(values is not None)

    for term in getattr(hamiltonian, "operators", [hamiltonian]):
        if isinstance(term, KineticEnergy):
            jax.eval_shape(kinetic, term, state.variables, samples)
    return "laplacian" if any(found) else "netket"
