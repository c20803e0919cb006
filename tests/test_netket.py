"""``compat.MLP`` in NetKet: what NetKet's own MLP gives, to the bit."""

import functools

import cases
import haiku as hk
import jax
import jax.numpy as jnp
import netket as nk
import numpy as np
import optax
import pytest
from comparison import assert_identical
from flax import serialization, traverse_util

import compat
import haiku_mlp
from compat.netket import local_energies

HILBERT = nk.hilbert.Spin(0.5, 4)
HAMILTONIAN = nk.operator.Ising(HILBERT, nk.graph.Chain(4), h=1.0)
REAL = {"hidden_dims": (5, 3)}
COMPLEX = {"hidden_dims_alpha": (2,), "param_dtype": complex}
FLOAT32 = {"hidden_dims": (5,), "param_dtype": np.float32}
MODELS = (compat.MLP, nk.models.MLP)


@pytest.fixture(autouse=True)
def as_netket_runs(monkeypatch):
    """With rank promotion, and as without an import of ``compat.netket``."""
    monkeypatch.setattr(local_energies, "is_ours", lambda state: False)
    with jax.numpy_rank_promotion("allow"):
        yield


def mc_state(model, **kwargs):
    sampler = nk.sampler.MetropolisLocal(HILBERT, n_chains=4)
    kwargs = {"n_samples": 64, "n_discard_per_chain": 2, "seed": 1, "sampler_seed": 2, **kwargs}
    return nk.vqs.MCState(sampler, model, **kwargs)


def full_state(model):
    return nk.vqs.FullSumState(HILBERT, model, seed=1)


STATES = {
    "real": (mc_state, REAL),
    "complex": (mc_state, COMPLEX),
    "float32": (mc_state, FLOAT32),
    "chunked": (functools.partial(mc_state, chunk_size=16), REAL),
    "linear, in full": (full_state, {"use_output_bias": True}),
    "complex, in full": (full_state, COMPLEX),
}


@pytest.mark.parametrize("name", cases.first({"real"}, STATES))
def test_state(name):
    """Initial weights, energy with its gradient, and steps of VMC with SR."""
    state, fields = STATES[name]
    holomorphic = True if fields is COMPLEX else None
    seen = []
    for mlp in MODELS:
        vs = state(mlp(**fields))
        start = vs.variables
        energy, grads = vs.expect_and_grad(HAMILTONIAN)
        sr = nk.optimizer.SR(diag_shift=0.01, holomorphic=holomorphic)
        driver = nk.driver.VMC(
            HAMILTONIAN, optax.sgd(0.05), variational_state=vs, preconditioner=sr
        )
        driver.run(2, out=None, show_progress=False)
        seen.append((start, energy, grads, vs.variables))
    assert_identical(*seen)


@pytest.mark.slow
def test_driver_of_sr():
    seen = []
    for mlp in MODELS:
        vs = mc_state(mlp(hidden_dims=(5,)))
        driver = nk.driver.VMC_SR(
            HAMILTONIAN, optax.sgd(0.05), variational_state=vs, diag_shift=0.01
        )
        driver.run(2, out=None, show_progress=False)
        seen.append(vs.variables)
    assert_identical(*seen)


@pytest.mark.parametrize("qgt", ["QGTJacobianDense", "QGTJacobianPyTree", "QGTOnTheFly"])
@pytest.mark.slow
def test_metric(qgt):
    seen = []
    for mlp in MODELS:
        vs = mc_state(mlp(hidden_dims=(3,)))
        seen.append(vs.quantum_geometric_tensor(getattr(nk.optimizer.qgt, qgt)).to_dense())
    assert_identical(*seen)


@pytest.mark.parametrize(
    "x", [np.ones((1, 4), np.int8), np.ones((3, 4)), np.ones(4, bool)], ids=str
)
def test_calls_of_netket(x):
    """``mutable=False`` by keyword, init under jit in float64, the module as a static argument."""

    @functools.partial(jax.jit, static_argnums=0)
    def apply(model, variables, x):
        return model.apply(variables, x, mutable=False)

    seen = []
    for mlp in MODELS:
        model = mlp(hidden_dims=(5,))
        variables = jax.jit(model.init)(jax.random.key(3), jnp.asarray(x, float))
        seen.append((variables, model.init(jax.random.key(3), x), apply(model, variables, x)))
    assert_identical(*seen)


