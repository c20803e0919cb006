"""The main job: trains the MLP on nuclear masses, through Haiku and through Flax.

``python -m haiku_mlp`` fits a semi-empirical mass formula to the nuclides of AME2003, lets
the MLP learn what the formula leaves, and compares the predictions for the nuclides first
measured in AME2012 with those of published mass models.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import pathlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from haiku_mlp.masses import nuclides, report, training
from haiku_mlp.masses.formula import Formula

_FORMATS = (".pdf", ".png", ".svg")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = _parse(arguments)
    from tqdm import tqdm

    settings = training.Settings(steps=options.steps)
    train, test = nuclides.measured()
    problem = training.Problem.pose(train, Formula.fit(train))
    inputs, targets = problem.inputs(train), problem.targets(train)

    faces = _faces(options.face, settings.hidden_dims)
    weights = {}
    for name, face in faces.items():
        title = f"{name} face, {settings.members} such networks:"
        print(title, face.tabulate(inputs), sep="\n", flush=True)
        with tqdm(total=settings.steps, desc=f"{name} face", unit="step") as bar:

            def advance(steps: int, error: float, bar: tqdm = bar) -> None:
                bar.update(steps)
                bar.set_postfix_str(f"{error * problem.scale:.3f} MeV")

            weights[name] = training.train(
                face, inputs, targets, settings, seed=options.seed, advance=advance
            )
    predictions = {
        name: problem.mass_excess(face, weights[name], test) for name, face in faces.items()
    }
    print(report.report(test, problem.formula, predictions))

    if options.plot:
        from haiku_mlp.masses import chart

        name, face = next(iter(faces.items()))
        all_predictions = problem.mass_excess(face, weights[name], train), predictions[name]
        chart.draw(options.plot, (train, test), problem.formula, all_predictions)
        print(f"\nChart of the residuals ({name} face): {options.plot}")
    if options.face == "both":
        if not _agree(faces, weights, inputs):
            print("the faces differ: other numbers from the same weights", file=sys.stderr)
            return 1
        print("\nFrom the same weights both faces predict the same numbers, bit for bit.")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="python -m haiku_mlp", description=__doc__.split("\n")[0])
    faces = ("haiku", "flax", "both")
    parser.add_argument("--face", choices=faces, default="both", help="default: both")
    steps = training.Settings.steps
    parser.add_argument("--steps", type=_steps, default=steps, help=f"default: {steps}")
    parser.add_argument("--seed", type=_seed, default=0, help="default: 0")
    parser.add_argument(
        "--plot", type=_writable, metavar="FILE", help="draw the residuals (.pdf, .png, .svg)"
    )
    options = parser.parse_args(arguments)
    needed = ["masstable", "tqdm", *(["matplotlib"] if options.plot else [])]
    missing = [name for name in needed if not _is_installed(name)]
    if missing:
        parser.error(f"{', '.join(missing)} not installed: pip install {' '.join(missing)}")
    return options


def _steps(text: str) -> int:
    return _integer(text, 1, 10**6)


def _seed(text: str) -> int:
    return _integer(text, 0, 2**32 - 1)


def _integer(text: str, lowest: int, highest: int) -> int:
    if not text.isdecimal() or not lowest <= int(text) <= highest:
        message = f"must be an integer from {lowest} to {highest}, got {text!r}"
        raise argparse.ArgumentTypeError(message)
    return int(text)


def _writable(text: str) -> pathlib.Path:
    path = pathlib.Path(text)
    if path.suffix.lower() not in _FORMATS:
        raise argparse.ArgumentTypeError(f"must end in {', '.join(_FORMATS)}, got {text!r}")
    is_new = not os.path.lexists(path)
    try:
        path.open("ab").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {text!r}: {error.strerror}") from None
    if is_new:
        path.unlink()
    return path


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _import_compat() -> ModuleType:
    """Returns our package ``compat``, or exits: the name is a common one."""
    import compat

    if not hasattr(compat, "HaikuFunction"):
        distributions = importlib.metadata.packages_distributions().get("compat", [])
        others = ", ".join({*distributions} - {"haiku-mlp"}) or "unknown"
        sys.exit(
            f"another package named compat, {compat.__path__[0]} (distribution: {others}), hides "
            "that of haiku-mlp: uninstall it, or use --face haiku"
        )
    return compat


def _faces(choice: str, hidden_dims: tuple[int, ...]) -> dict[str, training.Face]:
    """Returns the chosen faces by name."""
    faces = {}
    if choice != "flax":
        faces["Haiku"] = training.haiku_face(hidden_dims)
    if choice != "haiku":
        faces["Flax"] = _flax_face(hidden_dims)
    return faces


def _flax_face(hidden_dims: tuple[int, ...]) -> training.Face:
    compat = _import_compat()
    model = compat.MLP(hidden_dims=hidden_dims, param_dtype=jnp.float32)

    def tabulate(x: jax.Array) -> str:
        console = {"force_terminal": sys.stdout.isatty(), "width": 110}
        return model.tabulate(jax.random.key(0), x, console_kwargs=console)

    return training.Face(model.init, model.apply, tabulate)


def _agree(
    faces: dict[str, training.Face], weights: dict[str, training.Weights], inputs: jax.Array
) -> bool:
    """Returns whether both faces predict the same from the weights of either, bit for bit."""
    compat = _import_compat()
    trees = [
        (weights["Haiku"], compat.to_flax(weights["Haiku"])),
        (compat.to_haiku(weights["Flax"])[0], weights["Flax"]),
    ]
    return all(
        np.array_equal(
            training.predict(faces["Haiku"], in_haiku, inputs),
            training.predict(faces["Flax"], in_flax, inputs),
        )
        for in_haiku, in_flax in trees
    )
