"""Local energies by the structure of the model against NetKet's own, through its own calls."""

import functools

import cases
import jax
import jax.numpy as jnp
import netket as nk
import numpy as np
import optax
import pytest
from comparison import assert_close
from flax import linen as nn
from netket.vqs.mc import kernels

import compat
from compat.netket import layers, local_energies
from haiku_mlp.structure import Layer, at_configurations, changes, configurations, forward

CHAIN = nk.graph.Chain(16)
SPINS = nk.hilbert.Spin(0.5, 16)
ZERO = nk.hilbert.Spin(0.5, 16, total_sz=0)
FOCK = nk.hilbert.Fock(3, 16)
ISING = nk.operator.IsingJax(SPINS, CHAIN, h=0.7)

OPERATORS = {
    "ising": ISING,
    "diagonal": nk.operator.IsingJax(SPINS, CHAIN, h=0.0),
    "heisenberg": nk.operator.Heisenberg(ZERO, CHAIN).to_jax_operator(),
    "bosons": nk.operator.BoseHubbardJax(FOCK, CHAIN, U=1.0),
    "five_sites": nk.operator.PauliStringsJax(SPINS, ["XXXXX" + 11 * "I", "Y" + 15 * "I"], [1, 2]),
    "sum": ISING + nk.operator.PauliStringsJax(SPINS, ["XX" + 14 * "I"], [0.5]),
    "numba": nk.operator.Ising(SPINS, CHAIN, h=0.7).to_numba_operator(),
}
MODELS = {
    "real": {"hidden_dims": (5, 4)},
    "complex": {"hidden_dims": (5,), "param_dtype": complex, "hidden_activations": jnp.tanh},
    "split": {"hidden_dims": (5,), "param_dtype": complex, "hidden_activations": cases.split_gelu},
    "single": {"hidden_dims": (5,), "param_dtype": jnp.float32},
    "linear": {"use_output_bias": True},
    "half": {"hidden_dims": (5,), "param_dtype": jnp.bfloat16},
    "trainable": {"hidden_dims": (5,), "hidden_activations": nn.PReLU()},
}


@pytest.fixture(autouse=True)
def netket_promotes_ranks():
    with jax.numpy_rank_promotion("allow"):
        yield


def state_of(model, hilbert=SPINS, **options):
    sampler = nk.sampler.MetropolisLocal(hilbert, n_chains=4)
    if hilbert is ZERO:
        sampler = nk.sampler.MetropolisExchange(hilbert, graph=CHAIN, n_chains=4)
    options = {"n_samples": 16, "n_discard_per_chain": 0, "seed": 3, **options}
    return nk.vqs.MCState(sampler, model, **options)


def pair(fields, **options):
    """Returns a state of our model and one of NetKet's, with the same weights and samples."""
    ours, stock = (state_of(cls(**fields), **options) for cls in (compat.MLP, nk.models.MLP))
    assert (ours.samples == stock.samples).all()
    return ours, stock


def is_ours(kernel):
    return getattr(kernel, "func", None) is local_energies._local_values


@pytest.mark.parametrize("name", cases.first({"real", "trainable"}, MODELS))
def test_layers_are_all_that_the_model_is(name):
    """Where they are not, NetKet's own paths give the same results, so others do not see it."""
    fields = MODELS[name]
    model, x = compat.MLP(**fields), SPINS.random_state(jax.random.key(1), 3)
    variables = model.init(jax.random.key(0), x)
    found = layers.layers(model, variables)
    if isinstance(fields.get("hidden_activations"), nn.Module):
        assert found is None
        return
    assert_close(forward(found, x)[:, 0], model.apply(variables, x), 1e-14)
    assert layers.bits(found, x) == jnp.finfo(fields.get("param_dtype", float)).bits
    assert layers.bits((Layer(jnp.ones((16, 1), int)),), x) == 0
    assert layers.layers(nk.models.MLP(**fields), variables) is None
    assert layers.layers(model, {**variables, "perturbations": {}}) is None


