"""Programs that run side by side: JAX runs those of one thread in turn."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import jax

T = TypeVar("T")


def num_cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def side_by_side(call: Callable[[int], T], number: int) -> list[T]:
    """Returns ``call(0)`` to ``call(number - 1)``, of one compiled program, at the same time.

    The first comes from this thread, and compiles what the others find.  A context of JAX holds
    for one thread: where another has other settings than this one it would compile another
    program, so that the calls come from here, in turn, as while they are traced.

    Example::

      >>> import jax
      >>> from compat.netket.threads import side_by_side
      >>> square = jax.jit(lambda number: number**2)
      >>> [int(value) for value in side_by_side(square, 3)]
      [0, 1, 4]
    """
    first = call(0)
    is_traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(first))
    if is_traced or not hasattr(jax.sharding, "get_mesh"):  # which JAX 0.7.0 has not
        return [first, *map(call, range(1, number))]
    settings, mesh = jax.config.values, jax.sharding.get_mesh()

    def elsewhere(i: int) -> T | None:
        jax.sharding.set_mesh(None if mesh.empty else mesh)
        return call(i) if jax.config.values == settings else None

    with ThreadPoolExecutor(max(1, number - 1)) as pool:
        others = list(pool.map(elsewhere, range(1, number)))
    return [first, *(call(i) if a is None else a for i, a in enumerate(others, 1))]
