"""Imports run one way, and no file is two ideas."""

import pathlib
import shutil

import layout
import pytest

# The files of compat from the bottom up: each imports those before it, besides haiku_mlp.
LEAVES = {"compat.mirror", *(f"compat.mirror.{f}" for f in ("private", "caching", "copies"))}
MIRROR = ["calls", "names", "values", "run", "rows", "attributes", "node_run", "nodes"]
FACES, ALL_FACES, NETKET = range(len(MIRROR) + 1, len(MIRROR) + 4)


def rank(module):
    """Returns how high a module of ``compat`` stands, or None for a file of no known place."""
    if module in LEAVES:
        return 0
    if module.startswith("compat.mirror."):
        name = module.split(".")[2]
        return MIRROR.index(name) + 1 if name in MIRROR else None
    if module.split(".")[:2] == ["compat", "netket"]:
        return NETKET
    return ALL_FACES if module == "compat" else FACES


def is_allowed(found):
    importer, imported = found.importer, found.imported
    ours, other = importer.split(".")[0], imported.split(".")[0]
    if other not in ("haiku_mlp", "compat"):
        of_netket = importer.split(".")[:2] == ["compat", "netket"]
        allowed = {"haiku_mlp": set(), "compat": {"flax", "netket"} if of_netket else {"flax"}}
        return other not in {"flax", "netket"} - allowed[ours]
    if ours == "haiku_mlp":
        # The demo shows both faces where it is asked to.
        is_demo = importer == "haiku_mlp.masses.command" and found.in_function
        return other == "haiku_mlp" or (imported == "compat" and is_demo)
    if other == "haiku_mlp":
        return True
    high, low = rank(importer), rank(imported)
    if high is None or low is None or importer in LEAVES:
        return False
    return low < high or (low == high and high in (FACES, NETKET))


def circles(imports):
    """Returns the modules that import each other, directly or through others."""
    arrows = {
        (found.importer, found.imported)
        for found in imports
        if found.imported.split(".")[0] in ("haiku_mlp", "compat")
    }
    while True:
        importers, imported = ({arrow[end] for arrow in arrows} for end in (0, 1))
        kept = {arrow for arrow in arrows if arrow[1] in importers and arrow[0] in imported}
        if kept == arrows:
            return sorted(importers)
        arrows = kept


def violations(root):
    imports = layout.imports(root)
    refused = [str(found) for found in imports if not is_allowed(found)]
    refused += [
        f"{name} has no place in MIRROR of {pathlib.Path(__file__).name}"
        for name in layout.module_names(root)
        if name.startswith("compat") and rank(name) is None
    ]
    return refused + [f"{name} is in a circle" for name in circles(imports)]


def test_imports_run_one_way():
    found = layout.imports(layout.ROOT)
    assert len(found) > 150
    assert layout.Import("compat.netket", "compat.netket.min_sr", False) in found
    assert layout.Import("haiku_mlp.masses.command", "compat", True) in found
    assert violations(layout.ROOT) == []


PLANTED = {
    "Flax": ("haiku_mlp/blocks.py", "from flax import linen", "haiku_mlp.blocks imports flax"),
    "NetKet": ("haiku_mlp/mlp.py", "import netket.nn as nknn", "haiku_mlp.mlp imports netket.nn"),
    "compat": ("haiku_mlp/mlp.py", "import compat", "haiku_mlp.mlp imports compat"),
    "in a function": ("haiku_mlp/mlp.py", "def f():\n    import compat", "imports compat"),
    "in the demo": ("haiku_mlp/masses/command.py", "import compat", "command imports compat"),
    "NetKet in a face": ("compat/trees.py", "import netket", "compat.trees imports netket"),
    "a face": ("compat/mirror/run.py", "from ..trees import to_flax", "imports compat.trees"),
    "all faces": ("compat/trees.py", "from . import wrap", "compat.trees imports compat"),
    "NetKet's": ("compat/trees.py", "from .netket import MinSR", "trees imports compat.netket"),
    "rows": ("compat/mirror/run.py", "from . import rows", "imports compat.mirror.rows"),
    "run": ("compat/mirror/values.py", "from compat.mirror import run", "values imports compat"),
    "a leaf": ("compat/mirror/private.py", "from .names import Names", "private imports compat"),
    "a circle": ("compat/trees.py", "from . import blocks", "compat.blocks is in a circle"),
    "a new file": ("compat/mirror/new.py", "from . import names", "compat.mirror.new has no place"),
}  # fmt: skip


@pytest.mark.parametrize(("file", "line", "message"), PLANTED.values(), ids=PLANTED)
def test_a_planted_arrow_is_found(tmp_path, file, line, message):
    for package in ("haiku_mlp", "compat"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(layout.ROOT / package, tmp_path / package, ignore=ignored)
    path = tmp_path / file
    path.write_text((path.read_text() if path.exists() else "") + f"\n{line}\n")
    if message.endswith("circle"):
        with (tmp_path / "compat/blocks.py").open("a") as other:
            other.write("\nfrom . import trees\n")
    assert any(message in found for found in violations(tmp_path)), violations(tmp_path)


def sizes():
    files = layout.module_names(layout.ROOT).values()
    return {str(file.relative_to(layout.ROOT)): layout.code_lines(file) for file in files}


def test_no_file_is_long():
    assert len(sizes()) > 30
    assert {name: size for name, size in sizes().items() if size > 200} == {}


def test_what_is_a_line_of_code(tmp_path):
    path = pathlib.Path(tmp_path) / "file.py"
    path.write_text(
        '"""Prose,\non two lines."""\n\n# A comment.\nx = """not\nprose"""  # three\n'
        'def f(\n    a,\n):\n    """More."""\n    return a\n'
    )
    assert layout.code_lines(path) == 6
