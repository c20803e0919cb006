"""The structured sampler against NetKet's own: the same chain, sample for sample."""

import concurrent.futures
import os
import pickle
import subprocess
import sys
import textwrap
import threading

import cases
import flax
import jax
import jax.numpy as jnp
import netket as nk
import numpy as np
import pytest
from flax import linen as nn

import compat
from compat.netket import sampler as sampler_module
from compat.netket import structured
from compat.netket.threads import num_cores, side_by_side

rules = nk.sampler.rules
CHAIN, HALF_CHAIN = nk.graph.Chain(6), nk.graph.Chain(3)
SPINS, ZERO = nk.hilbert.Spin(0.5, 6), nk.hilbert.Spin(0.5, 6, total_sz=0)
FERMIONS = nk.hilbert.SpinOrbitalFermions(3, s=0.5, n_fermions_per_spin=(1, 2))
EXCHANGE = rules.ExchangeRule(graph=CHAIN)

# name: (Hilbert space, rule)
RULES = {
    "local": (SPINS, rules.LocalRule()),
    "qubits": (nk.hilbert.Qubit(6), rules.LocalRule()),
    "spin_one": (nk.hilbert.Spin(1, 6), rules.LocalRule()),
    "fock": (nk.hilbert.Fock(3, 6), rules.LocalRule()),
    "constrained": (ZERO, rules.LocalRule()),
    "exchange": (ZERO, EXCHANGE),
    "exchange_from_behind": (ZERO, rules.ExchangeRule(clusters=[(i, i - 1) for i in range(6)])),
    "exchange_of_three": (ZERO, rules.ExchangeRule(clusters=[(0, 1, 2), (1, -1, 3), (3, 4, 5)])),
    "weighted_exchange": (
        ZERO,
        rules.ExchangeRule(graph=CHAIN, d_max=2, probabilities=[0.7, 0.3]),
    ),
    "fermions": (FERMIONS, rules.FermionHopRule(FERMIONS, graph=HALF_CHAIN)),
    "hamiltonian": (SPINS, rules.HamiltonianRule(nk.operator.IsingJax(SPINS, CHAIN, h=1.0))),
    "multiple": (ZERO, rules.MultipleRules([EXCHANGE, rules.LocalRule()], [0.5, 0.5])),
    "many_changes": (
        SPINS,
        rules.MultipleRules(
            [
                rules.HamiltonianRule(
                    nk.operator.PauliStringsJax(SPINS, ["XXXXII", "IIIIIX"], [1.0, 1.0])
                ),
                rules.LocalRule(),
            ],
            [0.5, 0.5],
        ),
    ),
    "unknown": (SPINS, rules.MultipleRules([rules.LocalRule()], [1.0])),
}
MODELS = {
    "real": {"hidden_dims": (5, 4)},
    "complex": {"hidden_dims": (5,), "param_dtype": complex, "hidden_activations": jnp.tanh},
    "single": {"hidden_dims": (5,), "param_dtype": jnp.float32},
    "linear": {},
    "half": {"hidden_dims": (5,), "param_dtype": jnp.bfloat16},
    "trainable": {"hidden_dims": (5,), "hidden_activations": nn.PReLU()},
}


@pytest.fixture(autouse=True)
def netkets_operators_promote_ranks():
    with jax.numpy_rank_promotion("allow"):
        yield


def chain(sampler, model, variables, length=5):
    state = sampler.reset(model, variables, sampler.init_state(model, variables, seed=1))
    return sampler.sample(
        model, variables, state=state, chain_length=length, return_log_probabilities=True
    )


def assert_same_chain(sampler, model, **options):
    size = sampler.hilbert.size
    variables = model.init(jax.random.key(0), jnp.ones((1, size)))
    variables = jax.tree.map(lambda a: 2 * a, variables)  # far from accepting all
    (x, log_prob), state = chain(sampler, model, variables)
    (ours, ours_log_prob), our_state = chain(structured(sampler, **options), model, variables)
    np.testing.assert_array_equal(ours, x)
    assert ours.dtype == x.dtype
    assert ours_log_prob.dtype == log_prob.dtype
    np.testing.assert_allclose(
        ours_log_prob, log_prob, rtol=0, atol=100 * float(jnp.finfo(log_prob.dtype).eps)
    )
    np.testing.assert_array_equal(our_state.n_accepted_proc, state.n_accepted_proc)
    assert our_state.n_steps == state.n_steps
    assert jax.random.key_data(our_state.rng).tolist() == jax.random.key_data(state.rng).tolist()
    assert 0 < state.n_accepted < state.n_steps


