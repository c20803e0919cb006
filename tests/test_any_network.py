"""The tangent kernel of any network against the product of its Jacobians."""

import functools

import cases
import haiku as hk
import jax
import jax.numpy as jnp
import netket as nk
import numpy as np
import pytest
from comparison import assert_close
from flax import linen as nn
from flax import nnx

import compat
import haiku_mlp
from haiku_mlp.structure.contraction import centered_kernel

X = jnp.asarray(np.random.default_rng(0).choice([-1.0, 1.0], (5, 6)))
Y = jnp.asarray(np.random.default_rng(1).choice([-1.0, 1.0], (3, 6)))


def rows(function, params, x):
    """The Jacobian of the real outputs by all real numbers in the parameters, ``(B, O, P)``."""
    leaves, treedef = jax.tree.flatten(params)
    numbers = {i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)}
    halves = {i: (leaves[i].real, leaves[i].imag) for i in numbers}

    def outputs(halves, sample):
        whole = [(a + 1j * b if jnp.iscomplexobj(leaves[i]) else a) for i, (a, b) in halves.items()]
        values = dict(zip(halves, whole, strict=True))
        full = [values.get(i, leaf) for i, leaf in enumerate(leaves)]
        output = function(jax.tree.unflatten(treedef, full), sample[None])[0].reshape(-1)
        return jnp.concatenate([output.real, output.imag]) if jnp.iscomplexobj(output) else output

    jacobian = jax.vmap(lambda sample: jax.jacrev(outputs)(halves, sample))(x)
    flat = [leaf.reshape(*leaf.shape[:2], -1) for leaf in jax.tree.leaves(jacobian)]
    return jnp.concatenate(flat, -1)


def dense_kernel(function, params, x, y=None):
    left = rows(function, params, x)
    right = left if y is None else rows(function, params, y)
    return jnp.einsum("iap,jbp->ijab", left, right)


def real_outputs(function):
    """The function with its real and imaginary parts as outputs, ``(B, O)``."""

    def outputs(params, x):
        output = function(params, x)
        output = output.reshape(len(output), -1)
        parts = [output.real, output.imag] if jnp.iscomplexobj(output) else [output]
        return jnp.concatenate(parts, -1)

    return outputs


