"""Value, gradient and Laplacian of a multi-layer perceptron in one forward pass."""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from haiku_mlp.arguments import Activation
from haiku_mlp.structure.layers import Layer, map_samples


class Derivatives(NamedTuple):
    """A function and its derivatives by its inputs.

    Attributes:
      value: ``(...)``, for a block with ``O`` outputs ``(..., O)``.
      gradient: ``(..., N)``, for a block ``(..., O, N)``.
      laplacian: ``(...)``, for a block ``(..., O)``.
    """

    value: jax.Array
    gradient: jax.Array
    laplacian: jax.Array


def laplacian(layers: tuple[Layer, ...], x: jax.Array) -> Derivatives:
    r"""Value, gradient and Laplacian of the outputs, in one forward pass.

    Each layer passes on, beside its value, the Jacobian :math:`J_d = \partial_d z` and the
    Laplacian :math:`L = \sum_d \partial_d^2 z` by the inputs.  A linear map acts on the
    three alike; an activation :math:`h = \phi(z)` gives

    .. math:: \partial_d h = \phi'(z) \, J_d, \quad
              \sum_d \partial_d^2 h = \phi'(z) \, L + \phi''(z) \sum_d J_d^2

    (forward Laplacian: Li et al. 2024, arXiv:2307.08214).  The Jacobian of the first layer
    is ``w`` for all inputs, and the derivatives of ``phi`` are those of one number, so the
    cost is that of ``N`` forward passes without the first layer.

    The activations may be complex and need not be holomorphic: the inputs are real, and
    ``phi`` is taken as a function of the real and the imaginary part of ``z``.

    Args:
      layers: The layers.  Their activations act on each entry by itself, and have second
        derivatives (relu has none at its kinks, which are missing from the result).
      x: Inputs ``(..., N)``, real.

    Returns:
      :class:`Derivatives`: ``value (..., O)``, ``gradient (..., O, N)`` and
      ``laplacian (..., O)``.

    Raises:
      TypeError: ``x`` is complex.
      ValueError: An activation does not act on each number by itself (softmax).

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
    widths = [layer.w.shape[-1] for layer in layers]
    return map_samples(_laplacian, layers, (x,), x.ndim - 1, entries=x.shape[-1] * max(widths))


class _Carry(NamedTuple):
    """The derivatives of a layer's units; the Jacobian ``(N, n)`` is a sum of scaled terms."""

    value: jax.Array
    jacobian: list[tuple[jax.Array | None, jax.Array]]
    laplacian: jax.Array


def _laplacian(layers: tuple[Layer, ...], x: jax.Array) -> Derivatives:
    """Returns the derivatives for one input ``(N,)``."""
    first, *rest = layers
    z = first.affine(x)
    at = _activate(first, z, jnp.asarray(first.w, z.dtype), jnp.zeros_like(z))
    for layer in rest:
        apply = functools.partial(jnp.matmul, precision=layer.precision)
        jacobian = _sum([apply(*_scaled(*term, layer.w)) for term in at.jacobian])
        at = _activate(layer, layer.affine(at.value), jacobian, apply(at.laplacian, layer.w))
    gradient = _sum([j if f is None else f[None] * j for f, j in at.jacobian])
    return Derivatives(at.value, gradient.T, at.laplacian)


def _scaled(
    factor: jax.Array | None, jacobian: jax.Array, w: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns ``jacobian`` and ``w``, the smaller of them scaled by the factor between them."""
    if factor is None:
        return jacobian, w
    if w.shape[1] < jacobian.shape[0]:
        return jacobian, factor[:, None] * w
    return factor[None] * jacobian, w


def _activate(layer: Layer, z: jax.Array, jacobian: jax.Array, laplacian: jax.Array) -> _Carry:
    """Returns the derivatives of ``phi(z)`` from those of ``z``."""
    phi = layer.activation
    if not callable(phi):
        return _Carry(z, [(None, jacobian)], laplacian)
    jacobians, laplacians = _parts(jacobian), _parts(laplacian)
    _check_elementwise(phi, z.dtype)
    directions = [jnp.full_like(z, unit) for unit in ((1, 1j) if jnp.iscomplexobj(z) else (1,))]
    slopes = [functools.partial(_along, phi, direction) for direction in directions]
    first = [slope(z) for slope in slopes]
    second = [[_along(slope, direction, z) for direction in directions] for slope in slopes]
    curvatures = [
        f * jnp.sum(a * b, axis=0)
        for row, a in zip(second, jacobians, strict=True)
        for f, b in zip(row, jacobians, strict=True)
    ]
    return _Carry(
        value=phi(z),
        jacobian=list(zip(first, jacobians, strict=True)),
        laplacian=_sum([f * part for f, part in zip(first, laplacians, strict=True)] + curvatures),
    )


def _sum(terms: list[jax.Array]) -> jax.Array:
    return functools.reduce(operator.add, terms)


def _along(function: Activation, direction: jax.Array, z: jax.Array) -> jax.Array:
    """Returns the derivative of ``function`` at ``z`` along ``direction``."""
    return jax.jvp(function, (z,), (direction,))[1]


def _parts(a: jax.Array) -> list[jax.Array]:
    return [a.real, a.imag] if jnp.iscomplexobj(a) else [a]


def _check_elementwise(activation: Activation, dtype: Any) -> None:
    number = jax.ShapeDtypeStruct((), dtype)
    try:
        is_elementwise = jax.eval_shape(activation, number).shape == ()
        cause = None
    except Exception as error:  # whatever it raises, it does not take a number
        is_elementwise, cause = False, error
    if not is_elementwise:
        raise ValueError(
            f"laplacian needs activations that act on each number by itself, got {activation!r}, "
            "which cannot be applied to one number"
        ) from cause
