"""How each parameter takes part in a network, and the cheaper way to its part of the kernel."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from haiku_mlp.structure.program import Product, Survey

# Multiply-adds for one entry of the kernel in the time of one more term in a sum over pairs of
# positions.  Elsewhere than on a CPU a term is a turn of a loop with two small products: about
# 50 microseconds whatever their size, in which 1e9 multiply-adds could be done, 2**16 for each
# entry of a kernel of 128 samples.
_CPU_TERM, _OTHER_TERM = 2**5, 2**16


class Part(NamedTuple):
    """One parameter's part in a network.

    Attributes:
      leaf: Number of the parameter.
      products: The products with it, by their number in the program; none if the program
        does anything else with it.
      positions: How many pairs of inputs and signals make a derivative by it; 0 if it is
        used in another way.
      cost: Multiply-adds for one entry of the kernel, about.
      is_gram: Whether products of inputs and of signals are cheaper than its Jacobian.
    """

    leaf: int
    products: dict[int, Product]
    positions: int
    cost: int
    is_gram: bool

    @property
    def precision(self) -> Any:
        """That of the products."""
        return next(iter(self.products.values())).precision


def parts(leaves: Sequence[jax.Array], survey: Survey, num_outputs: int) -> list[Part]:
    """Returns the parts of the parameters that a program uses.

    Args:
      leaves: The parameters.
      survey: Of the program.
      num_outputs: Number of its real outputs.
    """
    found = []
    for number, leaf in enumerate(leaves):
        products = {n: p for n, p in enumerate(survey.products) if p.parameter == number}
        is_seen = number not in survey.others
        if leaf.size and (products or not is_seen):
            cost = leaf.size * (2 if jnp.iscomplexobj(leaf) else 1)
            part = Part(number, {}, 0, cost, is_gram=False)
            kinds = {(product.contracted, product.inputs is None) for product in products.values()}
            if is_seen and len(kinds) == 1:
                positions = sum(p.positions * num_reals(leaf, p) for p in products.values())
                gram = _gram_cost(leaf, products, positions, num_outputs)
                is_gram = positions == 1 or gram <= cost
                part = Part(number, products, positions, gram if is_gram else cost, is_gram)
            found.append(part)
    return found


def num_reals(leaf: jax.Array, product: Product) -> int:
    """Returns how many real products make the real part of a product with a real parameter."""
    is_split = jnp.issubdtype(product.dtype, jnp.complexfloating) and not jnp.iscomplexobj(leaf)
    return 2 if is_split and product.inputs is not None else 1


def _gram_cost(
    leaf: jax.Array, products: dict[int, Product], positions: int, num_outputs: int
) -> int:
    first = next(iter(products.values()))
    num_inputs = math.prod(leaf.shape[axis] for axis in first.contracted)
    cost = leaf.size // num_inputs  # of the signals
    if first.inputs is not None:
        cost += num_inputs // max(1, num_outputs) ** 2  # once for all outputs
    if positions > 1:
        cost += _CPU_TERM if jax.default_backend() == "cpu" else _OTHER_TERM
    # By symmetry each pair of positions is needed once.
    return cost * positions * (positions + 1) // 2 * (4 if jnp.iscomplexobj(leaf) else 1)
