"""Every precision, and derivatives against finite differences."""

import cases
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import compat
import haiku_mlp

X = np.random.default_rng(1).normal(size=(3, 4))
KEY = jax.random.key(3)

# Central differences of float64 values err by eps**2 times a third derivative (here up to
# 1e3), and by 1e-16 / eps times the value.
DIFFERENCES = {"modes": ("fwd", "rev"), "eps": 1e-5, "atol": 1e-6, "rtol": 1e-6}


def flax_face(**fields):
    model = compat.MLP(**fields)
    return jax.jit(model.init)(KEY, X), jax.jit(model.apply)


def haiku_face(**fields):
    net = hk.without_apply_rng(hk.transform(lambda x: haiku_mlp.MLP(**fields)(x)))
    return jax.jit(net.init)(KEY, X), jax.jit(net.apply)


FACES = {"flax": flax_face, "haiku": haiku_face}


@pytest.fixture(params=FACES)
def face(request):
    """A function of the fields that gives weights and forward pass."""
    return FACES[request.param]


WITHOUT_X64 = """
import haiku as hk, jax, jax.numpy as jnp, numpy as np
import compat, haiku_mlp
from jax.test_util import check_grads

x = np.random.default_rng(0).normal(size=(3, 4))
key = jax.random.key(0)
assert x.dtype == np.float64

def check(dtype, expected):
    fields = dict(hidden_dims=(8,), use_output_bias=True, param_dtype=dtype)
    model = compat.MLP(**fields)
    variables = model.init(key, x)
    grads = jax.grad(lambda v: jnp.abs(model.apply(v, x)).sum())(variables)
    for inputs in (x, x.astype(np.float32), x.astype(np.int64), x + 1j):
        model.apply(variables, inputs)
    model.tabulate(key, x)
    kernel = model.apply(variables, x, method="tangent_kernel")
    net = hk.without_apply_rng(hk.transform(lambda x: haiku_mlp.MLP(**fields)(x)))
    params = net.init(key, x)
    assert (net.apply(compat.to_haiku(variables)[0], x) == model.apply(variables, x)).all()
    leaves = jax.tree.leaves((variables, grads, params))
    assert {str(leaf.dtype) for leaf in leaves} == {expected}, leaves

check(jnp.float64, "float32")
check(np.complex128, "complex64")
for dtype in (float, "float64"):
    variables = compat.MLP(hidden_dims=(8,), param_dtype=dtype).init(key, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
compat.wrap(hk.Linear)(3).init(key, x.astype(np.float32))

# Central differences of float32 values err by eps**2 times a third derivative (here up to
# 10), and by 1e-7 / eps times the value, once more for the second order.
net = hk.without_apply_rng(hk.transform(lambda x: haiku_mlp.MLP(hidden_dims=(3,))(x)))
params, x = net.init(key, x), x.astype(np.float32)
differences = dict(modes=["fwd", "rev"], eps=1e-2, atol=1e-2, rtol=1e-2)
check_grads(jax.jit(net.apply), (params, x), order=2, **differences)
assert not jax.config.jax_enable_x64
"""


@pytest.mark.slow
def test_without_x64_there_is_no_warning(run_fresh):
    """``run_fresh`` makes each warning an error."""
    cache = jax.config.jax_compilation_cache_dir
    process = run_fresh(
        WITHOUT_X64,
        JAX_COMPILATION_CACHE_DIR=cache,
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""


@pytest.mark.parametrize("dtype", cases.first({jnp.bfloat16}, [jnp.bfloat16, jnp.float16]))
def test_half_precision(face, dtype):
    """The sums of 8 rounded products differ from the exact by a few roundings."""
    weights, apply = face(hidden_dims=(8,), use_output_bias=True, param_dtype=dtype)
    x = X.astype(dtype)
    outputs = apply(weights, x)
    assert outputs.dtype == dtype
    exact = apply(jax.tree.map(lambda leaf: leaf.astype(float), weights), x.astype(float))
    np.testing.assert_allclose(outputs.astype(float), exact, atol=8 * jnp.finfo(dtype).eps)
    grads = jax.grad(lambda weights: apply(weights, x).sum())(weights)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(dtype)}


def test_float32_parameters_take_the_precision_of_the_inputs(face):
    weights, apply = face(hidden_dims=(8,), param_dtype=jnp.float32)
    assert apply(weights, X.astype(np.float32)).dtype == jnp.float32
    assert apply(weights, X).dtype == jnp.float64
    np.testing.assert_allclose(apply(weights, X.astype(np.float32)), apply(weights, X), rtol=1e-5)


GRADIENTS = {
    "gelu": {},
    "tanh": {"hidden_activations": jnp.tanh, "output_activation": jnp.sin},
    "complex, holomorphic": {"param_dtype": complex, "hidden_activations": jnp.tanh},
    "complex, split": {"param_dtype": complex, "hidden_activations": cases.split_gelu},
    "one layer": {"hidden_dims": None, "use_output_bias": True},
}


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.slow
def test_gradients(face, name):
    """First and second order, forward and reverse, by the weights and by the inputs."""
    weights, apply = FACES[face](**{"hidden_dims": (3, 2), **GRADIENTS[name]})
    check_grads(apply, (weights, X[:2]), order=2, **DIFFERENCES)


def test_a_wrong_gradient_is_found(face):
    @jax.custom_jvp
    def bent(z):
        return jnp.tanh(z)

    bent.defjvp(lambda primals, tangents: (bent(*primals), 1.001 * tangents[0]))
    weights, apply = face(hidden_dims=(3,), hidden_activations=bent)
    with pytest.raises(AssertionError, match="JVP"):
        check_grads(apply, (weights, X), order=1, **DIFFERENCES)


@pytest.mark.slow
def test_gradient_of_complex_inputs(face):
    weights, apply = face(hidden_dims=(3,), hidden_activations=jnp.tanh)
    check_grads(apply, (weights, X[:2] + 0.5j), order=2, **DIFFERENCES)