QUICK = {"exchange_from_behind", "fock"}


@pytest.mark.parametrize("name", cases.first(QUICK, RULES))
def test_rules(name):
    check_rule(name, screened=False)


@pytest.mark.parametrize("name", cases.first({"exchange"}, ["fock", "exchange", "multiple"]))
def test_screened(name):
    check_rule(name, screened=True)


@pytest.mark.parametrize("name", cases.first({"local"}, ["local", "exchange"]))
def test_screened_where_single_precision_sees_little(name):
    """Two units whose difference, some roundings of 32 bits, decides."""
    model = compat.MLP(hidden_dims=(2,), hidden_activations=jnp.tanh, use_hidden_bias=False)
    w = jax.random.normal(jax.random.key(1), (6, 1))
    step = 2e-5 * jax.random.normal(jax.random.key(2), (6, 1))
    weights = {"Dense_0": jnp.concatenate([w, w + step], 1), "Dense_1": jnp.array([[5e4], [-5e4]])}
    variables = {"params": {"MLP_0": {name: {"kernel": a} for name, a in weights.items()}}}
    sampler = nk.sampler.MetropolisSampler(*RULES[name], n_chains=1)
    (x, _), state = chain(sampler, model, variables, 3000)
    (ours, _), our_state = chain(structured(sampler, screened=True), model, variables, 3000)
    np.testing.assert_array_equal(ours, x)
    assert 0 < our_state.n_accepted == state.n_accepted < state.n_steps


def check_rule(name, screened):
    hilbert, rule = RULES[name]
    sampler = nk.sampler.MetropolisSampler(hilbert, rule, n_chains=4)
    assert_same_chain(sampler, compat.MLP(**MODELS["real"]), screened=screened)


@pytest.mark.parametrize(
    ("name", "screened"),
    [*((name, False) for name in MODELS if name != "real"), ("complex", True), ("half", True)],
)
@pytest.mark.slow
def test_models(name, screened):
    sampler = nk.sampler.MetropolisLocal(SPINS, n_chains=4)
    assert_same_chain(sampler, compat.MLP(**MODELS[name]), screened=screened)


OPTIONS = {
    "float64": {"dtype": float},
    "float32": {"dtype": jnp.float32},
    "power": {"machine_pow": 1.5},
    "sweep": {"sweep_size": 3},
    "reset": {"reset_chains": True},
}


@pytest.mark.parametrize("name", cases.first({"float32"}, OPTIONS))
def test_options_of_the_sampler(name):
    sampler = nk.sampler.MetropolisLocal(SPINS, n_chains=4, **OPTIONS[name])
    assert_same_chain(sampler, compat.MLP(**MODELS["real"]))


def test_other_models_take_netkets_path():
    assert_same_chain(
        nk.sampler.MetropolisLocal(SPINS, n_chains=4), nk.models.MLP(hidden_dims=(5,))
    )


def test_chunked_sampler_takes_netkets_path():
    sampler = nk.sampler.MetropolisLocal(SPINS, n_chains=4).replace(chunk_size=2)
    assert structured(sampler).chunk_size == 2
    assert_same_chain(sampler, compat.MLP(**MODELS["real"]))


def test_no_product_with_the_first_layer_inside_the_sweep():
    sampler = structured(nk.sampler.MetropolisLocal(SPINS, n_chains=4))
    model = compat.MLP(hidden_dims=(5,))
    variables = model.init(jax.random.key(0), jnp.ones((1, 6)))
    state = sampler.init_state(model, variables, seed=1)
    text = str(jax.make_jaxpr(lambda s: sampler.sample_next(model, variables, s))(state))
    # One before the sweep, and one of the output layer within.
    assert text.count("dot_general") == 2


