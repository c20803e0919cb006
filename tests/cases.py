"""The table of cases: configurations of the MLP, and inputs."""

import contextlib
import itertools

import jax
import jax.numpy as jnp
import netket as nk
import numpy as np
import pytest

import compat


@contextlib.contextmanager
def x64(enabled):
    """Turns x64 on or off inside; ``jax.enable_x64`` is younger than JAX 0.7."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", enabled)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def split_gelu(z):
    """gelu of real and imaginary part apart."""
    return jax.lax.complex(jax.nn.gelu(z.real), jax.nn.gelu(z.imag))


def first(quick, names):
    """The names as parameters of a test, those not in ``quick`` marked slow.

    A name may be a tuple, one for each parameter.
    """
    return [
        pytest.param(
            *(name if isinstance(name, tuple) else (name,)),
            marks=[pytest.mark.slow] * (name not in quick),
        )
        for name in names
    ]


def cover(*axes):
    """All combinations as parameters; those beyond a few that show each value marked slow."""
    sizes = [len(axis) for axis in axes]
    quick = {tuple(i % size for size in sizes) for i in range(max(sizes))}
    return [
        pytest.param(
            *(axis[i] for axis, i in zip(axes, index, strict=True)),
            marks=[pytest.mark.slow] * (index not in quick),
        )
        for index in itertools.product(*map(range, sizes))
    ]


FACES = {
    "MLP": (compat.MLP, nk.models.MLP),
    "block": (compat.blocks.MLP, nk.nn.blocks.MLP),
}
"""Our model and NetKet's, our block and NetKet's."""

GOOD = {
    "default": {},
    "one_layer": {"hidden_dims": (8,)},
    "two_layers": {"hidden_dims": (8, 5)},
    "empty_dims": {"hidden_dims": ()},
    "alpha": {"hidden_dims_alpha": (2, 1)},
    "fractional_alpha": {"hidden_dims_alpha": (1.5,)},
    "float32": {"hidden_dims": (8,), "param_dtype": jnp.float32},
    "bfloat16": {"hidden_dims": (8,), "param_dtype": jnp.bfloat16},
    "float16": {"hidden_dims": (8,), "param_dtype": "float16"},
    "complex": {"hidden_dims": (8, 5), "param_dtype": complex},
    "complex64": {"hidden_dims": (8,), "param_dtype": jnp.complex64},
    "activations": {"hidden_dims": (8, 5), "hidden_activations": (jnp.tanh, None)},
    "no_activation": {"hidden_dims": (8,), "hidden_activations": None},
    "one_activation": {"hidden_dims": (8, 5), "hidden_activations": jax.nn.silu},
    "output_activation": {"hidden_dims": (8,), "output_activation": jnp.sinh},
    "no_hidden_bias": {"hidden_dims": (8,), "use_hidden_bias": False},
    "output_bias": {"hidden_dims": (8,), "use_output_bias": True},
    "precision": {"hidden_dims": (8,), "precision": jax.lax.Precision.HIGHEST},
    "precision_pair": {"hidden_dims": (8,), "precision": ("high", "highest")},
    "kernel_init": {"hidden_dims": (8,), "kernel_init": jax.nn.initializers.orthogonal()},
    "bias_init": {
        "hidden_dims": (8,),
        "use_output_bias": True,
        "bias_init": jax.nn.initializers.normal(0.1),
    },
    "no_bias_init": {"use_hidden_bias": False, "use_output_bias": False, "bias_init": None},
    "default_dtype": {"hidden_dims": (8,), "use_output_bias": True, "param_dtype": None},
    "int_parameters": {"param_dtype": int, "kernel_init": jax.nn.initializers.ones},
}
"""Keyword arguments that NetKet takes too."""

BEYOND = {
    "int_dims": ({"hidden_dims": 8}, {"hidden_dims": (8,)}),
    "int_alpha": ({"hidden_dims_alpha": 2}, {"hidden_dims_alpha": (2,)}),
    "list": ({"hidden_dims": [8, 5]}, {"hidden_dims": (8, 5)}),
    "array": ({"hidden_dims": np.array([8, 5])}, {"hidden_dims": (8, 5)}),
    "array_alpha": (
        {"hidden_dims_alpha": jnp.array([2.0])},
        {"hidden_dims_alpha": (np.float64(2),)},
    ),
    "activation_list": (
        {"hidden_dims": (8,), "hidden_activations": [jnp.tanh]},
        {"hidden_dims": (8,), "hidden_activations": (jnp.tanh,)},
    ),
}
"""Keyword arguments that NetKet does not take, or hash, and those that mean the same."""

BAD = {
    "both": ({"hidden_dims": (8,), "hidden_dims_alpha": (2,)}, ValueError, "both given"),
    "zero": ({"hidden_dims": (0,)}, ValueError, "positive integers, got 0"),
    "negative": ({"hidden_dims": (8, -1)}, ValueError, "positive integers, got -1"),
    "fraction": ({"hidden_dims": (8.0,)}, ValueError, "positive integers, got 8.0"),
    "zero_alpha": ({"hidden_dims_alpha": 0}, ValueError, "positive numbers"),
    "text": ({"hidden_dims": "16"}, ValueError, "positive integers, got '16'"),
    "text_alpha": ({"hidden_dims_alpha": ("a",)}, ValueError, "positive numbers"),
    "number_as_text": ({"hidden_dims_alpha": "2"}, ValueError, "positive numbers"),
    "matrix_alpha": ({"hidden_dims_alpha": np.ones((1, 1))}, ValueError, "positive numbers"),
    "few_activations": (
        {"hidden_dims": (8, 5), "hidden_activations": (jnp.tanh,)},
        ValueError,
        "1 entries for 2 hidden layers",
    ),
    "many_activations": (
        {"hidden_activations": (jnp.tanh,)},
        ValueError,
        "1 entries for 0 hidden layers",
    ),
    "name_of_an_activation": (
        {"hidden_dims": 8, "hidden_activations": "relu"},
        TypeError,
        "hidden_activations must be callable or None, got 'relu'",
    ),
    "text_activation": (
        {"hidden_dims": 8, "hidden_activations": ("gelu",)},
        TypeError,
        "hidden_activations must be callable",
    ),
    "text_output": ({"output_activation": "gelu"}, TypeError, "output_activation must be callable"),
    "dtype": ({"param_dtype": "float99"}, TypeError, "param_dtype must be a dtype"),
    "precision": ({"precision": "extreme"}, ValueError, "precision must be"),
    "array_dtype": ({"param_dtype": np.ones(2)}, TypeError, "param_dtype must be a dtype"),
    "dict_precision": ({"precision": {}}, ValueError, "precision must be"),
    "kernel_init": ({"kernel_init": None}, TypeError, "kernel_init must be an initializer"),
    "bias_init": (
        {"use_output_bias": True, "bias_init": 0.0},
        TypeError,
        "bias_init must be an initializer",
    ),
}
"""Keyword arguments that are refused: with the exception and a part of its message."""

_RNG = np.random.default_rng(0)

INPUTS = {
    "batch": _RNG.normal(size=(3, 4)),
    "vector": _RNG.normal(size=4),
    "deep_batch": _RNG.normal(size=(2, 1, 3, 4)),
    "empty_batch": np.zeros((0, 4)),
    "float32": _RNG.normal(size=(3, 4)).astype(np.float32),
    "complex": _RNG.normal(size=(3, 4)) + 1j * _RNG.normal(size=(3, 4)),
    "int8": _RNG.integers(-1, 2, size=(3, 4)).astype(np.int8),
    "bool": _RNG.integers(0, 2, size=(3, 4)).astype(bool),
    "jax": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4),
}
"""Inputs with four features."""
