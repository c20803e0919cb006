"""What two calls give, compared: values, exceptions, Python calls, times."""

import functools
import gc
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from benchmarks import timing
from flax import errors
from flax import linen as nn


def outcome(function: Callable[..., Any], *args: Any) -> Any:
    """Returns what the function returns or raises, or an exception that it is given."""
    for arg in args:
        if isinstance(arg, Exception):
            return arg
    try:
        return function(*args)
    except Exception as error:
        return error


def assert_identical(ours: Any, theirs: Any) -> None:
    """Asserts equal structures, types, dtypes, shapes and bits; exceptions with equal texts."""
    if isinstance(ours, Exception) or isinstance(theirs, Exception):
        assert type(ours) is type(theirs)
        texts = [str(ours), str(theirs)]
        if isinstance(ours, errors.ScopeParamShapeError) and "Initializer expected" in texts[0]:
            texts = ["".join(sorted(text)) for text in texts]  # Flax 0.11 swaps the two shapes
        assert texts[0] == texts[1]
        return
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        if not hasattr(b, "dtype") or isinstance(b, jax.ShapeDtypeStruct):
            assert type(a) is type(b)
            assert a == b
            continue
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert getattr(a, "weak_type", False) == getattr(b, "weak_type", False)
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def assert_close(ours: Any, expected: Any, tolerance: float) -> None:
    """Asserts equal structures, shapes and dtypes, and a small error beside the largest entry."""
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    pairs = [
        (np.asarray(a), np.asarray(b))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True)
    ]
    scale = max((np.max(np.abs(b), initial=0) for _, b in pairs), default=0)
    for a, b in pairs:
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert np.max(np.abs(a - b), initial=0) <= tolerance * scale
        assert np.all(np.isfinite(a))


def lowered_text(function: Callable[..., Any], *args: Any) -> str:
    """Returns the program that XLA is given: where it is the same, so is each result."""

    def main(*args: Any) -> Any:  # the program has the name of the function
        return function(*args)

    return jax.jit(main).lower(*args).as_text()


class _Key(nn.Module):
    stream: str

    def __call__(self) -> jax.Array:
        return self.make_rng(self.stream)


def root_key(key: jax.Array, stream: str) -> jax.Array:
    """Returns the key that ``make_rng`` gives at the root of a model."""
    return _Key(stream).apply({}, rngs={stream: key})


def num_calls(function: Callable[[], Any]) -> int:
    """Returns the number of calls of Python functions that ``function()`` makes."""
    count = 0

    def profile(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event == "call"

    function()  # whatever is kept after a first call
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def median_ratios(functions: dict[str, Callable[[], Any]], reference: str) -> dict[str, float]:
    """Returns the processor time of each function in units of the reference's.

    They take turns, each turn at another depth of the stack: at one alone a function may take up
    to twice as long as at others.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    gc.disable()  # else it is the size of the test process that is measured
    try:
        for depth in timing.DEPTHS:
            for name, function in functions.items():
                times[name].append(timing.at_depth(depth, functools.partial(_seconds, function)))
    finally:
        gc.enable()
    return {name: timing.ratio(values, times[reference]).median for name, values in times.items()}


def _seconds(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start
