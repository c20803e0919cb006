"""The table of Haiku modules: a function of one input for each, and that input.

Constructions, sizes and names are those of Haiku's own integration tests
(``haiku/_src/integration/descriptors.py``).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np


class Case(NamedTuple):
    """A Haiku function of one input."""

    function: Callable[[jax.Array], Any]
    shape: tuple[int, ...]
    dtype: Any = jnp.float32

    def input(self) -> np.ndarray:
        """Returns the input: normal numbers, or small integers."""
        rng = np.random.default_rng(0)
        if jnp.issubdtype(self.dtype, jnp.integer):
            return rng.integers(0, 6, self.shape).astype(self.dtype)
        return rng.normal(size=self.shape).astype(self.dtype)


class Ones(hk.RNNCore):
    """A core without parameters."""

    def initial_state(self, batch_size):
        return jnp.ones((batch_size, 128, 1))

    def __call__(self, inputs, state):
        return inputs, state


class AlwaysReset(hk.RNNCore):
    """Resets a core at each step."""

    def __init__(self, core, name=None):
        super().__init__(name=name)
        self.core = hk.ResetCore(core)

    def initial_state(self, batch_size):
        return self.core.initial_state(batch_size)

    def __call__(self, inputs, state):
        return self.core((inputs, np.broadcast_to(True, len(inputs))), state)


def _unrolled(make_core: Callable[[], hk.RNNCore], unroll: Callable[..., Any]):
    def function(x):
        core = make_core()
        state = jax.tree.map(lambda v: v.astype(x.dtype), core.initial_state(len(x)))
        return unroll(core, x[None], state)

    return function


def _training(make: Callable[[], hk.Module]):
    return lambda x: make()(x, is_training=True)


def _attention(x):
    with jax.numpy_rank_promotion("allow"):
        return hk.MultiHeadAttention(8, 64, w_init=hk.initializers.VarianceScaling())(x, x, x)


def _mobile_net():
    return hk.nets.MobileNetV1(strides=(1, 1, 1), channels=(16, 32, 64), num_classes=1000)


_CORES = {
    "ResetCore": (lambda: AlwaysReset(Ones()), (8, 128)),
    "GRU": (lambda: hk.GRU(1), (8, 128)),
    "IdentityCore": (hk.IdentityCore, (8, 128)),
    "LSTM": (lambda: hk.LSTM(1), (8, 128)),
    "Conv1DLSTM": (lambda: hk.Conv1DLSTM([2], 3, 3), (8, 2, 2)),
    "Conv2DLSTM": (lambda: hk.Conv2DLSTM([2, 2], 3, 3), (8, 2, 2, 2)),
    "Conv3DLSTM": (lambda: hk.Conv3DLSTM([2, 2, 2], 3, 3), (8, 2, 2, 2, 2)),
    "VanillaRNN": (lambda: hk.VanillaRNN(8), (8, 128)),
}

MODULES = {
    "Embed": Case(lambda x: hk.Embed(vocab_size=6, embed_dim=12)(x), (8,), jnp.int32),
    "Linear": Case(lambda x: hk.Linear(10)(x), (8, 1)),
    "Sequential": Case(lambda x: hk.Sequential([])(x), (8, 2, 2)),
    "nets.MLP": Case(lambda x: hk.nets.MLP([3, 4, 5])(x), (8, 3)),
    "ConvND": Case(lambda x: hk.ConvND(1, 3, 3)(x), (8, 2, 2)),
    "ConvNDTranspose": Case(lambda x: hk.ConvNDTranspose(1, 3, 3)(x), (8, 2, 2)),
    "Conv1D": Case(lambda x: hk.Conv1D(3, 3)(x), (8, 2, 2)),
    "Conv1DTranspose": Case(lambda x: hk.Conv1DTranspose(3, 3)(x), (8, 2, 2)),
    "Conv2D": Case(lambda x: hk.Conv2D(3, 3)(x), (8, 2, 2, 2)),
    "Conv2DTranspose": Case(lambda x: hk.Conv2DTranspose(3, 3)(x), (8, 2, 2, 2)),
    "Conv3D": Case(lambda x: hk.Conv3D(3, 3)(x), (8, 2, 2, 2, 2)),
    "Conv3DTranspose": Case(lambda x: hk.Conv3DTranspose(3, 3)(x), (8, 2, 2, 2, 2)),
    "BatchNorm": Case(_training(lambda: hk.BatchNorm(True, True, 0.9)), (8, 2, 2, 3)),
    "Bias": Case(lambda x: hk.Bias()(x), (8, 3, 3, 3)),
    "Flatten": Case(lambda x: hk.Flatten()(x), (8, 3, 3, 3)),
    "InstanceNorm": Case(lambda x: hk.InstanceNorm(True, True)(x), (8, 3, 2)),
    "GroupNorm": Case(lambda x: hk.GroupNorm(5)(x), (8, 4, 4, 10)),
    "LayerNorm": Case(lambda x: hk.LayerNorm(1, True, True, param_axis=-1)(x), (8, 3, 2)),
    "MultiHeadAttention": Case(_attention, (8, 3, 2)),
    "RMSNorm": Case(lambda x: hk.RMSNorm(1)(x), (8, 3, 2)),
    "SpectralNorm": Case(lambda x: hk.SpectralNorm()(x), (8, 3, 2)),
    "nets.ResNet": Case(_training(lambda: hk.nets.ResNet((1, 2, 1, 1), 10)), (8, 3, 3, 2)),
    "nets.MobileNetV1": Case(_training(_mobile_net), (8, 64, 64, 2)),
    "nets.VectorQuantizer": Case(
        _training(lambda: hk.nets.VectorQuantizer(64, 512, 0.25)), (8, 64)
    ),
    "nets.VectorQuantizerEMA": Case(
        _training(lambda: hk.nets.VectorQuantizerEMA(64, 512, 0.25, 0.9)), (8, 64)
    ),
    "DepthwiseConv1D": Case(lambda x: hk.DepthwiseConv1D(1, 3)(x), (8, 2, 2)),
    "DepthwiseConv2D": Case(lambda x: hk.DepthwiseConv2D(1, 3)(x), (8, 2, 2, 2)),
    "DepthwiseConv3D": Case(lambda x: hk.DepthwiseConv3D(1, 3)(x), (8, 2, 2, 2, 2)),
    "SeparableDepthwiseConv2D": Case(lambda x: hk.SeparableDepthwiseConv2D(1, 3)(x), (8, 2, 2, 2)),
    **{
        f"{name}, {unroll.__name__}": Case(_unrolled(core, unroll), shape)
        for unroll in (hk.dynamic_unroll, hk.static_unroll)
        for name, (core, shape) in _CORES.items()
    },
}
