"""Tests the supported versions, each in a new environment made from setup.cfg.

    python tests/versions.py

The lowest Python with the lowest version of each requirement, and the newest versions
that resolve with each newer Python that the machine has.  Warnings from this project's
own code are errors there.
"""

import configparser
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parent.parent
NEWER_PYTHONS = ("3.12", "3.13")
TESTS = ("test_parity.py", "test_precision.py", "test_fuzz_haiku.py", "test_threads.py")
NEEDED = ("cloudpickle", "hypothesis", "netket", "orbax-checkpoint", "pytest", "safetensors")
TIME_LIMIT = 600  # seconds, for an installation or a test run

# A test that the guard against deprecated calls is there.
PLANTED = """
import warnings
import pytest

@pytest.mark.parametrize("module", ["compat", "compat.mirror", "haiku_mlp.linear"])
def test_a_warning_from_our_code_is_an_error(module):
    with pytest.raises(DeprecationWarning):
        warnings.warn_explicit("old", DeprecationWarning, "file.py", 1, module)

def test_a_warning_from_elsewhere_is_none():
    warnings.warn_explicit("old", DeprecationWarning, "file.py", 1, "another")
"""
WARNINGS = "ignore\nerror:::(haiku_mlp|compat)(\\.|$)"


def main() -> int:
    """Returns the exit status."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lowest_python = config["options"]["python_requires"].removeprefix(">=")
    requirements = _lines(config["options"]["install_requires"])
    lowest = [requirement.replace(">=", "==") for requirement in requirements]
    needed = [
        line for line in _lines(config["options.extras_require"]["test"]) if line.startswith(NEEDED)
    ]
    environments = [("lowest", lowest_python, lowest)]
    environments += [("newest", version, []) for version in NEWER_PYTHONS]
    results = [_check(*environment, needed) for environment in environments]
    print("\n".join(line for _, line in results))
    return int(not all(passed for passed, _ in results))


def _check(name: str, version: str, pins: list[str], needed: list[str]) -> tuple[bool, str]:
    """Returns whether the tests passed (or there is no such newer Python), and a line."""
    label = f"{name} versions, Python {version}"
    print(f"-- {label}", flush=True)
    python = next(_interpreters(version), None)
    if python is None:
        return name == "newest", f"{label}: absent from this machine, not tested"
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        repo = _copy(pathlib.Path(folder) / "repo")
        subprocess.run([python, "-m", "venv", f"{folder}/venv"], check=True, timeout=TIME_LIMIT)
        venv_python = f"{folder}/venv/bin/python"
        install = [venv_python, "-m", "pip", "install", "--quiet", str(repo), *pins, *needed]
        if subprocess.run(install, timeout=TIME_LIMIT).returncode:
            return False, f"{label}: the installation failed"
        installed = time.monotonic()
        tests = subprocess.run(
            [venv_python, "-m", "pytest", "-q", "-n", "2", "--tb=short"]
            + ["-m", "not slow", "-o", f"filterwarnings={WARNINGS}"]
            + [*TESTS, "test_planted.py"],
            cwd=repo / "tests",
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            text=True,
            timeout=TIME_LIMIT,
        )
        versions = _versions(venv_python, pins)
    passed = tests.returncode == 0
    if not passed:
        print(tests.stdout)
    outcome = tests.stdout.strip().splitlines()[-1].strip("= ")
    return passed, f"{label} ({versions}): {outcome}, installed in {installed - start:.0f} s"


def _lines(value: str) -> list[str]:
    return value.strip().splitlines()


def _interpreters(version: str) -> Iterator[str]:
    """Yields the interpreters of a version that run: a name on PATH alone proves nothing."""
    folders = [pathlib.Path(folder) for folder in os.get_exec_path()]
    if pyenv := shutil.which("pyenv"):
        root = subprocess.run([pyenv, "root"], capture_output=True, text=True).stdout.strip()
        folders += sorted(pathlib.Path(root).glob(f"versions/{version}*/bin"))
    code = "import ensurepip, ssl, sys, venv; print('%d.%d' % sys.version_info[:2])"
    for folder in folders:
        python = folder / f"python{version}"
        if python.exists():
            answer = subprocess.run([python, "-c", code], capture_output=True, text=True)
            if answer.stdout.strip() == version:
                yield str(python)


def _copy(repo: pathlib.Path) -> pathlib.Path:
    """Copies what is installed and tested; an installation writes into its source."""
    unused = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, repo, ignore=unused)
    (repo / "tests" / "test_planted.py").write_text(PLANTED)
    return repo


def _versions(python: str, pins: list[str]) -> str:
    """Returns the installed versions, and asserts that they are the pinned ones."""
    names = ["jax", "dm-haiku", "flax", "optax", "netket"]
    code = f"import importlib.metadata as m; print(*map(m.version, {names!r}))"
    output = subprocess.check_output([python, "-c", code], text=True, cwd="/")
    installed = [f"{name}=={number}" for name, number in zip(names, output.split(), strict=True)]
    assert {pin for pin in pins if re.split("==", pin)[0] in names} <= set(installed), installed
    return " ".join(installed).replace("==", " ")


if __name__ == "__main__":
    sys.exit(main())
