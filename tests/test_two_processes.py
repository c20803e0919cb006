"""The MLP trained by two processes, one device each, that talk over 127.0.0.1."""

import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
from scripts import worker

STEPS = 6
TIME_LIMIT = 120  # seconds; ten times what a run takes
# What the survivor says: the sum over processes fails, or the coordinator is lost first.
CLEAR_ERROR = "Gloo all-reduce failed|another task died"


class Result(NamedTuple):
    """What a worker did."""

    status: int
    losses: dict[int, float]
    weights: list[str]
    stderr: str


def run(folder, *processes, **environment):
    """Runs workers side by side, by SIGKILL never longer than the time limit."""
    end = time.monotonic() + TIME_LIMIT
    with contextlib.ExitStack() as stack:
        running, files = [], []
        for number, arguments in enumerate(processes):
            # Files, since a pipe that nobody reads stops the process that writes.
            out, err = (
                stack.enter_context((folder / f"{number}.{name}").open("w+"))
                for name in ("out", "err")
            )
            command = [sys.executable, pathlib.Path(worker.__file__), *map(str, arguments)]
            env = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
            process = subprocess.Popen(command, env=env, stdout=out, stderr=err)
            running.append(process)
            files.append((out, err))
        try:
            for process in running:
                process.wait(timeout=max(0, end - time.monotonic()))
        finally:
            for process in running:
                process.kill()  # jax.distributed catches SIGTERM
                process.wait()
        return [
            _result(process.returncode, *map(_read, pair))
            for process, pair in zip(running, files, strict=True)
        ]


def _read(file):
    file.seek(0)
    return file.read()


def _result(status, out, err):
    losses = {int(step): float.fromhex(loss) for step, loss in _find(r"^step (\d+) (.*)$", out)}
    return Result(status, losses, _find("^weights .*$", out), err)


def _find(pattern, text):
    return re.findall(pattern, text, flags=re.MULTILINE)


@contextlib.contextmanager
def free_port() -> Iterator[int]:
    """A port that is given to nobody else as long as this one holds it.

    The coordinator of ``jax.distributed`` binds with ``SO_REUSEPORT`` too.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def run_two(folder, face, *arguments, killed=None):
    """Runs two processes; ``killed`` is the number of one that dies after step 5."""
    with free_port() as port:
        common = ["--face", face, "--steps", STEPS, "--devices", 2, "--processes", 2]
        common += ["--port", port, *arguments]
        processes = [[*common, "--process", number] for number in (0, 1)]
        if killed is not None:
            processes[killed] += ["--die-after", 5]
        return run(folder, *processes)


def run_one(folder, face, devices):
    """Runs one process with all the devices."""
    arguments = ["--face", face, "--steps", STEPS, "--devices", devices]
    flags = f"--xla_force_host_platform_device_count={devices}"
    (result,) = run(folder, arguments, XLA_FLAGS=flags)
    assert result.status == 0, result.stderr
    assert sorted(result.losses) == list(range(1, STEPS + 1))
    return result


@pytest.mark.slow
@pytest.mark.parametrize("face", worker.FACES)
def test_two_processes_train_as_one(tmp_path, face):
    one = run_one(tmp_path, face, devices=2)
    for process in run_two(tmp_path, face):
        assert process.status == 0, process.stderr
        assert process.losses == one.losses
        assert process.weights == one.weights
    # One device adds the 16 float64 terms of the loss in another order than two.
    losses = run_one(tmp_path, face, devices=1).losses
    np.testing.assert_allclose(list(one.losses.values()), list(losses.values()), rtol=1e-14)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The same training in one process, with the devices of two."""
    return run_one(tmp_path_factory.mktemp("one"), "flax", devices=2)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1], ids=["coordinator", "other"])
def test_a_process_dies_and_the_run_resumes(tmp_path, undisturbed, killed):
    """The checkpoint is that of step 4."""
    checkpoints = ["--checkpoints", tmp_path / "checkpoints"]
    processes = run_two(tmp_path, "flax", *checkpoints, killed=killed)
    assert processes[killed].status == -signal.SIGKILL, processes[killed].stderr
    survivor = processes[1 - killed]
    assert survivor.status not in (0, -signal.SIGKILL)
    assert re.search(CLEAR_ERROR, survivor.stderr), survivor.stderr
    # The end of the coordinator ends a process at once, maybe before it prints step 5.
    assert set(survivor.losses) | {5} == {1, 2, 3, 4, 5}
    assert survivor.losses.items() <= undisturbed.losses.items()
    assert survivor.weights == []
    for process in run_two(tmp_path, "flax", *checkpoints):
        assert process.status == 0, process.stderr
        assert process.losses == {step: undisturbed.losses[step] for step in (5, 6)}
        assert process.weights == undisturbed.weights


@pytest.mark.slow
def test_a_process_that_hangs_is_killed(tmp_path, monkeypatch):
    """The other one never comes; a worker waits longer for it than the limit here."""
    monkeypatch.setattr(sys.modules[__name__], "TIME_LIMIT", 3)
    alone = ["--face", "flax", "--steps", 1, "--devices", 2, "--processes", 2, "--port"]
    with free_port() as port, pytest.raises(subprocess.TimeoutExpired):
        run(tmp_path, [*alone, port])
