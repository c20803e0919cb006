"""Ratios of times measured in one run: interleaved repetitions, medians, spread."""

import functools
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

# Frames on the stack of a script, or of a notebook.  Python gets and frees its stack in pieces, so
# that a call which crosses a border costs more: what takes a moment at one depth may take twice as
# long at another.
DEPTHS = range(0, 100, 5)


class Ratio(NamedTuple):
    """How long one thing takes in units of another, and the quartiles of that."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


def seconds(
    functions: dict[str, Callable[[], object]],
    *,
    budget: float = 4.0,
    least: int = 7,
    depths: Sequence[int] = (0,),
) -> dict[str, list[float]]:
    """Returns the times of each function, called in turns until the budget (s) is spent.

    What takes less than 2 ms is called that long in each turn.  The first call of a turn does not
    count: it finds the caches, and the memory, as the function before it left them.

    Args:
      functions: The functions, by name.
      budget: Time for all of them, in seconds.
      least: Number of turns at least.
      depths: Frames on the stack below the calls, another number each turn.
    """
    for function in functions.values():
        jax.block_until_ready(function())
    calls = {name: max(1, round(2e-3 / _time(f, 3))) for name, f in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    start = time.perf_counter()
    while time.perf_counter() - start < budget or min(map(len, times.values())) < least:
        gc.collect()
        turn = len(next(iter(times.values())))
        depth, order = depths[turn % len(depths)], turn % len(functions)
        # In another order each turn: the first call after the collection is slow.
        for name, function in [*functions.items(), *functions.items()][order:][: len(functions)]:
            jax.block_until_ready(at_depth(depth, function))
            times[name].append(at_depth(depth, functools.partial(_time, function, calls[name])))
    return times


def at_depth(depth: int, function: Callable[[], Any]) -> Any:
    """Returns what the function does, called with so many frames more on the stack."""
    return function() if depth == 0 else at_depth(depth - 1, function)


def _time(function: Callable[[], object], calls: int) -> float:
    """Returns the mean time of a call."""
    begin = time.perf_counter()
    for _ in range(calls):
        jax.block_until_ready(function())
    return (time.perf_counter() - begin) / calls


def ratio(times: list[float], reference: list[float]) -> Ratio:
    """Returns the ratio of two interleaved series, turn by turn."""
    ratios = sorted(a / b for a, b in zip(times, reference, strict=True))
    low, median, high = statistics.quantiles(ratios, n=4)
    return Ratio(median, low, high)


def ratios(
    functions: dict[str, Callable[[], object]], reference: str, **options: Any
) -> dict[str, Ratio]:
    """Returns each function's time in units of the reference's."""
    times = seconds(functions, **options)
    return {name: ratio(series, times[reference]) for name, series in times.items()}


def peak_bytes(function: Callable[..., object], *arguments: object) -> int:
    """Returns the temporary memory of the compiled function."""
    analysis = jax.jit(function).lower(*arguments).compile().memory_analysis()
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes
