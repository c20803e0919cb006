"""``tangent_kernel``, ``connected`` and ``laplacian`` against what JAX gives by brute force."""

import functools

import cases
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_close, assert_identical, lowered_text
from jax.flatten_util import ravel_pytree

import compat
import haiku_mlp
from haiku_mlp import structure

KEY = jax.random.key(3)
METHODS = ("tangent_kernel", "connected", "laplacian")


def pure(fields, method="__call__"):
    """Returns ``init`` and ``apply`` of one method of the MLP, or of the block."""
    cls = haiku_mlp.blocks.MLP if "output_dim" in fields else haiku_mlp.MLP
    return hk.without_apply_rng(
        hk.transform(lambda *args, **kwargs: getattr(cls(**fields), method)(*args, **kwargs))
    )


def network(fields, method="__call__"):
    """The same, compiled."""
    net = pure(fields, method)
    return hk.Transformed(jax.jit(net.init), jax.jit(net.apply, static_argnames="chunk_size"))


def random_params(fields, x):
    """Returns parameters whose biases are not zero."""
    rng = np.random.default_rng(7)

    def values(shape_of):
        values = rng.normal(size=(2, *shape_of.shape)) / shape_of.shape[0] ** 0.5
        values = values[0] + 1j * values[1] if jnp.iscomplexobj(shape_of) else values[0]
        return jnp.asarray(values, shape_of.dtype)

    return jax.tree.map(values, jax.eval_shape(network(fields).init, KEY, x))


def both(ours, expected, *args):
    """Returns the results of two functions, compiled as one."""
    return jax.jit(lambda *args: (ours(*args), expected(*args)))(*args)


def normal(*shape, dtype=float, seed=0):
    real, imag = np.random.default_rng(seed).normal(size=(2, *shape))
    return jnp.asarray(real + 1j * imag if dtype is complex else real, dtype)


def spins(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).choice([-1, 1], shape), jnp.int8)


def arguments(method, x):
    """Returns arguments for a method at inputs ``(B, N)``."""
    if method != "connected":
        return (x,)
    sites = jnp.arange(x.shape[-1])[:, None]
    return x, sites, -x[..., None]


# The parameters of the cases hold float64, the inputs are (B, 4) unless they say.
NETWORKS = {
    "linear": {},
    "linear_bias": {"use_output_bias": True},
    "one_layer": {"hidden_dims": (8,)},
    "no_bias": {"hidden_dims": (8, 5), "use_hidden_bias": False},
    "all_biases": {"hidden_dims": (8, 5), "use_output_bias": True},
    "three_layers": {"hidden_dims": (8, 5, 6)},
    "alpha": {"hidden_dims_alpha": (2, 1.5)},
    "activations": {"hidden_dims": (8, 5, 6), "hidden_activations": (jnp.tanh, None, jnp.sin)},
    "no_activation": {"hidden_dims": (8, 5), "hidden_activations": None},
    "output_activation": {"hidden_dims": (8,), "output_activation": jnp.sinh},
    "highest": {"hidden_dims": (8,), "precision": "highest"},
    "complex": {"hidden_dims": (8, 5), "param_dtype": complex, "hidden_activations": jnp.tanh},
    "complex_split": {
        "hidden_dims": (8, 5),
        "param_dtype": complex,
        "hidden_activations": cases.split_gelu,
        "use_output_bias": True,
    },
    "complex_to_real": {
        "hidden_dims": (8, 5),
        "param_dtype": complex,
        "hidden_activations": (jnp.tanh, cases.split_gelu),
        "output_activation": jnp.real,
    },
    "modulus_between": {
        "hidden_dims": (8, 5),
        "param_dtype": complex,
        "hidden_activations": (jnp.tanh, lambda z: jnp.log1p(jnp.abs(z) ** 2)),
    },
    "real_to_complex": {
        "hidden_dims": (8, 5),
        "hidden_activations": (jnp.tanh, lambda z: jnp.exp(1j * z)),
        "use_output_bias": True,
    },
    "real_to_conjugate": {
        "hidden_dims": (8, 5),
        "hidden_activations": (lambda z: jnp.exp(1j * z), jnp.conj),
        "output_activation": cases.split_gelu,
    },
    "block": {"output_dim": 3, "hidden_dims": (8, 5)},
    "complex_block": {
        "output_dim": 2,
        "hidden_dims": (8,),
        "param_dtype": complex,
        "hidden_activations": cases.split_gelu,
    },
}
MIXING = {
    "softmax_between": {"hidden_dims": (8, 5), "hidden_activations": jax.nn.softmax},
    "softmax_block": {
        "output_dim": 3,
        "hidden_dims": (8,),
        "output_activation": jax.nn.softmax,
    },
    "glu": {"hidden_dims": (8,), "output_activation": lambda z: jnp.sum(z, -1, keepdims=True)},
}
"""Activations that mix the entries of the last axis."""
ALL = {**NETWORKS, **MIXING}
QUICK = {"linear", "activations", "complex_split", "real_to_conjugate", "block", "softmax_block"}


def dense_kernel(apply, params, x, y=None):
    """The product of the Jacobians by the real and the imaginary parts of the parameters.

    Half of it where parameters and outputs are both complex: by Wirtinger's derivatives
    ``p = (a - ib) / 2`` and ``q = (a + ib) / 2``, ``p p* + q q* = (a a* + b b*) / 2``.
    """
    flat, unravel = ravel_pytree(params)
    parts = [flat.real, flat.imag] if jnp.iscomplexobj(flat) else [flat]

    def outputs(parts, x):
        flat = parts[0] + 1j * parts[1] if len(parts) == 2 else parts[0]
        return apply(unravel(flat), x)

    def jacobian(x):
        real = jax.jacrev(lambda parts: outputs(parts, x).real)(parts)
        if not jnp.iscomplexobj(apply(params, x)):
            return jnp.concatenate(real, -1)
        imag = jax.jacrev(lambda parts: outputs(parts, x).imag)(parts)
        return jnp.concatenate(real, -1) + 1j * jnp.concatenate(imag, -1)

    left = jacobian(x)
    right = left if y is None else jacobian(y)
    kernel = jnp.tensordot(left, right.conj(), (-1, -1))
    if kernel.ndim == 4:
        kernel = jnp.swapaxes(kernel, 1, 2)
    both_complex = len(parts) == 2 and jnp.iscomplexobj(left)
    return kernel / 2 if both_complex else kernel


def kernels(fields, params, x, y=None):
    """Returns the tangent kernel and the product of Jacobians."""
    ours = network(fields, "tangent_kernel").apply
    return both(ours, functools.partial(dense_kernel, network(fields).apply), params, x, y)


class TestTangentKernel:
    @pytest.mark.parametrize("name", cases.first(QUICK, ALL))
    def test_equals_the_product_of_jacobians(self, name):
        fields = ALL[name]
        x = normal(5, 4)
        params = random_params(fields, x)
        assert_close(*kernels(fields, params, x), 1e-12)

    @pytest.mark.parametrize(
        "name", cases.first({"complex_block"}, ["all_biases", "modulus_between", "complex_block"])
    )
    def test_two_batches(self, name):
        fields, x, y = NETWORKS[name], normal(5, 4), normal(3, 4, seed=1)
        params = random_params(fields, x)
        assert_close(*kernels(fields, params, x, y), 1e-12)

    @pytest.mark.parametrize(
        "name", cases.first({"two_reals"}, ["real_to_complex", "two_reals", "complex_split"])
    )
    def test_complex_inputs(self, name):
        fields = {**NETWORKS, "two_reals": {"hidden_dims": 8, "hidden_activations": jnp.tanh}}[name]
        x = normal(5, 4, dtype=complex)
        params = random_params(fields, x)
        assert_close(*kernels(fields, params, x), 1e-12)

    def test_holomorphic_equals_the_complex_derivatives(self):
        fields, x = NETWORKS["complex"], normal(5, 4)
        params = random_params(fields, x)
        flat, unravel = ravel_pytree(params)
        jacobian = jax.jacrev(lambda p: network(fields).apply(unravel(p), x), holomorphic=True)
        j = jacobian(flat)
        kernel = network(fields, "tangent_kernel").apply(params, x)
        assert_close(kernel, j @ j.conj().T, 1e-12)

    def test_two_outputs_hold_what_a_complex_one_does_not(self):
        # The way that the docstring gives for a network that is not holomorphic.
        fields = {**NETWORKS["complex_split"]}
        x = normal(5, 4)
        params = random_params(fields, x)
        parts = lambda z: jnp.concatenate([z.real, z.imag], -1)  # noqa: E731
        block = {**fields, "output_dim": 1, "output_activation": parts}
        block_params = {name.removeprefix("mlp/").replace("block", "mlp"): value
                        for name, value in params.items()}  # fmt: skip
        kernel, expected = kernels(block, block_params, x)
        assert expected.shape == (5, 5, 2, 2)
        assert_close(kernel, expected, 1e-12)
        complex_kernel = network(fields, "tangent_kernel").apply(params, x)
        real, imag = (
            (kernel[:, :, 0, 0], kernel[:, :, 0, 1]),
            (kernel[:, :, 1, 0], kernel[:, :, 1, 1]),
        )
        half = (real[0] + imag[1] + 1j * (imag[0] - real[1])) / 2
        assert_close(complex_kernel, half, 1e-12)

    @pytest.mark.parametrize(
        ("name", "chunk_size"), cases.cover(["complex_block", "one_layer"], [3, 100, 1])
    )
    def test_chunks(self, name, chunk_size):
        fields, x, y = NETWORKS[name], normal(7, 4), normal(2, 4, seed=1)
        params = random_params(fields, x)
        apply = network(fields, "tangent_kernel").apply
        chunked = functools.partial(apply, chunk_size=chunk_size)
        assert_close(*both(chunked, apply, params, x, y), 1e-14)

    @pytest.mark.parametrize("x", [spins(5, 4), spins(5, 4) > 0])
    def test_integer_inputs(self, x):
        fields = NETWORKS["all_biases"]
        params = random_params(fields, x)
        assert_close(*kernels(fields, params, x), 1e-12)

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64])
    def test_single_precision(self, dtype):
        fields = {"hidden_dims": (8, 5), "param_dtype": dtype, "hidden_activations": jnp.tanh}
        x = normal(5, 4, dtype=jnp.float32)
        params = random_params(fields, x)
        kernel, expected = kernels(fields, params, x)
        assert kernel.dtype == dtype
        assert_close(kernel, expected.astype(dtype), 1e-5)

    @pytest.mark.slow
    def test_single_precision_parameters_with_double_inputs(self):
        fields = {"hidden_dims": (8, 5), "param_dtype": jnp.float32}
        x = normal(5, 4)
        params = random_params(fields, x)
        kernel, _ = kernels(fields, params, x)
        _, expected = kernels(fields, jax.tree.map(lambda a: a.astype(float), params), x)
        assert_close(kernel, expected, 1e-12)

    @pytest.mark.parametrize("chunk_size", [None, 2])
    @pytest.mark.slow
    def test_gradient_by_parameters(self, chunk_size):
        fields, x = {"hidden_dims": (8, 5), "hidden_activations": jnp.tanh}, normal(5, 4)
        params, weights = random_params(fields, x), normal(5, 5, seed=1)
        kernel = network(fields, "tangent_kernel").apply
        dense = functools.partial(dense_kernel, network(fields).apply)
        ours, expected = both(
            jax.grad(lambda p, x: jnp.sum(weights * kernel(p, x, chunk_size=chunk_size))),
            jax.grad(lambda p, x: jnp.sum(weights * dense(p, x))),
            params,
            x,
        )
        jax.tree.map(lambda a, b: assert_close(a, b, 1e-11), ours, expected)

    @pytest.mark.parametrize(
        ("sizes", "chunk_size"), cases.cover([(0, 3), (3, 0), (1, 1)], [2, None])
    )
    def test_small_batches(self, sizes, chunk_size):
        fields = NETWORKS["one_layer"]
        x, y = normal(sizes[0], 4), normal(sizes[1], 4)
        params = random_params(fields, x)
        kernel = network(fields, "tangent_kernel").apply(params, x, y, chunk_size=chunk_size)
        assert kernel.shape == sizes

    @pytest.mark.parametrize("x", [normal(4), normal(2, 3, 4), 1.0])
    def test_wrong_shapes(self, x):
        params, apply = random_params({}, normal(2, 4)), network({}, "tangent_kernel").apply
        with pytest.raises(ValueError, match=r"x must have the shape \(batch, inputs\)"):
            apply(params, x)
        with pytest.raises(ValueError, match=r"y must have the shape \(batch, inputs\)"):
            apply(params, normal(2, 4), x)

    @pytest.mark.parametrize("chunk_size", [0, -1])
    def test_wrong_chunk_size(self, chunk_size):
        params, apply = random_params({}, normal(2, 4)), network({}, "tangent_kernel").apply
        with pytest.raises(ValueError, match="chunk_size must be positive"):
            apply(params, normal(2, 4), chunk_size=chunk_size)

    def test_peak_memory(self, optimized):
        fields, x = {"hidden_dims": (256, 256)}, normal(256, 64)
        params = random_params(fields, x)
        ours = peak_bytes(network(fields, "tangent_kernel").apply, params, x)
        dense = peak_bytes(functools.partial(dense_kernel, network(fields).apply), params, x)
        assert ours * 20 < dense

    def test_chunks_bound_memory(self, optimized):
        fields, x = {"output_dim": 4, "hidden_dims": (16,)}, normal(256, 8)
        params = random_params(fields, x)
        apply = network(fields, "tangent_kernel").apply
        beside = []
        for chunk_size in (None, 8):
            function = jax.jit(functools.partial(apply, chunk_size=chunk_size))
            analysis = function.lower(params, x).compile().memory_analysis()
            beside.append(analysis.temp_size_in_bytes)
        assert beside[1] < 0.6 * beside[0]