def random_like(params, scale=0.4):
    """Parameters none of which are zero."""
    rng = np.random.default_rng(2)

    def draw(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf
        value = rng.normal(size=leaf.shape)
        value = value + 1j * rng.normal(size=leaf.shape) if jnp.iscomplexobj(leaf) else value
        return jnp.asarray(scale * value, leaf.dtype)

    return jax.tree.map(draw, params)


class Tied(nn.Module):
    """Weights used in a layer and again, transposed, outside of it."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(4, param_dtype=float)
        z = jnp.tanh(layer(x))
        w = layer.variables["params"]["kernel"]
        return jnp.sum(z @ w.T, -1) + jnp.sum(w**2)


class Shared(nn.Module):
    """A layer applied three times, at several positions."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(6, param_dtype=float)
        h = jnp.tanh(layer(x)).reshape(len(x), 1, 6)
        h = jnp.concatenate([h, jnp.tanh(layer(-h))], 1)
        return jnp.sum(jnp.sin(layer(h)), (1, 2))


class Backflow(nn.Module):
    @nn.compact
    def __call__(self, x):
        orbitals = self.param("orbitals", nn.initializers.normal(1.0), (6, 3), float)
        layers = [nn.Dense(n, param_dtype=float) for n in (7, 18)]

        def one(s):
            flow = layers[1](jnp.tanh(layers[0](s))).reshape(6, 3)
            return jnp.linalg.slogdet((orbitals + flow)[:3])[1]

        return jax.vmap(one)(x)


class Attention(nn.Module):
    """Eight outputs of all that a transformer has."""

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(8, param_dtype=float)(x.reshape(len(x), 3, 2))
        h = h + nn.MultiHeadDotProductAttention(2, param_dtype=float)(
            nn.LayerNorm(param_dtype=float)(h)
        )
        h = nn.remat(nn.Dense)(8, param_dtype=float)(nn.gelu(h))
        return nn.DenseGeneral(2, axis=(-2, -1), param_dtype=float)(h)


class Scan(nn.Module):
    """Layers in a loop, layers under ``nn.vmap`` and a convolution."""

    @nn.compact
    def __call__(self, x):
        class Cell(nn.Module):
            @nn.compact
            def __call__(self, carry, _):
                return jnp.tanh(nn.Dense(6, param_dtype=float)(carry)), None

        options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        h, _ = nn.scan(Cell, length=2, **options)()(x, None)
        heads = nn.vmap(nn.Dense, in_axes=None, out_axes=1, axis_size=2, **options)
        h = nn.Conv(3, (2,), param_dtype=float)(heads(4, param_dtype=float)(h))
        return jnp.sum(nn.PReLU(param_dtype=float)(h), (1, 2))


def holomorphic(x):
    return jnp.sum(jnp.tanh(nn.Dense(4, param_dtype=complex)(x)), -1)


class Function(nn.Module):
    function: object

    @nn.compact
    def __call__(self, x):
        return self.function(x)


def complex_of_real(x):
    h = nn.Dense(4, param_dtype=float)(x * (1 + 0.5j))
    return jnp.sum(h * jnp.exp(1j * nn.Dense(4, param_dtype=float)(h.real)), -1)


def not_holomorphic(x):
    h = nn.Dense(4, param_dtype=complex)(x)
    h += nn.Embed(2, 4, param_dtype=complex)((x > 0).astype(int)).sum(1)  # by its Jacobian
    h = jnp.tanh(h.real) + 1j * jnp.sin(h.imag)
    return nn.Dense(3, param_dtype=complex)(h).sum(-1) + nn.Dense(1, param_dtype=float)(x)[:, 0]


def real_of_complex(x):
    return jnp.sum(jnp.abs(nn.Dense(4, param_dtype=complex)(x)), -1)


def embedding(x):
    table = nn.Embed(2, 4, param_dtype=float)
    h = table((x > 0).astype(int)).mean(1)
    return table.attend(jnp.tanh(h)).sum(-1)


def general(x):
    h = nn.DenseGeneral((2, 3), param_dtype=float)(x.reshape(len(x), 2, 3))
    h = nn.DenseGeneral(4, axis=(1, -1), param_dtype=float)(jnp.sin(h))
    h = nn.Einsum((4, 5), "bti,ij->btj", param_dtype=float)(h)
    return jnp.sum(
        nn.WeightNorm(nn.Dense(3, param_dtype=float), param_dtype=float)(jnp.tanh(h)), (1, 2)
    )


LINEN = {
    "RBM": nk.models.RBM(alpha=2, param_dtype=float),
    "complex RBM": nk.models.RBM(alpha=1, param_dtype=complex),
    "symmetric RBM": nk.models.RBMSymm(nk.graph.Chain(6).translation_group(), alpha=2),
    "Jastrow": nk.models.Jastrow(param_dtype=float),
    "compat.MLP": compat.MLP(hidden_dims=(5, 4)),
    "wrapped": compat.wrap(hk.nets.MLP)([7, 3], activation=jnp.tanh),
    "tied": Tied(),
    "shared": Shared(),
    "backflow": Backflow(),
    "attention": Attention(),
    "scan": Scan(),
    **{
        function.__name__: Function(function)
        for function in (holomorphic, complex_of_real, not_holomorphic, real_of_complex)
    },
    "embedding": Function(embedding),
    "general": Function(general),
}


def linen(name):
    model = LINEN[name]
    variables = jax.eval_shape(model.init, jax.random.key(0), X)
    return model.apply, {**variables, "params": random_like(variables["params"])}


def of_params(apply, variables):
    others = {name: value for name, value in variables.items() if name != "params"}
    return lambda params, x: apply({"params": params, **others}, x)


@pytest.fixture(autouse=True)
def _rank_promotion():
    with jax.numpy_rank_promotion("allow"):  # NetKet's models promote
        yield


QUICK = {"complex RBM", "tied", "attention"}


@pytest.mark.parametrize("name", cases.first(QUICK, LINEN))
def test_flax_models(name):
    """The kernel of one batch, and of two."""
    apply, variables = linen(name)
    function = real_outputs(apply)

    def both(variables):
        inner = of_params(function, variables)
        left, right = (rows(inner, variables["params"], batch) for batch in (X, Y))
        ours = [compat.tangent_kernel(function, variables, X, y) for y in (None, Y)]
        return ours, [jnp.einsum("iap,jbp->ijab", left, r) for r in (left, right)]

    for ours, expected in zip(*jax.jit(both)(variables), strict=True):
        assert_close(ours, expected, 1e-12)


@pytest.mark.parametrize("name", ["holomorphic", "complex_of_real", "not_holomorphic"])
def test_complex_outputs(name):
    apply, variables = linen(name)
    kernel = jax.jit(functools.partial(compat.tangent_kernel, apply))(variables, X)
    by_parts = real_outputs(apply)
    ones = jax.tree.map(jnp.iscomplexobj, variables["params"])
    expected = 0
    for kind in (True, False):  # half the sum over the two parts of complex parameters
        freeze = functools.partial(_frozen_but, ones, kind, variables["params"])
        inner = of_params(by_parts, variables)
        function = functools.partial(lambda f, g, p, x: g(f(p), x), freeze, inner)
        k = jax.jit(functools.partial(dense_kernel, function))(variables["params"], X)
        k = k[..., 0, 0] + k[..., 1, 1] + 1j * (k[..., 1, 0] - k[..., 0, 1])
        expected += k / 2 if kind else k
    assert_close(kernel, expected, 1e-12)


@pytest.mark.parametrize("is_method", [True, False])
def test_real_rows_and_complex_columns(is_method):
    """The imaginary part of the kernel is not dropped."""

    def model():
        return haiku_mlp.MLP(hidden_dims=(5,), hidden_activations=jnp.tanh)

    net = hk.without_apply_rng(hk.transform(lambda x: model()(x)))
    method = hk.without_apply_rng(hk.transform(lambda x, y: model().tangent_kernel(x, y)))
    x, imag = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 4)))
    y = x[:2] + 1j * imag[:2]
    params = jax.jit(net.init)(jax.random.key(0), x)

    def jacobian(x):
        def outputs(params):
            psi = net.apply(params, x + 0j)
            return jnp.stack([psi.real, psi.imag])

        leaves = jax.tree.leaves(jax.jacrev(outputs)(params))
        real, imag = jnp.concatenate([leaf.reshape(2, len(x), -1) for leaf in leaves], -1)
        return real + 1j * imag

    kernel = method.apply if is_method else functools.partial(haiku_mlp.tangent_kernel, net.apply)
    expected = jax.jit(lambda x, y: jacobian(x) @ jacobian(y).conj().T)(x, y)
    assert_close(jax.jit(kernel)(params, x, y), expected, 1e-14)


