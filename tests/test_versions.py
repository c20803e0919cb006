"""What ``versions.py`` tests: exactly the floors of setup.cfg, and it says what is absent."""

import importlib.metadata
import pathlib
import re

from scripts import versions


def test_the_floors_are_what_is_tested():
    python, pins, needed = versions.requirements()
    distribution = importlib.metadata.distribution("haiku-mlp")
    floors = [line for line in distribution.requires if "extra ==" not in line]
    assert sorted(pins) == sorted(line.replace(">=", "==") for line in floors)
    assert all(re.fullmatch(r"[\w-]+==\d+\.\d+\.\d+", pin) for pin in pins), pins
    assert distribution.metadata["Requires-Python"] == f">={python}"
    assert len(needed) >= len(versions.NEEDED)


def test_the_tests_exist():
    tests = versions.TESTS + versions.LOWEST_TESTS + versions.NEWEST_TESTS
    folder = pathlib.Path(__file__).parent
    assert [name for name in tests if not (folder / name).exists()] == []


def test_an_absent_interpreter_is_named(capsys):
    absent = (True, "newest versions, Python 3.99: absent from this machine, not tested")
    assert versions.check("newest", "3.99", [], []) == absent
    assert not versions.check("lowest", "3.99", [], [])[0]


def test_a_command_that_hangs_is_killed(monkeypatch):
    monkeypatch.setattr(versions, "TIME_LIMIT", 0.2)
    status, output = versions._run(["sleep", "60"])
    assert status == -9
    assert "took more than 0.2 s" in output