def peak_bytes(function, *args):
    analysis = jax.jit(function).lower(*args).compile().memory_analysis()
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes


def changed(x, sites, values):
    """The configurations ``(..., K, N)``, each change of one in turn."""
    x, sites, values = map(np.asarray, (x, sites, values))
    sites = np.broadcast_to(sites, x.shape[:-1] + sites.shape[-2:])
    values = np.broadcast_to(values, x.shape[:-1] + values.shape[-2:])
    dtype = np.result_type(x, values)
    full = np.repeat(x[..., None, :], sites.shape[-2], axis=-2).astype(dtype)
    for index in np.ndindex(sites.shape):
        full[(*index[:-1], sites[index])] = values[index]
    return full


def changes(x, num_changes, num_sites, seed=0):
    """Random distinct sites, and spins flipped there."""
    rng = np.random.default_rng(seed)
    shape = (*x.shape[:-1], num_changes)
    sites = np.argsort(rng.random((*shape, x.shape[-1])))[..., :num_sites]
    values = -np.take_along_axis(np.asarray(x)[..., None, :], sites, -1)
    return jnp.asarray(sites), jnp.asarray(values)


def connected_and_full(fields, params, x, sites, values):
    """Returns the outputs at the changes of ``x``, and those of the forward pass."""
    full = changed(x, sites, values)
    return both(
        lambda params, *args: network(fields, "connected").apply(params, *args[:3]),
        lambda params, *args: network(fields).apply(params, args[3]),
        params,
        x,
        sites,
        values,
        full,
    )


