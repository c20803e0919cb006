"""Any Haiku function as a Flax module."""

import inspect
from collections.abc import Callable
from typing import Any

import haiku as hk
from flax import linen as nn

from .mirror.calls import place
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
        or an :class:`haiku.TransformedWithState`.  Of a pair, its own ``init`` and ``apply``
        run, with that key.

    Raises:
      TypeError: ``fn`` is no function: a module class, or an ``hk.MultiTransformed``.
      ValueError: ``fn`` is compiled already (``jax.jit``).

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
        if isinstance(self.fn, type) and issubclass(self.fn, hk.Module):
            name = self.fn.__name__
            raise TypeError(
                f"HaikuFunction takes a function that calls modules, got the class {name}: give "
                f"compat.wrap({name})(...)"
            )
        if not callable(self.fn) and not isinstance(self.fn, _TRANSFORMED):
            raise TypeError(
                "HaikuFunction takes a function, an hk.Transformed or an hk.TransformedWithState, "
                f"got {type(self.fn).__name__}: give the function that hk.transform takes; in "
                "place of hk.multi_transform, give wrap an hk.Module class with several methods"
            )
        if callable(self.fn):
            hk.transform(self.fn)  # which refuses what JAX has compiled
        super().__post_init__()

    @nn.nowrap
    def _haiku(self) -> Callable[..., Any]:
        return _function(self.fn) if isinstance(self.fn, _TRANSFORMED) else self.fn


def _function(pair: hk.Transformed | hk.TransformedWithState) -> Callable[..., Any]:
    """Returns a Haiku function that runs a pair of functions as it is."""
    takes_key = _takes_key(pair)

    def function(*args: Any, **kwargs: Any) -> Any:
        keys = hk.maybe_get_rng_sequence_state() or (None,)
        if takes_key or hk.running_init():
            hk.maybe_next_rng_key()  # the key is used up
        first = keys[:takes_key]
        with place().handed_over() as take_over:
            if isinstance(pair, hk.Transformed):
                params = hk.transparent_lift(pair.init)(keys[0], *args, **kwargs)
                take_over()
                return pair.apply(params, *first, *args, **kwargs)
            lifted, updater = hk.transparent_lift_with_state(pair.init)
            params, state = lifted(keys[0], *args, **kwargs)
            take_over()
            output, state = pair.apply(params, state, *first, *args, **kwargs)
            updater.update(state)
        return output

    parameters = list(inspect.signature(pair.init).parameters.values())
    function.__signature__ = inspect.Signature(parameters[1:])  # type: ignore[attr-defined]
    return function


def _takes_key(pair: hk.Transformed | hk.TransformedWithState) -> bool:
    """Returns whether the pair's ``apply`` takes a key, as it does unless ``without_apply_rng``.

    That one has one argument less than the trees and what ``init`` takes.
    """
    num_trees = 1 + isinstance(pair, hk.TransformedWithState)
    init, apply = map(_num_named, pair)
    return apply < num_trees or apply - init != num_trees - 1


def _num_named(function: Callable[..., Any]) -> int:
    """Returns the number of arguments that a function takes by position, without ``*args``."""
    parameters = inspect.signature(function).parameters.values()
    return sum(p.kind <= p.POSITIONAL_OR_KEYWORD for p in parameters)