def programs(stock, model):
    """Returns those of a step of NetKet's sampler, of ours, and of ours screened."""
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, stock.hilbert.size)))
    state = jax.eval_shape(lambda: stock.init_state(model, variables, seed=1))
    samplers = stock, structured(stock), structured(stock, screened=True)
    steps = [lambda v, s, sampler=sampler: sampler.sample_next(model, v, s) for sampler in samplers]
    return [str(jax.make_jaxpr(step)(variables, state)) for step in steps]


@pytest.mark.parametrize("name", cases.first({"local", "exchange", "many_changes"}, RULES))
def test_the_first_layer_is_carried_along_for_each_rule(name):
    stock, ours, screened = programs(
        nk.sampler.MetropolisSampler(*RULES[name], n_chains=4), compat.MLP(**MODELS["real"])
    )
    assert len({stock, ours, screened}) == 3


@pytest.mark.parametrize(
    ("name", "gains"), [("single", True), ("linear", False), ("half", False), ("trainable", False)]
)
def test_models_that_gain(name, gains):
    stock, ours, _ = programs(
        nk.sampler.MetropolisLocal(SPINS, n_chains=4), compat.MLP(**MODELS[name])
    )
    assert (ours != stock) == gains


def test_single_precision_is_decided_again_in_doubt():
    """Whether it is asked for or not."""
    stock, ours, screened = programs(
        nk.sampler.MetropolisLocal(SPINS, n_chains=4), compat.MLP(**MODELS["single"])
    )
    assert ours == screened != stock


@pytest.mark.parametrize(
    ("rule", "width", "gains"),
    [("local", 5, False), ("local", 2**21, True), ("hamiltonian", 5, False), ("exchange", 5, True)],
)
def test_on_an_accelerator(monkeypatch, rule, width, gains):
    """Exchanges gain, and layers whose products take time; no condition waits for the host."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    stock, ours, screened = programs(
        nk.sampler.MetropolisSampler(*RULES[rule], n_chains=4), compat.MLP(hidden_dims=(width,))
    )
    assert ours == screened
    assert (ours != stock) == gains


def test_samplers_that_are_not_metropolis_come_back():
    exact = nk.sampler.ExactSampler(SPINS)
    assert structured(exact) is exact
    tempering = nk.sampler.ParallelTemperingLocal(SPINS, n_replicas=2, n_chains=4)
    assert structured(tempering) is tempering
    with pytest.raises(TypeError, match="sampler must be a sampler of NetKet, got 'local'"):
        structured("local")


def test_a_sampler_is_not_screened_unasked():
    made = sampler_module.StructuredMetropolis(SPINS, rules.LocalRule(), n_chains=4)
    assert not made.screened


def test_structured_again_changes_the_screening_alone():
    sampler = structured(nk.sampler.MetropolisLocal(SPINS, n_chains=4))
    again = structured(sampler, screened=True)
    assert (sampler.screened, again.screened) == (False, True)
    assert jax.tree.structure(structured(again)) == jax.tree.structure(sampler)


@pytest.mark.parametrize(
    "stock",
    [
        nk.sampler.MetropolisLocal(SPINS, n_chains=4, sweep_size=3, dtype=float),
        nk.sampler.MetropolisExchange(ZERO, graph=CHAIN, reset_chains=True),
        nk.sampler.MetropolisHamiltonian(
            SPINS, hamiltonian=nk.operator.IsingJax(SPINS, CHAIN, h=1.0), machine_pow=1.5
        ),
        nk.sampler.MetropolisFermionHop(FERMIONS, graph=HALF_CHAIN, n_chains_per_rank=2),
    ],
    ids=lambda stock: type(stock.rule).__name__,
)
def test_constructors(stock):
    """All that NetKet's constructors set is set, and nothing else but the screening."""
    ours, expected = vars(structured(stock)), vars(stock) | {"screened": False}
    assert set(ours) == set(expected)
    for name, value in expected.items():
        assert jax.tree.all(jax.tree.map(np.array_equal, ours[name], value)), name


