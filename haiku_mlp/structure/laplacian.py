"""Value, gradient and Laplacian of a multi-layer perceptron in one forward pass."""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from haiku_mlp.arguments import Activation
from haiku_mlp.linear import common_dtype
from haiku_mlp.structure.dependence import NONE, owners
from haiku_mlp.structure.derivatives import Derivatives
from haiku_mlp.structure.first_layer import Features, Inputs, first_layer
from haiku_mlp.structure.layers import Layer, map_samples


class MixedEntriesError(ValueError):
    """An activation does not act on each number by itself."""


def laplacian(
    layers: tuple[Layer, ...],
    x: jax.Array,
    *,
    features: Features | None = None,
    weights: jax.Array | None = None,
) -> Derivatives:
    r"""Value, gradient and Laplacian of the outputs, in one forward pass.

    Each layer passes on, beside its value, the Jacobian :math:`J_d = \partial_d z` and the
    Laplacian :math:`L = \sum_d \partial_d^2 z` by the inputs.  A linear map acts on the
    three alike; an activation :math:`h = \phi(z)` gives

    .. math:: \partial_d h = \phi'(z) \, J_d, \quad
              \sum_d \partial_d^2 h = \phi'(z) \, L + \phi''(z) \sum_d J_d^2

    (forward Laplacian: Li et al. 2024, arXiv:2307.08214).  The Jacobian of the first layer
    is ``w`` for all inputs, and the derivatives of ``phi`` are those of one number, so the
    cost is that of ``N`` forward passes without the first layer.  Where ``N`` exceeds the
    first width ``H``, it is that of ``H`` passes: only the sum over ``d`` is needed, and
    :math:`\sum_d J_d J_d = P^T (w^T w) P` with :math:`P` the derivatives by the first layer.

    The activations may be complex and need not be holomorphic: the inputs are real, and
    ``phi`` is taken as a function of the real and the imaginary part of ``z``.

    Args:
      layers: The layers.  Their activations act on each entry by itself, and have second
        derivatives (relu has none at its kinks, which are missing from the result).
      x: Inputs ``(..., N)``, real.
      features: What the first layer takes in place of the input: a function of one input,
        from ``(N,)`` to ``(F,)``.  None: the input itself.
      weights: ``(N,)``, of the second derivatives in the Laplacian, such as inverse masses.
        None: all 1.

    Returns:
      :class:`Derivatives`: ``value (..., O)``, ``gradient (..., O, N)`` and
      ``laplacian (..., O)``, all by ``x``.

    Raises:
      TypeError: ``x`` is complex.
      MixedEntriesError: An activation mixes entries (softmax, a division by a norm).

    Example::

      >>> import jax.numpy as jnp
      >>> from haiku_mlp.structure import Layer, laplacian
      >>> square = Layer(w=jnp.array([[1.], [2.]]), activation=jnp.square)
      >>> at = laplacian((square,), jnp.array([1., 1.]))  # of (x + 2y)**2
      >>> at.value.tolist(), at.gradient.tolist(), at.laplacian.tolist()
      ([9.0], [[6.0, 12.0]], [10.0])
    """
    x = jnp.asarray(x)
    if jnp.iscomplexobj(x):
        raise TypeError(f"x must be real, got {x.dtype}")
    x = x.astype(common_dtype(x.dtype, layers[0].w.real.dtype))
    widths = [layer.w.shape[-1] for layer in layers]
    of_one = functools.partial(_laplacian, features, x.ndim - 1)
    with jax.numpy_dtype_promotion("standard"):  # of weights and inputs, as elsewhere
        return map_samples(
            of_one, (layers, weights), (x,), x.ndim - 1, entries=x.shape[-1] * max(widths)
        )


class _Carry(NamedTuple):
    """The derivatives of a layer's units; the Jacobian ``(n, units)`` is a sum of scaled terms."""

    value: jax.Array
    jacobian: list[tuple[jax.Array | None, Any]]
    laplacian: jax.Array


