"""The energies of ``varbench.py`` beside those that varbench lists: makes ``varbench.txt``.

    python tests/benchmarks/varbench_table.py

The rows are those of varbench (arXiv:2302.04919), copied to ``varbench.tsv``: total energies
in Pauli units.  The V-score is N var / (E - E_inf)^2, and smaller is better.
"""

import csv
import json
import math
import pathlib
from collections.abc import Iterable
from typing import Any

FOLDER = pathlib.Path(__file__).parent
EXACT = ("Exact Solution", "Exact diagonalization")


def listed() -> list[dict[str, str]]:
    """Returns the rows of varbench."""
    lines = (FOLDER / "varbench.tsv").read_text().splitlines()
    rows = (line for line in lines if not line.startswith("# "))
    return list(csv.DictReader(rows, delimiter="\t"))


def results() -> dict[str, list[dict[str, Any]]]:
    """Returns the results of each system, in the order of varbench.

    Those of few cores go first, and of them the one with the least variance.
    """
    found = [json.loads(path.read_text()) for path in sorted((FOLDER / "varbench").glob("*.json"))]
    found.sort(key=lambda one: (not one["device"].endswith("core(s)"), one["variance"]))
    systems = dict.fromkeys(row["system"] for row in listed())
    sorted_ = {name: [one for one in found if one["system"] == name] for name in systems}
    return {name: ours for name, ours in sorted_.items() if ours}


def table(name: str, ours: list[dict[str, Any]]) -> str:
    """Returns the table of a system."""
    rows = [row for row in listed() if row["system"] == name]
    sites, zero = int(rows[0]["dof"]), float(rows[0]["e_inf"] or 0)
    exact = [float(row["energy"]) for row in rows if row["method"] in EXACT]
    lines = [name, "-" * len(name)]
    lines += [_described(*pair, *exact[:1]) for pair in zip("abcdef", ours, strict=False)]
    lines += ["", f"{'energy':>14}  {'error':>8}  {'variance':>9}  {'V-score':>8}  method"]
    energies = [
        (one["energy"], one["error"], one["variance"], f"this MLP ({letter})")
        for letter, one in zip("abcdef", ours, strict=False)
    ]
    energies += [
        (
            float(row["energy"]),
            _number(row["sigma"]),
            _number(row["variance"].partition("(")[0]),
            row["method"],
        )
        for row in rows
    ]
    for energy, error, variance, method in sorted(energies, key=lambda line: line[0]):
        score = None if variance is None else sites * variance / (energy - zero) ** 2
        lines.append(f"{energy:14.6f}  {_cells(error, variance, score)}  {method}")
    return "\n".join(lines) + "\n"


def _described(letter: str, result: dict[str, Any], exact: float = math.nan) -> str:
    recipe = result["recipe"]
    hidden = " x ".join(str(width) for width in (recipe["features"], *recipe["hidden"]))
    size = f"{hidden} features, {recipe['group']} group, {result['parameters']} parameters"
    driver = recipe.get("driver", "VMC_SR")  # of results older than the choice
    text = (
        f"({letter}) {size}, "
        f"{result['steps']} steps of {driver}, {result['minutes']:.1f} minutes "
        f"on {result['device']}, seed {result['seed']}"
    )
    if math.isnan(exact):
        return text
    error, spread = 1 - result["energy"] / exact, result["error"] / abs(exact)
    return f"{text}:\n    relative error {error:.1e} +- {spread:.1e}"


def _number(text: str) -> float | None:
    return float(text) if text else None


def _cells(*values: float | None) -> str:
    texts = ("" if value is None else f"{value:.1e}" for value in values)
    return "  ".join(f"{text:>{width}}" for text, width in zip(texts, (8, 9, 8), strict=True))


def report(found: dict[str, list[dict[str, Any]]]) -> Iterable[str]:
    """Yields the lines of ``varbench.txt``."""
    yield "python tests/benchmarks/varbench.py, with the options that varbench/*.json has as recipe"
    versions = {json.dumps(one["versions"]) for ours in found.values() for one in ours}
    for text in sorted(versions):
        yield "float64, " + ", ".join(f"{key} {value}" for key, value in json.loads(text).items())
    for name, ours in found.items():
        yield ""
        yield table(name, ours).rstrip()


if __name__ == "__main__":
    (FOLDER / "varbench.txt").write_text("\n".join(report(results())) + "\n")
