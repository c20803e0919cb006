"""``min_sr`` and ``natural_gradient`` against the solution in parameter space."""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import cover
from comparison import assert_close
from jax.flatten_util import ravel_pytree

import haiku_mlp

RNG = np.random.default_rng()
min_sr = haiku_mlp.min_sr


@pytest.fixture(autouse=True)
def _the_same_numbers_in_any_order():
    RNG.bit_generator.state = np.random.default_rng(5).bit_generator.state


def normal(*shape, dtype=float):
    values = RNG.normal(size=(2, *shape))
    return values[0] + 1j * values[1] if dtype is complex else values[0]


def parameter_space(jacobian, residuals, damping, *, centered, momentum=0.0, previous=None):
    """The step of stochastic reconfiguration, a system as large as the parameters."""
    if centered:
        jacobian = jacobian - jacobian.mean(0)
        residuals = residuals - residuals.mean(0)
    size = len(jacobian)
    jacobian = jacobian.reshape(-1, jacobian.shape[-1])
    residuals = residuals.reshape(-1)
    old = 0.0
    if previous is not None:
        old = momentum * previous
        residuals = residuals - jacobian @ old
    metric = jacobian.conj().T @ jacobian / size
    force = jacobian.conj().T @ residuals / size
    if damping == 0:
        return old + np.linalg.pinv(metric, rcond=1e-10, hermitian=True) @ force
    return old + np.linalg.solve(metric + damping * np.eye(len(metric)), force)


def step_of(jacobian, weights):
    jacobian = jacobian.reshape(-1, jacobian.shape[-1])
    return jacobian.conj().T @ np.asarray(weights).reshape(-1)


def kernel_of(jacobian):
    kernel = np.tensordot(jacobian, jacobian.conj(), (-1, -1))
    return kernel if kernel.ndim == 2 else kernel.swapaxes(1, 2)


