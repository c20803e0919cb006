"""What the files import, and how long they are: read, not run."""

import ast
import functools
import io
import pathlib
import tokenize
from collections.abc import Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


class Import(NamedTuple):
    """``importer`` imports ``imported``: both are names of modules with dots."""

    importer: str
    imported: str
    in_function: bool

    def __str__(self) -> str:
        return f"{self.importer} imports {self.imported}"


def module_names(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns the files of both packages by the names of their modules."""
    files = [file for name in ("haiku_mlp", "compat") for file in (root / name).rglob("*.py")]
    return {
        ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file
        for file in sorted(files)
    }


def imports(root: pathlib.Path) -> list[Import]:
    """Returns each import of each file: of a module of ours where there is one of that name."""
    modules = module_names(root)
    found = []
    for name, file in modules.items():
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        for statement, in_function in _all_import_statements(file.read_text()):
            for target in _targets(statement, package):
                while target.split(".")[0] in ("haiku_mlp", "compat") and target not in modules:
                    target = target.rpartition(".")[0]  # a name in a module
                found.append(Import(name, target, in_function))
    return [found for found in dict.fromkeys(found) if found.imported != found.importer]


@functools.cache
def _all_import_statements(source: str) -> list[tuple[ast.Import | ast.ImportFrom, bool]]:
    return list(_import_statements(ast.parse(source), in_function=False))


def _import_statements(
    node: ast.AST, in_function: bool
) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, in_function
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _import_statements(child, in_function or is_function)


def _targets(statement: ast.Import | ast.ImportFrom, package: str) -> list[str]:
    """Returns the full names that a statement in a package imports."""
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    parts = package.split(".")
    base = parts[: len(parts) - statement.level + 1] if statement.level else []
    base += [statement.module] if statement.module else []
    return [".".join([*base, alias.name]) for alias in statement.names]


def code_lines(file: pathlib.Path) -> int:
    """Returns the number of lines of code: none blank, no comments, no docstrings."""
    text = file.read_text()
    prose = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    code = {
        line
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in NO_CODE
        for line in range(token.start[0], token.end[0] + 1)
    }
    return len(code - prose)