def _frozen_but(kinds, kind, constants, params):
    return jax.tree.map(lambda k, c, p: p if k == kind else c, kinds, constants, params)


@pytest.mark.parametrize(
    ("name", "y"), [("shared", None), ("backflow", Y), ("scan", Y), ("not_holomorphic", None)]
)
@pytest.mark.slow
def test_chunks(name, y):
    apply, variables = linen(name)
    whole = jax.jit(functools.partial(compat.tangent_kernel, apply))(variables, X, y)
    chunked = functools.partial(compat.tangent_kernel, apply, chunk_size=2)
    assert_close(jax.jit(chunked)(variables, X, y), whole, 1e-13)


def test_chunks_take_little_memory():
    """The derivatives of few samples are formed at a time, down to one."""

    def function(params, x):
        return jnp.sum(jnp.sin(x[:, :1] * jnp.exp(params)), -1)

    params, x = jnp.linspace(0.0, 1.0, 4096), jnp.linspace(-1.0, 1.0, 64)[:, None]
    memory, kernels = [], []
    for chunk_size in (None, 8, 1):
        kernel = functools.partial(haiku_mlp.tangent_kernel, function, chunk_size=chunk_size)
        program = jax.jit(kernel).lower(params, x).compile()
        memory.append(program.memory_analysis().temp_size_in_bytes)
        kernels.append(program(params, x))
    assert memory[0] > 2 * memory[1] > 4 * memory[2]
    for kernel in kernels[1:]:
        assert_close(kernel, kernels[0], 1e-13)


