"""A function of parameters and samples as a program for one sample, and its derivatives."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from haiku_mlp.structure.parts import Part, parts
from haiku_mlp.structure.program import (
    Evaluation,
    Parameter,
    Product,
    Survey,
    as_matrix,
    is_number,
    plain,
)


class Factors(NamedTuple):
    """The derivatives of the outputs by one parameter, ``sum over t of h_t d_t``.

    Attributes:
      h: What the parameter is multiplied by at its positions, ``(T, inputs)``; None for one.
      d: The derivatives by the products, ``(O, T, outputs)``.
    """

    h: jax.Array | None
    d: jax.Array


class ParameterDerivatives(NamedTuple):
    """The ``O`` real outputs at a sample, and their derivatives by number of the parameter.

    Attributes:
      outputs: ``(O,)``.
      factors: The factors of the derivatives where their products are not formed.
      jacobians: The derivatives by the other parameters, ``(O, size)`` and real.
    """

    outputs: jax.Array
    factors: dict[int, Factors]
    jacobians: dict[int, jax.Array]


class Network:
    """A function of parameters and samples as a program for one sample.

    Args:
      function: From parameters and inputs with a batch axis to ``(B,)`` or ``(B, O)``.
      params: The parameters, a tree.
      x: Inputs with a batch axis, a tree.

    Attributes:
      output: Shape and dtype of the outputs for one sample.
      leaves: The parameters.
      parts: How those that are used take part.

    Raises:
      TypeError: The function does not return one array of numbers that have derivatives.
      ValueError: Its shape is not that of one sample.
    """

    def __init__(self, function: Callable[[Any, Any], jax.Array], params: Any, x: Any):
        self._like = jax.tree.leaves(x)[0]
        one = jax.tree.map(lambda a: self._zeros((1, *a.shape[1:]), a.dtype), x)
        self._program, output = jax.make_jaxpr(function, return_shape=True)(params, one)
        self.output = _of_one_sample(output)
        self.leaves: list[jax.Array] = jax.tree.leaves(params)
        survey = Survey()
        values = [variable.aval for variable in self._program.jaxpr.invars]
        self._walk(survey, values[: len(self.leaves)], values[len(self.leaves) :])
        num_outputs = math.prod(self.output.shape) * (2 if jnp.iscomplexobj(self.output) else 1)
        self.parts = parts(self.leaves, survey, num_outputs)

    def derivatives(self, sample: Any, parts: Sequence[Part]) -> ParameterDerivatives:
        """Returns the derivatives at one sample by the parameters of these parts."""
        return multiplied(self.factors(sample, parts), parts)

    def factors(self, sample: Any, parts: Sequence[Part]) -> ParameterDerivatives:
        """Returns the same as ``derivatives``, with factors for all parameters that have some."""
        inputs = [jnp.asarray(a)[None] for a in jax.tree.leaves(sample)]

        def outputs(zeros: dict[int, Any], leaves: dict[int, Any]) -> tuple[jax.Array, Any]:
            evaluation = Evaluation(zeros)
            values = [leaves.get(number, leaf) for number, leaf in enumerate(self.leaves)]
            output = self._walk(evaluation, values, inputs)
            return _real_parts(output), evaluation.inputs

        products = {n: product for part in parts for n, product in part.products.items()}
        zeros = {n: self._zeros(product.shape, product.dtype) for n, product in products.items()}
        leaves = {part.leaf: self.leaves[part.leaf] for part in parts if not part.products}
        real, pull, h = jax.vjp(outputs, zeros, leaves, has_aux=True)
        num_outputs = real.shape[0]
        every_output = jnp.eye(num_outputs, dtype=real.dtype) + self._zeros(
            (num_outputs, num_outputs), real.dtype
        )
        d, jacobians = jax.vmap(pull)(every_output)
        summable = functools.partial(_summable, dtype=real.dtype)
        h, d, jacobians = jax.tree.map(summable, (h, d, jacobians))
        factors = {part.leaf: self._factors(part, h, d) for part in parts if part.products}
        return ParameterDerivatives(real, factors, jax.tree.map(_real_rows, jacobians))

    def _zeros(self, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Returns zeros that in ``jax.shard_map`` are each device's own, as the inputs are."""
        zeros = jnp.zeros(shape, dtype)
        # The zeros may be random keys, which full_like does not make.
        return jnp.where(jax.lax.full_like(self._like, 0, bool, shape), zeros, zeros)

    def _walk(self, survey: Survey, leaves: Sequence[Any], inputs: Sequence[Any]) -> Any:
        marked = [
            Parameter(number, leaf, tuple(range(leaf.ndim))) if is_number(leaf) else leaf
            for number, leaf in enumerate(leaves)
        ]
        program = self._program
        (output,) = survey.walk(program.jaxpr, program.consts, [*marked, *inputs])
        if isinstance(output, Parameter):
            survey.others.add(output.number)
        return plain(output)

    def _factors(self, part: Part, h: dict[int, jax.Array], d: dict[int, jax.Array]) -> Factors:
        pairs = [
            _real_factors(self.leaves[part.leaf], product, h.get(number), d[number])
            for number, product in part.products.items()
        ]
        inputs = [factors.h for factors in pairs if factors.h is not None]
        signals = [factors.d for factors in pairs]
        with jax.numpy_dtype_promotion("standard"):
            all_inputs = jnp.concatenate(inputs) if inputs else None
            return Factors(all_inputs, jnp.concatenate(signals, 1))


