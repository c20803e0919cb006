"""The tangent kernel of a multi-layer perceptron, layer by layer."""

import functools
import itertools
import operator
from typing import Any

import jax
import jax.numpy as jnp

from haiku_mlp.linear import promote
from haiku_mlp.structure.layers import Layer

# The derivatives by a layer's weights are sums of products of two factors: one like the
# layer's inputs, (B, inputs), and one like its signals, (B, O, outputs).
Factors = list[tuple[jax.Array, jax.Array]]


def tangent_kernel(
    layers: tuple[Layer, ...],
    x: jax.Array,
    y: jax.Array | None = None,
    *,
    chunk_size: int | None = None,
) -> jax.Array:
    r"""Gram matrix of the derivatives of the outputs by the parameters.

    .. math:: K_{ij} = \sum_p \frac{\partial f(x_i)}{\partial p}
              \overline{\frac{\partial f(y_j)}{\partial p}}

    No derivative by a parameter is ever formed.  A layer ``z = h @ w + b`` has

    .. math:: \frac{\partial f}{\partial w_{mn}} = h_m \delta_n, \quad
              \frac{\partial f}{\partial b_n} = \delta_n, \quad
              \delta_n = \frac{\partial f}{\partial z_n}

    and so contributes the product, entry by entry, of the Gram matrix of its inputs and
    that of its signals, which one backward pass gives:

    .. math:: (1 + h(x_i) \cdot \bar h(y_j)) \; (\delta(x_i) \cdot \bar\delta(y_j))

    This costs ``B * B'`` times the sum of the widths, where a product of Jacobians
    costs ``B * B'`` times the number of parameters (empirical neural tangent kernel:
    Jacot et al. 2018, arXiv:1806.07572; structured derivatives: Novak et al. 2022,
    arXiv:2206.08720).

    Complex numbers.  If the network is holomorphic in its complex parameters, the
    derivatives are complex derivatives.  In general:

    - Real output: the sum runs over the real and the imaginary parts of the parameters.
    - Complex output, real parameters: the derivatives are complex, the sum is as above.
    - Complex output, complex parameters: with
      :math:`\partial_p` and :math:`\partial_{\bar p}` the derivatives of Wirtinger,

      .. math:: K_{ij} = \sum_p \partial_p f(x_i) \overline{\partial_p f(y_j)}
                + \partial_{\bar p} f(x_i) \overline{\partial_{\bar p} f(y_j)}

      whose second term is zero for a holomorphic network.  For another one ``K`` is
      half the sum over real and imaginary parts, and does not hold all that a
      natural-gradient step needs: take the real and the imaginary part as two outputs.

    Args:
      layers: The layers.  Activations may mix the entries of the last axis.
      x: Inputs ``(B, N)``.
      y: Inputs ``(B', N)``; None: ``x``.
      chunk_size: Rows of ``K`` computed at a time; None: all.  What is in memory beside
        ``K`` grows with ``chunk_size * B'`` instead of ``B * B'``.

    Returns:
      ``(B, B', O, O)`` for ``O`` outputs.

    Raises:
      ValueError: ``x`` or ``y`` is not a matrix, or ``chunk_size`` is not positive.

    Example::

      >>> import jax.numpy as jnp
      >>> from haiku_mlp.structure import Layer, tangent_kernel
      >>> linear = Layer(w=jnp.ones((3, 1)), b=jnp.zeros(1))
      >>> x = jnp.array([[1., 0., 0.], [0., 2., 0.]])
      >>> tangent_kernel((linear,), x)[:, :, 0, 0].tolist()
      [[2.0, 1.0], [1.0, 5.0]]
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be positive or None, got {chunk_size!r}")
    outputs, rows = _derivatives(layers, _matrix("x", x))
    columns = rows if y is None else _derivatives(layers, _matrix("y", y))[1]

    def kernel_row(row: list[Factors]) -> jax.Array:
        kernel = functools.reduce(operator.add, map(_contribution, layers, row, columns))
        return kernel if jnp.iscomplexobj(outputs) else jnp.real(kernel)

    is_empty = 0 in (len(x), len(x if y is None else y))  # lax.map takes no empty rows
    if chunk_size is None or is_empty:
        kernel = jax.vmap(kernel_row)(rows)
    else:
        kernel = jax.lax.map(kernel_row, rows, batch_size=chunk_size)
    return jnp.swapaxes(kernel, 1, 2)  # from (B, O, B', O)


def _matrix(name: str, x: jax.Array) -> jax.Array:
    if jnp.ndim(x) != 2:
        raise ValueError(f"{name} must have the shape (batch, inputs), got {jnp.shape(x)}")
    return jnp.asarray(x)


def _derivatives(layers: tuple[Layer, ...], x: jax.Array) -> tuple[jax.Array, list[Factors]]:
    """Returns the outputs and, for each layer, the factors of the derivatives."""
    inputs, pulls = [x], []
    z = layers[0].affine(x)
    for layer, following in itertools.zip_longest(layers, layers[1:]):
        step = functools.partial(_step, layer, following)
        z, pull, h = jax.vjp(step, z, has_aux=True)
        inputs.append(h)
        pulls.append(pull)

    def signals(cotangent: jax.Array) -> list[jax.Array]:
        found = []
        for pull in reversed(pulls):
            (cotangent,) = pull(cotangent)
            found.append(cotangent)
        return found[::-1]

    # JAX pulls 1 back to the derivatives of the real part, -i to those of the imaginary
    # part; by z = a + ib each is the derivative by a minus i times that by b.
    pull_back = jax.vmap(signals, in_axes=1, out_axes=1)
    one = jnp.broadcast_to(jnp.eye(z.shape[-1], dtype=z.dtype), (*z.shape, z.shape[-1]))
    real = pull_back(one)
    imag = pull_back(-1j * one) if jnp.iscomplexobj(z) else [None] * len(layers)
    return z, list(map(_factors, layers, inputs, real, imag))


def _step(layer: Layer, following: Layer | None, z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns what follows ``z``, the next layer's or the outputs, and the inputs between."""
    h = layer.activate(z)
    return (h if following is None else following.affine(h)), h