@pytest.mark.parametrize(
    ("name", "is_single"), cases.first({("scan", False)}, [("attention", True), ("scan", False)])
)
def test_blocks(name, is_single, monkeypatch):
    """What takes long is made of one block of samples with another once."""
    apply, variables = linen(name)
    given = jax.tree.map(jnp.float32, (variables, X)) if is_single else (variables, X)
    kernels = []
    for large in (2**60, 1):
        monkeypatch.setattr("haiku_mlp.structure.real_kernel._LARGE", large)
        kernel = functools.partial(compat.tangent_kernel, apply, centered=is_single)
        program = jax.jit(kernel).lower(*given)
        kernels.append((program.as_text(), program.compile()(*given)))
    (whole_text, whole), (blocks_text, blocks) = kernels
    assert blocks_text != whole_text
    assert_close(blocks, whole, 1e-5 if is_single else 1e-14)


@pytest.mark.parametrize("is_single", [False, True])
@pytest.mark.parametrize(
    "name", cases.first({"not_holomorphic"}, ["complex RBM", "attention", "not_holomorphic"])
)
def test_centered(name, is_single):
    apply, variables = linen(name)
    function = real_outputs(apply)

    def in_single(a):
        return a.astype(jnp.complex64 if jnp.iscomplexobj(a) else jnp.float32)

    def both(variables):
        jacobian = rows(of_params(function, variables), variables["params"], X)
        jacobian -= jnp.mean(jacobian, 0, keepdims=True)
        given = jax.tree.map(in_single, (variables, X)) if is_single else (variables, X)
        ours = compat.tangent_kernel(function, *given, centered=True)
        return ours, jnp.einsum("iap,jbp->ijab", jacobian, jacobian)

    ours, expected = jax.jit(both)(variables)
    assert ours.dtype == (jnp.float32 if is_single else jnp.float64)
    assert_close(ours.astype(float), expected, 1e-5 if is_single else 1e-12)


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.slow
def test_centered_in_single_precision(chunk_size):
    """Where derivatives hardly vary the factors are centred, not the finished kernel."""
    rng = np.random.default_rng(0)
    layers = [rng.normal(size=(8, 32)) / 3, rng.normal(size=(32, 32)) / 6, rng.normal(size=(3, 32))]
    params = jax.tree.map(jnp.float32, {"layers": layers, "scale": np.ones(8)})
    x = jnp.asarray(1 + 0.02 * rng.normal(size=(7, 3, 8)), jnp.float32)

    def function(params, x):  # by Gram products of several positions and of one, by a Jacobian
        h = jnp.tanh((x * params["scale"]) @ params["layers"][0])
        h = jnp.tanh(h @ params["layers"][1]).mean(1)
        return jnp.sum(h @ params["layers"][2].T, -1)

    def kernel(params, x, centered):
        return haiku_mlp.tangent_kernel(
            function, params, x, centered=centered, chunk_size=chunk_size
        )

    kernel = jax.jit(kernel, static_argnums=2)
    in_float64 = jax.tree.map(jnp.float64, (params, x))
    full, exact = kernel(*in_float64, False), kernel(*in_float64, True)
    expected = jax.jit(functools.partial(dense_kernel, function))(*in_float64)[..., 0, 0]
    assert_close(full, expected, 1e-12)
    assert jnp.mean(full) > 30**2 * jnp.mean(jnp.diagonal(exact))
    assert_close(exact, centered_kernel(full), 1e-11)
    size = jnp.max(jnp.abs(exact))
    assert jnp.max(jnp.abs(kernel(params, x, True) - exact)) < 1e-5 * size
    assert jnp.max(jnp.abs(centered_kernel(kernel(params, x, False)) - exact)) > 1e-4 * size


def test_several_positions_of_two_batches():
    """Products of inputs and of signals at several positions, those of each pair once."""
    rng = np.random.default_rng(0)
    params = [jnp.asarray(rng.normal(size=shape)) for shape in ((8, 32), (32, 32))]
    x, y = (jnp.asarray(rng.normal(size=(batch, 3, 8))) for batch in (5, 4))

    def function(params, x):
        return jnp.tanh(jnp.tanh(x @ params[0]) @ params[1]).sum((1, 2))

    assert [route[1:3] for route in haiku_mlp.kernel_plan(function, params, x)][1] == ("gram", 3)
    kernels = (haiku_mlp.tangent_kernel, dense_kernel)
    for batches in ((x,), (x, y)):
        programs = (jax.jit(functools.partial(kernel, function)) for kernel in kernels)
        ours, expected = (program(params, *batches) for program in programs)
        assert_close(ours, expected[..., 0, 0], 1e-12)


