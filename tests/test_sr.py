"""``compat.netket`` against NetKet's ``VMC_SR(use_ntk=True)`` on the same samples."""

import sys

import cases
import flax
import haiku as hk
import jax
import jax.numpy as jnp
import netket as nk
import netket.experimental as nkx
import numpy as np
import optax
import pytest
from comparison import assert_close, assert_identical
from flax import linen as nn
from flax import nnx

import compat
import haiku_mlp
from compat.netket import MinSR, few_parameters, min_sr, natural_gradient
from compat.netket.local_energies import local_energies

HILBERT = nk.hilbert.Spin(0.5, 6)
HAMILTONIAN = nk.operator.Ising(HILBERT, nk.graph.Chain(6), h=1.0)

MODELS = {
    "real": {"hidden_dims": (8,)},
    "two_layers": {"hidden_dims": (8, 5), "use_output_bias": True, "hidden_activations": jnp.tanh},
    "holomorphic": {"hidden_dims": (8,), "param_dtype": complex, "hidden_activations": jnp.tanh},
    "not_holomorphic": {
        "hidden_dims": (8, 4),
        "param_dtype": complex,
        "hidden_activations": cases.split_gelu,
    },
    "real_to_complex": {
        "hidden_dims": (8, 4),
        "hidden_activations": (jnp.tanh, lambda z: z * jnp.exp(0.5j * z)),
    },
    "linear": {"kernel_init": jax.nn.initializers.normal(0.3)},
}


@pytest.fixture(autouse=True)
def _rank_promotion():
    with jax.numpy_rank_promotion("allow"):  # NetKet's operators promote
        yield


def state_of(model, n_samples=48):
    sampler = nk.sampler.MetropolisLocal(HILBERT, n_chains=8)
    return nk.vqs.MCState(sampler, model, n_samples=n_samples, n_discard_per_chain=5, seed=2)


def netket_driver(state, **options):
    options = {"diag_shift": 1e-3, "use_ntk": True, "on_the_fly": False, **options}
    return nk.driver.VMC_SR(HAMILTONIAN, optax.sgd(0.1), variational_state=state, **options)


def assert_same(ours, theirs):
    """Asserts equal trees, up to an error relative to the largest entry, which is no zero."""
    assert max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(theirs)) > 0.01
    assert_close(ours, theirs, 1e-8)


RINGS = {
    "one site": lambda hilbert, ring: nk.operator.Ising(hilbert, ring, h=0.7),
    "two sites": lambda hilbert, ring: nk.operator.Heisenberg(hilbert, ring),
    "one or two": lambda hilbert, ring: sum(
        nk.operator.spin.sigmax(hilbert, i) @ (1 + nk.operator.spin.sigmax(hilbert, j))
        for i, j in ring.edges()
    ),
    "none": lambda hilbert, ring: nk.operator.Ising(hilbert, ring, h=0.0),
}


@pytest.mark.parametrize("model", ["real", "not_holomorphic"])
@pytest.mark.parametrize("operator", RINGS.values(), ids=RINGS)
@pytest.mark.slow
def test_local_energies_are_netkets(operator, model):
    hilbert, ring = nk.hilbert.Spin(0.5, 16), nk.graph.Chain(16)
    hamiltonian = operator(hilbert, ring)
    if not isinstance(hamiltonian, nk.operator.DiscreteJaxOperator):
        hamiltonian = hamiltonian.to_jax_operator()
    sampler = nk.sampler.MetropolisLocal(hilbert, n_chains=4)
    state = nk.vqs.MCState(sampler, compat.MLP(**MODELS[model]), n_samples=16, seed=3)
    ours = jnp.asarray(local_energies(state, hamiltonian))
    theirs = state.local_estimators(hamiltonian)
    assert ours.dtype == theirs.dtype
    np.testing.assert_allclose(ours, jnp.asarray(theirs), rtol=1e-12)


