"""Four devices: the tests of two files that must run in a process which has them."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

import haiku_mlp

HERE = pathlib.Path(__file__).parent


@pytest.mark.parametrize(
    ("file", "environment", "number"),
    [
        pytest.param(
            "scripts/four_devices.py",
            {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
            28,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "scripts/four_devices_netket.py",
            {"NETKET_EXPERIMENTAL_SHARDING_CPU": "4"},
            8,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_on_four_devices(file, environment, number):
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / file],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout
    assert f"\n{number} passed" in process.stdout


def test_specs_of_an_mlp():
    """Pairs of layers: outputs split, then rows split; the last has its rows split."""
    by_depth = {
        1: [P()],
        2: [P(None, "hidden"), P("hidden", None)],
        3: [P(None, "hidden"), P("hidden", None), P("hidden", None)],
        4: [P(None, "hidden"), P("hidden", None), P(None, "hidden"), P("hidden", None)],
    }
    for depth, expected in by_depth.items():
        params = {f"mlp/block/linear_{i}": {"w": jnp.ones((4, 4))} for i in range(depth)}
        specs = haiku_mlp.partition_specs(params, "hidden")
        assert [specs[name]["w"] for name in params] == expected


def test_specs_beside_an_mlp():
    """Members of an ensemble stay whole; what is no MLP is whole."""
    matrix = jax.ShapeDtypeStruct((3, 4, 4), float)
    vector = jax.ShapeDtypeStruct((3, 4), float)
    params = {
        "net/head/linear_0": {"w": matrix, "b": vector},
        "net/head/linear_1": {"w": matrix, "b": vector},
        "net/linear_1": {"w": matrix},
        "net/norm": {"scale": vector},
        "~": {"offset": vector},
    }
    assert haiku_mlp.partition_specs(params) == {
        "net/head/linear_0": {"w": P(None, None, "model"), "b": P(None, "model")},
        "net/head/linear_1": {"w": P(None, "model", None), "b": P()},
        "net/linear_1": {"w": P()},
        "net/norm": {"scale": P()},
        "~": {"offset": P()},
    }


def test_specs_of_an_optimiser_are_refused():
    state = optax.adam(0.1).init({"linear": {"w": jnp.ones((4, 4))}})
    with pytest.raises(ValueError, match=r"got tuple; .* optimiser\.init\(params\)"):
        haiku_mlp.partition_specs(state)


def test_specs_of_a_flax_tree_are_refused():
    params = {"MLP_0": {"Dense_0": {"kernel": jnp.ones((4, 4))}}}
    with pytest.raises(ValueError, match="MLP_0/Dense_0 must be an array, got dict: give Haiku"):
        haiku_mlp.partition_specs(params)
