"""The semi-empirical mass formula, and what the network gets to know of a nuclide."""

import dataclasses
from collections.abc import Iterable

import numpy as np

from haiku_mlp.masses.nuclides import Nuclides

HYDROGEN = 7.2889705
"""Mass excess of the hydrogen atom in MeV (AME2003)."""

NEUTRON = 8.0713171
"""Mass excess of the neutron in MeV (AME2003)."""

MAGIC = (2, 8, 20, 28, 50, 82, 126, 184)
"""Numbers of protons or neutrons that fill a shell."""


def terms(z: np.ndarray, n: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the terms of the binding energy, without units, each ``(m,)``.

    Source: von Weizsaecker, Z. Phys. 96 (1935) 431; beyond the pairing term Myers and
    Swiatecki, Nucl. Phys. 81 (1966) 1.
    """
    a = z + n
    radius = np.cbrt(a)
    excess = np.abs(n - z)
    return {
        "volume": a,
        "surface": -(radius**2),
        "Coulomb": -z * (z - 1) / radius,
        "asymmetry": -(excess**2) / a,
        "pairing": (1 - z % 2 - n % 2) / np.sqrt(a),
        "surface asymmetry": excess**2 / radius**4,
        "curvature": radius,
        "Coulomb exchange": np.cbrt(z) ** 4 / radius,
        "Wigner": -excess / a,
    }


@dataclasses.dataclass(frozen=True)
class Formula:
    """A semi-empirical mass formula.

    Args:
      coefficients: In MeV, by the name of the term.
    """

    coefficients: dict[str, float]

    @classmethod
    def fit(cls, nuclides: Nuclides, names: Iterable[str] | None = None) -> "Formula":
        """Returns the formula of the named terms (None: all) that fits best (least squares)."""
        columns = terms(nuclides.z, nuclides.n)
        names = tuple(columns if names is None else names)
        binding = nuclides.z * HYDROGEN + nuclides.n * NEUTRON - nuclides.mass_excess
        matrix = np.stack([columns[name] for name in names], axis=-1)
        solution, *_ = np.linalg.lstsq(matrix, binding, rcond=None)
        return cls(dict(zip(names, solution.tolist(), strict=True)))

    def mass_excess(self, nuclides: Nuclides) -> np.ndarray:
        """Returns the formula's mass excess in MeV, ``(m,)``."""
        columns = terms(nuclides.z, nuclides.n)
        binding = sum(value * columns[name] for name, value in self.coefficients.items())
        return nuclides.z * HYDROGEN + nuclides.n * NEUTRON - binding


def features(z: np.ndarray, n: np.ndarray) -> dict[str, np.ndarray]:
    """Returns what the network gets to know of a nuclide, each ``(m,)``.

    Size, asymmetry and parities; and for either kind of nucleon the shell that is being
    filled, how full it is, and the distance to the nearest magic number.
    """
    a = z + n
    z_shell, z_filled, z_valence = _shell(z)
    n_shell, n_filled, n_valence = _shell(n)
    return {
        "Z": z,
        "N": n,
        "radius": np.cbrt(a),
        "asymmetry": (n - z) / a,
        "Z parity": z % 2,
        "N parity": n % 2,
        "Z shell": z_shell,
        "N shell": n_shell,
        "Z filled": z_filled,
        "N filled": n_filled,
        "Z valence": z_valence,
        "N valence": n_valence,
    }


def _shell(number: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the shell's index, its filled fraction, and the nucleons or holes beside it."""
    magic = np.array(MAGIC)
    index = np.searchsorted(magic, number, side="right")
    below, above = magic[index - 1], magic[index]
    nearest = np.minimum(number - below, above - number)
    return index, (number - below) / (above - below), nearest
