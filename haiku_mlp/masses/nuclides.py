"""Measured and published nuclear masses, read from the text files of ``masstable``.

All files hold atomic mass excesses in MeV, one nuclide ``Z N M`` a line.
"""

import dataclasses
import importlib.resources
import importlib.util
from collections.abc import Iterable

import numpy as np

Table = dict[tuple[int, int], float]
"""Mass excess in MeV by ``(Z, N)``."""

LIGHTEST = 8
"""Smallest proton and neutron number, as in the literature on mass models."""

_FAULTY = {"AME2003all", "AME2012all", "ETFSI12", "HFB14", "KTUY05"}


@dataclasses.dataclass(frozen=True)
class Nuclides:
    """Nuclides and their masses.

    Args:
      z: Proton numbers, ``(m,)`` integers.
      n: Neutron numbers, ``(m,)`` integers.
      mass_excess: Measured mass excesses in MeV, ``(m,)``.
    """

    z: np.ndarray
    n: np.ndarray
    mass_excess: np.ndarray

    def __len__(self) -> int:
        return len(self.z)

    def numbers(self) -> list[tuple[int, int]]:
        """Returns ``(Z, N)`` of each."""
        return list(zip(self.z.tolist(), self.n.tolist(), strict=True))

    def where(self, mask: np.ndarray) -> "Nuclides":
        """Returns those for which ``mask (m,)`` is true."""
        return Nuclides(self.z[mask], self.n[mask], self.mass_excess[mask])

    def among(self, table: Iterable[tuple[int, int]]) -> np.ndarray:
        """Returns which of the nuclides the table has, ``(m,)`` booleans."""
        known = set(table)
        return np.array([key in known for key in self.numbers()], bool)


@dataclasses.dataclass(frozen=True)
class Published:
    """A published mass model whose table the package has.

    Args:
      table: Name of its table.
      year: Year of publication.
      remark: What to know before comparing with it.
    """

    table: str
    year: int
    remark: str = ""

    @property
    def postdates_test(self) -> bool:
        """Whether it is younger than AME2012, and so may have been fitted to the test data."""
        return self.year > 2012


PUBLISHED = (
    Published("MAJA88", 1988),
    Published("DUZU", 1995),
    Published("ETFSI12", 1995),
    Published("FRDM95", 1995),
    Published("KTUY05", 2005),
    Published("HFB14", 2007),
    Published("WS32010", 2010, "with radial-basis correction"),
    Published("WS32011", 2011, "with radial-basis correction"),
    Published("TCSM12", 2012),
    Published("BR2013", 2013),
    Published("HFB26", 2013, "fitted to AME2012"),
    Published("SVM13", 2013),
    Published("TCSM13", 2013),
)
"""The models, oldest first.  GK88 is left out: its table has lost its minus signs.

The two Weizsaecker-Skyrme tables are 0.218 and 0.184 MeV from AME2003, which they can be
only with the correction of Phys. Rev. C 84 (2011) 051303 that interpolates the residuals.
"""


def measured() -> tuple[Nuclides, Nuclides]:
    """Returns the nuclides of AME2003, and those of AME2012 that it has not."""
    train = read("AME2003")
    test = {key: mass for key, mass in read("AME2012").items() if key not in train}
    return nuclides(train), nuclides(test)


def nuclides(table: Table) -> Nuclides:
    """Returns the nuclides of a table from ``LIGHTEST`` on."""
    rows = {key: mass_excess for key, mass_excess in table.items() if min(key) >= LIGHTEST}
    z, n = np.array(list(rows)).T
    return Nuclides(z, n, np.array(list(rows.values())))


def read(name: str) -> Table:
    """Returns the table of that name.

    In some of the files N has a wrong last digit above Z = 100: too large by Z - 100,
    modulo 10.  This is undone, after which AME2003all agrees with AME2003, and HFB14 has
    its published error of 0.729 MeV on AME2003.
    """
    table = {}
    for line in _text(name).splitlines()[1:]:
        z, n, mass_excess = line.split()
        table[int(z), int(n)] = float(mass_excess)
    if name in _FAULTY:
        return {(z, _corrected(z, n)): mass_excess for (z, n), mass_excess in table.items()}
    return table


def _corrected(z: int, n: int) -> int:
    return n - n % 10 + (n - z) % 10 if z > 100 else n


def _text(name: str) -> str:
    # Not imported: that takes pandas and most of a second, for files that are there anyway.
    spec = importlib.util.find_spec("masstable")
    if spec is None:
        raise ModuleNotFoundError("No module named 'masstable'", name="masstable")
    package = importlib.util.module_from_spec(spec)
    return (importlib.resources.files(package) / "data" / f"{name}.txt").read_text()