class TestMinSR:
    @pytest.mark.parametrize(
        ("size", "dtype", "centered", "jit"),
        cover([(4,), (40,), (2, 4), (2, 40)], [float, complex], [False, True], [True, False]),
    )
    def test_equals_the_solution_in_parameter_space(self, size, dtype, centered, jit):
        *outputs, num_params = size
        jacobian, residuals = normal(7, *outputs, num_params, dtype=dtype), normal(7, *outputs)
        residuals = residuals.astype(dtype)
        solve = jax.jit(min_sr, static_argnames="centered") if jit else min_sr
        weights = solve(kernel_of(jacobian), residuals, 1e-2, centered=centered)
        assert weights.shape == residuals.shape
        expected = parameter_space(jacobian, residuals, 1e-2, centered=centered)
        assert_close(step_of(jacobian, weights), expected, 1e-10)

    def test_centred_and_not_differ(self):
        jacobian, residuals = normal(7, 10), normal(7)
        centered = min_sr(kernel_of(jacobian), residuals, 1e-2)
        np.testing.assert_allclose(centered.sum(), 0, atol=1e-12)
        assert abs(min_sr(kernel_of(jacobian), residuals, 1e-2, centered=False).sum()) > 1e-3

    @pytest.mark.parametrize("jit", [False, True])
    @pytest.mark.parametrize("centered", [False, True])
    @pytest.mark.parametrize("num_params", [4, 40])
    def test_no_damping_gives_the_pseudo_inverse(self, jit, centered, num_params):
        # Singular for 4 parameters, and for 40 if centred.
        jacobian, residuals = normal(7, num_params), normal(7)
        solve = jax.jit(min_sr, static_argnames="centered") if jit else min_sr
        weights = solve(kernel_of(jacobian), residuals, 0.0, centered=centered)
        expected = parameter_space(jacobian, residuals, 0, centered=centered)
        assert_close(step_of(jacobian, weights), expected, 1e-8)

    def test_constant_added_to_the_outputs_changes_nothing(self):
        # A wave function has no norm: neither the mean of the energies nor of J matters.
        jacobian, residuals = normal(7, 10), normal(7)
        weights = min_sr(kernel_of(jacobian), residuals, 1e-2)
        shifted = min_sr(kernel_of(jacobian + normal(1, 10)), residuals + 3.0, 1e-2)
        assert_close(shifted, weights, 1e-10)

    def test_dtypes(self):
        kernel = np.eye(3, dtype=np.float32)
        half = kernel.astype(jnp.bfloat16)

        def dtype(*arguments):
            return jax.eval_shape(min_sr, *arguments).dtype

        assert dtype(kernel, np.ones(3, np.float32), 0.1) == jnp.float32
        assert dtype(kernel, np.arange(3), 1) == jnp.float32
        assert dtype(kernel, np.arange(3.0), 1) == jnp.float64
        assert dtype(half, jnp.ones(3, jnp.bfloat16), 1) == jnp.float32
        assert dtype(kernel, np.ones(3, np.complex64), 0.1) == jnp.complex64
        assert min_sr(kernel, np.ones(3, np.float32), 0.1).dtype == jnp.float32

    @pytest.mark.slow
    def test_differentiable(self):
        jacobian, residuals = normal(7, 10), normal(7)

        def norm(damping):
            return jnp.sum(min_sr(kernel_of(jacobian), residuals, damping) ** 2)

        step = 1e-5
        difference = (norm(0.1 + step) - norm(0.1 - step)) / (2 * step)
        np.testing.assert_allclose(jax.grad(norm)(0.1), difference, rtol=1e-6)

    @pytest.mark.parametrize(
        ("kernel", "residuals", "damping", "message"),
        [
            ((3, 3), (3,), (2,), r"damping must be a number, got the shape \(2,\)"),
            ((3, 3), (3, 1, 1), (), r"residuals must be \(B,\) or \(B, O\)"),
            ((3, 3), (), (), r"residuals must be \(B,\) or \(B, O\)"),
            ((0, 0), (0,), (), r"not empty, got \(0,\)"),
            ((3, 4), (3,), (), r"kernel must be \(3, 3\) for residuals \(3,\), got \(3, 4\)"),
            ((3, 3), (3, 2), (), r"kernel must be \(3, 3, 2, 2\) for residuals"),
        ],
    )
    def test_wrong_shapes(self, kernel, residuals, damping, message):
        with pytest.raises(ValueError, match=message):
            min_sr(jnp.ones(kernel), jnp.ones(residuals), jnp.ones(damping))
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(min_sr, jnp.ones(kernel), jnp.ones(residuals), jnp.ones(damping))

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    @pytest.mark.parametrize("name", ["kernel", "residuals", "damping"])
    def test_not_finite(self, name, bad):
        arguments = {"kernel": np.eye(3), "residuals": np.arange(3.0), "damping": np.array(0.1)}
        arguments[name] = arguments[name].copy()
        arguments[name].flat[0] = bad
        with pytest.raises(ValueError, match=f"{name} has entries that are not finite"):
            min_sr(**arguments)

    def test_negative_damping(self):
        with pytest.raises(ValueError, match=r"damping must not be negative, got -0\.1"):
            min_sr(np.eye(3), np.ones(3), -0.1)

    def test_kernel_of_two_batches(self):
        with pytest.raises(ValueError, match="kernel is not Hermitian"):
            min_sr(normal(3, 3), np.ones(3), 0.1)
        rotation = np.array([[2.0, 1j], [1j, 2.0]])
        with pytest.raises(ValueError, match="kernel is not Hermitian"):
            min_sr(rotation, np.ones(2), 0.1)

    @pytest.mark.slow
    def test_indefinite_kernel(self):
        # Under jit the negative eigenvalue is left out.
        vectors = np.linalg.qr(normal(4, 4))[0]
        kernel = (vectors * np.array([3.0, 2.0, 1.0, -2.0])) @ vectors.T
        kernel, residuals = (kernel + kernel.T) / 2, normal(4)
        with pytest.raises(ValueError, match=r"kernel / B \+ damping has the negative eigenvalue"):
            min_sr(kernel, residuals, 0.1, centered=False)
        ours = jax.jit(min_sr, static_argnames="centered")(kernel, residuals, 0.1, centered=False)
        inverse = np.array([1 / 0.85, 1 / 0.6, 1 / 0.35, 0])
        assert_close(ours, (vectors * inverse) @ vectors.T @ residuals / 4, 1e-10)

    def test_rounding_is_no_negative_eigenvalue(self):
        # 40 samples of 3 parameters: 37 eigenvalues are zero up to rounding.
        jacobian, residuals = 1e3 * normal(40, 3), normal(40)
        weights = min_sr(kernel_of(jacobian), residuals, 0.0)
        expected = parameter_space(jacobian, residuals, 0, centered=True)
        assert_close(step_of(jacobian, weights), expected, 1e-8)