def test_equal_samplers_share_a_program():
    traced = []

    @jax.jit
    def number_of_chains(sampler):
        traced.append(sampler.screened)
        return sampler.machine_pow * sampler.n_chains

    stock = nk.sampler.MetropolisLocal(SPINS, n_chains=4)
    for screened in (False, False, True):
        number_of_chains(structured(stock, screened=screened))
    assert traced == [False, True]


class TestState:
    stock = nk.sampler.MetropolisLocal(SPINS, n_chains=4)
    model = compat.MLP(hidden_dims=(5,))

    def state(self, sampler):
        return nk.vqs.MCState(sampler, self.model, n_samples=16, seed=1)

    def test_samples_like_stock_across_resets(self):
        ours, stock = self.state(structured(self.stock)), self.state(self.stock)
        for _ in range(2):
            np.testing.assert_array_equal(ours.samples, stock.samples)
            assert ours.sampler_state.acceptance == stock.sampler_state.acceptance
            ours.reset()
            stock.reset()

    @pytest.mark.parametrize("ours_first", [False, True])
    def test_checkpoints_cross(self, ours_first):
        samplers = [self.stock, structured(self.stock)]
        first, second = map(self.state, samplers[::-1] if ours_first else samplers)
        first.sample()
        second = flax.serialization.from_bytes(second, flax.serialization.to_bytes(first))
        np.testing.assert_array_equal(second.samples, first.samples)

    def test_pickle(self):
        sampler = structured(self.stock, screened=True)
        copied = pickle.loads(pickle.dumps(sampler))
        structure = jax.tree.structure(sampler)
        assert jax.tree.structure(copied) == structure
        assert hash(jax.tree.structure(copied)) == hash(structure)

    def test_energy_of_a_chunked_state(self):
        hamiltonian = nk.operator.IsingJax(SPINS, CHAIN, h=1.0)
        ours, stock = self.state(structured(self.stock)), self.state(self.stock)
        ours.chunk_size = stock.chunk_size = 8
        np.testing.assert_allclose(
            ours.expect(hamiltonian).mean, stock.expect(hamiltonian).mean, rtol=1e-12
        )


TRANSFORMS = {
    "jit": lambda f: jax.jit(f)(1.0),
    "grad": lambda f: jax.grad(f)(1.0) / 2,
    "vmap": lambda f: jax.vmap(f)(jnp.ones(2))[0],
    "jvp": lambda f: jax.jvp(f, (1.0,), (1.0,))[0],
    "jit of grad": lambda f: jax.jit(jax.grad(f))(1.0) / 2,
}


