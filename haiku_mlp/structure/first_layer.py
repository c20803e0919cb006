"""Where the derivatives by the inputs begin: the first layer, or features before it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from haiku_mlp.linear import common_dtype
from haiku_mlp.structure.dependence import SEVERAL, owners
from haiku_mlp.structure.derivatives import along, directions
from haiku_mlp.structure.layers import Layer

Features = Callable[[jax.Array], jax.Array]


class Inputs:
    """The first layer of the inputs themselves, whose Jacobian is its weights."""

    def __init__(self, layer: Layer, weights: jax.Array | None):
        self.layer, self.weights = layer, weights

    def at(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        """Returns ``z (H,)`` at ``x (N,)``, its Jacobian ``(N, H)`` and Laplacian ``(H,)``."""
        z = self.layer.affine(x)
        return z, self.layer.w, jnp.zeros_like(z)

    def inner(self, a: Any, b: Any) -> jax.Array:
        """Returns the sum over the inputs of the products of two Jacobians: ``(units,)``."""
        products = a * b
        return jnp.sum(products if self.weights is None else self.weights[:, None] * products, 0)

    def by_inputs(self, jacobian: jax.Array) -> jax.Array:
        """Returns the Jacobian ``(N, units)`` of one that is like that of :meth:`at`."""
        return jacobian


class _FewUnits(Inputs):
    """The same for more inputs than units.

    Jacobians are by the first layer's units in place of the inputs, and None stands for the
    identity.  Sums over the inputs need ``w^T w`` alone.
    """

    def __init__(self, layer: Layer, weights: jax.Array | None):
        super().__init__(layer, weights)
        w = layer.w if weights is None else weights[:, None] * layer.w
        self.metric = jnp.matmul(layer.w.T, w, precision=layer.precision)

    def at(self, x: jax.Array) -> tuple[jax.Array, None, jax.Array]:
        z, _, laplacian = super().at(x)
        return z, None, laplacian

    def inner(self, a: Any, b: Any) -> jax.Array:
        if a is None:
            return jnp.diagonal(self.metric)
        return jnp.sum(a * jnp.matmul(self.metric, b, precision=self.layer.precision), 0)

    def by_inputs(self, jacobian: jax.Array) -> jax.Array:
        return jnp.matmul(self.layer.w, jacobian, precision=self.layer.precision)


class _OfFeatures(Inputs):
    """The first layer of features, each of which may depend on several inputs."""

    def __init__(self, layer: Layer, weights: jax.Array | None, features: Features):
        super().__init__(layer, weights)
        self.features = features

    def at(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        slopes, curvatures = jax.vmap(lambda d: along(self.features, x, d))(directions(x))
        weights = jnp.ones_like(x) if self.weights is None else self.weights
        times_w = Layer(self.layer.w, precision=self.layer.precision).affine
        z = self.layer.affine(self.features(x))
        return z, times_w(slopes), times_w(weights @ curvatures)


class _OfSingleInputs(_OfFeatures):
    """The same where each feature depends on one input, as sines and cosines do."""

    def __init__(
        self, layer: Layer, weights: jax.Array | None, features: Features, owners: np.ndarray
    ):
        super().__init__(layer, weights, features)
        self.owners = owners

    def at(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        slopes, curvatures = along(self.features, x, jnp.ones_like(x))
        z = self.layer.affine(self.features(x))
        jacobian = jnp.zeros((len(x), len(z)), z.dtype)
        for column in _columns(self.owners, len(x)):
            rows = self.layer.w.at[column].get(mode="fill", fill_value=0)
            slope = slopes.at[column].get(mode="fill", fill_value=0)
            jacobian += slope[:, None] * rows
        if self.weights is not None:
            curvatures *= self.weights[self.owners]
        return z, jacobian, Layer(self.layer.w, precision=self.layer.precision).affine(curvatures)


def first_layer(
    layers: Sequence[Layer],
    x: jax.Array,
    features: Features | None,
    weights: jax.Array | None,
) -> Inputs:
    """Returns where the derivatives of the layers at one input ``x (N,)`` begin."""
    layer = layers[0]
    if weights is not None:
        weights = jnp.asarray(weights, common_dtype(x.dtype, layer.w.real.dtype))
    if features is not None:
        found = owners(features, x)
        if (found == SEVERAL).any():
            return _OfFeatures(layer, weights, features)
        return _OfSingleInputs(layer, weights, features, found)
    dtype = common_dtype(x, layer.w, layer.b)
    layer = layer._replace(w=layer.w.astype(dtype))
    return (_FewUnits if _is_fewer_units(layers) else Inputs)(layer, weights)


def _is_fewer_units(layers: Sequence[Layer]) -> bool:
    """Returns whether derivatives by the first layer's units take fewer products."""
    (num_inputs, num_units), *shapes = [layer.w.shape for layer in layers]
    if any(map(jnp.iscomplexobj, (layers[0].w, layers[0].b))):
        return False
    by_inputs = sum(num_inputs * n * m for n, m in shapes)
    by_units = sum(num_units * n * m for n, m in shapes[1:])
    by_units += sum(num_units**2 * layer.w.shape[1] for layer in layers[1:] if layer.activation)
    return by_units < by_inputs


def _columns(owners: np.ndarray, num_inputs: int) -> list[np.ndarray]:
    """Returns features of each input, ``(N,)`` at a time; out of range where none is left."""
    of_input = [np.flatnonzero(owners == i) for i in range(num_inputs)]
    most = max(map(len, of_input), default=0)
    padded = [np.pad(own, (0, most - len(own)), constant_values=len(owners)) for own in of_input]
    return list(np.array(padded, int).reshape(num_inputs, most).T)