def network(**fields):
    def forward_and_kernel():
        mlp = haiku_mlp.MLP(**fields)
        return mlp, (mlp, mlp.tangent_kernel)

    net = hk.without_apply_rng(hk.multi_transform(forward_and_kernel))
    x = normal(9, 4)
    params = jax.jit(net.init)(jax.random.key(0), x)
    forward, kernel = net.apply
    flat, unravel = ravel_pytree(params)
    is_real = not jnp.iscomplexobj(jax.eval_shape(forward, params, x))
    if jnp.iscomplexobj(flat) and is_real:
        parts = (flat.real, flat.imag)
        jacobian = jax.jit(jax.jacrev(lambda p: forward(unravel(p[0] + 1j * p[1]), x)))(parts)
        jacobian = jnp.concatenate(jacobian, -1)
    else:
        rows = jax.jacrev(lambda p: forward(unravel(p), x), holomorphic=not is_real)
        jacobian = jax.jit(rows)(flat)
    return (lambda p: forward(p, x)), params, jax.jit(kernel)(params, x), np.asarray(jacobian)


class TestNaturalGradient:
    @pytest.mark.parametrize(
        ("name", "centered", "momentum"),
        cover(["real", "holomorphic", "complex_to_real"], [False, True], [None, 0.7]),
    )
    def test_equals_the_solution_in_parameter_space(self, name, centered, momentum):
        fields = {"hidden_dims": (3,), "hidden_activations": jnp.tanh}
        if name != "real":
            fields["param_dtype"] = complex
        if name == "complex_to_real":
            fields["output_activation"] = jnp.real
        function, params, kernel, jacobian = network(**fields)
        residuals = normal(9, dtype=complex if name == "holomorphic" else float)
        previous, old = None, None
        if momentum is not None:
            previous = jax.tree.map(lambda a: jnp.asarray(normal(*a.shape), a.dtype), params)
            old = np.asarray(ravel_pytree(previous)[0])
            old = np.concatenate([old.real, old.imag]) if name == "complex_to_real" else old
        step = jax.jit(
            functools.partial(
                haiku_mlp.natural_gradient, function, centered=centered, momentum=momentum or 0.0
            )
        )(params, kernel, residuals, 1e-2, previous=previous)
        assert jax.tree.structure(step) == jax.tree.structure(params)
        expected = parameter_space(
            jacobian, residuals, 1e-2, centered=centered, momentum=momentum, previous=old
        )
        if name == "complex_to_real":
            expected = expected[: expected.size // 2] + 1j * expected[expected.size // 2 :]
        assert_close(ravel_pytree(step)[0], expected, 1e-10)

    @pytest.mark.slow
    def test_jit(self, check_leaks):
        function, params, kernel, _ = network(hidden_dims=(3,))
        residuals = normal(9)

        def step(params, previous):
            return haiku_mlp.natural_gradient(
                function, params, kernel, residuals, 1e-2, momentum=0.5, previous=previous
            )

        expected = step(params, params)
        for a, b in zip(
            jax.tree.leaves(jax.jit(step)(params, params)), jax.tree.leaves(expected), strict=True
        ):
            assert_close(a, b, 1e-10)

    @pytest.mark.parametrize("momentum", [0.0, 0.5])
    def test_integers_among_the_parameters(self, momentum):
        """They stay as they are, in optax too."""
        x, residuals = normal(5, 4), normal(5)
        params = {"w": normal(4, 4), "table": jnp.arange(4), "v": normal(4)}

        def outputs(params):
            return jnp.tanh(x @ params["w"])[:, params["table"]] @ params["v"]

        def alone(numbers):
            return outputs({**params, **numbers})

        def step(function, params, previous):
            return haiku_mlp.natural_gradient(
                function, params, kernel, residuals, 0.1, momentum=momentum, previous=previous
            )

        kernel = haiku_mlp.tangent_kernel(lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], params, x)
        numbers = {name: params[name] for name in ("w", "v")}
        expected = found = None
        for _ in range(2):
            expected, found = step(alone, numbers, expected), step(outputs, params, found)
            table = found.pop("table")
            np.testing.assert_array_equal(table, jnp.zeros(4, int), strict=True)
            jax.tree.map(np.testing.assert_array_equal, found, expected)
            found["table"] = table
        kept = optax.apply_updates(params, found)["table"]
        np.testing.assert_array_equal(kept, params["table"], strict=True)

    def test_momentum_of_a_function_with_a_backward_pass_alone(self):
        @jax.custom_vjp
        def square(z):
            return z**2

        square.defvjp(lambda z: (z**2, z), lambda z, ct: (2 * z * ct,))
        params = {"used": jnp.array([1.0, 2.0, 3.0]), "unused": jnp.ones(2)}
        previous = jax.tree.map(jnp.cos, params)
        kernel, residuals = jnp.diag(4 * params["used"] ** 2), jnp.array([1.0, -1.0, 0.5])
        steps = [
            haiku_mlp.natural_gradient(
                lambda p, f=f: f(p["used"]),
                *(params, kernel, residuals, 1e-2),
                momentum=0.5,
                previous=previous,
            )
            for f in (square, lambda z: z**2)
        ]
        assert_close(*steps, 1e-12)

    def test_complex_function_of_real_parameters(self):
        def function(params):
            return params * np.array([1.0, 1j])

        with pytest.raises(ValueError, match="the real and the imaginary part as two real outputs"):
            haiku_mlp.natural_gradient(function, jnp.ones(()), np.eye(2), np.ones(2), 0.1)

    def test_of_complex_residuals_of_real_outputs_the_real_part_counts(self):
        function, params, kernel, _ = network(hidden_dims=(3,))
        residuals = normal(9, dtype=complex)
        step = jax.jit(functools.partial(haiku_mlp.natural_gradient, function))
        ours, expected = (
            step(params, kernel, values, 1e-2) for values in (residuals, residuals.real)
        )
        jax.tree.map(np.testing.assert_array_equal, ours, expected)

    @pytest.mark.slow
    def test_a_step_has_the_dtypes_of_the_parameters(self):
        """Of a float32 model with a float64 momentum, step after step, promotion forbidden."""
        function, params, kernel, _ = network(hidden_dims=(3,), param_dtype=jnp.float32)
        dtypes = jax.tree.map(jnp.result_type, params)
        residuals, momentum = normal(9), jnp.asarray(0.7, jnp.float64)
        steps = [jax.tree.map(lambda p: p.astype(jnp.float64), params)]
        with jax.numpy_dtype_promotion("strict"):
            for _ in range(2):
                steps.append(
                    haiku_mlp.natural_gradient(
                        function,
                        params,
                        kernel,
                        residuals,
                        1e-2,
                        momentum=momentum,
                        previous=steps[-1],
                    )
                )
        assert [jax.tree.map(jnp.result_type, step) for step in steps[1:]] == [dtypes] * 2
        wide = jax.tree.map(lambda p: p.astype(jnp.float64), params)
        previous = jax.tree.map(lambda p: p.astype(jnp.float64), steps[1])
        expected = haiku_mlp.natural_gradient(
            function, wide, kernel, residuals, 1e-2, momentum=momentum, previous=previous
        )
        jax.tree.map(lambda a, b: assert_close(a.astype(float), b, 1e-4), steps[2], expected)

    @pytest.mark.parametrize(
        ("kernel", "residuals", "message"),
        [
            (np.eye(9), np.ones((9, 1)), r"outputs of function are \(9,\), the residuals \(9, 1\)"),
            (np.eye(9) * (1 + 0j), np.ones(9), "outputs of function are real, but kernel is"),
        ],
    )
    def test_what_does_not_fit(self, kernel, residuals, message):
        function, params, _, _ = network(hidden_dims=(3,))
        with pytest.raises(ValueError, match=message):
            haiku_mlp.natural_gradient(function, params, kernel, residuals, 1e-2)