class TestConnected:
    @pytest.mark.parametrize("name", cases.first(QUICK, ALL))
    def test_equals_the_full_evaluation(self, name):
        fields = ALL[name]
        x = spins(3, 4)
        sites, values = changes(x, 6, 2)
        params = random_params(fields, x)
        assert_close(*connected_and_full(fields, params, x, sites, values), 1e-12)

    @pytest.mark.parametrize("num_sites", [1, 4])
    def test_number_of_sites(self, num_sites):
        fields, x = NETWORKS["all_biases"], spins(3, 4)
        sites, values = changes(x, 6, num_sites)
        params = random_params(fields, x)
        assert_close(*connected_and_full(fields, params, x, sites, values), 1e-12)

    @pytest.mark.parametrize(
        ("name", "batch"), cases.cover(["one_layer", "block"], [(), (2, 3), (0,), (1,)])
    )
    def test_leading_axes(self, name, batch):
        fields, x = NETWORKS[name], normal(*batch, 4)
        params = random_params(fields, normal(1, 4))
        sites, values = changes(x, 6, 2)
        assert_close(*connected_and_full(fields, params, x, sites, values), 1e-12)
        sites, values = jnp.array([[0, 1], [2, 0], [3, 1]]), normal(3, 2, seed=1)
        outputs, expected = connected_and_full(fields, params, x, sites, values)
        assert outputs.shape[: len(batch) + 1] == (*batch, 3)
        assert_close(outputs, expected, 1e-12)

    def test_sites_of_one_axis_less(self):
        # Leading axes broadcast: the sites belong to the last batch axis alone.
        fields, x = NETWORKS["one_layer"], normal(2, 3, 4)
        params = random_params(fields, x)
        sites, values = changes(x[0], 5, 2)
        outputs = network(fields, "connected").apply(params, x, sites, values)
        each = [connected_and_full(fields, params, x[i], sites, values)[1] for i in range(2)]
        assert_close(outputs, jnp.stack(each), 1e-12)

    def test_no_change_pads(self):
        fields, x = NETWORKS["three_layers"], spins(4)
        params = random_params(fields, x)
        sites = jnp.array([[1, 1], [1, 3], [0, 0]])
        values = jnp.stack([jnp.array([-x[1], x[1]]), jnp.array([-x[1], x[3]]), x[:1].repeat(2)])
        outputs = network(fields, "connected").apply(params, x, sites, values)
        flipped = x.at[1].set(-x[1])
        expected = network(fields).apply(params, jnp.stack([flipped, flipped, x]))
        assert_close(outputs, expected, 1e-12)

    def test_repeated_sites_add_up(self):
        fields, x = NETWORKS["one_layer"], normal(4)
        params = random_params(fields, x)
        outputs = network(fields, "connected").apply(
            params, x, jnp.array([[2, 2]]), x[2] + jnp.array([[0.25, 0.5]])
        )
        expected = network(fields).apply(params, x.at[2].add(0.75)[None])
        assert_close(outputs, expected, 1e-12)

    @pytest.mark.parametrize(("num_changes", "num_sites"), [(0, 2), (3, 0)])
    def test_nothing_to_change(self, num_changes, num_sites):
        fields, x = NETWORKS["one_layer"], normal(2, 4)
        params = random_params(fields, x)
        sites = jnp.zeros((num_changes, num_sites), int)
        outputs = network(fields, "connected").apply(params, x, sites, sites.astype(float))
        expected = jnp.broadcast_to(network(fields).apply(params, x)[:, None], (2, num_changes))
        assert_close(outputs, expected, 1e-12)

    def test_negative_sites_count_from_the_end(self):
        fields, x = NETWORKS["one_layer"], normal(4)
        params = random_params(fields, x)
        apply = network(fields, "connected").apply
        values = jnp.array([[0.5], [2.0]])
        ours = apply(params, x, jnp.array([[-1], [-4]]), values)
        np.testing.assert_array_equal(ours, apply(params, x, jnp.array([[3], [0]]), values))

    @pytest.mark.parametrize("site", [4, -5])
    def test_site_out_of_range(self, site):
        fields, x = NETWORKS["one_layer"], normal(4)
        params = random_params(fields, x)
        sites = jnp.array([[site], [1]])
        outputs = network(fields, "connected").apply(params, x, sites, jnp.ones((2, 1)))
        np.testing.assert_array_equal(np.isnan(outputs), [True, False])

    @pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, bool])
    def test_differences_do_not_overflow(self, dtype):
        fields = NETWORKS["one_layer"]
        high, low = (1, 0) if dtype is bool else (jnp.iinfo(dtype).max, jnp.iinfo(dtype).min)
        x = jnp.array([low, high, low, high]).astype(dtype)
        params = random_params(fields, x)
        sites = jnp.arange(4)[:, None]
        values = jnp.array([high, low, high, low]).astype(dtype)[:, None]
        assert_close(*connected_and_full(fields, params, x, sites, values), 1e-12)

    @pytest.mark.parametrize("batch", cases.first({67}, [1, 5, 67]))
    def test_many_samples(self, batch):
        # More than one block of samples goes through on a CPU, the last one not full.
        fields, x = {"hidden_dims": (128,)}, spins(batch, 40)
        sites, values = changes(x, 60, 2)
        params = random_params(fields, x)
        assert_close(*connected_and_full(fields, params, x, sites, values), 1e-12)

    def test_single_precision(self):
        fields = {"hidden_dims": (8,), "param_dtype": jnp.float32}
        x = spins(3, 4)
        sites, values = changes(x, 6, 2)
        params = random_params(fields, x)
        outputs, expected = connected_and_full(fields, params, x, sites, values)
        assert outputs.dtype == jnp.float32
        assert_close(outputs, expected, 1e-6)

    def test_gradient_by_parameters(self):
        fields, x = NETWORKS["three_layers"], spins(3, 4)
        sites, values = changes(x, 6, 2)
        full = changed(x, sites, values)
        ours, expected = both(
            jax.grad(
                lambda p: jnp.sum(network(fields, "connected").apply(p, x, sites, values) ** 2)
            ),
            jax.grad(lambda p: jnp.sum(network(fields).apply(p, full) ** 2)),
            random_params(fields, x),
        )
        jax.tree.map(lambda a, b: assert_close(a, b, 1e-12), ours, expected)

    @pytest.mark.parametrize(
        ("x_dtype", "values_dtype", "w_dtype"),
        [
            ("bool", "int8", "int32"),
            ("int8", "float64", "bfloat16"),
            ("int8", "complex64", "float32"),
            ("bfloat16", "float64", "float32"),
            ("bfloat16", "float16", "bfloat16"),
            ("float32", "int8", "complex64"),
        ],
    )
    def test_dtype_and_digits_of_a_call(self, x_dtype, values_dtype, w_dtype):
        """Of ``x`` with its entries replaced, not those of ``x`` or ``values`` alone."""
        x, values = spins(3, 4).astype(x_dtype), normal(6, 2, seed=1).astype(values_dtype)
        layers = (structure.Layer(w=(4 * normal(4, 8)).astype(w_dtype), activation=jnp.tanh),)
        sites = jnp.argsort(normal(6, 4, seed=2), axis=-1)[:, :2]
        wide = x.astype(jnp.promote_types(x_dtype, values_dtype))
        with jax.numpy_dtype_promotion("strict"):
            ours = jax.jit(functools.partial(structure.connected, layers))(x, sites, values)
        full = changed(wide, sites, values.astype(wide.dtype))
        expected = jax.jit(functools.partial(structure.forward, layers))(full)
        assert ours.dtype == expected.dtype
        wider = jnp.promote_types(ours.dtype, float)  # NumPy has no bfloat16
        assert_close(ours.astype(wider), expected.astype(wider), 30 * jnp.finfo(ours.dtype).eps)

    @pytest.mark.parametrize("bad", cases.first({np.inf}, [np.nan, np.inf, -np.inf]))
    def test_an_entry_that_is_not_finite_is_replaced_or_spoils(self, bad):
        layers = (structure.Layer(w=normal(4, 2), activation=jnp.tanh),)
        x = normal(4).at[1].set(bad)
        sites, values = jnp.array([[0, 1], [1, 3], [0, 2], [3, 3]]), normal(4, 2, seed=1)
        connected = jax.jit(functools.partial(structure.connected, layers))
        outputs = connected(x, sites, values)
        full = changed(x, sites, values)
        assert_close(outputs[:2], structure.forward(layers, full[:2]), 1e-12)
        assert np.isnan(outputs[2:]).all()
        x = x.at[2].set(bad)
        outputs = connected(x, jnp.array([[1, 2], [1, 0]]), values[:2])
        np.testing.assert_array_equal(np.isnan(outputs).all(-1), [False, True])

    @pytest.mark.slow
    def test_site_out_of_range_of_integers(self):
        layers = (structure.Layer(w=jnp.arange(8).reshape(4, 2)),)
        x = jnp.array([1, -1, 1, 1], jnp.int8)
        outputs = structure.connected(layers, x, jnp.array([[4], [1]]), jnp.array([[1], [1]]))
        np.testing.assert_array_equal(np.isnan(outputs), [[True, True], [False, False]])

    def test_wrong_arguments(self):
        layers = (structure.Layer(w=jnp.ones((4, 1))),)
        x, sites, values = normal(3, 4), jnp.zeros((5, 2), int), jnp.zeros((5, 2))
        call = functools.partial(structure.connected, layers)
        with pytest.raises(TypeError, match="sites must be integers, got float64"):
            call(x, values, values)
        for wrong in (
            (x, sites[0], values[0]),
            (x, sites, values[:, :1]),
            (x, sites, values[0]),
            (jnp.array(1.0), sites, values),
        ):
            with pytest.raises(ValueError, match=r"sites and values \(\.\.\., K, m\)"):
                call(*wrong)
        for batch in ((2,), (3, 3), (2, 3)):
            with pytest.raises(ValueError, match="must fit those of x"):
                call(x, jnp.broadcast_to(sites, (*batch, 5, 2)), values)