TWO_WAYS = {
    "rows and columns": lambda w, x: (
        jnp.sum(jnp.tanh(x[..., None] + w[None]), (1, 2))
        + jnp.sum(jnp.sin(x[:, None] ** 2 * w.T[None]), (1, 2))
    ),
    "transposed and not, added": lambda w, x: (
        jnp.sum(jnp.tanh(_square(x) + w[None]), (1, 2))
        + jnp.sum(jnp.sin(_square(x) ** 2 + w.T[None]), (1, 2))
    ),
    "two orders": lambda w, x: (
        jnp.tanh(w.ravel()[:6] * x).sum(1)
        + jnp.sin(jnp.ravel(w, order="F")[None] + x[:, :1]).sum(1)
    ),
    "outer product and bias": lambda w, x: (
        jnp.tanh(jnp.einsum("bi,cd->bicd", x, w)).sum((1, 2, 3))
        + jnp.sum(jnp.sin(_square(x) + w[None]), (1, 2))
    ),
    "outer product of one and bias": lambda w, x: (
        jnp.tanh(jnp.einsum("b,cd->bcd", x[:, 0], w)).sum((1, 2))
        + jnp.sum(jnp.sin(_square(x) + w[None]), (1, 2))
    ),
}


def _square(x):
    return jnp.stack([x] * 6, 1)


@pytest.mark.parametrize("function", TWO_WAYS.values(), ids=TWO_WAYS)
def test_a_parameter_used_in_two_ways(function):
    """Whose derivatives are in other orders, or of other shapes."""
    x = 0.3 * X + 0.1 * jnp.arange(6.0)[None]
    assert_is_dense(lambda w, x: function(w, x), np.random.default_rng(2).normal(size=(6, 6)), x)


@pytest.mark.parametrize(
    "function",
    [
        lambda w, z: (z @ w.astype(float)).sum(-1),
        lambda w, z: jnp.tanh(0.1 * (z[:, None] + w.astype(float).astype(complex)[None])).sum(
            (1, 2)
        ),
    ],
    ids=["product", "bias"],
)
@pytest.mark.filterwarnings("ignore:Casting:Warning")
def test_a_complex_parameter_cast_to_real(function):
    """Of which the network does not see the imaginary part, though it is complex itself."""
    w = np.random.default_rng(2).normal(size=(6, 6, 2)) @ np.array([1, 1j])
    assert_is_dense(lambda w, x: jnp.tanh(0.1 * function(w, (1 + 2j) * x)).real, w)


@pytest.mark.parametrize("dtype", ["int8", "int32", "bool"])
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_integers_that_no_product_has_converted(dtype, chunk_size):
    x = jnp.full((2, 64), {"int8": 100, "int32": 70000, "bool": True}[dtype], dtype)

    def function(w, x):
        return jax.lax.dot(x, w, preferred_element_type=jnp.float32).sum(-1)

    w = jnp.ones((64, 3), jnp.float32)
    kernel = haiku_mlp.tangent_kernel(function, w, x, chunk_size=chunk_size)
    expected = jnp.full((2, 2), 3 * 64 * float(x[0, 0]) ** 2)
    assert_close(kernel.astype(float), expected, 1e-6)


def test_products_of_two_dtypes_where_promotion_is_strict():
    def function(w, x):
        single = x.astype(jnp.float32) @ w.astype(jnp.float32)
        return jnp.sum(x @ w + single.astype(float), -1)

    with jax.numpy_dtype_promotion("strict"):
        kernel = haiku_mlp.tangent_kernel(function, jnp.ones((6, 3)), X)
    assert_close(kernel, 3 * 4 * X @ X.T, 1e-6)


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize(
    ("function", "x", "expected"),
    [
        (lambda p, x: (x @ p["w"]).sum(1) + x @ p["v"], X, X @ X.T),
        (lambda p, x: x[:, :0] * p["v"][0], X, jnp.ones((5, 5, 0, 0))),
        (lambda p, x: x[0] @ p["v"], (X, jnp.ones((5, 0))), X @ X.T),
    ],
    ids=["parameter", "outputs", "features"],
)
def test_what_is_empty(function, x, expected, chunk_size):
    params = {"v": jnp.ones(6), "w": jnp.ones((6, 0))}
    kernel = haiku_mlp.tangent_kernel(function, params, x, chunk_size=chunk_size)
    np.testing.assert_allclose(kernel, expected, rtol=1e-12)


