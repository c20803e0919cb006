"""Stricter than users are: x64 on purpose, no rank promotion, warnings are errors (setup.cfg)."""

import gc
import os
import pathlib
import subprocess
import sys

import jaxlib.version

# Compiling is most of the time: half of the programs have been compiled before, by the other
# worker or for another face, the others are compiled in a third of the time without
# optimisations.  CI runs those of numbers optimised, as users run them.
if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    flags = ["--xla_cpu_parallel_codegen_split_count=1"]
    if jaxlib.version.__version_info__ < (0, 11):  # the newest know one way only
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])

import jax
import pytest
from hypothesis import HealthCheck, settings

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update(
    "jax_compilation_cache_dir", str(pathlib.Path(__file__).parent.parent / ".jax_cache")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

# The fuzz tests try the same models each time, more of them in CI, or new ones.
for name, number in {"few": 6, "many": 150, "new": 1000}.items():
    settings.register_profile(
        name,
        max_examples=number,
        derandomize=name != "new",
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
settings.load_profile("few")


def pytest_ignore_collect(collection_path, config):
    """Spares the fast tests the imports of other people's models, whose tests are all slow."""
    is_fast = config.getoption("markexpr") == "not slow"
    return True if is_fast and collection_path.name == "test_zoo.py" else None


def pytest_collection_finish():
    """Spares the garbage collector what lives on: modules, and most of what JAX holds."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


@pytest.fixture
def check_leaks():
    """Fails a test that lets a tracer out of its trace."""
    with jax.checking_leaks():
        yield


@pytest.fixture
def optimized():
    """Compiles as users do."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def run_fresh():
    """Runs code in a new interpreter: no x64, nothing imported.  Returns the process."""

    def run(code: str, *, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run
