"""Parts of a program that run one after the other."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_identical

from haiku_mlp.sequence import after

TREE = {
    "float": np.array([-0.0, 0.0, np.nan, np.inf, 1.5]),
    "half": np.array([-0.0, 2.0], np.float16),
    "complex": np.array([1 + 2j, -0.0j]),
    "int": np.array([-128, 127], np.int8),
    "unsigned": np.array([255], np.uint8),
    "bool": np.array([True, False]),
}


@pytest.mark.parametrize("value", [-3.0, np.nan, -np.inf, 2 - 1j, 7])
def test_after_changes_nothing(value):
    tree = {**jax.tree.map(jnp.asarray, TREE), "key": jax.random.key(1), "text": "a"}
    arrays = {name: leaf for name, leaf in tree.items() if name != "text"}
    done = {"first": jnp.full((2, 3), value), "empty": jnp.zeros((0, 2))}
    found = jax.jit(lambda arrays, done: after(arrays, done))(arrays, done)
    key, expected = found.pop("key"), arrays.pop("key")
    assert_identical(jax.random.key_data(key), jax.random.key_data(expected))
    assert_identical(found, arrays)
    for name in ("float", "half"):
        np.testing.assert_array_equal(np.signbit(found[name]), np.signbit(TREE[name]))
    assert after(tree, done) is tree  # outside of a program things are in order anyway


def test_after_needs_what_is_done():
    """The compiler cannot leave it out."""

    def program(x, y):
        return after(y, jnp.cos(x))

    text = jax.jit(program).lower(jnp.ones(1), jnp.ones(2, jnp.int8)).compile().as_text()
    assert "cosine" in text


def test_after_has_the_derivative_of_what_it_returns():
    slope = jax.jit(jax.grad(lambda x: jnp.sum(after(x, x**2) ** 2)))(jnp.array([3.0, 1.0]))
    assert slope.tolist() == [6.0, 2.0]


@pytest.mark.slow
def test_determinants():
    """What decomposes many matrices never runs twice at once, which would stop it for ever."""
    script = pathlib.Path(__file__).parent / "scripts" / "determinants.py"
    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(script.parents[2]), "NPROC": "2"}
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "step"