@pytest.mark.slow
def test_local_energies_of_any_model_in_chunks(monkeypatch):
    sizes = []

    class Noting(nn.Module):
        @nn.compact
        def __call__(self, x):
            sizes.append(x[..., 0].size)
            return nk.models.RBM(alpha=2)(x)

    state = state_of(Noting())
    hamiltonian = nk.operator.IsingJax(HILBERT, nk.graph.Chain(6), h=1.0)
    theirs = jnp.asarray(state.local_estimators(hamiltonian))
    monkeypatch.setattr(sys.modules[local_energies.__module__], "_CONFIGURATIONS", 16)
    sizes.clear()
    np.testing.assert_allclose(local_energies(state, hamiltonian), theirs, rtol=1e-12)
    assert max(sizes) == 14  # two samples, seven configurations each
    state.chunk_size = 32
    sizes.clear()
    np.testing.assert_allclose(local_energies(state, hamiltonian), theirs, rtol=1e-12)
    assert max(sizes) == 28


@pytest.mark.parametrize("mode", [None, "real", "complex"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.slow
def test_step_equals_netkets(name, mode):
    state = state_of(compat.MLP(**MODELS[name]))
    energy, step = natural_gradient(state, HAMILTONIAN, 1e-3, mode=mode)
    # NetKet's Jacobian refuses these two; its lazy kernel takes them.
    is_complex_output = jnp.iscomplexobj(state.log_value(state.samples))
    lazy = (mode, is_complex_output) in [("real", True), ("complex", False)]
    driver = netket_driver(state, mode=mode, on_the_fly=lazy)
    theirs, expected = driver.compute_loss_and_update()
    assert_same(step, expected)
    assert energy.mean == theirs.mean


@pytest.mark.slow
def test_step_equals_that_of_netkets_lazy_kernel():
    state = state_of(compat.MLP(**MODELS["not_holomorphic"]))
    _, step = natural_gradient(state, HAMILTONIAN, 1e-2, chunk_size=7)
    driver = netket_driver(state, on_the_fly=True, diag_shift=1e-2)
    assert_same(step, driver.compute_loss_and_update()[1])


@pytest.mark.slow
def test_holomorphic_mode_gives_the_same_step():
    state = state_of(compat.MLP(**MODELS["holomorphic"]))
    _, step = natural_gradient(state, HAMILTONIAN, 1e-3, mode="holomorphic")
    assert_same(step, netket_driver(state).compute_loss_and_update()[1])
    _, other = natural_gradient(
        state_of(compat.MLP(**MODELS["not_holomorphic"])), HAMILTONIAN, 1e-3, mode="holomorphic"
    )
    state = state_of(compat.MLP(**MODELS["not_holomorphic"]))
    with pytest.raises(AssertionError):  # the comparison can fail
        assert_same(other, netket_driver(state).compute_loss_and_update()[1])


class RealAndComplex(nn.Module):
    @nn.compact
    def __call__(self, x):
        phase = self.param("phase", nn.initializers.ones, (6,), float)
        return compat.MLP((5,), param_dtype=complex)(x) + 1j * x @ phase


@pytest.mark.parametrize(
    ("model", "mode"),
    [
        (compat.MLP(**MODELS["holomorphic"]), "holomorphic"),
        (compat.MLP(**MODELS["not_holomorphic"]), None),
        (compat.MLP(**MODELS["not_holomorphic"]), "real"),
        (RealAndComplex(), None),
    ],
)
@pytest.mark.slow
def test_step_of_few_parameters(model, mode, monkeypatch):
    state = state_of(model, n_samples=400)
    assert few_parameters.are_few(state.parameters, 400 if mode == "real" else 800)
    _, step = natural_gradient(state, HAMILTONIAN, 1e-3, mode=mode)
    _, in_chunks = natural_gradient(state, HAMILTONIAN, 1e-3, mode=mode, chunk_size=30)
    assert_close(in_chunks, step, 1e-10)
    parts = sys.modules[natural_gradient.__module__]
    monkeypatch.setattr(parts, "are_few", lambda *_: False)
    _, by_kernel = natural_gradient(state, HAMILTONIAN, 1e-3, mode=mode, chunk_size=400)
    assert_same(step, by_kernel)


def test_chunks_are_those_of_the_state(monkeypatch):
    """But for the MLP, of which no derivatives are formed."""
    chunks, own = [], haiku_mlp.tangent_kernel

    def kernel(*args, chunk_size, **options):
        chunks.append(chunk_size)
        return own(*args, chunk_size=chunk_size, **options)

    monkeypatch.setattr(haiku_mlp, "tangent_kernel", kernel)
    steps = []
    for chunk_size, own_size in ((None, None), (8, None), (8, 16)):
        state = state_of(nk.models.RBM(alpha=3))
        state.chunk_size = chunk_size
        steps.append(natural_gradient(state, HAMILTONIAN, 1e-2, chunk_size=own_size)[1])
    assert chunks == [None, 8, 16]
    assert_close(steps[1:], [steps[0]] * 2, 1e-10)
    state = state_of(compat.MLP(**MODELS["real"]))
    state.chunk_size = 8
    natural_gradient(state, HAMILTONIAN, 1e-2)
    assert len(chunks) == 3


@pytest.mark.slow
def test_a_bound_model():
    model = compat.MLP(**MODELS["real"])
    variables = model.init(jax.random.key(0), jnp.ones((1, 6)))
    state, bound = state_of(model), state_of(model.bind(variables))
    state.variables = variables
    state.samples, bound.samples  # noqa: B018  (drawn alike)
    _, expected = natural_gradient(state, HAMILTONIAN, 1e-2)
    _, step = natural_gradient(bound, HAMILTONIAN, 1e-2)
    assert_close(step, expected, 1e-12)
    for chunk_size in (None, 8):
        bound.chunk_size = chunk_size
        assert_close(bound.expect(HAMILTONIAN).mean, state.expect(HAMILTONIAN).mean, 1e-12)


def test_when_parameters_are_few():
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones(2, complex)}
    assert few_parameters.are_few(params, 33)
    assert not few_parameters.are_few(params, 32)


@pytest.mark.parametrize(("outputs", "momentum"), [((), None), ((2,), 0.8)])
def test_step_of_few_parameters_by_normal_equations(outputs, momentum):
    rng = np.random.default_rng(0)
    x, residuals, w, last = map(rng.normal, 4 * [0], 4 * [1], [(9, 3), (9, *outputs)] + 2 * [(3,)])

    def function(w, x):
        z = jnp.sin(x @ w)
        return jnp.stack([z, z**2], -1) if outputs else z

    @jax.jit
    def step_and_rows(w, x, residuals):
        options = {"momentum": momentum, "previous": None if momentum is None else last}
        step = few_parameters.parameter_step(
            function, w, x, residuals, 0.1, chunk_size=None, **options
        )
        return step, jax.jacrev(function)(w, x)

    ours, rows = map(np.asarray, step_and_rows(w, x, residuals))
    rows = (rows - rows.mean(0)).reshape(-1, 3)
    before = np.zeros(3) if momentum is None else momentum * last
    rest = residuals.reshape(-1) - rows @ before
    expected = np.linalg.solve(rows.T @ rows / 9 + 0.1 * np.eye(3), rows.T @ rest / 9)
    assert_close(ours, before + expected, 1e-12)


@pytest.mark.parametrize(
    ("name", "momentum", "n_samples"),
    cases.first(
        {("real", 0.8, 48)},
        [("real", 0.8, 48), ("real", 0.8, 200), ("not_holomorphic", None, 48)],
    ),
)
def test_driver_runs_as_netkets(name, momentum, n_samples):
    def schedule(step):
        return 1e-2 * 0.5**step

    ours, theirs = (state_of(compat.MLP(**MODELS[name]), n_samples) for _ in range(2))
    driver = MinSR(
        HAMILTONIAN, optax.sgd(0.1), diag_shift=schedule, variational_state=ours, momentum=momentum
    )
    log = nk.logging.RuntimeLog()
    driver.run(3, out=log, show_progress=False)
    reference = netket_driver(theirs, diag_shift=schedule, momentum=momentum)
    reference.run(3, out=(), show_progress=False)
    assert_same(ours.parameters, theirs.parameters)
    assert len(log.data["Energy"]["Mean"]) == 3
    assert driver.energy.mean == log.data["Energy"]["Mean"][-1]


class Envelope(nn.Module):
    """A factor times an MLP, as their logarithms."""

    @nn.compact
    def __call__(self, x):
        width = self.param("width", nn.initializers.ones, (), float)
        return compat.MLP((5,))(x) - width * jnp.sum(x * jnp.roll(x, 1, -1), -1)


class Dense(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(6, 5, param_dtype=complex, rngs=rngs)
        self.last = nnx.Linear(5, 1, param_dtype=complex, rngs=rngs)

    def __call__(self, x):
        return self.last(jnp.tanh(self.first(x)))[..., 0]


class Subclass(compat.MLP):
    """Of no other behaviour."""


RING = nk.graph.Chain(6)
OF_OTHERS = {
    "RBM": lambda: nk.models.RBM(alpha=2),
    "complex RBM": lambda: nk.models.RBM(param_dtype=complex),
    "GCNN": lambda: nk.models.GCNN(symmetries=RING, layers=2, features=2),
    "envelope": Envelope,
    "subclass": lambda: Subclass((5,)),
    "SymmExpSum": lambda: nk.nn.blocks.SymmExpSum(
        compat.MLP((5,)), symm_group=RING.translation_group()
    ),
    "NNX": lambda: Dense(nnx.Rngs(0)),
    "Haiku": lambda: hk.transform(lambda x: hk.nets.MLP([5, 1])(1.0 * x)[..., 0]),
    "scan": lambda: nkx.models.LSTMNet(HILBERT, layers=1, features=3),
    "wrapped": lambda: compat.HaikuFunction(lambda x: hk.nets.MLP([5, 1])(1.0 * x)[..., 0]),
}


@pytest.mark.parametrize("name", OF_OTHERS)
@pytest.mark.slow
def test_step_of_any_model(name):
    state = state_of(OF_OTHERS[name]())
    _, step = natural_gradient(state, HAMILTONIAN, 1e-2)
    expected = netket_driver(state, diag_shift=1e-2).compute_loss_and_update()[1]
    assert_same(step, expected)


@pytest.mark.slow
def test_single_precision_model_with_a_momentum_in_double():
    state = state_of(compat.MLP(hidden_dims=(8,), param_dtype=jnp.float32))
    driver = MinSR(
        HAMILTONIAN,
        optax.sgd(0.1),
        diag_shift=1e-2,
        variational_state=state,
        momentum=jnp.asarray(0.8, jnp.float64),
    )
    driver.run(2, show_progress=False)
    dtypes = [
        [leaf.dtype for leaf in jax.tree.leaves(tree)] for tree in (driver._dp, state.parameters)
    ]
    assert dtypes[0] == dtypes[1]


@pytest.mark.slow
def test_single_precision_where_derivatives_hardly_vary():
    """The mean goes before the products, though the local energies are in 64 bits."""

    def activation(z):
        return z + 0.01 * jnp.tanh(z)

    def step(dtype):
        model = compat.MLP(hidden_dims=(8,), hidden_activations=activation, param_dtype=dtype)
        accepts_all = nk.sampler.MetropolisLocal(HILBERT, n_chains=8, machine_pow=0)
        state = nk.vqs.MCState(accepts_all, model, n_samples=48, seed=2)
        single = model.clone(param_dtype=jnp.float32)
        params = single.init(jax.random.key(0), jnp.ones((1, 6)))["params"]
        params["MLP_0"]["Dense_0"]["bias"] += 300
        state.parameters = jax.tree.map(lambda a: a.astype(dtype), params)
        return jax.tree.map(lambda a: a.astype(float), natural_gradient(state, HAMILTONIAN, 1)[1])

    assert_close(step(jnp.float32), step(jnp.float64), 3e-4)


def test_a_state_of_another_kind():
    state = nk.vqs.FullSumState(HILBERT, compat.MLP())
    with pytest.raises(TypeError, match=r"must be a netket.vqs.MCState, got a FullSumState"):
        natural_gradient(state, HAMILTONIAN, 1e-3)


def test_settings_between_steps(monkeypatch):
    seen = {}

    def recorded(state, hamiltonian, diag_shift, **options):
        seen.update(options, diag_shift=diag_shift)
        return nk.stats.statistics(jnp.zeros((1, 2))), state.parameters

    monkeypatch.setattr(min_sr, "natural_gradient", recorded)
    state = state_of(compat.MLP())
    driver = MinSR(HAMILTONIAN, optax.sgd(0.1), diag_shift=1.0, variational_state=state)
    settings = {"diag_shift": 1e-2, "momentum": 0.8, "mode": "complex", "chunk_size": 16}
    for name, value in settings.items():
        setattr(driver, name, value)
    driver.compute_loss_and_update()
    assert settings.items() <= seen.items()


@pytest.mark.slow
def test_a_new_driver_goes_on_from_a_checkpoint():
    def new():
        state = state_of(compat.MLP(**MODELS["real"]))
        options = {"diag_shift": 1e-2, "momentum": 0.8, "variational_state": state}
        return MinSR(HAMILTONIAN, optax.adam(0.1), **options)

    driver, other = new(), new()
    driver.run(2, show_progress=False)
    other = flax.serialization.from_bytes(other, flax.serialization.to_bytes(driver))
    assert other.step_count == 2
    for each in (driver, other):
        each.run(1, show_progress=False)
    assert_identical(other.state.parameters, driver.state.parameters)


def test_all_steps_with_a_momentum_are_one_program():
    """The first one too, which has none before it."""
    step = sys.modules[natural_gradient.__module__]._step
    state = state_of(compat.MLP(**MODELS["real"]))
    options = {"diag_shift": 1e-2, "momentum": 0.8, "variational_state": state}
    driver = MinSR(HAMILTONIAN, optax.sgd(0.1), **options)
    before = step._cache_size()
    for _ in range(2):
        driver.compute_loss_and_update()
    assert step._cache_size() <= before + 1


def test_auto_chunk_size_does_not_know_the_driver():
    state = state_of(compat.MLP())
    driver = MinSR(HAMILTONIAN, optax.sgd(0.1), diag_shift=1.0, variational_state=state)
    with pytest.raises(NotImplementedError, match="MinSR"):
        driver.run(1, show_progress=False, callback=nk.callbacks.AutoChunkSize())


def test_an_observable_that_is_no_operator():
    variance = nk.observable.VarianceObservable(HAMILTONIAN)
    with pytest.raises(TypeError, match="must be an operator, got a VarianceObservable"):
        natural_gradient(state_of(compat.MLP()), variance, 1e-3)


def test_stops_where_nothing_is_finite():
    model = compat.MLP(hidden_dims=(4,), param_dtype=complex)

    def driver(**options):
        state = state_of(model)
        state.parameters = jax.tree.map(lambda leaf: leaf * jnp.nan, state.parameters)
        return MinSR(
            HAMILTONIAN, optax.sgd(0.1), diag_shift=0.1, variational_state=state, **options
        )

    with pytest.raises(FloatingPointError, match=r"energy and step not finite at step 0: .*gelu"):
        driver().run(1, show_progress=False)
    driver(stop_if_not_finite=False).run(1, show_progress=False)


def test_wrong_modes():
    state = state_of(compat.MLP())
    with pytest.raises(ValueError, match="one of real, complex, holomorphic or None, got 'both'"):
        natural_gradient(state, HAMILTONIAN, 1e-3, mode="both")
    with pytest.raises(ValueError, match="needs complex parameters"):
        natural_gradient(state, HAMILTONIAN, 1e-3, mode="holomorphic")


def test_another_hilbert_space():
    hilbert = nk.hilbert.Spin(0.5, 4)
    hamiltonian = nk.operator.Ising(hilbert, nk.graph.Chain(4), h=1.0)
    with pytest.raises(TypeError, match="the same Hilbert space"):
        MinSR(hamiltonian, optax.sgd(0.1), diag_shift=0.1, variational_state=state_of(compat.MLP()))
    with pytest.raises(TypeError, match="the same Hilbert space"):
        natural_gradient(state_of(compat.MLP()), hamiltonian, 0.1)


@pytest.mark.slow
def test_compat_does_not_import_netket(run_fresh):
    probe = "import sys; {}; sys.exit('netket' in sys.modules)"
    assert run_fresh(probe.format("import compat")).returncode == 0
    assert run_fresh(probe.format("import compat.netket")).returncode == 1
