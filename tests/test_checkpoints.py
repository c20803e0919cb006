"""Checkpoints in three formats: whole, truncated, of another model."""

import gc
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from cases import cover
from flax import errors, serialization, traverse_util

import compat

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(3, 4))
MODEL = compat.MLP(hidden_dims=(3,), use_output_bias=True)


class Msgpack:
    """``flax.serialization``."""

    @staticmethod
    def save(path, variables):
        path.write_bytes(serialization.to_bytes(variables))

    @staticmethod
    def load(path, target):
        return serialization.from_bytes(target, path.read_bytes())


class Safetensors:
    """Flat names with ``/``; the file has no target."""

    @staticmethod
    def save(path, variables):
        flat = traverse_util.flatten_dict(variables, sep="/")
        safetensors.numpy.save_file({name: np.asarray(leaf) for name, leaf in flat.items()}, path)

    @staticmethod
    def load(path, target):
        return traverse_util.unflatten_dict(safetensors.numpy.load_file(path), sep="/")


class Orbax:
    """A folder of files."""

    @staticmethod
    def save(path, variables):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, variables)

    @staticmethod
    def load(path, target):
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path, target)


class OrbaxWithoutTarget(Orbax):
    """The shapes are those of the file."""

    @staticmethod
    def load(path, target):
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path)


FORMATS = [Msgpack, Safetensors, Orbax, OrbaxWithoutTarget]


@pytest.fixture
def unfinished(form):
    """Takes the coroutines that orbax leaves unfinished when a load fails."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    yield
    for _ in range(3 if issubclass(form, Orbax) else 0):  # one may hold another
        gc.collect()
    sys.unraisablehook = hook


@pytest.fixture(scope="module")
def variables():
    return MODEL.init(KEY, X)


@pytest.mark.parametrize("form", FORMATS)
def test_round_trip(form, variables, tmp_path):
    form.save(tmp_path / "checkpoint", variables)
    loaded = form.load(tmp_path / "checkpoint", MODEL.init(jax.random.key(1), X))
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)
    np.testing.assert_array_equal(MODEL.apply(loaded, X), MODEL.apply(variables, X))


OTHERS = {
    "deeper": {"hidden_dims": (3, 3), "use_output_bias": True},
    "all shapes broadcast": {"hidden_dims": (1,), "use_output_bias": True},
    "without a bias": {"hidden_dims": (3,)},
}


@pytest.mark.parametrize(("form", "name"), cover(FORMATS, list(OTHERS)))
def test_of_another_model(form, variables, tmp_path, unfinished, name):
    """Refused when it is loaded or when it is applied, and what was there stays."""
    form.save(tmp_path / "checkpoint", compat.MLP(**OTHERS[name]).init(KEY, X))
    before = MODEL.apply(variables, X)
    refused = (ValueError, errors.ScopeParamShapeError, errors.ScopeParamNotFoundError)
    with pytest.raises(refused, match=r"bias|kernel|Dense_|shape"):
        MODEL.apply(form.load(tmp_path / "checkpoint", variables), X)
    np.testing.assert_array_equal(MODEL.apply(variables, X), before)


@pytest.mark.parametrize(("form", "part"), cover(FORMATS, [0.99, 0.5, 0]))
def test_truncated(form, variables, tmp_path, unfinished, part):
    """Each file of it in turn: an error, or the weights are there to the bit."""
    path = tmp_path / "checkpoint"
    form.save(path, variables)
    before = MODEL.apply(variables, X)
    files = (
        [file for file in sorted(path.rglob("*")) if file.is_file()] if path.is_dir() else [path]
    )
    num_errors = 0
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(whole[: int(part * len(whole))])
        try:
            loaded = form.load(path, MODEL.init(jax.random.key(1), X))
        except (ValueError, safetensors.SafetensorError, OSError):
            num_errors += 1
        else:
            jax.tree.map(np.testing.assert_array_equal, loaded, variables)
        file.write_bytes(whole)
    assert num_errors
    np.testing.assert_array_equal(MODEL.apply(variables, X), before)
