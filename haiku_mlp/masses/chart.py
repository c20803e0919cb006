"""The residuals over the chart of nuclides."""

import pathlib
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from haiku_mlp.masses.formula import MAGIC, Formula
from haiku_mlp.masses.nuclides import Nuclides
from haiku_mlp.masses.training import rms

_INK = "#222222"
_COLORS = "RdBu_r"
_PAPER = "#ececec"
_NAMES = ("AME2003, train", "AME2012, test")
_SPAN_N = (-4, 166)
_SPAN_Z = (-1, 115)


def draw(
    path: pathlib.Path,
    nuclides: tuple[Nuclides, Nuclides],
    formula: Formula,
    predictions: tuple[np.ndarray, np.ndarray],
) -> None:
    """Draws predicted less measured mass, of the formula alone and with the MLP.

    Args:
      path: File to write; its suffix gives the format.
      nuclides: Those of the training and those of the test.
      formula: The mass formula.
      predictions: Mass excesses in MeV of either, formula and MLP together.
    """
    alone = [formula.mass_excess(some) - some.mass_excess for some in nuclides]
    together = [mass - some.mass_excess for mass, some in zip(predictions, nuclides, strict=True)]
    figure = Figure(figsize=(10, 12.5), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    _panel(upper, "Semi-empirical mass formula", nuclides, alone, limit=10.0)
    _panel(lower, "Formula and MLP", nuclides, together, limit=1.0)
    lower.set_xlabel("Neutron number $N$")
    figure.savefig(path, dpi=150, bbox_inches="tight")


def _panel(
    axes: Axes,
    title: str,
    nuclides: tuple[Nuclides, Nuclides],
    residuals: list[np.ndarray],
    limit: float,
) -> None:
    """Draws one chart; colours end at ``limit`` MeV."""
    train, test = nuclides
    grid = np.full((_SPAN_Z[1], _SPAN_N[1]), np.nan)
    for some, values in zip(nuclides, residuals, strict=True):
        grid[some.z, some.n] = values
    edges = [np.arange(size + 1) - 0.5 for size in grid.shape]
    mesh = axes.pcolormesh(edges[1], edges[0], grid, cmap=_COLORS, vmin=-limit, vmax=limit)
    squares = [Rectangle((n - 0.5, z - 0.5), 1, 1) for z, n in zip(test.z, test.n, strict=True)]
    axes.add_collection(
        PatchCollection(squares, facecolor="none", edgecolor=_INK, linewidth=0.6, zorder=3)
    )
    _magic_lines(axes, np.concatenate([train.z, test.z]), np.concatenate([train.n, test.n]))
    axes.set(xlim=_SPAN_N, ylim=_SPAN_Z, aspect="equal", facecolor=_PAPER)
    axes.set_ylabel("Proton number $Z$")
    axes.set_title(title, loc="left", fontweight="bold")
    axes.legend(
        handles=[
            Patch(facecolor="white", edgecolor=edge, label=_label(name, values))
            for edge, name, values in zip(("none", _INK), _NAMES, residuals, strict=True)
        ],
        loc="upper left",
        frameon=False,
    )
    bar = axes.figure.colorbar(mesh, cax=axes.inset_axes((1.015, 0, 0.02, 1)), extend="both")
    bar.set_label("Predicted less measured mass (MeV)")


def _label(name: str, residuals: np.ndarray) -> str:
    return f"{name}: {len(residuals)} nuclides, rms {rms(residuals):.2f} MeV"


def _magic_lines(axes: Axes, z: np.ndarray, n: np.ndarray) -> None:
    """Marks the magic numbers along the nuclides that have them."""
    style: Any = {"color": _INK, "linewidth": 0.8, "linestyle": (0, (4, 3)), "zorder": 2}
    for magic in MAGIC:
        if (z == magic).any():
            start, stop = n[z == magic].min() - 3, n[z == magic].max() + 3
            axes.plot((start, stop), (magic, magic), **style)
            axes.text(start - 0.7, magic, f"$Z={magic}$", va="center", ha="right", fontsize=8)
        if (n == magic).any():
            start, stop = z[n == magic].min() - 3, z[n == magic].max() + 3
            axes.plot((magic, magic), (start, stop), **style)
            axes.text(magic, start - 0.7, f"$N={magic}$", va="top", ha="center", fontsize=8)
