"""Ratios of times measured in one run: interleaved repetitions, medians, spread."""

import gc
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax


class Ratio(NamedTuple):
    """How long one thing takes in units of another, and the quartiles of that."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


def seconds(
    functions: dict[str, Callable[[], object]], *, budget: float = 4.0, least: int = 7
) -> dict[str, list[float]]:
    """Returns the times of each function, called in turns until the budget (s) is spent.

    What takes less than 2 ms is called that long in each turn.  The first call of a turn does not
    count: it finds the caches, and the memory, as the function before it left them.
    """
    for function in functions.values():
        jax.block_until_ready(function())
    calls = {name: max(1, round(2e-3 / _time(f, 3))) for name, f in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    start = time.perf_counter()
    while time.perf_counter() - start < budget or min(map(len, times.values())) < least:
        gc.collect()
        turn = len(next(iter(times.values()))) % len(functions)
        # In another order each turn: the first call after the collection is slow.
        for name, function in [*functions.items(), *functions.items()][turn:][: len(functions)]:
            jax.block_until_ready(function())
            times[name].append(_time(function, calls[name]))
    return times


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
    functions: dict[str, Callable[[], object]], reference: str, **options: float
) -> dict[str, Ratio]:
    """Returns each function's time in units of the reference's."""
    times = seconds(functions, **options)
    return {name: ratio(series, times[reference]) for name, series in times.items()}


def peak_bytes(function: Callable[..., object], *arguments: object) -> int:
    """Returns the temporary memory of the compiled function."""
    analysis = jax.jit(function).lower(*arguments).compile().memory_analysis()
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes
