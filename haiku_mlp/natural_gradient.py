"""Natural-gradient steps from a tangent kernel: a linear system as large as the batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from haiku_mlp import semidefinite
from haiku_mlp.sequence import after
from haiku_mlp.sharding import is_explicit
from haiku_mlp.structure.contraction import centered_kernel
from haiku_mlp.structure.program import is_number


def min_sr(
    kernel: jax.Array, residuals: jax.Array, damping: jax.Array | float, *, centered: bool = True
) -> jax.Array:
    r"""Weights of the samples whose vjp is the natural-gradient step.

    With the Jacobian :math:`J` of the outputs by the parameters at ``B`` samples and the
    residuals :math:`r`, the step of stochastic reconfiguration (or of Gauss-Newton)

    .. math:: \delta = (J^\dagger J / B + \lambda)^{-1} J^\dagger r / B
              = J^\dagger (J J^\dagger / B + \lambda)^{-1} r / B

    needs, in the second form, only the kernel :math:`K = J J^\dagger`: a system as large as
    the batch instead of the number of parameters (minSR: Chen and Heyl 2024,
    doi:10.1038/s41567-024-02566-1).  For a wave function, which has no norm, the mean over
    the samples is taken from :math:`J` and :math:`r`.

    The system is solved by Cholesky decomposition, unless it has eigenvalues not larger than
    the rounding errors of its kernel: then the solution is that of smallest norm in the
    eigenvectors of larger ones, since in the others a rounding error divided by the damping
    would be most of the step.  Derivatives keep those that are left out fixed, which is right
    where the residuals have no part in them, as with enough damping.

    Args:
      kernel: Tangent kernel ``(B, B)``, for ``O`` outputs ``(B, B, O, O)``.  Integers are
        taken as floats; half precision is computed in float32.  In single precision give
        ``tangent_kernel(..., centered=True)`` where ``centered`` is True, since the mean may
        be much larger than the rest.
      residuals: ``(B,)``, for ``O`` outputs ``(B, O)``: twice the local energies for the
        energy of a wave function (its gradient has this factor), outputs minus targets
        for least squares.
      damping: :math:`\lambda`, a number that is not negative, in units of ``kernel / B``.
      centered: Whether to take the mean from ``kernel`` and ``residuals``: True for wave
        functions, False for least squares.

    Returns:
      The weights ``v``, shaped as ``residuals``.  The step, to be subtracted, is
      ``conj(vjp(conj(v)))``: :func:`natural_gradient` computes it.  NaN, without a
      decomposition, if under :func:`jax.jit` an argument is not finite.

    Raises:
      ValueError: The shapes do not fit; or, outside of :func:`jax.jit` only, the damping
        is negative, an argument is not finite, or the kernel is not Hermitian or has
        negative eigenvalues.

    Example::

      >>> import jax.numpy as jnp
      >>> import haiku_mlp
      >>> kernel = jnp.array([[2., 1.], [1., 5.]])
      >>> weights = haiku_mlp.min_sr(kernel, jnp.array([3., 6.]), 0., centered=False)
      >>> print(kernel @ weights)  # the step without damping takes away the residuals
      [3. 6.]
    """
    kernel, residuals, damping = map(jnp.asarray, (kernel, residuals, damping))
    _check_shapes(kernel, residuals, damping)
    dtype = _solver_dtype(kernel, residuals)
    # That of the kernel as it was computed, of which no cast makes a better one.
    is_inexact = jnp.issubdtype(kernel.dtype, jnp.inexact)
    eps = float(jnp.finfo(kernel.dtype if is_inexact else dtype).eps)
    kernel, residuals = (_replicated(a.astype(dtype)) for a in (kernel, residuals))
    damping = damping.astype(kernel.real.dtype)
    is_concrete = not any(isinstance(a, jax.core.Tracer) for a in (kernel, residuals, damping))
    if is_concrete:
        _check_values(kernel, residuals, damping, tolerance=eps**0.5)
    num_samples = residuals.shape[0]
    # An entry has an error of a few roundings, also where the mean taken off is all of it.
    rounding = 4 * eps * jnp.linalg.norm(kernel.ravel()) / num_samples
    rhs = _center(residuals) if centered else residuals
    matrix = _as_matrix(centered_kernel(kernel) if centered else kernel) / num_samples
    matrix += damping.astype(dtype) * jnp.eye(matrix.shape[0], dtype=dtype)
    solution, smallest = semidefinite.solve(matrix, rhs.ravel(), rounding, damping)
    if is_concrete and smallest < -(eps**0.5) * jnp.max(jnp.abs(matrix)):
        raise ValueError(
            f"kernel / B + damping has the negative eigenvalue {smallest}, as no tangent kernel "
            "has: give that of one batch with itself, or more damping"
        )
    solution = solution.reshape(rhs.shape)
    return (_center(solution) if centered else solution) / num_samples


def natural_gradient(
    function: Callable[[Any], jax.Array],
    params: Any,
    kernel: jax.Array,
    residuals: jax.Array,
    damping: jax.Array | float,
    *,
    centered: bool = True,
    momentum: jax.Array | float = 0.0,
    previous: Any = None,
) -> Any:
    r"""The natural-gradient step, with the momentum of SPRING.

    SPRING asks the step to solve for the residuals as in :func:`min_sr`, but to be small
    in its distance from :math:`\mu` times the previous step instead of from zero
    (Goldshlager et al. 2024, arXiv:2401.10190):

    .. math:: \delta = \mu \delta' + J^\dagger (J J^\dagger / B + \lambda)^{-1}
              (r - \mu J \delta') / B

    Args:
      function: From parameters to the outputs, shaped as ``residuals``, whose tangent
        kernel is ``kernel``.  Holomorphic in complex parameters, or real; of any other
        complex function give the real and the imaginary part as two outputs.  Of complex
        residuals of real outputs only the real part counts, since no step of real outputs
        changes the imaginary part.
      params: The parameters.
      kernel: As for :func:`min_sr`.
      residuals: As for :func:`min_sr`.
      damping: As for :func:`min_sr`.
      centered: As for :func:`min_sr`.
      momentum: :math:`\mu`; 0 with no ``previous``.
      previous: The step before this one; None: there was none.

    Returns:
      The step to be subtracted, a tree like ``params`` with its dtypes, zero for integers.
      Give it to ``optax.sgd`` as the gradient.

    Raises:
      ValueError: As for :func:`min_sr`; or the outputs are not shaped as the residuals, or
        complex where the parameters are not, or real where the kernel is not.

    Example (of any network; the step is the gradient that an optax optimiser takes)::

      >>> import haiku as hk, jax, jax.numpy as jnp, optax
      >>> import haiku_mlp
      >>> def network(x):
      ...     h = hk.LayerNorm(-1, True, True)(jnp.tanh(hk.Linear(8)(x)))
      ...     return hk.Linear(1)(h + jnp.tanh(hk.Linear(8)(h)))[:, 0]
      >>> net = hk.without_apply_rng(hk.transform(network))
      >>> x = jnp.linspace(-1., 1., 20)[:, None]
      >>> params = net.init(jax.random.key(0), x)
      >>> optimiser = optax.sgd(0.5)
      >>> state = optimiser.init(params)
      >>> @jax.jit
      ... def update(params, state, step):
      ...     residuals = net.apply(params, x) - jnp.sin(3 * x[:, 0])
      ...     kernel = haiku_mlp.tangent_kernel(net.apply, params, x)
      ...     step = haiku_mlp.natural_gradient(
      ...         lambda p: net.apply(p, x), params, kernel, residuals, 1e-3,
      ...         centered=False, momentum=0.5, previous=step)
      ...     updates, state = optimiser.update(step, state)
      ...     return optax.apply_updates(params, updates), state, step, jnp.mean(residuals**2)
      >>> step = jax.tree.map(jnp.zeros_like, params)
      >>> for _ in range(30):
      ...     params, state, step, loss = update(params, state, step)
      >>> bool(loss < 1e-3)
      True
    """
    kernel, residuals = jnp.asarray(kernel), jnp.asarray(residuals)
    params = after(params, kernel)
    leaves, structure = jax.tree.flatten(params)
    # By their place, those that have derivatives.
    numbers = {i: leaf for i, leaf in enumerate(leaves) if is_number(jnp.asarray(leaf))}

    def of_numbers(numbers: dict[int, jax.Array]) -> jax.Array:
        values = [numbers.get(i, leaf) for i, leaf in enumerate(leaves)]
        return function(jax.tree.unflatten(structure, values))

    outputs, pull = jax.vjp(of_numbers, numbers)
    _check_outputs(outputs, numbers, kernel, residuals)
    if not jnp.iscomplexobj(outputs):
        residuals = residuals.real
    with jax.numpy_dtype_promotion("standard"):  # a step has the dtypes of the parameters
        if previous is not None:
            given = jax.tree.leaves(jax.tree.map(lambda _, old: old, params, previous))
            before = {i: _like(given[i], leaf) for i, leaf in numbers.items()}
            # Not by jax.jvp: a function with a backward pass of its own may have no forward one.
            (change,) = jax.linear_transpose(pull, outputs)((before,))
            residuals = residuals - _like(momentum * change, change)
        weights = min_sr(kernel, residuals, damping, centered=centered)
        (step,) = pull(_like(jnp.conj(weights), outputs))
        step = jax.tree.map(jnp.conj, step)
        if previous is not None:
            step = jax.tree.map(lambda new, old: new + _like(momentum * old, new), step, before)
    steps = [step.get(i, jnp.zeros_like(leaf)) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, steps)


def _like(a: Any, other: Any) -> jax.Array:
    """Returns ``a`` with the dtype of another array, and where that lies on an Explicit mesh."""
    a = jnp.asarray(a, jnp.result_type(other))
    return jax.sharding.reshard(a, jax.typeof(other).sharding) if is_explicit(other) else a


def _replicated(a: jax.Array) -> jax.Array:
    """Returns ``a`` whole on each device of an Explicit mesh: no decomposition is spread."""
    whole = NamedSharding(jax.typeof(a).sharding.mesh, PartitionSpec())
    return jax.sharding.reshard(a, whole) if is_explicit(a) else a


def _check_outputs(
    outputs: jax.Array, params: Any, kernel: jax.Array, residuals: jax.Array
) -> None:
    if outputs.shape != residuals.shape:
        raise ValueError(
            f"the outputs of function are {outputs.shape}, the residuals {residuals.shape}: "
            "they must be alike"
        )
    if not jnp.iscomplexobj(outputs) and jnp.iscomplexobj(kernel):
        raise ValueError("the outputs of function are real, but kernel is complex")
    if jnp.iscomplexobj(outputs) and not all(map(jnp.iscomplexobj, jax.tree.leaves(params))):
        raise ValueError(
            "complex outputs of real parameters: give the real and the imaginary part as two "
            "real outputs, (B, 2)"
        )


def _solver_dtype(*arrays: jax.Array) -> Any:
    """Returns the dtype of a decomposition of arrays, as :mod:`jax.numpy.linalg` has it."""
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*arrays)
        dtype = dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.result_type(float)
        return jnp.promote_types(dtype, jnp.float32)


def _check_shapes(kernel: jax.Array, residuals: jax.Array, damping: jax.Array) -> None:
    if damping.shape != ():
        raise ValueError(f"damping must be a number, got the shape {damping.shape}")
    batch, outputs = residuals.shape[:1], residuals.shape[1:]
    if residuals.ndim not in (1, 2) or residuals.size == 0:
        raise ValueError(f"residuals must be (B,) or (B, O), not empty, got {residuals.shape}")
    if kernel.shape != batch * 2 + outputs * 2:
        raise ValueError(
            f"kernel must be {batch * 2 + outputs * 2} for residuals {residuals.shape}, "
            f"got {kernel.shape}"
        )


def _check_values(
    kernel: jax.Array, residuals: jax.Array, damping: jax.Array, *, tolerance: float
) -> None:
    for name, value in (("kernel", kernel), ("residuals", residuals), ("damping", damping)):
        if not jnp.all(jnp.isfinite(value)):
            raise ValueError(f"{name} has entries that are not finite")
    if not damping >= 0:
        raise ValueError(f"damping must not be negative, got {damping}")
    matrix = _as_matrix(kernel)
    if jnp.max(jnp.abs(matrix - matrix.conj().T)) > tolerance * jnp.max(jnp.abs(matrix)):
        raise ValueError(
            "kernel is not Hermitian: give the tangent kernel of one batch with itself"
        )


def _as_matrix(kernel: jax.Array) -> jax.Array:
    """Returns ``(B, B)`` as it is and ``(B, B, O, O)`` as ``(B * O, B * O)``."""
    if kernel.ndim == 2:
        return kernel
    size = kernel.shape[0] * kernel.shape[2]
    return jnp.swapaxes(kernel, 1, 2).reshape(size, size)


def _center(a: jax.Array) -> jax.Array:
    return a - jnp.mean(a, 0, keepdims=True)