@pytest.mark.parametrize("is_own", [True, False])
def test_half_precision_in_sums_of_many_terms(is_own):
    """So many that a sum of bfloat16 would keep the first ones alone."""
    size, x = 640, np.random.default_rng(0).uniform(0.5, 1, (3, 24, 640)).astype(jnp.bfloat16)

    def function(w, x):
        return (x @ w).mean((1, 2)).astype(jnp.float32)

    w = jnp.zeros((size, size), jnp.bfloat16)
    assert [route.route for route in haiku_mlp.kernel_plan(function, w, x)] == ["gram"]
    ours = haiku_mlp.tangent_kernel(function, w, x, None if is_own else x)
    means = jnp.asarray(x, float).mean(1)
    assert_close(ours.astype(float), means @ means.T / size, 0.02)


def test_large_half_precision_products():
    """Of inputs and of signals, one of which float16 does not hold."""
    x, w = 150 * X.astype(jnp.float16), jnp.zeros((6, 8), jnp.float16)
    ours = haiku_mlp.tangent_kernel(lambda w, x: (x @ w).mean(1) / 8, w, x)
    assert ours.dtype == jnp.float16
    assert_close(ours.astype(float), (x.astype(float) @ x.astype(float).T) / 512, 2e-3)


def test_samples_of_other_shapes():
    """A program for sets of six, which their mean divides by, is none for sets of three."""
    with pytest.raises(ValueError, match="must have the same shapes"):
        haiku_mlp.tangent_kernel(lambda w, x: jnp.tanh(w * x.mean(1)), jnp.ones(()), X, X[:, :3])


def test_centered_is_of_one_batch():
    with pytest.raises(ValueError, match="leave out y"):
        haiku_mlp.tangent_kernel(lambda p, x: x @ p, jnp.ones(6), X, Y, centered=True)


def assert_is_dense(function, params, x=X):
    def both(params):
        ours = compat.tangent_kernel(function, params, x)
        return ours, dense_kernel(function, params, x)[..., 0, 0]

    assert_close(*jax.jit(both)(params), 1e-12)


def haiku_network(x):
    h = hk.Linear(6)(x)
    h = (
        h
        + hk.MultiHeadAttention(2, 3, w_init=hk.initializers.VarianceScaling(1.0))(
            *[h.reshape(len(x), 2, 3)] * 3
        ).reshape(len(x), -1)[:, :6]
    )
    h = hk.LayerNorm(-1, True, True)(hk.remat(hk.Linear(6))(h))
    return haiku_mlp.MLP(hidden_dims=(4,))(h)


@pytest.mark.slow
def test_haiku_network():
    net = hk.without_apply_rng(hk.transform(haiku_network))
    params = random_like(net.init(jax.random.key(0), X))
    assert_is_dense(net.apply, params)


def test_nnx_network():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(6, 5, param_dtype=float, rngs=rngs)
            self.norm = nnx.LayerNorm(5, param_dtype=float, rngs=rngs)
            self.last = nnx.LinearGeneral((5,), (1,), param_dtype=float, rngs=rngs)

        def __call__(self, x):
            return self.last(jnp.tanh(self.norm(self.first(x))))[:, 0]

    graph, params, others = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)

    def function(params, x):
        return nnx.merge(graph, params, others)(x)

    params = random_like(params)
    assert_is_dense(function, params)
    routes = {route.route for route in compat.kernel_plan(function, params, X)}
    assert routes == {"gram"}


