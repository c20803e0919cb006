"""Prints the ratios of the benchmarks, all measured in one run, and writes them to a file.

Each line is a time (or what it says) in units of that of the thing it is compared with: the
median of interleaved repetitions, and the quartiles.

Run: python tests/benchmarks/run.py [GROUP ...]    (no GROUP: all, and results.txt is written)
"""

import importlib.metadata
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Iterator

import jax

jax.config.update("jax_enable_x64", True)

import any_network  # noqa: E402  (x64 is on from the start)
import forward  # noqa: E402
import iteration  # noqa: E402
import overhead  # noqa: E402
import structure  # noqa: E402

RESULTS = pathlib.Path(__file__).parent / "results.txt"
BUDGET = 2.0
"""Seconds for the repetitions of one comparison."""

GROUPS: dict[str, tuple[str, Callable[[], Iterator[tuple[str, ...]]]]] = {
    "tangent": (
        "Tangent kernel, in units of tangent_kernel",
        lambda: structure.tangent_kernel_rows(BUDGET),
    ),
    "slopes": ("How the time of the tangent kernel grows", lambda: structure.slope_rows(BUDGET)),
    "networks": (
        "Tangent kernels of networks of many kinds: NetKet's by its Jacobian in units of ours",
        lambda: any_network.rows(BUDGET),
    ),
    "laplacian": (
        "Value, gradient and Laplacian, in units of laplacian",
        lambda: structure.laplacian_rows(BUDGET),
    ),
    "forward": ("Jitted, in units of raw jnp", lambda: forward.rows(BUDGET)),
    "matmul": ("Of the machine's own rate", forward.matmul_rows),
    "overhead": ("Python, in units of netket.models.MLP", lambda: overhead.rows(BUDGET / 4)),
    "resnet": ("Tracing through the adapter", lambda: overhead.resnet_rows(BUDGET / 2)),
    "imports": ("Imports, in units of haiku", overhead.import_rows),
    "iterations": (
        "A whole iteration, sampling and step: VMC_SR in units of ours",
        lambda: iteration.iteration_rows(BUDGET),
    ),
    "growth": ("How the time of an iteration grows", lambda: iteration.growth_rows(BUDGET)),
    "energies": (
        "Local energies: NetKet's kernels in units of ours",
        lambda: iteration.local_energy_rows(BUDGET),
    ),
    "proposals": ("Sampling, all chains at once", lambda: iteration.proposal_rows(BUDGET)),
    "kinetic": (
        "Kinetic energy in a sum with a potential: NetKet's in units of ours",
        lambda: iteration.kinetic_rows(BUDGET),
    ),
    "sr": (
        "A step of stochastic reconfiguration, in units of MinSR",
        lambda: structure.sr_rows(BUDGET),
    ),
}


def lines(names: list[str]) -> Iterator[str]:
    """Yields the table, line by line."""
    packages = ("jax", "dm-haiku", "flax", "netket", "equinox", "folx")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    cores, device = len(os.sched_getaffinity(0)), jax.devices()[0].device_kind
    yield f"{platform.machine()}, {cores} cores, {device}, Python {platform.python_version()}"
    yield versions
    for name in names:
        title, rows = GROUPS[name]
        yield ""
        yield title
        yield "-" * len(title)
        for what, who, value in rows():
            yield f"{what:<83}  {who:<32}  {value}"


def main(names: list[str]) -> None:
    begin, table = time.perf_counter(), []
    for line in lines(names or list(GROUPS)):
        print(line, flush=True)
        table.append(line)
        if not names:
            RESULTS.write_text("\n".join(table) + "\n")
    print(f"\n{time.perf_counter() - begin:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
