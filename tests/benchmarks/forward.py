"""Jitted forward pass and gradient, against peers and the machine's own rate."""

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from peers import peers
from timing import ratios

SHAPES = {
    "small (16 inputs, 1 x 16, batch 16)": (16, (16,), 16),
    "VMC-sized (64 inputs, 2 x 256, batch 1024)": (64, (256, 256), 1024),
    "large (512 inputs, 2 x 1024, batch 1024)": (512, (1024, 1024), 1024),
}


def rows(budget: float) -> Iterator[tuple[str, ...]]:
    """Yields (what, ratio to the fastest peer): float32, both cores."""
    for shape, (num_inputs, hidden_dims, batch) in SHAPES.items():
        x = jax.random.normal(jax.random.key(1), (batch, num_inputs), jnp.float32)
        forward, gradient = {}, {}
        for name, (apply, weights) in peers(num_inputs, hidden_dims, jnp.float32).items():
            f = jax.jit(apply)
            g = jax.jit(jax.grad(lambda w, x, apply=apply: apply(w, x).sum()))
            forward[name] = lambda f=f, w=weights, x=x: f(w, x)
            gradient[name] = lambda g=g, w=weights, x=x: g(w, x)
        for kind, functions in (("forward", forward), ("gradient", gradient)):
            for name, value in ratios(functions, "raw jnp", budget=budget).items():
                yield f"{kind}, {shape}", name, str(value)


def matmul_rows() -> Iterator[tuple[str, ...]]:
    """Yields the fraction of the matrix-multiply rate that the large forward pass reaches."""
    num_inputs, hidden_dims, batch = SHAPES["large (512 inputs, 2 x 1024, batch 1024)"]
    sizes = (num_inputs, *hidden_dims, 1)
    operations = 2 * batch * sum(a * b for a, b in itertools.pairwise(sizes))
    apply, weights = peers(num_inputs, hidden_dims, jnp.float32)["haiku_mlp.MLP"]
    x = jnp.ones((batch, num_inputs), jnp.float32)
    device = jnp.ones((1024, 1024), jnp.float32)
    forward, dot = jax.jit(apply), jax.jit(jnp.dot)
    rates = {
        "haiku_mlp.MLP": operations / _best(lambda: forward(weights, x)),
        "NumPy": _rate_of_numpy(),
        "jnp.dot": 2 * 1024**3 / _best(lambda: dot(device, device)),
    }
    for name in ("NumPy", "jnp.dot"):
        value = f"{rates['haiku_mlp.MLP'] / rates[name]:.2f}"
        yield "large forward pass", f"fraction of the rate of {name}", value


def _rate_of_numpy() -> float:
    """Returns the rate on all cores: ``run.py`` leaves NumPy one."""
    code = """
import time
import numpy as np
square = np.ones((1024, 1024), np.float32)
times = []
for _ in range(15):
    begin = time.perf_counter()
    square @ square
    times.append(time.perf_counter() - begin)
print(min(times))
"""
    environment = {k: v for k, v in os.environ.items() if k != "OPENBLAS_NUM_THREADS"}
    output = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    return 2 * 1024**3 / float(output)


def _best(function: object, repeats: int = 15) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - begin)
    return min(times)
