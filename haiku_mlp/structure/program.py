"""A function of parameters as a program, and where it multiplies something by a parameter."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

# Calls of another program, in which a parameter is still that parameter.
_CALLS = {"jit", "pjit", "checkpoint", "remat2"}
_RESHAPES = {"reshape", "broadcast_in_dim", "add"}


# The axes that are rows of a matrix, and those that are its columns.
Axes = tuple[tuple[int, ...], tuple[int, ...]]


class Parameter(NamedTuple):
    """A value in a program that is a parameter, up to its dtype and the order of its axes."""

    number: int
    value: Any
    axes: tuple[int, ...]  # of the parameter, in the order of those of ``value``


class Product(NamedTuple):
    """A product ``z = h @ w`` with a parameter ``w``, seen as one of matrices.

    A parameter that gets axes of size one, as a bias does, is its product with one.

    Attributes:
      parameter: Which parameter it is.
      contracted: The axes of the parameter that are summed over.
      shape: Of ``z``.
      dtype: Of ``z``.
      inputs: Axes of ``h`` that are positions, and those summed over; None for one.
      outputs: Axes of ``z`` that are positions, and the others.
      precision: As for :func:`jax.lax.dot_general`.
    """

    parameter: int
    contracted: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: Any
    inputs: Axes | None
    outputs: Axes
    precision: Any

    @property
    def positions(self) -> int:
        """How often the sample multiplies something by the parameter."""
        return math.prod(self.shape[axis] for axis in self.outputs[0])


class Survey:
    """A walk through a program that computes nothing.

    Attributes:
      products: The products with parameters, in the order of the program.
      others: The parameters that the program uses in another way.
    """

    def __init__(self) -> None:
        self.products: list[Product] = []
        self.others: set[int] = set()

    def walk(self, jaxpr: core.Jaxpr, consts: Sequence[Any], values: Sequence[Any]) -> list[Any]:
        """Returns the outputs of a program; a parameter among the values is so marked."""
        known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *values), strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, core.Literal) else known[atom]

        for equation in jaxpr.eqns:
            outputs = self._outputs(equation, [read(atom) for atom in equation.invars])
            known.update(zip(equation.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _outputs(self, equation: core.JaxprEqn, values: list[Any]) -> Sequence[Any]:
        name, options = equation.primitive.name, equation.params
        parameters = [value for value in values if isinstance(value, Parameter)]
        if parameters and name in _CALLS:
            inner = options["jaxpr"]  # closed or not
            return self.walk(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), values)
        outputs = self._computed(equation, [plain(value) for value in values])
        if len(parameters) == 1:
            (parameter,) = parameters
            if name == "convert_element_type" and _is_same_number(parameter.value, outputs[0]):
                return [parameter._replace(value=outputs[0])]
            if name == "transpose":
                axes = tuple(parameter.axes[axis] for axis in options["permutation"])
                return [parameter._replace(value=outputs[0], axes=axes)]
            if name in _RESHAPES and _is_reshape(parameter, outputs[0], options):
                return [self._shown(_reshaped(parameter, outputs[0]), None, outputs[0])]
            if name == "dot_general" and not any(options["dimension_numbers"][1]):
                side = 0 if values[0] is parameter else 1
                product = _product(parameter, side, values[1 - side], outputs[0], options)
                return [self._shown(product, values[1 - side], outputs[0])]
        self.others.update(parameter.number for parameter in parameters)
        return outputs

    def _computed(self, equation: core.JaxprEqn, values: list[Any]) -> Sequence[Any]:
        return [variable.aval for variable in equation.outvars]

    def _shown(self, product: Product, h: Any, z: Any) -> Any:
        self.products.append(product)
        return z


class Evaluation(Survey):
    """A walk through a program that evaluates it.

    Args:
      zeros: What is added to the products, by their number.

    Attributes:
      inputs: What the parameters are multiplied by there, ``(positions, inputs)``.
    """

    def __init__(self, zeros: Mapping[int, jax.Array]):
        super().__init__()
        self.inputs: dict[int, jax.Array] = {}
        self._zeros = zeros

    def _computed(self, equation: core.JaxprEqn, values: list[Any]) -> Sequence[Any]:
        primitive = equation.primitive
        bound = primitive.get_bind_params(equation.params)
        # Until JAX 0.7 the functions among the parameters come apart from the others.
        functions, params = bound if isinstance(bound, tuple) else ((), bound)
        outputs = primitive.bind(*functions, *values, **params)
        return outputs if primitive.multiple_results else [outputs]

    def _shown(self, product: Product, h: jax.Array | None, z: jax.Array) -> jax.Array:
        number = len(self.products)
        self.products.append(product)
        if number not in self._zeros:
            return z
        if h is not None and product.inputs is not None:
            self.inputs[number] = as_matrix(h, product.inputs)
        return z + self._zeros[number]


def plain(value: Any) -> Any:
    """Returns the array, of a parameter or of any other value."""
    return value.value if isinstance(value, Parameter) else value


def is_number(value: Any) -> bool:
    """Returns whether an array's numbers have derivatives."""
    return jnp.issubdtype(value.dtype, jnp.inexact)


def _is_same_number(a: Any, b: Any) -> bool:
    """Returns whether a value in the dtype of ``b`` has all derivatives that it has in its own."""
    return is_number(b) and (jnp.iscomplexobj(b) or not jnp.iscomplexobj(a))


def as_matrix(a: jax.Array, axes: Axes) -> jax.Array:
    """Returns ``a`` with the first axes as its rows and the second as its columns."""
    rows, columns = ([a.shape[axis] for axis in part] for part in axes)
    order = (*axes[0], *axes[1])
    return jnp.transpose(a, order).reshape(math.prod(rows), math.prod(columns))


def _is_reshape(parameter: Parameter, z: Any, options: Mapping[str, Any]) -> bool:
    """Returns whether ``z`` has the entries of the parameter, in the order that they have there."""
    is_in_order = parameter.axes == tuple(range(len(parameter.axes)))
    return is_in_order and z.size == parameter.value.size and not options.get("dimensions")


def _reshaped(parameter: Parameter, z: Any) -> Product:
    every_axis = ((), tuple(range(z.ndim)))
    return Product(parameter.number, (), z.shape, z.dtype, None, every_axis, None)


def _product(
    parameter: Parameter, side: int, h: Any, z: Any, options: Mapping[str, Any]
) -> Product:
    """Describes a ``dot_general`` with a parameter on its left side (0) or its right (1)."""
    summed, _ = options["dimension_numbers"]
    pairs = [
        (parameter.axes[own], axis)
        for own, axis in zip(summed[side], summed[1 - side], strict=True)
    ]
    pairs.sort()
    kept = [axis for own, axis in enumerate(parameter.axes) if own not in summed[side]]
    positions = tuple(axis for axis in range(h.ndim) if axis not in summed[1 - side])
    # The output has the axes of the left side first.
    first = len(positions) if side else 0
    return Product(
        parameter.number,
        tuple(own for own, _ in pairs),
        z.shape,
        z.dtype,
        inputs=(positions, tuple(axis for _, axis in pairs)),
        outputs=(
            tuple(range(len(positions)) if side else range(len(kept), z.ndim)),
            tuple(first + kept.index(axis) for axis in sorted(kept)),
        ),
        precision=options["precision"],
    )
