"""The tangent kernel of any Flax model."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

import haiku_mlp
from haiku_mlp.structure import KernelPlan


def tangent_kernel(
    function: Callable[[Any, Any], jax.Array],
    params: Any,
    x: Any,
    y: Any = None,
    *,
    chunk_size: int | None = None,
    centered: bool = False,
) -> jax.Array:
    """Returns the tangent kernel of a Flax model: see :func:`haiku_mlp.tangent_kernel`.

    Args:
      function: From parameters and inputs to ``(B,)`` or ``(B, O)``: a function, or
        ``model.apply``.
      params: The parameters; for ``model.apply`` the variables, of which the collection
        ``params`` counts.
      x: Inputs ``(B, ...)``, or a tree of them.
      y: Other inputs of the same shapes for the columns; None: ``x``.
      chunk_size: As for :func:`haiku_mlp.tangent_kernel`.
      centered: As for :func:`haiku_mlp.tangent_kernel`.

    Returns:
      ``(B, B')``; for ``O`` outputs ``(B, B', O, O)``.

    Raises:
      TypeError, ValueError: As :func:`haiku_mlp.tangent_kernel`.

    Example::

      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> import compat
      >>> model = nn.Sequential([nn.Dense(8), nn.LayerNorm(), nn.gelu, nn.Dense(2)])
      >>> variables = model.init(jax.random.key(0), jnp.ones((5, 3)))
      >>> compat.tangent_kernel(model.apply, variables, jnp.ones((5, 3))).shape
      (5, 5, 2, 2)

    A natural-gradient step in an optax loop, which Adam needs many more steps for::

      >>> import haiku_mlp, optax
      >>> model = nn.Sequential([nn.Dense(16), nn.tanh, nn.LayerNorm(), nn.Dense(1), jnp.ravel])
      >>> x = jnp.linspace(-1., 1., 20)[:, None]
      >>> def residuals(variables):
      ...     return model.apply(variables, x) - jnp.sin(3 * x[:, 0])
      >>> def natural(variables):
      ...     kernel = compat.tangent_kernel(model.apply, variables, x)
      ...     return haiku_mlp.natural_gradient(
      ...         residuals, variables, kernel, residuals(variables), 1e-3, centered=False)
      >>> def adam(variables):
      ...     return jax.grad(lambda v: jnp.mean(residuals(v)**2) / 2)(variables)
      >>> losses = {}
      >>> for name, gradient, optimiser in [
      ...         ("natural", natural, optax.sgd(0.5)), ("adam", adam, optax.adam(1e-2))]:
      ...     variables = model.init(jax.random.key(0), x)
      ...     state = optimiser.init(variables)
      ...     gradient = jax.jit(gradient)
      ...     for _ in range(20):
      ...         updates, state = optimiser.update(gradient(variables), state)
      ...         variables = optax.apply_updates(variables, updates)
      ...     losses[name] = float(jnp.mean(residuals(variables)**2))
      >>> losses["natural"] < losses["adam"] / 10
      True
    """
    options: Any = {"chunk_size": chunk_size, "centered": centered}
    return haiku_mlp.tangent_kernel(*_of_params(function, params), x, y, **options)


def kernel_plan(function: Callable[[Any, Any], jax.Array], params: Any, x: Any) -> KernelPlan:
    """Returns how the tangent kernel is computed: see :func:`haiku_mlp.kernel_plan`.

    Args:
      function: As for :func:`tangent_kernel`.
      params: As for :func:`tangent_kernel`.
      x: Inputs ``(B, ...)``, or a tree of them; shapes are enough.

    Returns:
      A tuple with the path, the route, the positions and the cost of each parameter in use.

    Raises:
      TypeError, ValueError: What ``function`` returns, as for :func:`tangent_kernel`.

    Example::

      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> import compat
      >>> model = nn.Sequential([nn.Dense(8), nn.LayerNorm(), nn.gelu, nn.Dense(2)])
      >>> variables = model.init(jax.random.key(0), jnp.ones((5, 3)))
      >>> compat.kernel_plan(model.apply, variables, jnp.ones((5, 3)))[1]
      Route(path="['layers_0']['kernel']", route='gram', positions=1, cost=8)
    """
    return haiku_mlp.kernel_plan(*_of_params(function, params), x)


def _of_params(function: Callable[[Any, Any], jax.Array], variables: Any) -> tuple[Any, Any]:
    """Returns the function of the collection ``params`` alone, and that collection."""
    if not (isinstance(variables, Mapping) and isinstance(variables.get("params"), Mapping)):
        return function, variables

    def of_params(params: Any, x: Any) -> jax.Array:
        return function({**variables, "params": params}, x)

    return of_params, variables["params"]
