"""``min_sr`` where the kernel is singular, or not finite: over many seeds, never by luck."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import first

import haiku_mlp
from haiku_mlp import semidefinite

SOLVE = jax.jit(haiku_mlp.min_sr, static_argnames="centered")
SEEDS = range(24)


def exact_step(jacobian, residuals, damping):
    """The step in float64, from the singular values of the Jacobian."""
    u, s, v = np.linalg.svd(jacobian.astype(float) / len(jacobian) ** 0.5, full_matrices=False)
    kept = s > 1e-6 * s[0]
    factors = np.where(kept, s / np.where(kept, s**2 + damping, 1), 0)
    return v.T @ (factors * (u.T @ residuals.astype(float))) / len(jacobian) ** 0.5


def errors(num_samples, num_params, damping, *, centered, dtype, size=1.0):
    """Errors of the steps of random Jacobians, in units of the step."""
    found = []
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        jacobian = (size * rng.normal(size=(num_samples, num_params))).astype(dtype)
        residuals = rng.normal(size=num_samples).astype(dtype)
        weights = SOLVE(jacobian @ jacobian.T, residuals, damping, centered=centered)
        assert weights.dtype == dtype
        if centered:
            jacobian, residuals = jacobian - jacobian.mean(0), residuals - residuals.mean()
        expected = exact_step(jacobian, residuals, damping)
        step = jacobian.T.astype(float) @ np.asarray(weights, float)
        found.append(np.linalg.norm(step - expected) / np.linalg.norm(expected))
    return np.array(found)


@pytest.mark.parametrize(
    ("num_params", "centered", "size"),
    first([(70, True, 1.0)], [(63, False, 1e3), (20, False, 1.0), (70, True, 1.0)]),
)
def test_no_damping(num_params, centered, size):
    """Rank 63 or 20 of 64: a pivot is a rounding error, which is negative or not.

    Of a square normal matrix of size ``n`` the smallest of some singular values is 1e-4 or
    so of the largest: squared, and in units of the rounding errors, that leaves 7 digits.
    """
    assert errors(64, num_params, 0.0, centered=centered, dtype=np.float64, size=size).max() < 1e-6


@pytest.mark.parametrize("of_kernel", [np.float32, np.float16])
def test_rounding_is_that_of_the_kernel(of_kernel):
    """Whatever the residuals have: the energies of a network of 32 bits have 64."""
    rng = np.random.default_rng(0)
    jacobian, residuals = rng.normal(size=(64, 5)), rng.normal(size=64)
    kernel = (jacobian @ jacobian.T).astype(of_kernel)
    expected = exact_step(jacobian, residuals, 0.0)
    for solve in (SOLVE, haiku_mlp.min_sr):
        step = jacobian.T @ np.asarray(solve(kernel, residuals, 0.0, centered=False))
        error = np.linalg.norm(step - expected) / np.linalg.norm(expected)
        assert error < 20 * np.finfo(of_kernel).eps


def test_a_kernel_as_hermitian_as_its_rounding():
    rng = np.random.default_rng(0)
    jacobian = rng.normal(size=(64, 5))
    kernel = (jacobian @ jacobian.T).astype(np.float32)
    kernel[0, 1] *= 1 + 2e-6
    haiku_mlp.min_sr(kernel, rng.normal(size=64), 0.1)
    with pytest.raises(ValueError, match="not Hermitian"):
        haiku_mlp.min_sr(kernel.astype(float), rng.normal(size=64), 0.1)


@pytest.mark.parametrize("damping", [0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4])
def test_float32(damping):
    """Damping that is smaller than the rounding errors of the kernel, about so large, larger."""
    found = errors(64, 20, damping, centered=True, dtype=np.float32, size=0.5)
    assert found.max() < (0.05 if damping == 1e-6 else 0.01)


def test_a_smooth_spectrum_keeps_what_is_above_rounding():
    """Eigenvalues from 1 to 1e-12: a cut-off of ``n`` roundings would lose nine tenths."""
    rng = np.random.default_rng(0)
    jacobian = (rng.normal(size=(64, 128)) * np.exp(-np.arange(128) / 9)).astype(np.float32)
    residuals = rng.normal(size=64).astype(np.float32)
    weights = SOLVE(jacobian @ jacobian.T, residuals, 1e-5, centered=False)
    step = jacobian.T.astype(float) @ np.asarray(weights, float)
    u, s, v = np.linalg.svd(jacobian.astype(float) / 8, full_matrices=False)
    expected = v.T @ (s / (s**2 + 1e-5) * (u.T @ residuals)) / 8
    assert np.linalg.norm(step - expected) < 0.03 * np.linalg.norm(expected)


@pytest.fixture
def eigensolver_runs(monkeypatch):
    """Returns a list with an entry for each run of the eigensolver."""
    runs, eigh = [], jnp.linalg.eigh

    def counted(matrix, **options):
        jax.debug.callback(lambda: runs.append(matrix.shape))
        return eigh(matrix, **options)

    monkeypatch.setattr(jnp.linalg, "eigh", counted)
    jax.clear_caches()  # of what was traced with the other one, before and after
    yield runs
    jax.clear_caches()


@pytest.mark.slow
def test_the_eigensolver_runs_only_where_it_is_needed(eigensolver_runs):
    kernel, residuals = np.diag([2.0, 1.0, 0.0]), np.arange(3.0)

    def num_runs(*arguments):
        eigensolver_runs.clear()
        jax.block_until_ready(SOLVE(*arguments, centered=False))
        jax.effects_barrier()
        return len(eigensolver_runs)

    assert num_runs(kernel, residuals, 0.0) == 1
    assert num_runs(kernel, residuals, 0.1) == 0
    for bad in (np.nan, np.inf):
        assert num_runs(kernel, residuals + bad, 0.0) == 0
        assert num_runs(kernel + bad, residuals, 0.0) == 0
        assert num_runs(kernel, residuals, bad) == 0


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["kernel", "residuals", "damping"])
@pytest.mark.parametrize("size", [1, 3])
def test_one_entry_that_is_not_finite_gives_nan(size, name, bad, centered):
    arguments = {"kernel": np.eye(size), "residuals": np.ones(size), "damping": np.array(0.1)}
    arguments[name] = arguments[name].copy()
    arguments[name].flat[0] = bad
    assert np.all(np.isnan(SOLVE(**arguments, centered=centered)))


@pytest.mark.parametrize("jit", first({True}, [False, True]))
def test_debug_nans_and_strict_promotion(jit):
    """A decomposition that fails on the way is no result; integers are taken as floats."""
    solve = SOLVE if jit else haiku_mlp.min_sr
    kernel = np.array([[4, 2, 0], [2, 1, 0], [0, 0, 0]])
    expected = np.linalg.pinv(kernel / 3) @ np.arange(3) / 3
    with jax.debug_nans(True), jax.numpy_dtype_promotion("strict"):
        weights = solve(kernel, np.arange(3), 0, centered=False)
        solve(kernel.astype(np.float32), np.arange(3.0), np.float32(0), centered=False)
    assert weights.dtype == jnp.float64
    np.testing.assert_allclose(weights, expected, atol=1e-15)


def test_integers_are_checked():
    with pytest.raises(ValueError, match="kernel is not Hermitian"):
        haiku_mlp.min_sr(np.array([[1, 2], [3, 4]]), np.arange(2), 1)
    with pytest.raises(ValueError, match="negative eigenvalue"):
        haiku_mlp.min_sr(np.array([[1, 2], [2, 1]]), np.arange(2), 0, centered=False)


@pytest.mark.parametrize("dtype", first({complex}, [float, complex]))
def test_derivatives(dtype):
    """By the matrix and the right-hand side, where Cholesky failed too."""
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(2, 5, 3))
    factor = factor[0] + 1j * factor[1] if dtype is complex else factor[0]
    rhs = factor @ rng.normal(size=3)  # in the range: the solution is differentiable

    def solution(scale, shift):
        matrix = (scale * factor) @ (scale * factor).conj().T + shift * np.eye(5)
        solved, _ = semidefinite.solve(matrix, jnp.asarray(rhs) * scale, jnp.array(1e-12))
        return jnp.real(jnp.vdot(solved, solved))

    step = 1e-6
    for at in ((1.0, 0.0), (1.0, 0.3)):
        difference = (solution(at[0] + step, at[1]) - solution(at[0] - step, at[1])) / (2 * step)
        np.testing.assert_allclose(jax.grad(solution)(*at), difference, rtol=1e-5)


def test_second_derivatives():
    """In all modes, of a regular system."""
    rng = np.random.default_rng(0)
    factor, change = jnp.asarray(rng.normal(size=(2, 5, 3)))
    residuals = jnp.asarray(rng.normal(size=5))

    def size(solve):
        def of(t):
            root = factor + t * change
            return jnp.sum(solve(root @ root.T, residuals) ** 2)

        return jax.jit(jax.jacfwd(jax.grad(of))), jax.jit(jax.grad(jax.jacfwd(of)))

    ours = size(lambda kernel, r: haiku_mlp.min_sr(kernel, r, 0.3, centered=False))
    dense = size(lambda kernel, r: jnp.linalg.solve(kernel / 5 + 0.3 * jnp.eye(5), r) / 5)
    for one, other in zip(ours, dense, strict=True):
        np.testing.assert_allclose(one(0.3), other(0.3), rtol=1e-10)


@pytest.mark.parametrize(("bound", "expected"), [(0.5, 0.5), (0.0, 1.0), (1e-9, 1.0)])
def test_a_bound_that_is_clear_decides(bound, expected):
    """The smallest eigenvalue is looked for where the bound is among the rounding errors."""
    matrix, rhs = jnp.diag(jnp.array([4.0, 2.0, 1.0])), jnp.ones(3)
    solution, smallest = semidefinite.solve(matrix, rhs, jnp.array(1e-8), bound)
    np.testing.assert_allclose(solution, [0.25, 0.5, 1.0])
    np.testing.assert_allclose(smallest, expected, rtol=0.3)