def multiplied(at: ParameterDerivatives, parts: Sequence[Part]) -> ParameterDerivatives:
    """Returns derivatives with the factors multiplied of those parts that go by their Jacobian."""
    outputs, factors, jacobians = at.outputs, dict(at.factors), dict(at.jacobians)
    for part in parts:
        if part.products and not part.is_gram:
            jacobian = _product(factors.pop(part.leaf), part.precision)
            jacobians[part.leaf] = _real_rows(jacobian)
    return ParameterDerivatives(outputs, factors, jacobians)


def _summable(a: jax.Array, dtype: Any) -> jax.Array:
    """Returns factors in a dtype in which many products can be summed.

    Half precision would keep the first ones alone, and integers overflow.
    """
    if is_number(a):
        dtype = a.dtype
    return a.astype(jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype)


def _of_one_sample(output: Any) -> jax.ShapeDtypeStruct:
    if not isinstance(output, jax.ShapeDtypeStruct):
        raise TypeError(f"function must return one array, (B,) or (B, O), got {output}")
    if output.ndim not in (1, 2) or output.shape[0] != 1:
        raise ValueError(f"function must return (B,) or (B, O), got {output.shape} for one sample")
    if not is_number(output):
        raise TypeError(f"function returns {output.dtype}, which has no derivatives")
    return jax.ShapeDtypeStruct(output.shape[1:], output.dtype)


def _real_parts(output: jax.Array) -> jax.Array:
    """Returns the real outputs ``(O,)``: the real parts, then the imaginary parts."""
    flat = output.reshape(-1)
    return jnp.concatenate([flat.real, flat.imag]) if jnp.iscomplexobj(flat) else flat


def _product(factors: Factors, precision: Any) -> jax.Array:
    """Returns the derivatives, ``(O, outputs, inputs)``, or ``(O, outputs)``."""
    # JAX would transpose them to the order of the parameter.
    if factors.h is None:
        return jnp.sum(factors.d, 1)
    with jax.numpy_dtype_promotion("standard"):
        return jnp.einsum("ato,ti->aoi", factors.d, factors.h, precision=precision)


def _real_rows(jacobian: jax.Array) -> jax.Array:
    """Returns ``(O, size)``, whose products sum over real and imaginary parts."""
    rows = jacobian.reshape(len(jacobian), math.prod(jacobian.shape[1:]))
    return jnp.concatenate([rows.real, rows.imag], 1) if jnp.iscomplexobj(rows) else rows


def _real_factors(leaf: jax.Array, product: Product, h: jax.Array | None, d: jax.Array) -> Factors:
    """Returns the factors at one product, real for a real parameter."""
    d = jax.vmap(lambda d: as_matrix(d, product.outputs))(d)
    if jnp.iscomplexobj(leaf) or not jnp.iscomplexobj(d):
        return Factors(h, d)
    if h is None:
        return Factors(h, d.real)
    # The real part of h d is the sum of two real products.
    return Factors(jnp.concatenate([h.real, h.imag]), jnp.concatenate([d.real, -d.imag], 1))
