"""How the tangent kernel of a network is computed, as a table."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from haiku_mlp.structure.network import Network


class Route(NamedTuple):
    """How one parameter's part of the tangent kernel is computed.

    Attributes:
      path: Where the parameter is in the tree.
      route: ``"gram"``: by products of inputs and of signals.  ``"jacobian"``: by products
        of derivatives.
      positions: How often the network multiplies something by the parameter in one sample;
        0 if it does anything else with it.
      cost: Multiply-adds for one entry of the kernel, about.
    """

    path: str
    route: str
    positions: int
    cost: int


class KernelPlan(tuple[Route, ...]):
    """The routes of all parameters that a network uses; prints as a table."""

    def __repr__(self) -> str:
        lines = [Route._fields, *(tuple(map(str, route)) for route in self)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = (map(str.ljust, line, widths) for line in lines)
        return "\n".join("  ".join(line).rstrip() for line in padded)


def kernel_plan(function: Callable[[Any, Any], jax.Array], params: Any, x: Any) -> KernelPlan:
    """Returns how :func:`tangent_kernel` computes each parameter's part; computes nothing.

    Args:
      function: As for :func:`tangent_kernel`.
      params: The parameters, a tree; shapes are enough.
      x: Inputs ``(B, ...)``, or a tree of them; shapes are enough.

    Returns:
      A tuple with a :class:`Route` for each parameter that the function uses.

    Raises:
      TypeError, ValueError: What ``function`` returns, as for :func:`tangent_kernel`.

    Example::

      >>> import haiku as hk, jax, jax.numpy as jnp
      >>> import haiku_mlp
      >>> def convolutional(x):
      ...     h = jax.nn.gelu(hk.Conv1D(8, 3)(x))
      ...     return hk.nets.MLP([64, 1])(h.reshape(len(x), -1))[:, 0]
      >>> net = hk.without_apply_rng(hk.transform(convolutional))
      >>> x = jnp.ones((5, 16, 1))
      >>> params = net.init(jax.random.key(0), x)
      >>> haiku_mlp.kernel_plan(net.apply, params, x)
      path                     route     positions  cost
      ['conv1_d']['b']         jacobian  0          8
      ['conv1_d']['w']         jacobian  0          24
      ['mlp/~/linear_0']['b']  gram      1          64
      ['mlp/~/linear_0']['w']  gram      1          192
      ['mlp/~/linear_1']['b']  gram      1          1
      ['mlp/~/linear_1']['w']  gram      1          65
    """
    shapes = jax.tree.map(_shape, (params, x))
    network = Network(function, *shapes)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
    return KernelPlan(
        Route(paths[part.leaf], "gram" if part.is_gram else "jacobian", part.positions, part.cost)
        for part in network.parts
    )


def _shape(a: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a))
