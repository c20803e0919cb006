"""One part of a program after another."""

from typing import Any

import jax
import jax.numpy as jnp


def after(tree: Any, done: Any) -> Any:
    """Returns the same tree, but a compiled program waits for all of ``done`` before it uses it.

    On a CPU XLA runs the independent parts of a program at the same time.  Two decompositions of
    many matrices (for determinants, ``solve``, ...) then wait for each other's threads, for ever if
    there are few: a user's function that has one must not run twice at once.  Zero times an entry
    of ``done`` is subtracted: the compiler drops ``jax.lax.optimization_barrier`` too early.
    """
    arrays = [array for array in jax.tree.leaves(done) if array.size > 0]
    is_compiled = any(isinstance(array, jax.core.Tracer) for array in arrays)
    if jax.default_backend() != "cpu" or jax.device_count() > 1 or not is_compiled:
        return tree

    def tied(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or not jnp.issubdtype(leaf.dtype, jnp.number):
            return leaf
        for array in arrays:
            entry = jax.lax.stop_gradient(array)[(0,) * array.ndim].real
            zero = 0 * jnp.abs(jnp.nan_to_num(entry))  # which the compiler does not know
            leaf -= zero.astype(leaf.dtype)  # -0.0 stays what it is
        return leaf

    return jax.tree.map(tied, tree)