class TestConfigurations:
    @staticmethod
    def network(num_inputs=32, dtype=float):
        rng = np.random.default_rng(0)
        weights = [rng.normal(size=shape) / shape[0] for shape in ((num_inputs, 6), (6, 2))]
        w, v = (jnp.asarray(a).astype(dtype) for a in weights)
        return Layer(w, jnp.arange(6) / 7, jnp.tanh), Layer(v)

    @staticmethod
    def configurations(num_changes, num_inputs=32, dtype=jnp.int8):
        """Returns ``x`` and ``y`` of which some are equal to it, the others differ as told."""
        rng = np.random.default_rng(1)
        x = rng.choice([-1, 1], (3, num_inputs))
        y = np.repeat(x[:, None], 7, 1)
        for row in y.reshape(-1, num_inputs)[::2]:
            row[rng.permutation(num_inputs)[: rng.integers(num_changes + 1)]] *= -1
        y[1, 2, :num_changes] = -x[1, :num_changes]
        return jnp.asarray(x, dtype), jnp.asarray(y, dtype)

    @pytest.mark.parametrize(("num_changes", "block_size"), cases.cover([2, 5, 0], [None, 4]))
    def test_equal_the_full_evaluation(self, num_changes, block_size):
        network, (x, y) = self.network(), self.configurations(num_changes)
        ours = functools.partial(at_configurations, network, block_size=block_size)
        expected = functools.partial(forward, network)
        assert_close(jax.jit(ours)(x, y), jax.jit(expected)(y), 1e-14)

    @pytest.mark.parametrize(("num_inputs", "dtype"), [(5, float), (16, jnp.float32)])
    def test_dtypes_and_few_inputs(self, num_inputs, dtype):
        network = self.network(num_inputs, complex)
        x, y = self.configurations(2, num_inputs, dtype)
        ours = jax.jit(functools.partial(at_configurations, network))(x, y)
        assert_close(ours, jax.jit(functools.partial(forward, network))(y), 1e-14)

    @pytest.mark.parametrize("dtypes", [(jnp.int8, float), (float, jnp.int8)])
    def test_samples_and_configurations_of_other_dtypes(self, dtypes):
        single = (layer.w.astype(jnp.float32) for layer in self.network())
        network = tuple(Layer(w, activation=jnp.tanh) for w in single)
        x, y = (
            part.astype(dtype) for part, dtype in zip(self.configurations(2), dtypes, strict=True)
        )
        assert_close(at_configurations(network, x, y), forward(network, y.astype(float)), 1e-14)

    def test_complex_configurations_of_real_weights(self):
        network, (x, y) = self.network(), self.configurations(2)
        x, y = x + 0j, y + 0.5j * (y != x[:, None])
        assert_close(at_configurations(network, x, y), forward(network, y), 1e-14)

    def test_an_infinite_entry_that_is_replaced(self):
        network, (x, y) = self.network(), self.configurations(2, dtype=float)
        x = x.at[0, 3].set(jnp.inf)
        assert_close(at_configurations(network, x, y), forward(network, y), 1e-14)

    def test_strict_promotion(self):
        network, (x, y) = self.network(dtype=complex), self.configurations(2)
        expected = forward(network, y)
        with jax.numpy_dtype_promotion("strict"):
            assert_close(at_configurations(network, x, y), expected, 1e-14)

    @pytest.mark.parametrize("size", [5, 128, 129, 300])
    def test_last_and_number_of_many(self, size):
        rng = np.random.default_rng(0)
        masks = rng.random((40, size)) < rng.choice([0, 1 / size, 0.5], (40, 1))
        expected = [max(np.flatnonzero(mask) + 1, default=0) for mask in masks]
        np.testing.assert_array_equal(changes.last(jnp.asarray(masks)), expected)
        np.testing.assert_array_equal(changes.count(jnp.asarray(~masks)), (~masks).sum(-1))

    @pytest.mark.parametrize("batch", [(), (2, 3)])
    def test_last_and_number_of_other_axes(self, batch):
        masks = np.random.default_rng(0).random((*batch, 200)) < 0.02
        expected = np.max(np.where(masks, np.arange(1, 201), 0), -1)
        np.testing.assert_array_equal(changes.last(jnp.asarray(masks)), expected)
        np.testing.assert_array_equal(changes.count(jnp.asarray(masks)), masks.sum(-1))

    def test_blocks_of_samples_on_an_explicit_mesh(self, monkeypatch):
        """Hold all configurations of a sample, each of as many entries as the widest layer."""
        network, (x, y) = self.network(), self.configurations(2)
        monkeypatch.setattr("haiku_mlp.structure.layers._BLOCK_ENTRIES", 2 * 7 * 6 + 5)
        mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
        with jax.set_mesh(mesh):
            spread = jax.device_put((x, y), jax.sharding.PartitionSpec("data"))
            program = str(jax.make_jaxpr(functools.partial(at_configurations, network))(*spread))
        assert "f64[2,7,6]" in program
        assert "f64[3,7,6]" not in program

    @pytest.mark.parametrize(("backend", "size"), [("cpu", 1024), ("gpu", 188)])
    def test_size_of_blocks(self, monkeypatch, backend, size):
        """Small ones stay in the cache of a CPU; elsewhere there are sixteen at most."""
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        x, y = jnp.ones((3, 32)), jnp.ones((3, 1000, 32))
        program = jax.make_jaxpr(functools.partial(at_configurations, self.network()))(x, y)
        assert f"f64[{size},6]" in str(program)

    @pytest.mark.parametrize(
        ("num_inputs", "numbers"),
        [(32, [1, 2, 4, 4, None]), (16, [1, 2, None, None, None]), (7, 5 * [None])],
    )
    def test_one_loop_runs(self, num_inputs, numbers):
        """That of the fewest changes which are enough, for 1 to 5 of them; of none, none."""
        for most, number in enumerate([None, *numbers]):
            choices = configurations._choices(jnp.asarray(most), num_inputs)
            assert [n for n, is_it in choices if is_it] == [number] * (most > 0)

    @pytest.mark.parametrize("shape", [(0, 7), (3, 0)])
    def test_none(self, shape):
        x, y = jnp.ones((shape[0], 32)), jnp.ones((*shape, 32))
        assert at_configurations(self.network(), x, y).shape == (*shape, 2)

    @pytest.mark.parametrize("transform", [jax.grad, lambda f: jax.grad(lambda w: f(w) ** 2)])
    def test_derivatives(self, transform):
        first, last = self.network()
        x, y = self.configurations(2)

        def total(function):
            return lambda w: jnp.sum(jnp.sin(function((first._replace(w=w), last))))

        assert_close(
            transform(total(lambda network: at_configurations(network, x, y)))(first.w),
            transform(total(lambda network: forward(network, y)))(first.w),
            1e-13,
        )


