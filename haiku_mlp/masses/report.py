"""The comparison with the published mass models, as text."""

from collections.abc import Mapping

import numpy as np

from haiku_mlp.masses.formula import Formula
from haiku_mlp.masses.nuclides import PUBLISHED, Nuclides, read
from haiku_mlp.masses.training import rms


def report(test: Nuclides, formula: Formula, predictions: Mapping[str, np.ndarray]) -> str:
    """Returns the errors of formula, faces and published models on the same nuclides.

    Args:
      test: The nuclides, with their measured masses.
      formula: The mass formula.
      predictions: Mass excesses in MeV, ``(m,)``, by the name of the face.
    """
    errors = {name: values - test.mass_excess for name, values in predictions.items()}
    lines = [
        f"Root-mean-square error in MeV on the {len(test)} nuclides first measured in AME2012:",
        "",
        f"{'formula alone':20}{rms(formula.mass_excess(test) - test.mass_excess):8.3f}",
        *(f"{f'MLP, {name} face':20}{rms(values):8.3f}" for name, values in errors.items()),
        "",
        "Published mass models, each on those of the nuclides that its table has:",
        "",
        "model    year  nuclides   error" + "".join(f"{f'MLP, {name}':>12}" for name in errors),
    ]
    for model in PUBLISHED:
        table = read(model.table)
        common = test.among(table)
        both = test.where(common)
        theirs = rms(np.array([table[key] for key in both.numbers()]) - both.mass_excess)
        ours = {name: rms(values[common]) for name, values in errors.items()}
        beaten = [name for name, value in ours.items() if theirs < value]
        remarks = [
            f"beats the MLP ({', '.join(beaten)})" if beaten else "",
            "postdates the test data" if model.postdates_test else "",
            model.remark,
        ]
        lines.append(
            f"{model.table:8} {model.year} {len(both):9} {theirs:7.3f}"
            + "".join(f"{value:12.3f}" for value in ours.values())
            + "   "
            + ", ".join(filter(None, remarks))
        )
    return "\n".join(line.rstrip() for line in lines)
