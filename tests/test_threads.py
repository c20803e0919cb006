"""Models that are built, initialised, applied and shown in eight threads at once."""

import concurrent.futures
import sys
import threading

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compat
import haiku_mlp

THREADS = 8
MODELS = 4  # each by two threads at once
X = np.linspace(-1, 1, 12).reshape(3, 4)


@pytest.fixture
def often_switching():
    """Makes threads take turns within what is otherwise one turn."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def flax_mlp(number):
    """The face, with another depth and other sizes for each number."""
    model = compat.MLP(hidden_dims=(2 + number,) * (1 + number % 3))
    variables = model.init(jax.random.key(number), X)
    outputs, captured = model.apply(variables, X, capture_intermediates=True, mutable=True)
    return variables, outputs, captured, model.tabulate(jax.random.key(0), X)


def haiku_mlp_net(number):
    """The same in plain Haiku."""
    fields = {"hidden_dims": (2 + number,) * (1 + number % 3)}
    net = hk.without_apply_rng(hk.transform(lambda x: haiku_mlp.MLP(**fields)(x)))
    params = net.init(jax.random.key(number), X)
    return params, net.apply(params, X), compat.to_flax(params)


def wrapped(number):
    """A class that ``wrap`` makes, with state and random keys."""

    class Noisy(hk.Module):
        def __init__(self, size):
            super().__init__()
            self.size = size

        def __call__(self, x):
            count = hk.get_state("count", (), init=jnp.zeros)
            hk.set_state("count", count + 1)
            return hk.dropout(hk.next_rng_key(), 0.5, hk.Linear(self.size)(x)) + count

    model = compat.wrap(Noisy)(size=2 + number)
    variables = model.init(jax.random.key(number), X)
    rngs = {"dropout": jax.random.key(number)}
    return variables, model.apply(variables, X, rngs=rngs, mutable=["state"])


@pytest.mark.parametrize("work", [flax_mlp, haiku_mlp_net, wrapped])
@pytest.mark.slow
def test_threads_give_the_sequential_results(often_switching, work):
    expected = [work(number) for number in range(MODELS)]
    start = threading.Barrier(THREADS)

    def worker(number):
        start.wait(timeout=60)
        return [work((number + turn) % MODELS) for turn in range(2)]

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(worker, range(THREADS)))
    for number, turns in enumerate(results):
        for turn, result in enumerate(turns):
            jax.tree.map(np.testing.assert_array_equal, result, expected[(number + turn) % MODELS])


def test_one_model_in_all_threads():
    """One bound to one set of weights, which no thread changes."""
    model = compat.MLP(hidden_dims=(5, 3))
    variables = model.init(jax.random.key(0), X)
    inputs = [X * number for number in range(THREADS)]
    expected = [model.apply(variables, x) for x in inputs]
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for _ in range(3):
            results = list(pool.map(lambda x: model.apply(variables, x), inputs))
            np.testing.assert_array_equal(results, expected)


def test_wrap_gives_one_class_to_all_threads(often_switching):
    start = threading.Barrier(THREADS)

    def wrap(hk_cls):
        start.wait(timeout=60)
        return compat.wrap(hk_cls)

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for number in range(50):
            hk_cls = type(f"Net{number}", (hk.Linear,), {})
            classes = set(pool.map(wrap, [hk_cls] * THREADS))
            assert len(classes) == 1