class TestPartsOfTheChains:
    """Swept side by side, each in a thread."""

    @pytest.fixture(autouse=True)
    def netkets_operators_promote_ranks(self):
        """In place of the module's: a context holds for one thread."""

    @pytest.fixture
    def parts(self, monkeypatch):
        """Makes small work worth threads, and tells how many there were, 0: in one part."""
        numbers = []

        def recorded(call, number):
            found = side_by_side(lambda i: (call(i), threading.get_ident()), number)
            numbers.append(len({thread for _, thread in found or []}))
            return found and [result for result, _ in found]

        monkeypatch.setattr(sampler_module, "_ENTRIES", 0)
        monkeypatch.setattr(sampler_module, "_CHAINS", 3)
        monkeypatch.setattr(sampler_module, "num_cores", lambda: 2)
        monkeypatch.setattr(sampler_module, "side_by_side", recorded)
        return numbers

    @pytest.mark.parametrize(
        ("name", "screened"),
        cases.first(
            {("local", False), ("exchange", True)},
            [(name, s) for name in ("local", "fock", "exchange", "fermions") for s in (0, 1)],
        ),
    )
    def test_the_same_chain(self, parts, name, screened):
        sampler = nk.sampler.MetropolisSampler(*RULES[name], n_chains=6)
        assert_same_chain(sampler, compat.MLP(**MODELS["real"]), screened=screened)
        assert parts == [2]

    @pytest.mark.parametrize(
        ("rule", "options", "model"),
        [
            ("hamiltonian", {}, {}),
            ("weighted_exchange", {}, {}),
            ("local", {"n_chains": 7}, {}),
            ("local", {"n_chains": 4}, {}),
            ("local", {}, {"hidden_dims": None}),
            ("local", {}, {"hidden_activations": nn.PReLU()}),
            ("exchange", {"dtype": float}, {}),
        ],
        ids=str,
    )
    def test_one_part(self, parts, rule, options, model):
        sampler = nk.sampler.MetropolisSampler(*RULES[rule], **{"n_chains": 6, **options})
        with jax.numpy_rank_promotion("allow"):
            assert_same_chain(sampler, compat.MLP(**{"hidden_dims": (5,), **model}))
        assert not parts

    def test_a_complex_model(self, parts):
        model = compat.MLP(**MODELS["complex"])
        assert_same_chain(nk.sampler.MetropolisLocal(SPINS, n_chains=6), model)
        assert parts == [2]

    @pytest.mark.parametrize(
        "dtype", cases.first([jnp.float32], [jnp.float32, jnp.complex64, jnp.bfloat16])
    )
    def test_low_precision(self, parts, dtype):
        """The rounding of half a product may be another, and decides."""
        model = compat.MLP(hidden_dims=(5,), param_dtype=dtype, hidden_activations=jnp.tanh)
        assert_same_chain(nk.sampler.MetropolisLocal(SPINS, n_chains=6), model)
        assert not parts

    @pytest.mark.parametrize("change", [None, "chunks", "accelerator", "devices", "core", "work"])
    def test_worth_threads(self, parts, monkeypatch, change):
        sampler, model = nk.sampler.MetropolisLocal(SPINS, n_chains=6), compat.MLP(hidden_dims=(5,))
        # 4 steps of 6 proposals for 6 chains each, 5 hidden units and one output
        monkeypatch.setattr(sampler_module, "_ENTRIES", 4 * 6 * 6 * 6 + (change == "work"))
        if change == "chunks":
            sampler = sampler.replace(chunk_size=2)
        elif change == "accelerator":
            monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        elif change == "devices":
            monkeypatch.setattr(jax, "device_count", lambda: 2)
        elif change == "core":
            monkeypatch.setattr(sampler_module, "num_cores", lambda: 1)
        variables = model.init(jax.random.key(0), jnp.ones((1, 6)))
        sampler = structured(sampler)
        state = sampler.init_state(model, variables, seed=1)
        assert sampler._is_worth_threads(model, variables, state, 4) == (change is None)

    @pytest.mark.parametrize(("chain_length", "is_worth_it"), [(1, False), (10**6, True)])
    def test_work_that_is_worth_it(self, monkeypatch, chain_length, is_worth_it):
        model = compat.MLP(hidden_dims=(5,))
        sampler = structured(nk.sampler.MetropolisLocal(SPINS, n_chains=16))
        variables = model.init(jax.random.key(0), jnp.ones((1, 6)))
        state = sampler.init_state(model, variables, seed=1)
        monkeypatch.setattr(sampler_module, "num_cores", lambda: 2)
        assert sampler._is_worth_threads(model, variables, state, chain_length) == is_worth_it

    @pytest.mark.parametrize(
        ("name", "of_constants"),
        cases.first(
            {("jit", False), ("grad", True)},
            [(name, constants) for name in TRANSFORMS for constants in (True, False)],
        ),
    )
    def test_while_traced(self, parts, name, of_constants):
        """In one part, which is how it was compiled before."""
        model = compat.MLP(hidden_dims=(5,))
        sampler = structured(nk.sampler.MetropolisLocal(SPINS, n_chains=6))
        variables = model.init(jax.random.key(0), jnp.ones((1, 6)))
        state = sampler.reset(model, variables, sampler.init_state(model, variables, seed=1))

        def squared(t):
            ones = jax.tree.map(lambda a: a if of_constants else a * t / t, variables)
            x, _ = sampler.sample(model, ones, state=state, chain_length=5)
            return t**2 * jnp.sum(x.astype(float) @ jnp.arange(6.0))

        expected = squared(1.0)
        assert parts == [2]
        assert TRANSFORMS[name](squared) == expected
        assert set(parts[1:]) <= {0}

    def test_variables_of_another_model(self, parts):
        """Whose leaves are numbers."""
        sampler = structured(nk.sampler.MetropolisLocal(SPINS, n_chains=6))

        def log_psi(variables, x):
            return variables["a"] * jnp.sum(x, -1) + variables["b"][0]

        state = sampler.init_state(log_psi, {"a": 0.1, "b": [0.2]}, seed=1)
        samples, _ = sampler.sample(log_psi, {"a": 0.1, "b": [0.2]}, state=state)
        assert samples.shape == (6, 1, 6)
        assert not parts

    def test_state_of_another_number_of_chains(self, parts):
        model, many = compat.MLP(hidden_dims=(5,)), nk.sampler.MetropolisLocal(SPINS, n_chains=12)
        variables = model.init(jax.random.key(0), jnp.ones((1, 6)))
        state = many.reset(model, variables, many.init_state(model, variables, seed=1))
        stock = nk.sampler.MetropolisLocal(SPINS, n_chains=6)
        for sampler in (stock, structured(stock)):
            with pytest.raises(ValueError, match=r"shape=\(12, 6\)"):
                sampler.sample(model, variables, state=state)
        assert not parts


