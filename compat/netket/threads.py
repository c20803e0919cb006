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


def side_by_side(call: Callable[[int], T], number: int) -> list[T] | None:
    """Returns ``call(0)`` to ``call(number - 1)``, of one compiled program, at the same time.

    The first comes from this thread, and compiles what the others find.  None, and no call, where
    they would not: JAX's contexts hold for one thread.  So does a mesh, which they are given.

    Args:
      call: Calls the program.
      number: How often, at least twice.

    Example::

      >>> import jax
      >>> from compat.netket.threads import side_by_side
      >>> square = jax.jit(lambda number: number**2)
      >>> [int(value) for value in side_by_side(square, 3)]
      [0, 1, 4]
    """
    try:
        mesh = jax.sharding.get_mesh()
    except (AttributeError, ValueError):  # JAX 0.7.0 has none; or a transformation traces
        return None
    settings = jax.config.values

    def elsewhere(i: int) -> T:
        jax.sharding.set_mesh(None if mesh.empty else mesh)
        return call(i)

    with ThreadPoolExecutor(number - 1) as pool:
        try:
            found = pool.submit(lambda: jax.config.values)
        except RuntimeError:  # Python shuts down, and starts no threads any more
            return None
        if found.result() != settings:
            return None
        return [call(0), *pool.map(elsewhere, range(1, number))]
