"""One affine layer."""

import dataclasses
from typing import Any, ClassVar

import haiku as hk
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from haiku_mlp import arguments
from haiku_mlp.initializers import (
    Initializer,
    as_haiku_initializer,
    default_bias_init,
    default_kernel_init,
)


@dataclasses.dataclass(eq=False)
class Linear(hk.Module):
    """An affine map ``x @ w + b`` of the last axis.

    Unlike :class:`haiku.Linear` the parameters have a dtype of their own, and input,
    weights and bias are promoted together, so int8 spins meet float64 or complex
    weights as in ``flax.linen.Dense``, whose operations it does in the same order.

    Args:
      output_size: Number of outputs.
      use_bias: Whether to add ``b``.
      param_dtype: dtype of ``w`` and ``b``; a 64-bit one becomes its 32-bit counterpart
        where x64 is off.
      precision: As for :func:`jax.lax.dot_general`.
      kernel_init: Initializer of ``w``, JAX's ``(key, shape, dtype)`` or Haiku's.
      bias_init: Initializer of ``b``.
      name: Name of the module.

    Example::

      >>> import haiku as hk, jax, jax.numpy as jnp
      >>> from haiku_mlp.linear import Linear
      >>> net = hk.transform(lambda x: Linear(3, param_dtype=jnp.float32)(x))
      >>> spins = jnp.ones((5, 4), jnp.int8)
      >>> params = net.init(jax.random.key(0), spins)
      >>> jax.tree.map(jnp.shape, params)
      {'linear': {'b': (3,), 'w': (4, 3)}}
      >>> net.apply(params, None, spins).shape
      (5, 3)
    """

    AUTO_REPR: ClassVar[bool] = False  # which takes as long as the rest of the constructor

    output_size: int
    use_bias: bool = True
    param_dtype: Any = jnp.float64
    precision: Any = None
    kernel_init: Initializer = dataclasses.field(default=default_kernel_init)
    bias_init: Initializer = dataclasses.field(default=default_bias_init)
    name: str | None = None

    def __repr__(self) -> str:
        return f"Linear(output_size={self.output_size}, name={self.name!r})"

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Returns ``(..., output_size)`` for inputs ``(..., input_size)``."""
        w, b = _weights(self, arguments.num_features(inputs))
        return affine(inputs, w, b, self.precision)

    # For code outside, which is not in the module's scope.  Not a public method: that would be a
    # call for compat to show.
    def _parameters(self, input_size: int) -> tuple[jax.Array, jax.Array | None]:
        """Returns ``w (input_size, output_size)`` and ``b (output_size,)``, or None for ``b``."""
        return _weights(self, input_size)


def _weights(layer: Linear, input_size: int) -> tuple[jax.Array, jax.Array | None]:
    arguments.check_weights(input_size, layer.output_size)
    # Without x64 JAX warns of each 64-bit dtype asked for; a dtype it has goes on as given.
    dtype = jax.dtypes.canonicalize_dtype(layer.param_dtype)
    # None, for which Haiku would take float32, is the default float, as in Flax.
    is_kept = layer.param_dtype is not None and dtype == jnp.dtype(layer.param_dtype)
    dtype = layer.param_dtype if is_kept else dtype
    shape = (input_size, layer.output_size)
    w = hk.get_parameter("w", shape, dtype, as_haiku_initializer(layer.kernel_init))
    if not layer.use_bias:
        return w, None
    return w, hk.get_parameter("b", shape[1:], dtype, as_haiku_initializer(layer.bias_init))


def affine(x: jax.Array, w: jax.Array, b: jax.Array | None, precision: Any = None) -> jax.Array:
    """Returns ``x @ w + b``, promoted, by the operations of ``flax.linen.Dense``."""
    x, w, b = promote(x, w, b)
    contract_last = (((x.ndim - 1,), (0,)), ((), ()))
    z = jax.lax.dot_general(
        x, w, contract_last, precision=precision, out_sharding=_out_sharding(x, w)
    )
    return z if b is None else z + jnp.reshape(b, (1,) * (z.ndim - 1) + (-1,))


def _out_sharding(x: jax.Array, w: jax.Array) -> NamedSharding | None:
    """Returns the sharding of ``x @ w`` where a mesh with Explicit axes asks for it."""
    of_x, of_w = (jax.typeof(a).sharding for a in (x, w))
    if of_x.spec[-1] is None and of_w.spec[0] is None:
        return None
    mesh = of_w.mesh if of_x.mesh.empty else of_x.mesh
    return NamedSharding(mesh, PartitionSpec(*of_x.spec[:-1], of_w.spec[-1]))


def promote(
    inputs: jax.Array, w: jax.Array, b: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Casts all to their common inexact dtype."""
    arrays = [jnp.asarray(x) for x in (inputs, w, b) if x is not None]
    dtype = common_dtype(*arrays)
    inputs, w, *bias = (jnp.asarray(x, dtype) for x in arrays)
    return inputs, w, bias[0] if bias else None


def common_dtype(*arrays: Any) -> Any:
    """Returns the inexact dtype to which arrays or dtypes are promoted, apart from None.

    Promotion is what is asked for here, so it happens where a user forbids the silent one
    (``jax_numpy_dtype_promotion="strict"``).
    """
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*(a for a in arrays if a is not None))
        return dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.promote_types(dtype, "float32")


def promoted(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns ``a`` with the dtype to which both are promoted."""
    with jax.numpy_dtype_promotion("standard"):
        return a if a.dtype == b.dtype else a.astype(jnp.promote_types(a.dtype, b.dtype))
