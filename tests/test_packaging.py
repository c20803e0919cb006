"""What an import does and does not do, and what the distributions hold."""

import inspect
import os
import pathlib
import pydoc
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

import compat
import compat.netket
import haiku_mlp

CAPTURED = {"capture_output": True, "text": True, "check": True}
ROOT = pathlib.Path(__file__).parent.parent

IMPORTS = """
import builtins, logging, sys, warnings
sys.path.insert(0, {path!r})
import haiku, jax, optax

found = set()
original = builtins.__import__

def watch(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {{}}).get("__name__", "")
    if importer.split(".")[0] == "haiku_mlp" and name.split(".")[0] in ("flax", "netket"):
        found.add(importer + " imports " + name)
    return original(name, globals, locals, fromlist, level)

def settings():
    return (
        dict(jax.config.values), list(warnings.filters),
        logging.root.level, list(logging.root.handlers),
    )

builtins.__import__ = watch
before = settings()
import haiku_mlp
assert settings() == before, "a global setting changed"
assert "netket" not in sys.modules
assert haiku_mlp.__file__.startswith({path!r}), haiku_mlp.__file__
print(*found)
"""


@pytest.fixture
def package(tmp_path):
    """A copy of the package that a test may spoil."""
    shutil.copytree(ROOT / "haiku_mlp", tmp_path / "haiku_mlp")
    return tmp_path / "haiku_mlp"


def test_core_imports_no_other_framework(run_fresh, package):
    process = run_fresh(IMPORTS.format(path=str(package.parent)))
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == ""


@pytest.mark.slow
def test_a_planted_import_is_found(run_fresh, package):
    with (package / "mlp.py").open("a") as file:
        file.write("\nimport flax.linen\n")
    process = run_fresh(IMPORTS.format(path=str(package.parent)))
    assert process.stdout.strip() == "haiku_mlp.mlp imports flax.linen"


@pytest.mark.slow
def test_a_planted_setting_is_found(run_fresh, package):
    with (package / "mlp.py").open("a") as file:
        file.write("\njax.config.update('jax_enable_x64', True)\n")
    process = run_fresh(IMPORTS.format(path=str(package.parent)))
    assert "a global setting changed" in process.stderr


@pytest.mark.slow
def test_another_compat_is_named(tmp_path):
    (tmp_path / "compat").mkdir()
    (tmp_path / "compat" / "__init__.py").write_text("")
    (tmp_path / "django_compat-1.0.dist-info").mkdir()
    (tmp_path / "django_compat-1.0.dist-info" / "METADATA").write_text("Name: django-compat\n")
    (tmp_path / "django_compat-1.0.dist-info" / "top_level.txt").write_text("compat\n")
    process = subprocess.run(
        [sys.executable, "-m", "haiku_mlp", "--face", "flax"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1
    assert process.stderr.startswith(f"another package named compat, {tmp_path / 'compat'}")
    assert "django-compat" in process.stderr
    assert process.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The sdist, and the wheel built from it, of a clone: as pip builds them."""
    folder = tmp_path_factory.mktemp("dist")
    clone = folder / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    build = [sys.executable, "-m", "build", "--outdir", str(folder), str(clone)]
    subprocess.run(build, check=True, capture_output=True)
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


@pytest.mark.slow
def test_distributions_hold_the_two_packages(distributions):
    sdist, wheel = distributions
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {
        "haiku_mlp",
        "compat",
    }
    assert "haiku_mlp/py.typed" in names
    assert "compat/py.typed" in names
    kept = ["haiku_mlp", "compat", "*.in", "*.rst", "*.toml", "LICENSE", "NOTICE", "setup.*"]
    listed = subprocess.run(["git", "ls-files", *kept, ":!.ruff.toml"], cwd=ROOT, **CAPTURED)
    with tarfile.open(sdist) as archive:
        files = {
            name.partition("/")[2]
            for name in archive.getnames()
            if archive.getmember(name).isfile()
        }
    made = {name for name in files if name == "PKG-INFO" or ".egg-info/" in name}
    assert sorted(files - made) == listed.stdout.split()


@pytest.mark.slow
def test_the_wheel_works_without_extras(distributions, tmp_path):
    _, wheel = distributions
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", wheel], check=True)
    code = """if True:
        import haiku_mlp, compat, jax, jax.numpy as jnp
        model = compat.MLP(hidden_dims=(8,))
        variables = model.init(jax.random.key(0), jnp.ones((2, 3)))
        print(model.apply(variables, jnp.ones((2, 3))).shape)
        print(model.tabulate(jax.random.key(0), jnp.ones((2, 3))))
    """
    process = subprocess.run(
        [python, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert "(2,)" in process.stdout
    assert "MLP_0/Dense_1" in process.stdout


def test_the_version_is_in_the_changelog():
    release = haiku_mlp.__version__.removesuffix(".dev0")
    assert f"\n{release} " in (ROOT / "CHANGELOG.rst").read_text()


def signature(cls):
    parameters = inspect.signature(cls).parameters.values()
    return [(p.name, p.default) for p in parameters if p.name not in ("parent", "name")]


@pytest.mark.parametrize(
    ("ours", "flax"), [(haiku_mlp.MLP, compat.MLP), (haiku_mlp.blocks.MLP, compat.blocks.MLP)]
)
def test_constructors_agree(ours, flax):
    """Names, order and defaults."""
    assert signature(ours) == signature(flax)


@pytest.mark.parametrize("package", [haiku_mlp, haiku_mlp.structure, compat, compat.netket])
def test_help_shows_the_public_names(package):
    """Which are what the package has besides its modules, of which ``blocks`` is public."""
    found = {
        name
        for name, value in vars(package).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert found == set(package.__all__) - {"blocks"}
    text = pydoc.plain(pydoc.render_doc(package))
    contents = text[text.find("\nCLASSES") :] if "\nCLASSES" in text else text
    for name in found:
        assert re.search(rf"^    (class )?{name}\b", contents, re.M), name


def test_a_quantity_is_no_module():
    for name in ("connected", "laplacian", "tangent_kernel"):
        assert callable(getattr(haiku_mlp.structure, name))
        assert not inspect.ismodule(getattr(haiku_mlp, name, None))
