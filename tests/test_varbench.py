"""The benchmark on varbench's systems: a short run, and the results in the repository."""

import pathlib
import re
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parent / "benchmarks"
NAME = "Heisenberg chain 20 periodic"


@pytest.mark.slow
def test_a_short_run_is_near_the_exact_energy():
    command = [sys.executable, "varbench.py", "--system", NAME, "--steps", "150"]
    process = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    error = float(re.search(r"relative error (\S+),", process.stdout)[1])
    assert -1e-3 < error < 5e-3


def test_the_results_quote_the_rows_of_varbench():
    results = (FOLDER / "varbench.txt").read_text()
    lines = (FOLDER / "varbench.tsv").read_text().splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")][1:]
    systems = re.findall(r"^(.+)\n-+$", results, re.MULTILINE)
    assert NAME in systems
    for system, _, energy, *_, method in rows:
        if system in systems:
            assert re.search(rf"^ *{float(energy):.6f} .*  {re.escape(method)}$", results, re.M)
