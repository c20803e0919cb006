"""The multi-layer perceptron with one output."""

import dataclasses
from typing import Any, ClassVar

import haiku as hk
import jax

from haiku_mlp import blocks, structure
from haiku_mlp.arguments import Arguments, check_is_of_its_call, shared, text


@dataclasses.dataclass(repr=False, eq=False)
class MLP(Arguments, hk.Module):  # type: ignore[misc]  # Haiku's __post_init__ is its __init__
    """A multi-layer perceptron with one output: a wave function, an energy, a regressor.

    The same model as ``netket.models.MLP``, with its defaults and, from the same
    weights, its numbers bit for bit.  By default it is one linear layer.
    :class:`haiku_mlp.blocks.MLP` is the same with several outputs.

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
      ValueError: Both sizes are given, a size is not positive, the number of
        activations is not that of the hidden layers, or the precision is unknown.
      TypeError: The dtype is unknown, or an activation or initializer is not callable.

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

    AUTO_REPR: ClassVar[bool] = False  # as in Linear

    name: str | None = None

    def __new__(cls, *args: Any, **arguments: Any) -> "MLP":  # noqa: D102
        if "output_dim" in arguments and cls.__init__ is MLP.__init__:
            raise TypeError(
                f"haiku_mlp.MLP has one output, got output_dim={arguments['output_dim']!r}: "
                "take haiku_mlp.blocks.MLP"
            )
        return super().__new__(cls)

    def __repr__(self) -> str:
        return text(self)

    def __call__(self, input: jax.Array) -> jax.Array:
        """Returns ``(...)`` for inputs ``(..., N)``."""
        return _block(self)(input).squeeze(-1)

    @hk.name_like("__call__")
    def tangent_kernel(
        self, x: jax.Array, y: jax.Array | None = None, *, chunk_size: int | None = None
    ) -> jax.Array:
        """Returns the tangent kernel ``(B, B')``, the Gram matrix of parameter derivatives.

        ``K[i, j]`` sums over the parameters the derivative of the output at ``x[i]`` times
        the conjugate derivative at ``y[j]``, without forming them:
        see :func:`haiku_mlp.structure.tangent_kernel`.

        Args:
          x: Inputs ``(B, N)``.
          y: Inputs ``(B', N)``; None: ``x``.
          chunk_size: Rows of the kernel computed at a time; None: all.

        Example::

          >>> import haiku as hk, jax, jax.numpy as jnp
          >>> import haiku_mlp
          >>> net = hk.transform(lambda x: haiku_mlp.MLP(hidden_dims=(8,)).tangent_kernel(x))
          >>> params = net.init(jax.random.key(0), jnp.ones((5, 3)))
          >>> list(params)
          ['mlp/block/linear_0', 'mlp/block/linear_1']
          >>> net.apply(params, None, jnp.ones((5, 3))).shape
          (5, 5)
        """
        return blocks.tangent_kernel(self, x, y, chunk_size)

    @hk.name_like("__call__")
    def connected(self, x: jax.Array, sites: jax.Array, values: jax.Array) -> jax.Array:
        """Returns ``(..., K)``, the outputs where a few entries of ``x`` change.

        Faster than evaluating the changed inputs, since only the changed entries pass the
        first layer: see :func:`haiku_mlp.structure.connected`.

        Args:
          x: Inputs ``(..., N)``.
          sites: Entries that change ``(..., K, m)``, integers.
          values: What they become ``(..., K, m)``; the present value changes nothing.

        Example::

          >>> import haiku as hk, jax, jax.numpy as jnp
          >>> import haiku_mlp
          >>> def flip_each(x):
          ...     sites = jnp.arange(x.shape[-1])[:, None]
          ...     return haiku_mlp.MLP(hidden_dims=(8,)).connected(x, sites, -x[..., None])
          >>> net = hk.transform(flip_each)
          >>> spins = jnp.ones((5, 3), jnp.int8)
          >>> params = net.init(jax.random.key(0), spins)
          >>> net.apply(params, None, spins).shape
          (5, 3)
        """
        check_is_of_its_call(self, "connected")
        return _block(self).connected(x, sites, values).squeeze(-1)

    @hk.name_like("__call__")
    def laplacian(
        self,
        x: jax.Array,
        *,
        features: structure.Features | None = None,
        weights: jax.Array | None = None,
    ) -> structure.Derivatives:
        """Returns value, gradient and Laplacian by the inputs, in one forward pass.

        The activations must act on each number by itself and be smooth:
        see :func:`haiku_mlp.structure.laplacian`.

        Args:
          x: Inputs ``(..., N)``, real.
          features: Function from ``(N,)`` to what the network takes, of which the derivatives
            are by ``x`` all the same: ``self(features(x))``.  None: none.
          weights: ``(N,)``, of the second derivatives in the Laplacian; None: all 1.

        Returns:
          ``value (...)``, ``gradient (..., N)`` and ``laplacian (...)``.

        Example::

          >>> import haiku as hk, jax, jax.numpy as jnp
          >>> import haiku_mlp
          >>> net = hk.transform(lambda x: haiku_mlp.MLP(hidden_dims=(8,)).laplacian(x))
          >>> params = net.init(jax.random.key(0), jnp.ones((5, 3)))
          >>> value, gradient, laplacian = net.apply(params, None, jnp.ones((5, 3)))
          >>> value.shape, gradient.shape, laplacian.shape
          ((5,), (5, 3), (5,))
        """
        check_is_of_its_call(self, "laplacian")
        value, gradient, laplacian = _block(self).laplacian(x, features=features, weights=weights)
        return structure.Derivatives(value.squeeze(-1), gradient.squeeze(-2), laplacian.squeeze(-1))


def _block(mlp: MLP) -> blocks.MLP:
    return blocks.MLP(1, **shared(mlp), name="block")