def brute_force(apply, params, x):
    """Value, gradient and Laplacian at one input by ``jax.jacfwd``."""

    def parts(x):
        out = apply(params, x)
        return jnp.stack([out.real, out.imag]) if jnp.iscomplexobj(out) else out[None]

    def join(a):
        return a[0] + 1j * a[1] if len(a) == 2 else a[0]

    hessian = jax.jacfwd(jax.jacfwd(parts))(x)
    return (
        apply(params, x),
        join(jax.jacfwd(parts)(x)),
        join(jnp.trace(hessian, axis1=-2, axis2=-1)),
    )


def derivatives(fields, params, x):
    """Returns value, gradient and Laplacian, and the same by brute force."""

    def expected(params, x):
        one = functools.partial(brute_force, network(fields).apply, params)
        for _ in x.shape[:-1]:
            one = jax.vmap(one)
        return one(x)

    return both(network(fields, "laplacian").apply, expected, params, x)


class TestLaplacian:
    @pytest.mark.parametrize("name", cases.first(QUICK, NETWORKS))
    def test_equals_the_hessian(self, name):
        fields = NETWORKS[name]
        x = normal(3, 4)
        params = random_params(fields, x)
        found, expected = derivatives(fields, params, x)
        assert isinstance(found, haiku_mlp.Derivatives)
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(ours, theirs, 1e-10)

    @pytest.mark.parametrize(
        ("name", "batch"), cases.cover(["one_layer", "block"], [(), (2, 3), (0,), (1,)])
    )
    def test_leading_axes(self, name, batch):
        fields, x = NETWORKS[name], normal(*batch, 4)
        params = random_params(fields, normal(1, 4))
        found, expected = derivatives(fields, params, x)
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(ours, theirs, 1e-10)
        assert found.gradient.shape[-1] == 4

    def test_many_samples(self):
        # More than one block of samples goes through on a CPU, the last one not full.
        fields, x = {"hidden_dims": (64, 64)}, normal(37, 40)
        params = random_params(fields, x)
        found, expected = derivatives(fields, params, x)
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(ours, theirs, 1e-10)

    @pytest.mark.slow
    def test_harmonic_oscillator(self):
        # log psi = -x**2 / 2 has the local energy of the ground state, N / 2, everywhere.
        layers = (structure.Layer(w=jnp.eye(3), activation=lambda z: -(z**2) / 2),
                  structure.Layer(w=jnp.ones((3, 1))))  # fmt: skip
        x = normal(5, 3)
        found = structure.laplacian(layers, x)
        kinetic = -(found.laplacian[:, 0] + jnp.sum(found.gradient[:, 0] ** 2, -1)) / 2
        assert_close(kinetic + jnp.sum(x**2, -1) / 2, jnp.full(5, 1.5), 1e-14)

    @pytest.mark.parametrize("name", ["three_layers", "real_to_complex"])
    @pytest.mark.slow
    def test_gradient_by_parameters(self, name):
        fields, x = NETWORKS[name], normal(3, 4)

        def energy(derivatives):
            _, gradient, laplacian = derivatives
            return jnp.mean(jnp.real(laplacian + jnp.sum(gradient**2, -1)))

        def expected(params):
            return energy(jax.vmap(lambda x: brute_force(network(fields).apply, params, x))(x))

        ours, expected = both(
            jax.grad(lambda params: energy(network(fields, "laplacian").apply(params, x))),
            jax.grad(expected),
            random_params(fields, x),
        )
        jax.tree.map(lambda a, b: assert_close(a, b, 1e-10), ours, expected)

    def test_single_precision(self):
        fields = {"hidden_dims": (8, 5), "param_dtype": jnp.float32}
        x = normal(3, 4, dtype=jnp.float32)
        params = random_params(fields, x)
        found, expected = derivatives(fields, params, x)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == jnp.float32
            assert_close(ours, theirs, 1e-5)

    def test_relu_has_no_second_derivative(self):
        fields, x = {"hidden_dims": (8,), "hidden_activations": jax.nn.relu}, normal(3, 4)
        found = network(fields, "laplacian").apply(random_params(fields, x), x)
        np.testing.assert_array_equal(found.laplacian, 0)
        assert np.any(found.gradient)

    @pytest.mark.parametrize("fields", [MIXING["softmax_between"], MIXING["softmax_block"]])
    def test_activation_that_mixes(self, fields):
        x = normal(3, 4)
        params = random_params(fields, x)
        with pytest.raises(ValueError, match="act on each number by itself"):
            network(fields, "laplacian").apply(params, x)

    def test_complex_inputs(self):
        x = normal(3, 4, dtype=complex)
        fields = NETWORKS["one_layer"]
        with pytest.raises(TypeError, match="x must be real, got complex128"):
            network(fields, "laplacian").apply(random_params(fields, x), x)


