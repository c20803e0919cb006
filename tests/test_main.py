"""The main job's command line."""

import dataclasses
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from haiku_mlp.masses import chart, command, training


@pytest.fixture
def run(run_fresh, tmp_path):
    """Runs the command in an empty folder, after the statements ``before``."""

    def run(*arguments, before=""):
        code = f"""
import os, runpy, sys
os.chdir({str(tmp_path)!r})
{before}
sys.argv[1:] = {list(map(str, arguments))!r}
runpy.run_module("haiku_mlp", run_name="__main__", alter_sys=True)
"""
        return run_fresh(code, timeout=300)

    return run


def assert_refused(process, *words):
    assert process.returncode == 2, process.stderr
    assert process.stdout == ""
    (line,) = process.stderr.splitlines()
    assert line.startswith("python -m haiku_mlp: ")
    for word in words:
        assert word in line


@pytest.mark.slow
def test_faces_agree_and_a_difference_is_seen():
    faces = command._faces("both", (8,))
    inputs = jnp.linspace(-1, 1, 36, dtype=jnp.float32).reshape(3, 12)
    keys = jax.random.split(jax.random.key(0), 2)
    weights = {name: jax.vmap(face.init, (0, None))(keys, inputs) for name, face in faces.items()}
    assert command._agree(faces, weights, inputs)

    def one_ulp_off(weights, x):
        return jnp.nextafter(faces["Flax"].predict(weights, x), jnp.float32(np.inf))

    off = {**faces, "Flax": dataclasses.replace(faces["Flax"], predict=one_ulp_off)}
    assert not command._agree(off, weights, inputs)


@pytest.mark.slow
def test_both_faces_and_the_chart(tmp_path, monkeypatch, capsys):
    draw, drawn, path = chart.draw, [], tmp_path / "chart.png"
    monkeypatch.setattr(chart, "draw", lambda *args: drawn.append(args) or draw(*args))
    assert command.main(["--steps", "30", "--seed", "7", "--plot", str(path)]) == 0
    output, progress = capsys.readouterr()
    assert "Haiku face, 8 such networks:\n" in output
    assert "mlp/block/linear_0" in output
    assert "MLP_0/Dense_0" in output
    assert "\033" not in output
    figures = dict(re.findall(r"^(formula alone|MLP, \w+ face) +(\d\.\d{3})$", output, re.M))
    assert float(figures["formula alone"]) == pytest.approx(2.877, abs=0.001)
    for name in ("Haiku", "Flax"):
        assert 0.3 < float(figures[f"MLP, {name} face"]) < 2.5
        # In MeV: as far off on the training nuclides, of which the formula leaves 2.4 MeV.
        errors = re.findall(rf"{name} face: 100%.* 30/30 .*step/s, (\d\.\d{{3}}) MeV\]", progress)
        assert 0.5 < float(errors[-1]) < 2.3
    assert re.search(r"^HFB26 .*postdates the test data", output, re.M)
    assert f"Chart of the residuals (Haiku face): {path}" in output
    assert "same numbers, bit for bit" in output
    assert path.read_bytes().startswith(b"\x89PNG")
    ((_, some, formula, predictions),) = drawn
    for nuclides, masses in zip(some, predictions, strict=True):
        alone = training.rms(formula.mass_excess(nuclides) - nuclides.mass_excess)
        assert training.rms(masses - nuclides.mass_excess) < 0.9 * alone


@pytest.mark.slow
def test_faces_that_differ_are_an_error(monkeypatch, capsys):
    monkeypatch.setattr(command, "_agree", lambda *args: False)
    assert command.main(["--steps", "1"]) == 1
    assert "the faces differ" in capsys.readouterr().err


@pytest.mark.slow
def test_one_face_has_its_own_seed(capsys):
    """And the same errors again with the same seed."""
    outputs = []
    for seed in ("3", "3", "4"):
        assert command.main(["--face", "flax", "--steps", "2", "--seed", seed]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]
    assert "Haiku" not in outputs[0]
    assert "bit for bit" not in outputs[0]


WATCH_IMPORTS = """
import builtins, sys
plain, importers = builtins.__import__, []
def watch(name, globals=None, *rest, **more):
    importer = (globals or {}).get("__name__", "")
    if name.split(".")[0] == "flax" and importer.split(".")[0] in ("haiku_mlp", "__main__"):
        importers.append(importer)
    return plain(name, globals, *rest, **more)
builtins.__import__ = watch
import atexit
atexit.register(lambda: print("importers of flax:", importers, "compat" in sys.modules))
"""


BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""


@pytest.mark.slow
def test_haiku_face_needs_neither_flax_nor_matplotlib(run, monkeypatch):
    """Nor a terminal that shows the frames of its table."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    before = WATCH_IMPORTS + BLOCK.format(names=["matplotlib"])
    process = run("--face", "haiku", "--steps", 1, before=before)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1] == "importers of flax: [] False"
    assert "Flax face" not in process.stdout
    assert "? mlp (MLP)" in process.stdout


@pytest.mark.slow
def test_a_reader_that_leaves():
    """As ``| head -1`` does."""
    process = subprocess.Popen(
        [sys.executable, "-m", "haiku_mlp", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": ""},  # argparse hides its own error
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1
    process.stderr.close()


@pytest.mark.slow
def test_the_watch_on_imports_can_fail(run, tmp_path):
    (tmp_path / "planted.py").write_text("import flax.linen")
    planted = WATCH_IMPORTS + "import runpy; runpy.run_path('planted.py', run_name='haiku_mlp.x')\n"
    process = run("--steps", 0, before=planted)
    assert "importers of flax: ['haiku_mlp.x']" in process.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--face", "jax"], ["--face", "'jax'", "haiku", "flax", "both"]),
        (["--steps", "0"], ["--steps", "integer from 1", "'0'"]),
        (["--steps", "many"], ["--steps", "'many'"]),
        (["--seed", "-1"], ["--seed", "integer from 0", "'-1'"]),
        (["--seed", str(2**32)], ["--seed", str(2**32 - 1)]),
        (["--plot"], ["--plot", "expected one argument"]),
        (["--plot", "chart.txt"], ["--plot", ".pdf, .png, .svg", "'chart.txt'"]),
        (["--plot", "no/such/chart.png"], ["cannot write", "No such file or directory"]),
        (["--plot", "folder.png"], ["cannot write", "Is a directory"]),
        (["--wrong"], ["--wrong"]),
    ],
)
def test_bad_arguments_get_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "folder.png").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as refusal:
        command.main(arguments)
    output, errors = capsys.readouterr()
    assert_refused(subprocess.CompletedProcess([], refusal.value.code, output, errors), *words)


def test_the_bounds_are_taken(monkeypatch):
    monkeypatch.setattr(command, "_is_installed", lambda name: True)
    options = command._parse(["--steps", "1", "--seed", "0"])
    assert (options.steps, options.seed) == (1, 0)
    assert command._parse(["--steps", str(10**6), "--seed", str(2**32 - 1)]).seed == 2**32 - 1


def test_a_chart_alone_needs_matplotlib(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "_is_installed", lambda name: name != "matplotlib")
    assert command._parse([]).plot is None
    with pytest.raises(SystemExit):
        command._parse(["--plot", str(tmp_path / "chart.png")])
    assert "matplotlib not installed" in capsys.readouterr().err


@pytest.mark.slow
def test_refusal_as_a_program(run):
    assert_refused(run("--plot", "no/such/chart.png"), "--plot", "cannot write")


def test_a_suffix_in_capitals(tmp_path):
    assert command._writable(str(tmp_path / "A.PNG")).suffix == ".PNG"


@pytest.mark.parametrize("before", ["", "old"])
def test_checking_the_plot_path_leaves_no_trace(before, tmp_path):
    path = tmp_path / "chart.png"
    if before:
        path.write_text(before)
    assert command._writable(str(path)) == path
    assert (path.read_text() if before else path.exists()) == (before or False)


@pytest.mark.parametrize(
    ("names", "arguments"),
    [
        (["masstable", "tqdm"], []),
        pytest.param(["masstable"], [], marks=pytest.mark.slow),
        pytest.param(["tqdm"], [], marks=pytest.mark.slow),
        pytest.param(["matplotlib"], ["--plot", "chart.png"], marks=pytest.mark.slow),
    ],
)
def test_a_missing_extra_gets_one_line(names, arguments, run, tmp_path):
    process = run(*arguments, before=BLOCK.format(names=names))
    assert_refused(process, f"pip install {' '.join(names)}")
    assert not list(tmp_path.iterdir())
