"""Initializers: JAX's ``(key, shape, dtype)`` where Haiku wants ``(shape, dtype)``."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

from haiku_mlp.caching import kept_by_object

KeyedInitializer = Callable[..., jax.Array]
HaikuInitializer = Callable[[Sequence[int], Any], jax.Array]
Initializer = KeyedInitializer | HaikuInitializer


@dataclasses.dataclass(frozen=True)
class JaxInitializer:
    """A JAX initializer ``(key, shape, dtype)``, usable where Haiku wants one.

    Under plain Haiku the key is the next one of the transform's sequence
    (``hk.next_rng_key()``).  Under ``compat`` it is the key that Flax itself would
    give to a parameter of that name, so the initial values are Flax's bit for bit.

    Args:
      init: Callable ``(key, shape, dtype) -> array``, as in ``jax.nn.initializers``.

    Example::

      >>> import haiku as hk, jax
      >>> from haiku_mlp import JaxInitializer
      >>> w_init = JaxInitializer(jax.nn.initializers.orthogonal())
      >>> net = hk.transform(lambda x: hk.Linear(3, w_init=w_init)(x))
      >>> params = net.init(jax.random.key(0), jax.numpy.ones((1, 4)))
      >>> params["linear"]["w"].shape
      (4, 3)
    """

    init: KeyedInitializer

    def __call__(self, shape: Sequence[int], dtype: Any) -> jax.Array:
        """Returns an array, its key drawn from Haiku's sequence."""
        return self.init(hk.next_rng_key(), tuple(shape), dtype)


_lecun_normal = jax.nn.initializers.lecun_normal()


def default_kernel_init(key: jax.Array, shape: Sequence[int], dtype: Any = float) -> jax.Array:
    """``jax.nn.initializers.lecun_normal()`` as a function that pickles."""
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(
            f"the default kernel_init draws no {jnp.dtype(dtype)}: give one that does, for "
            "instance jax.nn.initializers.ones, or another param_dtype"
        )
    return _lecun_normal(key, shape, dtype)


# The repr of a Flax module shows a callable by its __name__; lecun_normal()'s is "init".
default_kernel_init.__name__ = "init"

default_bias_init = jax.nn.initializers.zeros


def as_haiku_initializer(init: Initializer) -> HaikuInitializer:
    """Returns ``init`` as Haiku calls it; wraps it if it wants a key first."""
    return JaxInitializer(init) if _takes_key(init) else init


@kept_by_object
def _takes_key(init: Initializer) -> bool:
    if isinstance(init, JaxInitializer):
        return False
    try:
        parameters = list(inspect.signature(init).parameters.values())
    except (TypeError, ValueError):  # some builtins have no signature, and None is not called
        return True
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return True
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    first = positional[0].name if positional else ""
    # jnp.zeros(shape, dtype) and np.zeros(shape, dtype, order) against (key, shape, dtype).
    return first in ("key", "rng") or (len(positional) >= 3 and first != "shape")