def test_in_a_thread_without_netkets_mesh():
    model, stock = compat.MLP(hidden_dims=(5,)), nk.sampler.MetropolisLocal(SPINS, n_chains=4)
    hamiltonian = nk.operator.IsingJax(SPINS, CHAIN, h=1.0)

    def energy(sampler):
        with jax.numpy_rank_promotion("allow"):
            return nk.vqs.MCState(sampler, model, n_samples=16, seed=1).expect(hamiltonian).mean

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        ours, theirs = pool.map(energy, [structured(stock), stock])
    assert ours == theirs


class TestSideBySide:
    @pytest.fixture(autouse=True)
    def netkets_operators_promote_ranks(self):
        """In place of the module's: a context holds for one thread."""

    @staticmethod
    def called(number=4):
        """Returns the results, the number of programs and the threads of the calls."""
        traced, threads = [], []

        @jax.jit
        def square(i):
            traced.append(i)
            return i**2

        def call(i):
            threads.append(threading.get_ident())
            return square(i)

        return [int(a) for a in side_by_side(call, number)], len(traced), threads

    def test_one_program(self):
        results, num_programs, threads = self.called()
        assert (results, num_programs) == ([0, 1, 4, 9], 1)
        assert threads[0] == threading.get_ident()
        assert threading.get_ident() not in threads[1:]

    def test_settings_of_one_thread(self):
        """Another thread, where these do not hold, would compile another program."""
        with jax.default_matmul_precision("float32"):
            assert side_by_side(self.fail, 2) is None

    def test_traced(self):
        jax.jit(lambda: self.none())()
        jax.vmap(lambda x: self.none() or x)(jnp.ones(2))

    def none(self):
        assert side_by_side(self.fail, 2) is None

    def test_old_jax(self, monkeypatch):
        monkeypatch.delattr(jax.sharding, "get_mesh")
        self.none()

    @pytest.mark.slow
    def test_when_python_shuts_down(self):
        code = """
            import atexit
            from compat.netket.threads import side_by_side
            atexit.register(lambda: print(side_by_side(lambda i: i, 2)))
            print(side_by_side(lambda i: i, 2))
        """
        command = [sys.executable, "-c", textwrap.dedent(code)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert output.split("\n")[:2] == ["[0, 1]", "None"]

    @staticmethod
    def fail(_):
        raise AssertionError("no call comes from anywhere")

    @pytest.mark.parametrize(("counted", "number"), [(3, 3), (None, 1)])
    def test_cores_where_the_system_tells_not_whose(self, monkeypatch, counted, number):
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: counted)
        assert num_cores() == number

    def test_errors_are_raised(self):
        def call(i):
            return 1 // (2 - i)

        with pytest.raises(ZeroDivisionError):
            side_by_side(call, 3)