def test_a_frozen_layer():
    """NetKet's example: all but the last layer, by its path."""
    seen = []
    for mlp in MODELS:
        vs = mc_state(mlp(hidden_dims=(5, 3)))
        labels = traverse_util.path_aware_map(
            lambda path, _: "free" if "Dense_2" in path else "frozen", vs.parameters
        )
        optimiser = optax.multi_transform(
            {"free": optax.sgd(0.05), "frozen": optax.set_to_zero()}, labels
        )
        before = vs.parameters
        driver = nk.driver.VMC(HAMILTONIAN, optimiser, variational_state=vs)
        driver.run(1, out=None, show_progress=False)
        after = vs.parameters["MLP_0"]
        assert_identical(after["Dense_0"], before["MLP_0"]["Dense_0"])
        assert (after["Dense_2"]["kernel"] != before["MLP_0"]["Dense_2"]["kernel"]).any()
        seen.append(vs.parameters)
    assert_identical(*seen)


NET = hk.without_apply_rng(hk.transform(lambda x: haiku_mlp.MLP(hidden_dims=(5, 3))(x)))


def test_raw_haiku():
    """A transform goes into a state as it is, and has the Flax face's values."""
    face = mc_state(compat.MLP(hidden_dims=(5, 3)))
    raw = mc_state(hk.transform(lambda x: haiku_mlp.MLP(hidden_dims=(5, 3))(x)))
    raw.parameters = compat.to_haiku(face.variables)[0]
    raw.sampler_state = face.sampler_state
    assert_identical(raw.samples, face.samples)
    ours, theirs = (vs.expect_and_grad(HAMILTONIAN) for vs in (raw, face))
    assert_identical(ours[0], theirs[0])
    assert_identical(compat.to_flax(ours[1]), {"params": theirs[1]})


@pytest.mark.parametrize("saved", MODELS, ids=["ours", "NetKet's"])
@pytest.mark.parametrize("loaded", MODELS, ids=["by ours", "by NetKet's"])
def test_saved_state(saved, loaded, tmp_path):
    """A file that either writes, either reads; and haiku_mlp.MLP too, and back."""
    path = tmp_path / "state.mpack"
    vs = mc_state(saved(hidden_dims=(5, 3)), seed=5)
    vs.samples  # noqa: B018
    path.write_bytes(serialization.to_bytes(vs))
    other = serialization.from_bytes(mc_state(loaded(hidden_dims=(5, 3))), path.read_bytes())
    assert_identical(other.variables, vs.variables)
    assert_identical(other.expect(HAMILTONIAN), vs.expect(HAMILTONIAN))

    x = HILBERT.all_states()
    params, _ = compat.to_haiku(other.variables)
    assert_identical(NET.apply(params, x), vs.log_value(x))
    other.variables = compat.to_flax(jax.tree.map(lambda leaf: 2 * leaf, params))
    assert_identical(other.variables, jax.tree.map(lambda leaf: 2 * leaf, vs.variables))


@pytest.mark.parametrize("saved", MODELS, ids=["ours", "NetKet's"])
def test_saved_variables(saved, tmp_path):
    """``nk.logging.JsonLog`` writes the variables alone."""
    vs = full_state(saved(hidden_dims=(5, 3)))
    logger = nk.logging.JsonLog(str(tmp_path / "run"), save_params=True)
    driver = nk.driver.VMC(HAMILTONIAN, optax.sgd(0.05), variational_state=vs)
    driver.run(1, out=logger, show_progress=False)
    logger.flush(vs)
    data = (tmp_path / "run.mpack").read_bytes()
    template = compat.MLP(hidden_dims=(5, 3)).init(jax.random.key(0), HILBERT.all_states())
    variables = serialization.from_bytes(template, data)
    x = HILBERT.all_states()
    params, _ = compat.to_haiku(variables)
    assert_identical(NET.apply(params, x), vs.model.apply(vs.variables, x))