@pytest.mark.parametrize(("name", "method"), cases.cover(["default", "alpha", "complex"], METHODS))
class TestFaces:
    x = normal(5, 4)

    def test_init_as_by_the_call(self, name, method):
        """From any key."""
        fields = cases.GOOD[name]
        args = arguments(method, self.x)
        by_method, by_call = pure(fields, method).init, pure(fields).init
        assert lowered_text(by_method, KEY, *args) == lowered_text(by_call, KEY, self.x)
        init = compat.MLP(**fields).init
        by_method = functools.partial(init, method=method)
        assert lowered_text(by_method, KEY, *args) == lowered_text(init, KEY, self.x)

    @pytest.mark.parametrize("block", cases.first({False}, [False, True]))
    def test_flax_face(self, name, method, block):
        """From any weights."""
        fields = {**cases.GOOD[name], **({"output_dim": 2} if block else {})}
        args = arguments(method, self.x)
        model = compat.blocks.MLP(**fields) if block else compat.MLP(**fields)
        params = random_params(fields, self.x)
        expected = lowered_text(pure(fields, method).apply, params, *args)
        for name_or_method in (method, getattr(type(model), method)):

            def apply(params, *args, method=name_or_method):
                dense = {f"Dense_{path[-1]}": flax_names(layer) for path, layer in params.items()}
                variables = {"params": dense if block else {"MLP_0": dense}}
                return model.apply(variables, *args, method=method)

            assert lowered_text(apply, params, *args) == expected


