"""The multi-layer perceptron with one output."""

from collections.abc import Iterable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

from haiku_mlp import arguments, blocks
from haiku_mlp.arguments import Activation, Activations
from haiku_mlp.initializers import Initializer, default_bias_init, default_kernel_init


class MLP(hk.Module):
    """A multi-layer perceptron with one output: a wave function, an energy, a regressor.

    The same model as ``netket.models.MLP``, with its defaults and, from the same
    weights, its numbers bit for bit.  By default it is one linear layer.

    As the logarithm of a wave function:

    - Real parameters give a real output, and so a positive wave function: a ground
      state with a sign structure needs complex parameters, or a basis in which the
      signs are known (Marshall's rule, for instance).
    - The default activation is the tanh form of gelu, which has poles near
      +-0.63 +- 2.76i.  With complex parameters on unbounded inputs (continuous
      space) the pre-activations meet them and the training diverges.  Give an
      activation that acts on real and imaginary part apart:
      ``lambda z: jax.lax.complex(jax.nn.gelu(z.real), jax.nn.gelu(z.imag))``.
    - relu has second derivatives only at its kinks, where automatic
      differentiation returns none.  Its kinetic energy misses them, and the energy
      comes out below the exact one, without an error.  Take a smooth activation
      wherever a Laplacian is taken.

    Args:
      hidden_dims: Sizes of the hidden layers: an int, or one for each layer.
      hidden_dims_alpha: Sizes of the hidden layers as multiples of the input size
        (rounded down), in place of ``hidden_dims``.  Neither: one linear layer.
      param_dtype: dtype of the parameters; a 64-bit one becomes its 32-bit
        counterpart where x64 is off.
      hidden_activations: Activation after each hidden layer: one callable for all,
        or one (or None) for each.  None: no activation.
      output_activation: Activation after the output layer, or None.
      use_hidden_bias: Whether the hidden layers have a bias.
      use_output_bias: Whether the output layer has a bias.
      precision: As for :func:`jax.lax.dot_general`.
      kernel_init: Initializer of the weights, JAX's ``(key, shape, dtype)`` or Haiku's
        ``(shape, dtype)``.
      bias_init: Initializer of the biases.
      name: Name of the module.

    Raises:
      ValueError: Both sizes are given, a size is not positive, or the number of
        activations is not that of the hidden layers.
      TypeError: An argument has the wrong type.

    Source: `Multi-layer perceptron of NetKet
    <https://netket.readthedocs.io/en/latest/api/_generated/models/netket.models.MLP.html>`_.

    Example::

      >>> import haiku as hk, jax, jax.numpy as jnp
      >>> import haiku_mlp
      >>> net = hk.transform(lambda x: haiku_mlp.MLP(hidden_dims=(8, 8))(x))
      >>> params = net.init(jax.random.key(0), jnp.ones((5, 3)))
      >>> list(params)
      ['mlp/block/linear_0', 'mlp/block/linear_1', 'mlp/block/linear_2']
      >>> net.apply(params, None, jnp.ones((5, 3))).shape
      (5,)
    """

    def __init__(
        self,
        hidden_dims: int | Iterable[int] | None = None,
        hidden_dims_alpha: float | Iterable[float] | None = None,
        param_dtype: Any = jnp.float64,
        hidden_activations: Activations = jax.nn.gelu,
        output_activation: Activation | None = None,
        use_hidden_bias: bool = True,
        use_output_bias: bool = False,
        precision: Any = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        name: str | None = None,
    ):
        super().__init__(name=name)
        self._arguments = arguments.check(
            hidden_dims=hidden_dims,
            hidden_dims_alpha=hidden_dims_alpha,
            param_dtype=param_dtype,
            hidden_activations=hidden_activations,
            output_activation=output_activation,
            use_hidden_bias=use_hidden_bias,
            use_output_bias=use_output_bias,
            precision=precision,
            kernel_init=kernel_init,
            bias_init=bias_init,
        )

    def __call__(self, input: jax.Array) -> jax.Array:
        """Returns ``(...)`` for inputs ``(..., N)``."""
        return blocks.MLP(1, **self._arguments, name="block")(input).squeeze(-1)
