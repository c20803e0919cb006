"""Linear systems of positive semidefinite matrices, singular ones too."""

from typing import Any

import jax
import jax.numpy as jnp

_ITERATIONS = 3


# Compiled as one: jax_debug_nans looks at the results alone, not at a decomposition that fails.
@jax.jit
def solve(
    matrix: jax.Array, rhs: jax.Array, rounding: jax.Array, bound: jax.Array | float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Solution of smallest norm of ``matrix @ x = rhs``, where rounding errors count as zero.

    By Cholesky decomposition if all eigenvalues are larger than ``rounding``, else in the
    eigenvectors of those that are.  That decides, not whether the decomposition fails: the
    pivots of a singular matrix are rounding errors of either sign.  Derivatives are those of
    the solution, with the eigenvectors that are left out kept fixed.

    Args:
      matrix: Hermitian ``(n, n)``, of float32 at least, with no eigenvalue below zero other
        than by rounding; the eigenvectors of such ones are left out too.
      rhs: ``(n,)``, of the same dtype.
      rounding: Size of the errors of the eigenvalues, a number.
      bound: A number below which no eigenvalue is, other than by rounding: the damping.  Where
        it is above ``rounding`` the smallest eigenvalue is not looked for.

    Returns:
      The solution ``(n,)`` and the smallest eigenvalue, where the solution is Cholesky's an
      estimate from above, or ``bound``.  NaN, at no cost, if an argument is not finite.

    Example::

      >>> import jax.numpy as jnp
      >>> from haiku_mlp import semidefinite
      >>> ones = jnp.ones((2, 2))
      >>> solution, smallest = semidefinite.solve(ones, jnp.array([2., 4.]), jnp.array(1e-6))
      >>> bool(jnp.allclose(solution, 1.5))
      True
    """
    fixed, bound = jax.lax.stop_gradient((matrix, jnp.asarray(bound, rounding.dtype)))
    # LAPACK takes columns: for rows the same matrix is its adjoint, without a transposition.
    factor = jax.scipy.linalg.cho_factor(fixed.conj().T, lower=True)

    def by_cholesky(b: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.scipy.linalg.cho_solve(factor, b), _smallest_eigenvalue(factor)

    def by_eigenvectors(b: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, vectors = jnp.linalg.eigh(fixed, symmetrize_input=False)
        inverse = jnp.where(values > rounding, 1 / values, 0).astype(b.dtype)
        entries = inverse * _product(vectors.conj().T, b)
        # In this order no copy of the eigenvectors is made, for which room is taken at each call.
        return _product(entries, vectors.T), values[0]

    def not_a_number(b: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.full_like(b, jnp.nan), jnp.full_like(bound, jnp.nan)

    def by_its_eigenvalues(b: jax.Array) -> tuple[jax.Array, jax.Array]:
        is_finite = jnp.isfinite(rounding) & jnp.all(jnp.isfinite(fixed)) & jnp.all(jnp.isfinite(b))
        is_regular = _smallest_eigenvalue(factor) > rounding  # False for NaN: Cholesky failed
        route = jnp.where(is_finite, jnp.where(is_regular, 2, 1), 0)
        return jax.lax.switch(route, (not_a_number, by_eigenvectors, by_cholesky), b)

    def inverse(_: Any, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        solution = jax.scipy.linalg.cho_solve(factor, b)
        is_clear = (bound > 2 * rounding) & jnp.all(jnp.isfinite(solution)) & jnp.isfinite(bound)
        return jax.lax.cond(is_clear, lambda _: (solution, bound), by_its_eigenvalues, b)

    def transposed(_: Any, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        solution, smallest = inverse(_, b.conj())
        return solution.conj(), smallest

    return jax.lax.custom_linear_solve(
        lambda x: _product(matrix, x), rhs, inverse, transposed, has_aux=True
    )


def _smallest_eigenvalue(factor: tuple[jax.Array, bool]) -> jax.Array:
    """Returns the smallest eigenvalue by inverse iteration, too large at most by a small factor.

    From a random vector of size ``n`` the factor is ``n`` to the power of ``1 / 6``, or less.
    """
    lower, _ = factor
    places = jnp.arange(lower.shape[0], dtype=lower.real.dtype)
    vector = jnp.cos(places**2).astype(lower.dtype)  # as good as random, without a key
    size = jnp.ones((), lower.real.dtype)
    growth = size
    for _ in range(_ITERATIONS):
        norm = jnp.linalg.norm(vector).astype(vector.dtype)
        vector = jax.scipy.linalg.cho_solve(factor, vector / norm)
        growth *= jnp.linalg.norm(vector)
    return growth ** (-1 / _ITERATIONS)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision="highest")
