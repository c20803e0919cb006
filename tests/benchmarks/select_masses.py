"""How the settings of the main job were chosen: prints errors on held-out training nuclides.

Only AME2003 is read for this; no mass that was first measured in AME2012 takes part.  Two
sets are held out, one at a time:

new    the nuclides that AME1995 has not.  They lie to AME1995 as the test nuclides lie to
       AME2003, so this error decides;
outer  the lightest and the heaviest isotope of each element: a second opinion.

Each line changes one thing and gives the root-mean-square errors in MeV, each the mean of
two seeds, whose scatter is about 0.02 MeV.  No line is better than the choice by more than
that; twice the steps gain 0.005 MeV for twice the time.  The seed is not chosen.

Run: python tests/benchmarks/select_masses.py [WORD ...]    (only the lines with a WORD)
"""

import dataclasses
import sys

import numpy as np

from haiku_mlp.masses import nuclides, training
from haiku_mlp.masses.formula import Formula, features, terms

TERMS = tuple(terms(np.array([8]), np.array([8])))
FEATURES = tuple(features(np.array([8]), np.array([8])))


def without(names: tuple[str, ...], word: str) -> tuple[str, ...]:
    return tuple(name for name in names if word not in name)


CASES: dict[str, tuple[dict, tuple[str, ...], tuple[str, ...]]] = {
    "as chosen": ({}, TERMS, FEATURES),
    "formula of 5 terms": ({}, TERMS[:5], FEATURES),
    "formula of 6 terms": ({}, TERMS[:6], FEATURES),
    "no shell features": ({}, TERMS, FEATURES[:6]),
    "no parities": ({}, TERMS, without(FEATURES, "parity")),
    "no shell index": ({}, TERMS, without(FEATURES, "shell")),
    "no filled fraction": ({}, TERMS, without(FEATURES, "filled")),
    "no valence": ({}, TERMS, without(FEATURES, "valence")),
    "32 units": ({"hidden_dims": (32, 32)}, TERMS, FEATURES),
    "96 units": ({"hidden_dims": (96, 96)}, TERMS, FEATURES),
    "1 layer of 256": ({"hidden_dims": (256,)}, TERMS, FEATURES),
    "3 layers of 48": ({"hidden_dims": (48, 48, 48)}, TERMS, FEATURES),
    "1 member": ({"members": 1}, TERMS, FEATURES),
    "4 members": ({"members": 4}, TERMS, FEATURES),
    "learning rate 0.01": ({"learning_rate": 0.01}, TERMS, FEATURES),
    "learning rate 0.04": ({"learning_rate": 0.04}, TERMS, FEATURES),
    "1000 steps": ({"steps": 1000}, TERMS, FEATURES),
    "4000 steps": ({"steps": 4000}, TERMS, FEATURES),
    "batches of 256": ({"batch_size": 256}, TERMS, FEATURES),
}


def error(
    known: nuclides.Nuclides,
    held_out: nuclides.Nuclides,
    settings: training.Settings,
    term_names: tuple[str, ...],
    feature_names: tuple[str, ...],
    seed: int,
) -> float:
    problem = training.Problem.pose(known, Formula.fit(known, term_names), feature_names)
    face = training.haiku_face(settings.hidden_dims)
    weights = training.train(
        face, problem.inputs(known), problem.targets(known), settings, seed=seed
    )
    predicted = problem.mass_excess(face, weights, held_out)
    return training.rms(predicted - held_out.mass_excess)


def outermost(train: nuclides.Nuclides) -> np.ndarray:
    ends = np.zeros(len(train), bool)
    for z in np.unique(train.z):
        isotopes = np.flatnonzero(train.z == z)
        isotopes = isotopes[np.argsort(train.n[isotopes])]
        ends[isotopes[[0, -1]]] = True
    return ends


def main(words: list[str]) -> None:
    train, _ = nuclides.measured()
    held_out = {"new": ~train.among(nuclides.read("AME1995")), "outer": outermost(train)}
    heads = [f"{name} ({mask.sum()})" for name, mask in held_out.items()]
    print(" " * 20 + "".join(f"{head:>14}" for head in heads), flush=True)
    for name, (changes, term_names, feature_names) in CASES.items():
        if words and not any(word in name for word in words):
            continue
        case = dataclasses.replace(training.Settings(), **changes), term_names, feature_names
        errors = [
            np.mean([error(train.where(~mask), train.where(mask), *case, seed) for seed in (0, 1)])
            for mask in held_out.values()
        ]
        print(f"{name:20}" + "".join(f"{value:14.3f}" for value in errors), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