def _factors(layer: Layer, h: jax.Array, real: jax.Array, imag: jax.Array | None) -> Factors:
    """Returns the factors of one layer from the derivatives of the outputs' parts."""
    h, *_ = promote(h, layer.w, None)
    if not jnp.iscomplexobj(real):
        return [(h, real if imag is None else real + 1j * imag)]
    if imag is None and jnp.iscomplexobj(layer.w):
        return [(h, real)]  # the real part of the product sums real and imaginary parts
    imag = jnp.zeros_like(real) if imag is None else imag
    wirtinger, conjugate = (real + 1j * imag) / 2, (real - 1j * imag).conj() / 2
    return [(h, wirtinger), (h.conj(), conjugate)]


def _contribution(layer: Layer, row: Factors, columns: Factors) -> jax.Array:
    """Returns a layer's part ``(O, B', O)`` of the kernel's row."""
    # A real parameter changes z and its conjugate at once, so their factors interfere.
    pair = zip if jnp.iscomplexobj(layer.w) else itertools.product
    products = []
    for (h, signal), (hs, signals) in pair(row, columns):
        gram = _inner(h, hs, layer.precision)
        gram = gram if layer.b is None else 1 + gram
        products.append(jnp.reshape(gram, (1, -1, 1)) * _inner(signal, signals, layer.precision))
    return functools.reduce(operator.add, products)


def _inner(a: jax.Array, b: jax.Array, precision: Any) -> jax.Array:
    """Returns ``a . conj(b)`` over the last axes: ``(..., n), (..., n) -> (..., ...)``."""
    contract_last = (((a.ndim - 1,), (b.ndim - 1,)), ((), ()))
    return jax.lax.dot_general(a, b.conj(), contract_last, precision=precision)