@pytest.mark.slow
def test_parameters_of_activations_count():
    def scaled(z):
        return jnp.tanh(z * hk.get_parameter("slope", (1,), z.dtype, jnp.ones))

    def normed(z):
        return hk.LayerNorm(-1, True, True)(scaled(z))

    def forward_and_kernel():
        mlp = haiku_mlp.MLP((5, 5), hidden_activations=normed, output_activation=scaled)
        return mlp, (mlp, mlp.tangent_kernel)

    net = hk.without_apply_rng(hk.multi_transform(forward_and_kernel))
    params = random_like(net.init(jax.random.key(0), X))
    assert len(params) == 6  # the modules that the activations make too
    forward, kernel = net.apply
    expected = dense_kernel(forward, params, X)[..., 0, 0]
    assert_close(kernel(params, X), expected, 1e-12)
    model = compat.MLP((5,), hidden_activations=nn.PReLU(param_dtype=float))
    variables = model.init(jax.random.key(0), X, method="tangent_kernel")
    params = random_like(variables["params"])
    kernel = model.apply({"params": params}, X, method="tangent_kernel")
    expected = dense_kernel(of_params(model.apply, {}), params, X)[..., 0, 0]
    assert_close(kernel, expected, 1e-12)


def test_inputs_that_are_a_tree():
    def function(params, x):
        return x["a"] @ params["w"] + jnp.sum(x["b"], (1, 2)) * params["scale"]

    params = {"w": jnp.arange(6.0), "scale": jnp.asarray(2.0), "unused": jnp.ones(3)}
    x = {"a": X, "b": jnp.ones((5, 2, 2))}
    kernel = haiku_mlp.tangent_kernel(function, params, x)
    assert_close(kernel, X @ X.T + 16, 1e-12)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_random_keys_among_the_inputs(chunk_size):
    """Each sample has its own, as in dropout."""

    def function(params, x):
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (6,)))(x["keys"])
        return (x["values"] * keep) @ params

    keys = jax.random.split(jax.random.key(0), 5)
    kept = X * jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (6,)))(keys)
    x = {"keys": keys, "values": X}
    for y in (None, x):
        kernel = haiku_mlp.tangent_kernel(function, jnp.ones(6), x, y, chunk_size=chunk_size)
        assert_close(kernel, kept @ kept.T, 1e-12)


def test_a_function_of_no_parameters():
    assert_close(haiku_mlp.tangent_kernel(lambda p, x: x[:, 0], {}, X), jnp.zeros((5, 5)), 0)
    params = {"n": jnp.arange(6)}
    kernel = haiku_mlp.tangent_kernel(lambda p, x: x @ (1.0 * p["n"]), params, X)
    assert_close(kernel, jnp.zeros((5, 5)), 0)


def test_samples_are_taken_alone():
    def mixing(params, x):
        z = x @ params
        return z - z.mean(0, keepdims=True)

    assert_close(haiku_mlp.tangent_kernel(mixing, jnp.ones(6), X), jnp.zeros((5, 5)), 0)


def routes(name):
    apply, variables = linen(name)
    return {
        route.path: (route.route, route.positions)
        for route in compat.kernel_plan(apply, variables, X)
    }


def test_plan():
    assert routes("shared") == {
        "['Dense_0']['bias']": ("jacobian", 3),
        "['Dense_0']['kernel']": ("jacobian", 4),
    }
    assert routes("tied") == {
        "['Dense_0']['bias']": ("gram", 1),
        "['Dense_0']['kernel']": ("jacobian", 0),
    }
    assert routes("backflow")["['Dense_1']['kernel']"] == ("gram", 1)
    assert routes("scan")["['Conv_0']['kernel']"] == ("jacobian", 0)
    attention = routes("attention")
    assert attention["['CheckpointDense_0']['kernel']"] == ("jacobian", 3)
    assert attention["['DenseGeneral_0']['kernel']"] == ("gram", 1)


def test_plan_takes_the_cheaper_route():
    def plan(width):
        model = nn.Sequential([nn.Dense(width), jnp.tanh, nn.Dense(width), jnp.tanh])
        x = jnp.ones((2, 3, width))

        def function(params, x):
            return model.apply({"params": params}, x).sum((1, 2))

        params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
        params = jax.tree.map(jnp.zeros_like, params)
        return haiku_mlp.kernel_plan(function, params, x)[1]

    path = "['layers_0']['kernel']"
    assert plan(8) == (path, "jacobian", 3, 64)
    pairs = 3 * 4 // 2
    assert plan(64) == (path, "gram", 3, pairs * (64 + 64 + 32))