QUICK = {"heisenberg"}


@pytest.mark.parametrize("name", cases.first(QUICK, OPERATORS))
def test_operators(name):
    operator = OPERATORS[name]
    ours, stock = pair(MODELS["real"], hilbert=operator.hilbert)
    assert is_ours(nk.vqs.get_local_kernel(ours, operator))
    assert_close(ours.local_estimators(operator).data, stock.local_estimators(operator).data, 1e-13)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "real"])
@pytest.mark.slow
def test_models(name):
    ours, stock = (
        pair(MODELS[name]) if name != "trainable" else 2 * (state_of(compat.MLP(**MODELS[name])),)
    )
    energies = ours.local_estimators(ISING).data
    kernel = nk.vqs.get_local_kernel.invoke(nk.vqs.MCState, type(ISING))(stock, ISING)
    expected = kernel(stock._apply_fun, stock.variables, stock.samples.reshape(-1, 16), ISING)
    assert_close(energies.reshape(-1), expected, {"single": 1e-5}.get(name, 1e-13))


class TestCalls:
    """What NetKet computes from local values, of a state in chunks or not."""

    @pytest.mark.parametrize("chunk_size", cases.first({8}, [None, 32, 8]))
    def test_energy_and_gradient(self, chunk_size):
        ours, stock = pair(MODELS["real"], chunk_size=chunk_size)
        (energy, gradient), (expected, expected_gradient) = (
            state.expect_and_grad(ISING) for state in (ours, stock)
        )
        assert_close([energy.mean, energy.variance], [expected.mean, expected.variance], 1e-12)
        assert_close(gradient, expected_gradient, 1e-12)
        assert_close(ours.expect(ISING).mean, expected.mean, 1e-12)

    @pytest.mark.slow
    def test_variance_and_gradient(self):
        variance = nk.observable.VarianceObservable(ISING)
        (energy, gradient), (expected, expected_gradient) = (
            state.expect_and_grad(variance) for state in pair(MODELS["real"])
        )
        assert_close(energy.mean, expected.mean, 1e-12)
        assert_close(gradient, expected_gradient, 1e-10)

    @pytest.mark.parametrize(
        "driver", cases.first({nk.driver.VMC}, [nk.driver.VMC_SR, nk.driver.VMC])
    )
    def test_drivers(self, driver):
        options = {"diag_shift": 0.01, "use_ntk": True} if driver is nk.driver.VMC_SR else {}
        steps = [
            driver(
                ISING, optax.sgd(0.1), variational_state=state, **options
            ).compute_loss_and_update()
            for state in pair(MODELS["real"])
        ]
        assert_close(*(step[1] for step in steps), 1e-9)