def flax_names(layer):
    return {{"w": "kernel", "b": "bias"}[name]: value for name, value in layer.items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_leaks_no_tracer(method, check_leaks):
    fields, x = {"hidden_dims": (3,), "hidden_activations": jnp.tanh}, normal(2, 2)
    args = arguments(method, x)
    jax.eval_shape(network(fields, method).apply, random_params(fields, x), *args)
    model = compat.MLP(**fields)
    variables = jax.eval_shape(model.init, KEY, x)
    jax.eval_shape(functools.partial(model.apply, method=method), variables, *args)


def test_methods_share_parameters():
    def forward_and_methods():
        mlp = haiku_mlp.MLP(hidden_dims=(8, 5))
        return mlp, (mlp, mlp.tangent_kernel, mlp.connected, mlp.laplacian)

    net = hk.without_apply_rng(hk.multi_transform(forward_and_methods))
    x = normal(5, 4)
    params = net.init(KEY, x)
    assert_identical(params, network({"hidden_dims": (8, 5)}).init(KEY, x))
    forward, tangent_kernel, connected, laplacian = map(jax.jit, net.apply)
    assert tangent_kernel(params, x).shape == (5, 5)
    outputs = forward(params, x)
    sites = jnp.zeros((1, 1), int)
    np.testing.assert_array_equal(connected(params, x, sites, x[:, :1, None])[:, 0], outputs)
    np.testing.assert_array_equal(laplacian(params, x).value, outputs)


def test_layers_are_the_network():
    fields, x = {"output_dim": 2, "hidden_dims": (8, 5)}, normal(5, 4)
    activations = jax.nn.gelu, jax.nn.gelu, None

    def of_layers(params, x):
        layers = [
            structure.Layer(**params[f"mlp/linear_{i}"], activation=activation)
            for i, activation in enumerate(activations)
        ]
        return structure.forward(layers, x)

    assert_identical(*both(of_layers, network(fields).apply, random_params(fields, x), x))
