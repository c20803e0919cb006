"""The private names of Haiku and Flax in use, each alone in one function, with its price.

``tests/test_internals.py`` fails when one of them moves.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from flax.linen import module as flax_module
from haiku._src import base as haiku_base

if TYPE_CHECKING:
    from flax import nnx


def haiku_context() -> object:
    """Returns the Haiku transform that is running, an object of its own for each run.

    A transform inside another (``hk.lift``, ``hk.transform`` in Haiku code) names its
    modules afresh; no public function tells it from the outer one.  Without this, values
    of one would be taken for those of the other.
    """
    return haiku_base.current_context()


def is_flax_looking() -> bool:
    """Returns whether Flax sees the calls that its modules make now; no public function tells.

    So it does for ``nn.intercept_methods``, ``tabulate`` and ``capture_intermediates``, and outside
    of ``init`` and ``apply``, where a bound module shows afterwards which children it made.
    Without this, each call goes through Flax: a deep network takes half as long again to trace.
    """
    context = flax_module._context
    is_captured = not context.capture_stack or bool(context.capture_stack[-1])
    return is_captured or bool(context.call_info_stack or flax_module._global_interceptor_stack)


def is_capturing(module: "nnx.Module") -> bool:
    """Returns whether ``nnx.capture`` is looking at an NNX module.

    ``sow`` and ``perturb`` are deprecated elsewhere, and would change the module.  Flax
    keeps what it captures in an attribute; before ``nnx.capture`` there was nothing else.
    """
    from flax import nnx  # which Linen's users need not wait for

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