def test_plan_counts_complex_products():
    def plan(num_positions, params_dtype, inputs_dtype):
        def function(params, x):
            return jnp.tanh(x @ params).sum((1, 2)).real

        x = jnp.zeros((2, num_positions, 8), inputs_dtype)
        return haiku_mlp.kernel_plan(function, jnp.zeros((8, 5), params_dtype), x)[0][1:]

    assert plan(1, float, float) == ("gram", 1, 5 + 8)
    assert plan(1, complex, float) == ("gram", 1, 4 * (5 + 8))
    assert plan(3, complex, float) == ("jacobian", 3, 2 * 5 * 8)
    assert plan(1, float, complex) == ("jacobian", 2, 5 * 8)


@pytest.mark.parametrize(
    ("num_outputs", "factor", "of_inputs"), [(1, 1.0, 12), (2, 1.0, 12 // 4), (1, 1j, 12 // 4)]
)
def test_plan_counts_inputs_once_for_all_outputs(num_outputs, factor, of_inputs):
    """Of a complex output both parts."""

    def function(params, x):
        return factor * (jnp.tanh(x @ params) @ jnp.ones((5, num_outputs)))

    (route,) = haiku_mlp.kernel_plan(function, jnp.zeros((12, 5)), jnp.zeros((2, 12)))
    assert route[1:] == ("gram", 1, 5 + of_inputs)


def test_plan_on_an_accelerator(monkeypatch):
    """Sums over few pairs of positions take longer there than large derivatives."""

    def function(params, x):
        return (jnp.tanh(x @ params["narrow"]) @ params["wide"]).sum((1, 2))

    params = {"narrow": jnp.zeros((64, 512)), "wide": jnp.zeros((512, 512))}

    def routes():
        plan = haiku_mlp.kernel_plan(function, params, jnp.ones((2, 2, 64)))
        return {route.path: route.route for route in plan}

    assert routes() == {"['narrow']": "gram", "['wide']": "gram"}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert routes() == {"['narrow']": "jacobian", "['wide']": "gram"}


WRONG = {
    "a scalar": (lambda p, x: jnp.sum(x @ p), ValueError, r"must return \(B,\) or .*got \(\)"),
    "a deep batch": (
        lambda p, x: (x @ p)[:, None, None],
        ValueError,
        r"must return .*got \(1, 1, 1\) for one sample",
    ),
    "no batch": (lambda p, x: jnp.ones(3) * p[0], ValueError, r"got \(3,\) for one sample"),
    "two arrays": (lambda p, x: (x @ p, x), TypeError, "must return one array"),
    "integers": (lambda p, x: (x @ p).astype(int), TypeError, "int64, which has no derivatives"),
}


@pytest.mark.parametrize(("function", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_outputs(function, error, message):
    with pytest.raises(error, match=message):
        haiku_mlp.tangent_kernel(function, jnp.ones(6), X)


def test_symbolic_batch():
    apply, variables = linen("shared")
    kernel = functools.partial(compat.tangent_kernel, apply)
    (size,) = jax.export.symbolic_shape("size")
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), variables)
    inputs = jax.ShapeDtypeStruct((size, 6), float)
    exported = jax.export.export(jax.jit(kernel))(shapes, inputs)
    assert_close(exported.call(variables, X), jax.jit(kernel)(variables, X), 1e-13)


@pytest.mark.parametrize(
    ("flag", "value"), [("jax_numpy_dtype_promotion", "strict"), ("jax_debug_nans", True)]
)
def test_flags(flag, value):
    apply, variables = linen("shared")
    kernel = jax.jit(functools.partial(compat.tangent_kernel, apply))
    expected = kernel(variables, X)
    before = getattr(jax.config, flag)
    try:
        jax.config.update(flag, value)
        assert_close(kernel(variables, X), expected, 0)
    finally:
        jax.config.update(flag, before)


@pytest.mark.usefixtures("check_leaks")
def test_leaks_no_tracer():
    apply, variables = linen("attention")
    jax.jit(functools.partial(compat.tangent_kernel, apply))(variables, X)
