"""Flax modules that Haiku code calls inside ``hk.scan``, ``hk.vmap``, ``hk.remat`` and the like."""

from collections.abc import Callable
from typing import Any

import haiku as hk
from flax import errors
from flax import linen as nn

from .calls import Call, Place


def interceptor(place: Place, is_own: Callable[[nn.Module], bool]) -> Any:
    """Returns an interceptor that runs Flax modules away from a place without their scope.

    What they would put into it there, or draw from it, belongs to the trace that runs.  So they
    read the values that they have, draw from Haiku's keys, and write nothing.

    Args:
      place: The place of the run.
      is_own: Whether a Flax module stands for the Haiku code itself.
    """
    is_in_guest = False

    def intercept(
        next_fun: Call,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        nonlocal is_in_guest
        module = context.module
        if is_in_guest or module.scope is None or is_own(module):
            return next_fun(*args, **kwargs)
        is_in_guest = True
        try:
            if place.is_same_trace():
                return next_fun(*args, **kwargs)
            return _apply(module, context.method_name, args, kwargs)
        finally:
            is_in_guest = False

    return intercept


def _apply(module: nn.Module, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls a method of a bound module with its values alone."""
    scope: Any = module.scope
    keys = {name: hk.maybe_next_rng_key() for name in scope.rngs}
    rngs = {name: key for name, key in keys.items() if key is not None}
    alone, values = module.clone(parent=None), module.variables
    try:
        return alone.apply(values, *args, rngs=rngs, method=method, **kwargs)
    except errors.FlaxError as error:
        error.add_note(
            f"{type(module).__name__} is a Flax module inside hk.scan, hk.vmap, hk.remat or the "
            "like, where it has the values that it had before and cannot change them: call it "
            "outside where hk.running_init(); where it has state take a Haiku module"
        )
        raise
