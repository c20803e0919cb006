"""The Flax faces: the MLP here, any Haiku module or function from the files beside it."""

from flax import linen as nn

import haiku_mlp
from haiku_mlp.arguments import Arguments, shared

from .blocks import Perceptron
from .functions import HaikuFunction as HaikuFunction
from .wrapping import wrap as wrap


class MLP(Arguments, Perceptron, haiku=haiku_mlp.MLP):
    """A multi-layer perceptron with one output, a Flax module.

    :class:`haiku_mlp.MLP` with the fields, the parameter tree (``MLP_0``, ``Dense_0``,
    ``kernel``, ``bias``) and, from the same key, the initial values of
    ``netket.models.MLP``.  By default it is one linear layer.

    See :class:`haiku_mlp.MLP` for what to mind when it is the logarithm of a wave
    function.

    Args:
      hidden_dims: Sizes of the hidden layers: an int, or one for each layer.
      hidden_dims_alpha: Sizes of the hidden layers as multiples of the input size, in place
        of ``hidden_dims``.
      param_dtype: dtype of the parameters; a 64-bit one becomes 32-bit where x64 is off.
      hidden_activations: Activation after each hidden layer: one for all, or one (or None)
        for each.
      output_activation: Activation after the output layer.
      use_hidden_bias: Whether the hidden layers have a bias.
      use_output_bias: Whether the output layer has a bias.
      precision: Precision of the products, see :class:`jax.lax.Precision`.
      kernel_init: Initializer of the weights, ``(key, shape, dtype)``.
      bias_init: Initializer of the biases, ``(key, shape, dtype)``.

    Raises:
      ValueError: Both sizes are given, a size is not positive, the number of
        activations is not that of the hidden layers, or the precision is unknown.
      TypeError: The dtype is unknown, or an activation or initializer is not callable.

    Source: `Multi-layer perceptron of NetKet
    <https://netket.readthedocs.io/en/latest/api/_generated/models/netket.models.MLP.html>`_.

    Example::

      >>> import jax, jax.numpy as jnp
      >>> import compat
      >>> model = compat.MLP(hidden_dims=(8, 8))
      >>> variables = model.init(jax.random.key(0), jnp.ones((5, 3)))
      >>> jax.tree.map(jnp.shape, variables["params"]["MLP_0"]["Dense_0"])
      {'bias': (8,), 'kernel': (3, 8)}
      >>> model.apply(variables, jnp.ones((5, 3))).shape
      (5,)
    """

    tangent_kernel = Perceptron.tangent_kernel  # in place of Haiku's

    @nn.nowrap
    def _haiku(self) -> haiku_mlp.MLP:
        return haiku_mlp.MLP(**shared(self))