class TestDispatch:
    def test_equal_states_share_a_program(self):
        kernels = [
            nk.vqs.get_local_kernel(state_of(compat.MLP(**MODELS["real"])), ISING, chunk_size)
            for chunk_size in (None, None, 4)
        ]
        assert kernels[0] == kernels[1] != kernels[2]
        assert hash(kernels[0]) == hash(kernels[1])

    def test_other_models_and_operators_keep_netkets(self):
        ours = state_of(compat.MLP(**MODELS["real"]))
        others = [
            nk.models.MLP(hidden_dims=(5,)),
            type("Mine", (compat.MLP,), {})(hidden_dims=(5,)),
        ]
        for state in map(state_of, others):
            assert nk.vqs.get_local_kernel(state, ISING) is kernels.local_value_kernel_jax
        squared = nk.operator.Squared(ISING)
        assert nk.vqs.get_local_kernel(ours, squared) is kernels.local_value_squared_kernel
        mixed = nk.vqs.MCMixedState(
            nk.sampler.MetropolisLocal(nk.hilbert.DoubledHilbert(nk.hilbert.Spin(0.5, 2))),
            compat.MLP(hidden_dims=(5,)),
        )
        operator = nk.operator.IsingJax(
            nk.hilbert.Spin(0.5, 2), nk.graph.Chain(2, pbc=False), h=1.0
        )
        assert not is_ours(nk.vqs.get_local_kernel(mixed, operator))

    @pytest.mark.parametrize(("backend", "is_structured"), [("cpu", True), ("gpu", False)])
    def test_an_accelerator_keeps_netkets(self, monkeypatch, backend, is_structured):
        state = state_of(compat.MLP(**MODELS["real"]))
        samples = state.samples.reshape(-1, 16)
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        kernel = nk.vqs.get_local_kernel(state, ISING)
        program = jax.make_jaxpr(lambda x: kernel(state._apply_fun, state.variables, x, ISING))
        assert ("while" in str(program(samples))) == is_structured

    def test_methods_for_an_operator_go_first(self):
        class Mine(nk.operator.IsingJax):
            pass

        @nk.vqs.get_local_kernel.dispatch
        def _(state: nk.vqs.MCState, operator: Mine):
            return "mine"

        state = state_of(compat.MLP(**MODELS["real"]))
        assert nk.vqs.get_local_kernel(state, Mine(SPINS, CHAIN, h=1.0)) == "mine"
        assert is_ours(nk.vqs.get_local_kernel(state, ISING))

    def test_a_method_without_chunks_is_asked_without(self):
        @jax.tree_util.register_pytree_node_class
        class Sevens(nk.operator.IsingJax):
            pass

        @nk.vqs.get_local_kernel.dispatch
        def _(state: nk.vqs.MCState, operator: Sevens):
            return nk.jax.HashablePartial(sevens)

        def sevens(logpsi, variables, samples, operator):
            return jnp.full(len(samples), 7.0)

        operator = Sevens(SPINS, CHAIN, h=1.0)
        for model in (compat.MLP(**MODELS["real"]), nk.models.RBM()):
            assert jnp.all(local_energies.local_energies(state_of(model), operator) == 7)

    def test_the_packed_kernel_is_fallen_back_to_where_it_is_on(self):
        state = state_of(compat.MLP(**MODELS["half"]))
        nk.config.netket_experimental_packed_kernel = True
        try:
            kernel = nk.vqs.get_local_kernel(state, ISING)
        finally:
            nk.config.netket_experimental_packed_kernel = False
        assert "packed" in kernel.args[1].__name__


def test_sizes_of_which_chunks_are_made(monkeypatch):
    """Of an operator, and of the configurations that it connects."""
    sizes, own = [], local_energies._chunk
    monkeypatch.setattr(local_energies, "_chunk", lambda *of: sizes.append(of) or own(*of))
    model, samples = compat.MLP(**MODELS["real"]), SPINS.random_state(jax.random.key(0), 6)
    variables = jax.eval_shape(model.init, jax.random.key(0), samples)
    for connected in (ISING, ISING.get_conn_padded(samples)):
        values = functools.partial(local_energies._values, model, 64)
        jax.eval_shape(values, variables, samples, connected)
    assert sizes == [(6, 16, 17, 64)] * 2


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((1024, 128, 129, None), 64),
        ((16, 4, 5, None), 16),
        ((100, 64, 64, 640), 7),
        ((8, 64, 64, 3), 1),
        ((0, 4, 5, None), 1),
    ],
)
def test_samples_at_a_time(sizes, expected):
    assert local_energies._chunk(*sizes) == expected
