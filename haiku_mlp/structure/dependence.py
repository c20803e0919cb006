"""On which entry of its argument each entry of a function's value depends."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

# What a derivative is made of: operations linear in the tangent that act entry by entry ...
# fmt: off
_ENTRY_BY_ENTRY = {
    "add", "add_any", "complex", "conj", "convert_element_type", "copy", "copy_p", "div", "imag",
    "mul", "neg", "real", "reduce_precision", "select_n", "sub",
}
# ... or move entries.
_MOVES = {
    "broadcast_in_dim", "concatenate", "reshape", "rev", "slice", "squeeze", "stack", "transpose",
}
# fmt: on

NONE, SEVERAL = -1, -2

# The owners of an array's entries; None for an array of NONE.
Owners = np.ndarray | None


def owners(function: Callable[[jax.Array], jax.Array], x: Any) -> np.ndarray:
    """Returns for each entry of ``function(x)`` the one entry of ``x`` that it depends on.

    Read off the program of the derivative, and so for all values of ``x`` at once.

    Args:
      function: A function of an array.
      x: The array, or its shape and dtype.

    Returns:
      Integers like ``function(x)``: a flat index into ``x``; ``NONE`` where the derivatives are
      zero; ``SEVERAL`` where there is more than one entry, or it cannot be told (sums, products of
      matrices).

    Example::

      >>> import jax.numpy as jnp
      >>> from haiku_mlp.structure.dependence import owners
      >>> owners(lambda x: jnp.append(jnp.sin(x), x.sum()), jnp.ones(3)).tolist()
      [0, 1, 2, -2]
    """
    shape = jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))

    def derivative(x: jax.Array, tangent: jax.Array) -> jax.Array:
        return jax.jvp(function, (x,), (tangent,))[1]

    program = jax.make_jaxpr(derivative)(shape, shape)
    entries = np.arange(math.prod(shape.shape)).reshape(shape.shape)
    (found,) = _follow(program.jaxpr, [None, entries])
    return _filled(found, program.out_avals[0].shape)


def _follow(program: core.Jaxpr, arguments: Sequence[Owners]) -> list[Owners]:
    known = dict(zip(program.invars, arguments, strict=True))

    def read(variable: Any) -> Owners:
        found = None if isinstance(variable, core.Literal) else known.get(variable)
        return None if found is None or (found == NONE).all() else found

    for equation in program.eqns:
        operands = [read(variable) for variable in equation.invars]
        if any(operand is not None for operand in operands):
            results = _results(equation, operands)
            known.update(zip(equation.outvars, results, strict=True))
    return [read(variable) for variable in program.outvars]


def _results(equation: Any, operands: list[Owners]) -> list[Owners]:
    name, parameters = equation.primitive.name, equation.params
    shapes = [variable.aval.shape for variable in equation.outvars]
    if name in _ENTRY_BY_ENTRY:
        return [_join(operands, shapes[0])]
    if name in _MOVES:
        shapes_in = [variable.aval.shape for variable in equation.invars]
        with jax.ensure_compile_time_eval():
            arrays = map(jnp.asarray, map(_filled, operands, shapes_in))
            return [np.asarray(equation.primitive.bind(*arrays, **parameters))]
    if name in ("scan", "while"):
        return _loop(equation, operands)
    programs = [program for value in parameters.values() for program in _programs(value)]
    if name == "cond" and operands[0] is None:
        results = zip(*(_follow(program, operands[1:]) for program in programs), strict=True)
        return [_join(each, shape) for each, shape in zip(results, shapes, strict=True)]
    if len(programs) == 1:
        return _follow(programs[0], operands)
    return [np.full(shape, SEVERAL) for shape in shapes]


def _loop(equation: Any, operands: list[Owners]) -> list[Owners]:
    """Returns the owners after any number of turns: those that one more turn leaves as they are."""
    parameters = equation.params
    shapes = [variable.aval.shape for variable in equation.outvars]
    if equation.primitive.name == "scan":
        (body,), skipped = _programs(parameters["jaxpr"]), 0
        num_constants, num_carried = parameters["num_consts"], parameters["num_carry"]
    else:
        (body,), skipped = _programs(parameters["body_jaxpr"]), parameters["cond_nconsts"]
        num_constants, num_carried = parameters["body_nconsts"], len(shapes)
    constants = operands[skipped : skipped + num_constants]
    start = skipped + num_constants
    carried = list(map(_filled, operands[start : start + num_carried], shapes))
    scanned = operands[start + num_carried :]
    if any(operand is not None for operand in scanned):
        return [np.full(shape, SEVERAL) for shape in shapes]
    while True:
        results = _follow(body, [*constants, *carried, *scanned])
        pairs = zip(carried, results, shapes, strict=False)
        joined = [_join((old, new), shape) for old, new, shape in pairs]
        if all(map(np.array_equal, joined, carried)):
            break
        carried = joined
    stacked = zip(results[num_carried:], shapes[num_carried:], strict=True)
    return [*carried, *(np.broadcast_to(_filled(a, shape[1:]), shape) for a, shape in stacked)]


def _programs(value: Any) -> list[core.Jaxpr]:
    if isinstance(value, tuple):
        return [program for entry in value for program in _programs(entry)]
    value = value.jaxpr if isinstance(value, core.ClosedJaxpr) else value
    return [value] if isinstance(value, core.Jaxpr) else []


def _filled(found: Owners, shape: tuple[int, ...]) -> np.ndarray:
    return np.full(shape, NONE) if found is None else found


def _join(operands: Sequence[Owners], shape: tuple[int, ...]) -> np.ndarray:
    """Returns the owners of entries that are made of one entry of each operand."""
    joined = np.full(shape, NONE)
    for operand in operands:
        if operand is not None:
            agreed = np.where((joined == NONE) | (joined == operand), operand, SEVERAL)
            joined = np.where(operand == NONE, joined, agreed)
    return joined
