"""Outputs of a multi-layer perceptron at configurations near given ones."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from haiku_mlp.linear import promoted
from haiku_mlp.sharding import is_explicit
from haiku_mlp.structure import changes
from haiku_mlp.structure.layers import Layer, forward, map_samples, with_weights

# Numbers of changed entries for which there is a loop of its own, each a program to compile.
_NUMBERS = (1, 2, 4)
# Inputs of a product that cost as much as to find one changed entry and to add its row.
_INPUTS_PER_CHANGE = 8


def at_configurations(
    layers: tuple[Layer, ...], x: jax.Array, y: jax.Array, *, block_size: int | None = None
) -> jax.Array:
    """Outputs at the ``K`` configurations ``y`` that belong to each ``x``.

    As ``forward(layers, y)``, in less time where they differ from ``x`` in few entries, as
    the configurations that an operator connects with a sample do.  Those equal to ``x`` are
    not evaluated, and where the others differ in at most 4 entries, and in at most one of
    8, these alone pass the first layer (see :func:`haiku_mlp.structure.connected`).  On a
    mesh with Explicit axes and for symbolic sizes (``jax.export``) all are evaluated.

    It may be differentiated by the parameters and by ``y``, as often as is wanted, in the
    time that ``forward`` takes.

    Args:
      layers: The layers.  Their activations own no parameters.
      x: Configurations ``(B, N)``.
      y: Configurations ``(B, K, N)``.
      block_size: How many are evaluated at a time; None: chosen for the device.

    Returns:
      ``(B, K, O)`` for ``O`` outputs.

    Example::

      >>> import jax.numpy as jnp
      >>> from haiku_mlp.structure import Layer, at_configurations
      >>> linear = Layer(w=jnp.array([[1.], [10.], [100.]]))
      >>> x = jnp.array([[1, 1, -1]], jnp.int8)
      >>> y = jnp.array([[[1, 1, -1], [-1, 1, -1], [1, 1, 1]]], jnp.int8)
      >>> at_configurations((linear,), x, y)[0, :, 0].tolist()
      [-89.0, -91.0, 111.0]
    """
    x, y = jnp.asarray(x), jnp.asarray(y)
    x, y = promoted(x, y), promoted(y, x)
    if _is_spread_or_symbolic(x) or _is_spread_or_symbolic(y):
        most = y.shape[1] * max(layer.w.shape[-1] for layer in layers)
        return map_samples(forward, layers, (y,), 1, entries=most)

    # Loops whose lengths depend on the data have no reverse mode of their own.
    @jax.custom_jvp
    def outputs(weights: list, x: jax.Array, y: jax.Array) -> jax.Array:
        return _outputs(with_weights(layers, weights), x, y, block_size)

    @outputs.defjvp
    def _(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
        def at_y(weights: list, _: jax.Array, y: jax.Array) -> jax.Array:
            return forward(with_weights(layers, weights), y)

        return jax.jvp(at_y, primals, tangents)

    with jax.numpy_dtype_promotion("standard"):  # of weights and configurations, as elsewhere
        return outputs([(layer.w, layer.b) for layer in layers], x, y)


def _is_spread_or_symbolic(y: jax.Array) -> bool:
    return is_explicit(y) or not all(isinstance(n, int) for n in y.shape)


def _outputs(
    layers: tuple[Layer, ...], x: jax.Array, y: jax.Array, block_size: int | None
) -> jax.Array:
    (num_samples, num_configurations, num_inputs), size = y.shape, y.shape[0] * y.shape[1]
    first, *rest = layers
    z = first.affine(x)
    at_x = forward(tuple(rest), first.activate(z))
    if size == 0:
        return jnp.zeros((num_samples, num_configurations, at_x.shape[-1]), at_x.dtype)
    block_size = min(size, block_size or _block_size(size))
    num_changes = changes.count(y != x[:, None]).reshape(size)
    # No change of its first layer gets rid of what is not finite.
    most = jnp.where(jnp.all(jnp.isfinite(x)), jnp.max(num_changes), num_inputs)
    of_changes = z.dtype if jnp.iscomplexobj(x) else z.real.dtype
    place, order = _packed(num_changes > 0, -size % block_size)
    configurations = y.reshape(size, num_inputs)

    def evaluate(number: int | None, block: jax.Array, found: jax.Array) -> jax.Array:
        start = block * block_size
        entries = lax.dynamic_slice_in_dim(order, start, block_size)
        sample, there = entries // num_configurations, configurations[entries]
        if number is None:
            moved = first.affine(there)
        else:
            different = changes.differences(x[sample], there, number, of_changes)
            moved = changes.shift(first, z[sample], *different)
        values = forward(tuple(rest), first.activate(moved))
        return lax.dynamic_update_slice_in_dim(found, values, start, 0)

    # Loops that run or not, since the CPU compiler takes one thread for the branches of a
    # condition.
    found, num_blocks = at_x[order // num_configurations], -(-place[-1] // block_size)
    for number, is_it in _choices(most, num_inputs):
        length = jnp.where(is_it, num_blocks, 0)
        found = lax.fori_loop(0, length, functools.partial(evaluate, number), found)
    found = found[jnp.maximum(place - 1, 0)].reshape(num_samples, num_configurations, -1)
    is_new = (num_changes > 0).reshape(num_samples, num_configurations, 1)
    return jnp.where(is_new, found, at_x[:, None])


def _block_size(size: int) -> int:
    """Returns how many configurations fit a CPU's cache; elsewhere few, large blocks are fast."""
    return 1024 if jax.default_backend() == "cpu" else -(-size // 16)


def _packed(mask: jax.Array, num_padding: int) -> tuple[jax.Array, jax.Array]:
    """Returns the place of each true entry among them, from 1, and the entries in this order."""
    size = len(mask)
    place = jnp.cumsum(mask, dtype=jnp.int32)
    target = jnp.where(mask, place - 1, size + num_padding)  # which is out of range: dropped
    order = jnp.full(size + num_padding, size - 1, jnp.int32)
    return place, order.at[target].set(jnp.arange(size, dtype=jnp.int32), mode="drop")


def _choices(most: jax.Array, num_inputs: int) -> list[tuple[int | None, jax.Array]]:
    """Returns pairs: by so many changes the first layer is updated (None: by a product), where."""
    numbers = [n for n in _NUMBERS if n * _INPUTS_PER_CHANGE <= num_inputs]
    bounds = [0, *numbers]
    choices: list[tuple[int | None, jax.Array]] = [
        (number, (most > low) & (most <= number))
        for low, number in zip(bounds, numbers, strict=False)
    ]
    return [*choices, (None, most > bounds[-1])]