def _laplacian(
    features: Features | None,
    num_axes: int,
    network: tuple[tuple[Layer, ...], jax.Array | None],
    x: jax.Array,
) -> Derivatives:
    """Returns the derivatives for one input ``(N,)`` of a batch with ``num_axes`` axes."""
    layers, weights = network
    first, *rest = [_of_batches(layer, num_axes) for layer in layers]
    start = first_layer(layers, x, features, weights)
    at = _activate(first, *start.at(x), start)
    for layer in rest:
        apply = functools.partial(jnp.matmul, precision=layer.precision)
        jacobian = _sum([_times(factor, j, layer) for factor, j in at.jacobian])
        z = layer.affine(at.value)
        at = _activate(layer, z, jacobian, apply(at.laplacian, layer.w), start)
    gradient = _sum([j if factor is None else factor[None] * j for factor, j in at.jacobian])
    return Derivatives(at.value, start.by_inputs(gradient).T, at.laplacian)


def _of_batches(layer: Layer, num_axes: int) -> Layer:
    """Returns a layer for one input whose activation sees as many axes as in a forward pass."""
    if not callable(layer.activation):
        return layer
    return layer._replace(activation=functools.partial(_in_batch, layer.activation, num_axes))


def _in_batch(activation: Activation, num_axes: int, z: jax.Array) -> jax.Array:
    axes = tuple(range(num_axes))
    return jnp.squeeze(activation(jnp.expand_dims(z, axes)), axes)


def _times(factor: jax.Array | None, jacobian: jax.Array | None, layer: Layer) -> jax.Array:
    """Returns ``jacobian @ w`` with the factor between them, which scales the smaller one."""
    w = layer.w
    if jacobian is None:
        return w if factor is None else factor[:, None] * w
    if factor is not None:
        if w.shape[1] < jacobian.shape[0]:
            w = factor[:, None] * w
        else:
            jacobian = factor[None] * jacobian
    return jnp.matmul(jacobian, w, precision=layer.precision)


def _activate(
    layer: Layer, z: jax.Array, jacobian: jax.Array | None, laplacian: jax.Array, start: Inputs
) -> _Carry:
    """Returns the derivatives of ``phi(z)`` from those of ``z``."""
    if not callable(layer.activation):
        return _Carry(z, [(None, jacobian)], laplacian)
    phi = _of_numbers(layer.activation, z)
    jacobians = [None] if jacobian is None else _parts(jacobian)
    laplacians = _parts(laplacian)
    _check_elementwise(phi, z)
    directions = [jnp.full_like(z, unit) for unit in ((1, 1j) if jnp.iscomplexobj(z) else (1,))]
    slopes = [functools.partial(_along, phi, direction) for direction in directions]
    first = [slope(z) for slope in slopes]
    second = [[_along(slope, direction, z) for direction in directions] for slope in slopes]
    curvatures = [
        f * start.inner(a, b)
        for row, a in zip(second, jacobians, strict=True)
        for f, b in zip(row, jacobians, strict=True)
    ]
    return _Carry(
        value=phi(z),
        jacobian=list(zip(first, jacobians, strict=True)),
        laplacian=_sum([f * part for f, part in zip(first, laplacians, strict=True)] + curvatures),
    )


def _of_numbers(phi: Activation, z: jax.Array) -> Activation:
    """Returns ``phi`` with integers and booleans, which have no derivatives, as numbers."""
    if jnp.issubdtype(jax.eval_shape(phi, z).dtype, jnp.inexact):
        return phi
    return lambda a: phi(a).astype(z.dtype)


def _sum(terms: list[jax.Array]) -> jax.Array:
    return functools.reduce(operator.add, terms)


def _along(function: Activation, direction: jax.Array, z: jax.Array) -> jax.Array:
    """Returns the derivative of ``function`` at ``z`` along ``direction``."""
    return jax.jvp(function, (z,), (direction,))[1]


def _parts(a: jax.Array) -> list[jax.Array]:
    return [a.real, a.imag] if jnp.iscomplexobj(a) else [a]


def _check_elementwise(phi: Activation, z: jax.Array) -> None:
    own = np.arange(z.size).reshape(z.shape)
    one = jnp.ones_like(z)
    for function in (phi, functools.partial(_along, phi, one)):
        found = owners(function, z)
        if found.shape != own.shape or ((found != own) & (found != NONE)).any():
            raise MixedEntriesError(
                "laplacian needs activations that act on each number by itself, got one that "
                f"mixes entries: {phi!r}"
            )
