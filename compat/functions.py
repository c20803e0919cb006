"""Any Haiku function as a Flax module."""

from collections.abc import Callable
from typing import Any

import haiku as hk
from flax import linen as nn

from .mirror.private import original_function
from .mirror.rows import Mirrored

_TRANSFORMED = hk.Transformed | hk.TransformedWithState


class HaikuFunction(Mirrored):
    """A function of Haiku modules as a Flax module.

    The Flax tree has Haiku's names, one level a module; values made outside of any
    module are under ``~``.  State is the collection ``state``.  At ``init`` Haiku's own
    initializers draw from the key that ``make_rng("params")`` gives at the root
    (``model.apply({}, rngs={"params": key}, method=lambda m: m.make_rng("params"))``), at
    ``apply`` from the stream ``apply``, ``dropout`` or ``params``, the first there is.

    Args:
      fn: A function that creates and calls Haiku modules, an :class:`haiku.Transformed`
        or an :class:`haiku.TransformedWithState`.

    Example::

      >>> import haiku as hk, jax, jax.numpy as jnp
      >>> import compat
      >>> model = compat.HaikuFunction(lambda x: hk.nets.MLP((8, 1))(x))
      >>> variables = model.init(jax.random.key(0), jnp.ones((5, 3)))
      >>> jax.tree.map(jnp.shape, variables["params"]["mlp"]["~/linear_0"])
      {'b': (8,), 'w': (3, 8)}
    """

    fn: Callable[..., Any] | hk.Transformed | hk.TransformedWithState

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function."""
        return self._run("__call__", args, kwargs)

    def __post_init__(self) -> None:
        if not callable(self.fn) and not isinstance(self.fn, _TRANSFORMED):
            raise TypeError(
                "HaikuFunction takes a function, an hk.Transformed or an hk.TransformedWithState, "
                f"got {type(self.fn).__name__}: give the function that hk.transform takes"
            )
        super().__post_init__()

    @nn.nowrap
    def _haiku(self) -> Callable[..., Any]:
        if isinstance(self.fn, _TRANSFORMED):
            return original_function(self.fn) or _lifted(self.fn)
        return self.fn


def _lifted(transformed: hk.Transformed | hk.TransformedWithState) -> Callable[..., Any]:
    """Returns a Haiku function that does what a pair of functions made by hand does."""

    def fn(*args: Any, **kwargs: Any) -> Any:
        keys = hk.maybe_get_rng_sequence_state()
        key = None if keys is None else keys[0]
        hk.maybe_next_rng_key()  # the key is used up
        if isinstance(transformed, hk.Transformed):
            params = hk.transparent_lift(transformed.init)(key, *args, **kwargs)
            return transformed.apply(params, key, *args, **kwargs)
        init, updater = hk.transparent_lift_with_state(transformed.init)
        params, state = init(key, *args, **kwargs)
        output, state = transformed.apply(params, state, key, *args, **kwargs)
        updater.update(state)
        return output

    return fn
