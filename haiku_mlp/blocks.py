"""The layers of a multi-layer perceptron, as many outputs wide as wanted."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import haiku as hk
import jax
import jax.numpy as jnp

from haiku_mlp import arguments, structure
from haiku_mlp.arguments import Activation, BlockArguments
from haiku_mlp.linear import Linear


@dataclasses.dataclass(repr=False, eq=False)
class MLP(BlockArguments, hk.Module):  # type: ignore[misc]  # as in mlp.py
    """A multi-layer perceptron with ``output_dim`` outputs.

    The block of which :class:`haiku_mlp.MLP` is made; the same model as
    ``netket.nn.blocks.MLP``, with its defaults.

    Args:
      output_dim: Number of outputs.
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
      >>> from haiku_mlp import blocks
      >>> net = hk.transform(lambda x: blocks.MLP(2, hidden_dims=(8,), name="head")(x))
      >>> params = net.init(jax.random.key(0), jnp.ones((5, 3)))
      >>> list(params)
      ['head/linear_0', 'head/linear_1']
      >>> net.apply(params, None, jnp.ones((5, 3))).shape
      (5, 2)
    """

    AUTO_REPR: ClassVar[bool] = False  # as in Linear

    name: str | None = None

    def __repr__(self) -> str:
        return arguments.text(self)

    def __call__(self, input: jax.Array) -> jax.Array:
        """Returns ``(..., output_dim)`` for inputs ``(..., N)``."""
        x = input
        for linear, activation in _layers(self, arguments.num_features(x)):
            x = linear(x)
            x = activation(x) if callable(activation) else x
        return x

    @hk.name_like("__call__")
    def tangent_kernel(
        self, x: jax.Array, y: jax.Array | None = None, *, chunk_size: int | None = None
    ) -> jax.Array:
        """Returns the tangent kernel ``(B, B', output_dim, output_dim)``.

        ``K[i, j, a, b]`` sums over the parameters the derivative of output ``a`` at
        ``x[i]`` times the conjugate derivative of output ``b`` at ``y[j]``:
        see :func:`haiku_mlp.structure.tangent_kernel`.

        Args:
          x: Inputs ``(B, N)``.
          y: Inputs ``(B', N)``; None: ``x``.
          chunk_size: Rows of the kernel computed at a time; None: all.
        """
        return tangent_kernel(self, x, y, chunk_size)

    @hk.name_like("__call__")
    def connected(self, x: jax.Array, sites: jax.Array, values: jax.Array) -> jax.Array:
        """Returns ``(..., K, output_dim)``, the outputs where a few entries of ``x`` change.

        See :func:`haiku_mlp.structure.connected`.

        Args:
          x: Inputs ``(..., N)``.
          sites: Entries that change ``(..., K, m)``.
          values: What they become ``(..., K, m)``.
        """
        arguments.check_is_of_its_call(self, "connected")
        return structure.connected(_as_structure(self, x), x, sites, values)

    @hk.name_like("__call__")
    def laplacian(
        self,
        x: jax.Array,
        *,
        features: structure.Features | None = None,
        weights: jax.Array | None = None,
    ) -> structure.Derivatives:
        """Returns value, gradient and Laplacian by the inputs, in one forward pass.

        See :func:`haiku_mlp.structure.laplacian`.

        Args:
          x: Inputs ``(..., N)``, real.
          features: Function from ``(N,)`` to what the network takes; None: none.
          weights: ``(N,)``, of the second derivatives in the Laplacian; None: all 1.

        Returns:
          ``value (..., output_dim)``, ``gradient (..., output_dim, N)`` and
          ``laplacian (..., output_dim)``.
        """
        arguments.check_is_of_its_call(self, "laplacian")
        inputs = x if features is None else jnp.vectorize(features, signature="(n)->(f)")(x)
        layers = _as_structure(self, inputs)
        return structure.laplacian(layers, x, features=features, weights=weights)


def tangent_kernel(
    module: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    y: jax.Array | None,
    chunk_size: int | None,
) -> jax.Array:
    """Returns the tangent kernel of a module that is called with ``(B, N)``."""
    arguments.check_batches(x, y)
    # In a transform of their own the modules that activations make are named afresh.
    net: Any = hk.without_apply_rng(hk.transform(lambda x: module(x)))
    read = _parameters_read(lambda: module(x))
    params = _tree(read, read.values())
    return structure.tangent_kernel(net.apply, params, x, y, chunk_size=chunk_size)


def _layers(block: MLP, input_size: int) -> list[tuple[Linear, Activation | None]]:
    """Returns the layers with their activations, first to last."""
    sizes = _hidden_sizes(block, input_size)
    use_bias = (*[block.use_hidden_bias] * len(sizes), block.use_output_bias)
    layers = [
        Linear(
            size,
            use_bias=bias,
            param_dtype=block.param_dtype,
            precision=block.precision,
            kernel_init=block.kernel_init,
            bias_init=block.bias_init,
            name=f"linear_{i}",
        )
        for i, (size, bias) in enumerate(zip((*sizes, block.output_dim), use_bias, strict=True))
    ]
    hidden_activations = arguments.for_each_layer(block.hidden_activations, len(sizes))
    return list(zip(layers, (*hidden_activations, block.output_activation), strict=True))


def _as_structure(block: MLP, x: jax.Array) -> tuple[structure.Layer, ...]:
    """Returns the layers with their parameters, those that the forward call of ``x`` uses."""
    if hk.running_init():
        block(x)  # makes those of the activations too, outside of what is traced below
    layers: list[structure.Layer] = []
    one = (*[1] * (jnp.ndim(x) - 1), arguments.num_features(x))
    h = jax.ShapeDtypeStruct(one, jnp.result_type(x))
    for linear, activation in _layers(block, h.shape[-1]):
        layer = structure.Layer(*linear._parameters(h.shape[-1]), None, linear.precision)
        z = jax.eval_shape(layer.affine, h)
        if callable(activation):
            layer = layer._replace(activation=_without_parameters(activation, z))
        h = jax.eval_shape(layer.activate, z)
        layers.append(layer)
    return tuple(layers)


def _without_parameters(activation: Activation, z: jax.ShapeDtypeStruct) -> Activation:
    """Returns ``activation`` as a function of arrays alone, for arrays like ``z``.

    It runs here once, in the order of the forward call: a module that it makes gets the same
    name there and here.  From then on it is a transform of its own, whose parameters are
    those of the same order.
    """
    # New functions, since JAX keeps what it traced for one that it knows.
    read = _parameters_read(lambda: jax.eval_shape(lambda z: activation(z), z))
    if not read:
        return activation
    pure: Any = hk.without_apply_rng(hk.transform(lambda z: activation(z)))
    init = functools.partial(jax.eval_shape, lambda z: pure.init(jax.random.key(0), z), z)
    parameters = _tree(_parameters_read(init), read.values())
    return jax.tree_util.Partial(pure.apply, parameters)  # a tree of its parameters


def _tree(
    names: Iterable[tuple[str, str]], values: Iterable[jax.Array]
) -> dict[str, dict[str, jax.Array]]:
    """Returns Haiku's tree of parameters with these modules and names."""
    tree: dict[str, dict[str, jax.Array]] = {}
    for (module, name), value in zip(names, values, strict=True):
        tree.setdefault(module, {})[name] = value
    return tree


def _parameters_read(run: Callable[[], Any]) -> dict[tuple[str, str], jax.Array]:
    """Returns the parameters that a call reads, by module and name, in that order."""
    stored = hk.get_params()
    read: dict[tuple[str, str], jax.Array] = {}

    def note(next_getter: Any, value: jax.Array, context: hk.GetterContext) -> jax.Array:
        # The stored value: getters before this one act again where it is read again.
        module, name = context.module_name, context.name
        read[module, name] = stored.get(module, {}).get(name, value)
        return next_getter(value)

    with hk.custom_getter(note):
        run()
    return read


def _hidden_sizes(block: MLP, input_size: int) -> tuple[int, ...]:
    dims: Any = block.hidden_dims
    alphas: Any = block.hidden_dims_alpha
    if alphas is None:
        return dims or ()
    sizes = tuple(int(alpha * input_size) for alpha in alphas)
    if min(sizes, default=1) < 1:
        raise ValueError(
            f"hidden_dims_alpha={alphas} gives layers of {sizes} units for "
            f"{input_size} inputs: each must have at least 1"
        )
    return sizes
