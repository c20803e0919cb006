"""Tests the supported versions, each in a new environment made from setup.cfg.

    python tests/scripts/versions.py            # the lowest and the newest
    python tests/scripts/versions.py 3.12       # one of them

The lowest Python with the lowest version of each requirement, and the newest versions
that resolve with a newer Python, if the machine has it.  Warnings from this project's
own code are errors there.
"""

import configparser
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

ROOT = pathlib.Path(__file__).parents[2]
NEWER_PYTHONS = ("3.12", "3.13")
TIME_LIMIT = 600  # seconds, for an installation and for a test run

# What depends on the versions; on the lowest also the texts of errors and all of Haiku's modules,
# on the newest what the lowest has not.
TESTS = (
    *("test_parity.py", "test_contract.py", "test_internals.py", "test_wrapping.py"),
    *("test_constructors.py", "test_nnx.py", "test_nnx_modules.py"),
)
NEWEST_TESTS = ("test_nnx_tools.py",)
LOWEST_TESTS = ("test_mirror.py", "test_trees.py", "test_bad_input.py", "test_intermediates.py")
NEEDED = ("cloudpickle", "hypothesis", "netket", "orbax", "pytest", "safetensors")
WARNINGS = "ignore\nerror:::(haiku_mlp|compat)(\\.|$)"

# Tests of the environment: its versions, and the guard against deprecated calls.
PLANTED = """
import importlib.metadata
import os
import re
import sys
import warnings

import pytest

LOWEST = os.environ["HAIKU_MLP_LOWEST"] == "1"


def test_versions_are_the_floors():
    distribution = importlib.metadata.distribution("haiku-mlp")
    floors = [line for line in distribution.requires if "extra ==" not in line]
    floors = dict(re.fullmatch(r"([\\w-]+)>=([\\d.]+)", line).groups() for line in floors)
    assert {"jax", "jaxlib", "dm-haiku", "flax", "optax"} <= floors.keys()
    installed = {name: importlib.metadata.version(name) for name in floors}
    python = "%d.%d" % sys.version_info[:2]
    is_lowest = installed == floors and distribution.metadata["Requires-Python"] == f">={python}"
    assert is_lowest == LOWEST, (installed, floors, python)


@pytest.mark.parametrize("module", ["compat", "compat.mirror.run", "haiku_mlp.linear"])
def test_a_warning_from_our_code_is_an_error(module):
    with pytest.raises(DeprecationWarning):
        warnings.warn_explicit("old", DeprecationWarning, "file.py", 1, module)


def test_a_warning_from_elsewhere_is_none():
    warnings.warn_explicit("old", DeprecationWarning, "file.py", 1, "another")
"""


def main() -> int:
    """Returns the exit status."""
    lowest_python, pins, needed = requirements()
    environments = [("lowest", lowest_python, pins)]
    environments += [("newest", python, []) for python in NEWER_PYTHONS]
    wanted = sys.argv[1:] or [lowest_python, NEWER_PYTHONS[-1]]
    chosen = [where for where in environments if where[1] in wanted]
    with ThreadPoolExecutor() as pool:  # one installs while the other is tested
        results = list(pool.map(lambda where: check(*where, needed), chosen))
    print("\n".join(line for _, line in results))
    return int(not all(passed for passed, _ in results))


def requirements() -> tuple[str, list[str], list[str]]:
    """Returns the lowest Python, the lowest versions, and what the tests need besides."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    python = config["options"]["python_requires"].removeprefix(">=")
    floors = config["options"]["install_requires"].split()
    extra = config["options.extras_require"]["test"].split()
    needed = [requirement for requirement in extra if requirement.startswith(NEEDED)]
    return python, [floor.replace(">=", "==") for floor in floors], needed


def check(name: str, version: str, pins: list[str], needed: list[str]) -> tuple[bool, str]:
    """Returns whether the tests passed (or there is no such newer Python), and a line."""
    label = f"{name} versions, Python {version}"
    print(f"-- {label}", flush=True)
    python = next(interpreters(version), None)
    if python is None:
        return name == "newest", f"{label}: absent from this machine, not tested"
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        repo = _copy(pathlib.Path(folder) / "repo")
        venv_python = f"{folder}/venv/bin/python"
        install = [venv_python, "-m", "pip", "install", "-qq", str(repo), *pins, *needed]
        for command in ([python, "-m", "venv", f"{folder}/venv"], install):
            status, output = _run(command)
            if status:
                print(output)
                return False, f"{label}: the installation failed"
        installed = time.monotonic()
        status, output = _run(
            [venv_python, "-m", "pytest", "-q", "-n", "2", "--tb=short", "-m", "not slow"]
            + ["-p", "no:cacheprovider", "-o", f"filterwarnings={WARNINGS}"]
            + [*TESTS, *(LOWEST_TESTS if pins else NEWEST_TESTS), "test_planted.py"],
            cwd=repo / "tests",
            JAX_PLATFORMS="cpu",
            HAIKU_MLP_LOWEST=str(int(name == "lowest")),
        )
        tested = time.monotonic()
        versions = _versions(venv_python)
    if status:
        print(output)
    outcome = output.strip().splitlines()[-1].strip("= ") if output.strip() else "no output"
    seconds = f"{installed - start:.0f} s to install, {tested - installed:.0f} s to test"
    return status == 0, f"{label} ({versions}): {outcome}; {seconds}"


def interpreters(version: str) -> Iterator[str]:
    """Yields the interpreters of a version that run: a name on PATH alone proves nothing."""
    pyenv = pathlib.Path(os.environ.get("PYENV_ROOT", pathlib.Path.home() / ".pyenv"))
    folders = [pathlib.Path(folder) for folder in os.get_exec_path()]
    folders += sorted(pyenv.glob(f"versions/{version}*/bin"))
    code = "import ensurepip, ssl, sys, venv; print('%d.%d' % sys.version_info[:2])"
    for folder in folders:
        python = folder / f"python{version}"
        if python.exists():
            answer = subprocess.run([python, "-c", code], capture_output=True, text=True)
            if answer.stdout.strip() == version:
                yield str(python)


def _run(command: list[str], cwd: pathlib.Path = ROOT, **environment: str) -> tuple[int, str]:
    """Runs a command, by SIGKILL with all that it started never longer than the limit."""
    with subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=TIME_LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            output += f"\ntook more than {TIME_LIMIT} s"
    return process.returncode, output


def _copy(repo: pathlib.Path) -> pathlib.Path:
    """Copies what is installed and tested; an installation writes into its source."""
    unused = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, repo, ignore=unused)
    (repo / "tests" / "test_planted.py").write_text(PLANTED)
    return repo


def _versions(python: str) -> str:
    names = ["jax", "dm-haiku", "flax", "optax", "netket"]
    code = f"import importlib.metadata as m; print(*(f'{{n}} {{m.version(n)}}' for n in {names}))"
    return subprocess.check_output([python, "-c", code], text=True, cwd="/").strip()


if __name__ == "__main__":
    sys.exit(main())
