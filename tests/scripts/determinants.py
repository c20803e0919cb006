"""Kernels and steps of a network with a determinant, compiled as one program each.

On two cores JAX stops for ever where a program decomposes two batches of matrices at once.
"""

import jax
import jax.numpy as jnp

import haiku_mlp
from haiku_mlp.structure import real_kernel


def function(params, x):
    matrix = jnp.tanh(x @ params["w"]).reshape(len(x), 16, 16) + jnp.eye(16)[None]
    for _ in range(3):
        matrix = jnp.tanh(matrix @ (params["m"] * matrix)) + jnp.eye(16)[None]
    return jnp.linalg.slogdet(matrix)[1]


def kernel(params, x, y=None, chunk_size=None):
    return haiku_mlp.tangent_kernel(function, params, x, y, chunk_size=chunk_size)


def step(params, x, **momentum):
    return haiku_mlp.natural_gradient(
        lambda params: function(params, x),
        params,
        kernel(params, x),
        jnp.ones(len(x)),
        1e-2,
        centered=False,
        **momentum,
    )


def main():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"w": (8, 256), "m": (16, 16)}
    params = {n: jax.random.normal(k, shapes[n]) for n, k in zip(shapes, keys, strict=False)}
    x = jax.random.normal(keys[2], (512, 8))
    real_kernel._LARGE = 1  # a kernel in blocks
    programs = {
        "blocks": lambda params, x: kernel(params, x),
        "columns": lambda params, x: kernel(params, x, x + 1),
        "chunks": lambda params, x: kernel(params, x[:256], chunk_size=128),
        "columns in chunks": lambda params, x: kernel(params, x[:256], x + 1, chunk_size=128),
        "momentum": lambda params, x: step(params, x, momentum=0.9, previous=params),
        "step": step,
    }
    for name, program in programs.items():
        compiled = jax.jit(program)
        for _ in range(5):
            jax.block_until_ready(compiled(params, x))
        print(name, flush=True)


if __name__ == "__main__":
    main()
