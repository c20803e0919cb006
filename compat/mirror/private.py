"""The private names of Haiku and Flax in use, each alone in one function, with the reason.

``tests/test_internals.py`` fails when one of them moves.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import haiku as hk
from flax import nnx
from flax.linen import module as flax_module
from haiku._src import base as haiku_base


def haiku_context() -> object:
    """Returns the Haiku transform that is running, an object of its own for each run.

    A transform inside another (``hk.lift``, ``hk.transform`` in Haiku code) names its
    modules afresh; no public function tells it from the outer one.
    """
    return haiku_base.current_context()


def is_missing_rng(error: Exception) -> bool:
    """Returns whether Haiku raised ``error`` because it had no random key to draw from.

    Haiku exports no class of its own for that error; where an initializer drew at apply,
    it is the cause of another.
    """
    return isinstance(error, haiku_base.MissingRNGError) or isinstance(
        error.__cause__, haiku_base.MissingRNGError
    )


def missing_state(error: Exception) -> tuple[str, str] | None:
    """Returns the module and the name of the state that Haiku did not find, if it did not.

    Haiku tells it by the text of a ValueError alone.
    """
    match = re.match(r"No value for '(.*)' in '(.*)', perhaps", str(error))
    return None if match is None else (match[2], match[1])


def original_function(
    transformed: hk.Transformed | hk.TransformedWithState,
) -> Callable[..., Any] | None:
    """Returns the function that ``hk.transform`` was given; None for a pair made by hand.

    ``init`` discards the function's output, which Flax's ``init_with_output`` returns.
    """
    return getattr(transformed.init, "_original_fn", None)


def is_flax_watching() -> bool:
    """Returns whether a Flax call would be captured, intercepted or listed in a summary now.

    Flax keeps what watches its calls to itself.
    """
    context = flax_module._context
    capturing = bool(context.capture_stack and context.capture_stack[-1])
    watchers = flax_module._global_interceptor_stack or context.call_info_stack
    return capturing or bool(watchers)


def is_capturing(module: nnx.Module) -> bool:
    """Returns whether ``nnx.capture`` is looking at an NNX module.

    ``sow`` and ``perturb`` are deprecated elsewhere, and would change the module.  Flax
    keeps what it captures in an attribute; before ``nnx.capture`` there was nothing else.
    """
    return hasattr(module, "__captures__") or not hasattr(nnx, "capture")


@contextlib.contextmanager
def no_flax_parent() -> Iterator[None]:
    """Makes Flax modules constructed inside orphans, as they are outside of Flax methods.

    Flax attaches a new module to the module whose method is running unless each
    construction says ``parent=None``, which Haiku code does not.
    """
    stack = flax_module._context.module_stack
    stack.append(None)
    try:
        yield
    finally:
        stack.pop()
