"""Prints the ratios of the benchmarks, and writes them to ``results.txt``, by group.

Each line is a time (or what it says) in units of that of the thing it is compared with, both
measured in this run: the median of interleaved repetitions, and the quartiles.

Run: python tests/benchmarks/run.py [GROUP ...]    (no GROUP: all)
"""

import importlib.metadata
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Iterator

# Else threads of its decompositions wait for more on cores that XLA needs (group "lapack").
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

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
    "dispatch": (
        "What Python and the start of operations take of an iteration",
        lambda: iteration.dispatch_rows(2 * BUDGET),
    ),
    "lapack": (
        "An iteration with OpenBLAS on all cores, in units of one with it on one",
        iteration.lapack_rows,
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


def header() -> str:
    """Returns what was measured, and on what."""
    packages = ("jax", "dm-haiku", "flax", "netket", "equinox", "folx")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    cores, device = len(os.sched_getaffinity(0)), jax.devices()[0].device_kind
    machine = f"{platform.machine()}, {cores} cores, {device}, Python {platform.python_version()}"
    settings = f"float64, OPENBLAS_NUM_THREADS={os.environ['OPENBLAS_NUM_THREADS']}"
    return f"{machine}\n{versions}\n{settings}; each group in one run, not all in the same"


def written() -> dict[str, str]:
    """Returns the groups that the file has, by title."""
    parts = RESULTS.read_text().strip().split("\n\n")[1:] if RESULTS.exists() else []
    return {part.partition("\n")[0]: part for part in parts}


def main(names: list[str]) -> None:
    begin = time.perf_counter()
    print(header())
    for name in names or GROUPS:
        title, rows = GROUPS[name]
        lines = [title, "-" * len(title)]
        print("", *lines, sep="\n", flush=True)
        for what, who, value in rows():
            lines.append(f"{what:<83}  {who:<32}  {value}")
            print(lines[-1], flush=True)
        found = {**written(), title: "\n".join(lines)}
        titles = [title for title, _ in GROUPS.values() if title in found]
        parts = [header(), *(found[title] for title in titles)]
        RESULTS.write_text("\n\n".join(parts) + "\n")
    print(f"\n{time.perf_counter() - begin:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
