"""The MLP trained by two processes, one device each, that talk over 127.0.0.1."""

import os
import pathlib
import re
import socket
import subprocess
import sys

import numpy as np
import pytest
import worker

STEPS = 6
TIME_LIMIT = 120  # seconds; ten times what a run takes


def run(*processes, **environment):
    """Runs workers side by side, by SIGKILL never longer than the time limit.

    Returns exit status, losses by step, final weights and stderr of each.
    """
    running = [
        subprocess.Popen(
            [sys.executable, pathlib.Path(worker.__file__), *map(str, arguments)],
            env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for arguments in processes
    ]
    try:
        outputs = [process.communicate(timeout=TIME_LIMIT) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    return [
        (
            process.returncode,
            {int(step): float.fromhex(loss) for step, loss in _find(r"^step (\d+) (.*)$", out)},
            _find("^weights .*$", out),
            err,
        )
        for process, (out, err) in zip(running, outputs, strict=True)
    ]


def run_two(face, *arguments, die_after=None):
    """Runs two processes; the second may die in the middle."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = ["--face", face, "--steps", STEPS, "--devices", 2, "--processes", 2, "--port", port]
    die = [] if die_after is None else ["--die-after", die_after]
    first, second = ([*common, "--process", number, *arguments] for number in (0, 1))
    return run(first, [*second, *die])


def run_one(face, devices):
    """Runs one process with all the devices."""
    arguments = ["--face", face, "--steps", STEPS, "--devices", devices]
    flags = f"--xla_force_host_platform_device_count={devices}"
    (result,) = run(arguments, XLA_FLAGS=flags)
    return result


def _find(pattern, text):
    return re.findall(pattern, text, flags=re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("face", worker.FACES)
def test_two_processes_train_as_one(face):
    two = run_two(face)
    one = run_one(face, devices=2)
    assert [status for status, *_ in (*two, one)] == [0, 0, 0], [err for *_, err in (*two, one)]
    assert sorted(one[1]) == list(range(1, STEPS + 1))
    assert two[0][1:3] == two[1][1:3] == one[1:3]
    # One device adds the 16 float64 terms of the loss in another order than two.
    _, losses, _, _ = run_one(face, devices=1)
    np.testing.assert_allclose(list(one[1].values()), list(losses.values()), rtol=1e-14)


@pytest.mark.slow
def test_a_process_dies_and_the_run_resumes(tmp_path):
    _, losses, weights, _ = run_one("flax", devices=2)
    checkpoints = ["--checkpoints", tmp_path / "checkpoints"]
    survivor, dead = run_two("flax", *checkpoints, die_after=5)
    assert dead[0] == -9, dead[3]
    status, before, _, error = survivor
    assert status != 0
    assert "Gloo all-reduce failed" in error
    assert before == {step: losses[step] for step in range(1, 6)}
    for status, after, resumed_weights, error in run_two("flax", *checkpoints):
        assert status == 0, error
        assert after == {step: losses[step] for step in (5, 6)}
        assert resumed_weights == weights
