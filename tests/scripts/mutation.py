"""Changes operators, constants and conditions of the code, one at a time: do the tests fall?

    python tests/scripts/mutation.py                               # 300 changes of all the code
    python tests/scripts/mutation.py --number 50 haiku_mlp/mlp.py  # 50 of one file, or folder
    python tests/scripts/mutation.py --slow compat/netket --tests tests/test_sampler.py

First the tests run once, without ``--slow`` the fast ones, and tell which lines each runs.  A
change is then met by those that run its line, the quickest first, in a process of its own,
until one fails.  Prints each change that no test sees, and the share that a test does.
"""

import argparse
import ast
import copy
import itertools
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

# Without a backend of JAX, which would not outlive a fork.
import flax.nnx  # noqa: F401
import haiku  # noqa: F401
import optax  # noqa: F401
import pytest

ROOT = pathlib.Path(__file__).parents[2]
PACKAGES = ("haiku_mlp", "compat")
# Threads and other processes hide which lines they run.
UNUSED = "not (threads or processes or devices or packaging or versions or readme or layout)"
ALL = ("-m", "slow or not slow")
AT_MOST = 40  # seconds of tests for a change
TIME_LIMIT = 180  # seconds: a change may make a loop endless

SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


class Mutant(NamedTuple):
    """A new text of a file, and the lines whose tests meet it."""

    file: str
    lines: range
    change: str
    text: str


class Run(NamedTuple):
    """A test: how long it took, and the lines that it ran."""

    seconds: float
    lines: set[tuple[str, int]]


def changes(node: ast.AST, is_condition: bool) -> Iterator[ast.AST]:
    """Yields what a node may become."""
    match node:
        case ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.AugAssign(op=op) if type(op) in SWAPS:
            yield _with(node, op=SWAPS[type(op)]())
        case ast.Compare(ops=[op, *rest]) if type(op) in SWAPS:
            yield _with(node, ops=[SWAPS[type(op)](), *rest])
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield _with(node, value=not value)
        case ast.Constant(value=int() | float() as value):
            yield _with(node, value=value + 1)
        case ast.expr() if is_condition:
            yield ast.UnaryOp(ast.Not(), node)


def _with(node: ast.AST, **fields: Any) -> ast.AST:
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def mutants(name: str) -> Iterator[Mutant]:
    """Yields the mutants of a file."""
    source = (ROOT / name).read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    tree = ast.parse(source)
    for node, statement, is_condition in _nodes(tree, tree):
        for new in changes(node, is_condition):
            start = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            after = ast.unparse(new) if isinstance(new, ast.stmt) else f"({ast.unparse(new)})"
            text = (source[:start] + after.encode() + source[end:]).decode()
            place = node if hasattr(statement, "body") else statement
            change = f"{name}:{node.lineno}: {source[start:end].decode()}  ->  {after}"
            yield Mutant(name, range(place.lineno, place.end_lineno + 1), change, text)


def _nodes(node: ast.AST, statement: ast.AST) -> Iterator[tuple[Any, Any, bool]]:
    """Yields all nodes but annotations and texts, with their statement, and if one is a test."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns") or isinstance(node, ast.JoinedStr):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                inner = child if isinstance(child, ast.stmt) else statement
                yield child, inner, field in ("test", "ifs")
                yield from _nodes(child, inner)


class Recorder:
    """A plugin of pytest that notes which lines of the code each test runs."""

    def __init__(self, root: pathlib.Path) -> None:
        self.prefixes = tuple(f"{root / package}{os.sep}" for package in PACKAGES)
        self.start = len(str(root)) + 1
        self.runs: dict[str, Run] = {}
        self.passed: set[str] = set()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        lines: set[tuple[str, int]] = set()

        def trace(frame: Any, event: str, _: Any) -> Callable[..., Any] | None:
            file = frame.f_code.co_filename
            if not file.startswith(self.prefixes):
                return None
            if event == "line":
                lines.add((file[self.start :], frame.f_lineno))
            return trace

        start = time.monotonic()
        sys.settrace(trace)
        result = yield
        sys.settrace(None)
        self.runs[item.nodeid] = Run(time.monotonic() - start, lines)
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.passed.add(report.nodeid)


def in_child(function: Callable[[], Any], log: pathlib.Path, limit: float | None) -> int:
    """Runs a function in a fork of this process, and returns its status: not 0 after the limit."""
    pid = os.fork()
    if not pid:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            os.setsid()
            try:
                status = int(function())
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    end = time.monotonic() + (limit or 1e9)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        if time.monotonic() > end:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return -1
        time.sleep(0.02)


def pytest_in(repo: pathlib.Path, arguments: list[str], plugins: tuple[Any, ...] = ()) -> int:
    """Runs the tests of a copy of the repository."""
    os.chdir(repo)
    sys.path.insert(0, str(repo))
    os.environ["PYTHONPATH"] = str(repo)
    sys.dont_write_bytecode = True
    return pytest.main(["-q", "-p", "no:cacheprovider", *arguments], plugins)


def record(repo: pathlib.Path, tests: list[str]) -> dict[str, Run]:
    """Runs tests once."""
    path = repo / "runs.txt"

    def run() -> int:
        recorder = Recorder(repo)
        pytest_in(repo, ["-k", UNUSED, *tests], (recorder,))
        path.write_text(repr({name: tuple(recorder.runs[name]) for name in recorder.passed}))
        return 0

    if in_child(run, repo / "log.txt", None):
        sys.exit((repo / "log.txt").read_text())
    return {name: Run(*values) for name, values in ast.literal_eval(path.read_text()).items()}


def tests_of(mutant: Mutant, runs: dict[str, Run]) -> list[str]:
    """Returns the quickest tests that run its lines, or the file where an import does."""
    places = {(mutant.file, line) for line in mutant.lines}
    found = [name for name, run in runs.items() if run.lines & places]
    if not found:
        found = [name for name, run in runs.items() if mutant.file in {f for f, _ in run.lines}]
    found.sort(key=lambda name: runs[name].seconds)
    total, chosen = 0.0, []
    for name in found:
        total += runs[name].seconds
        if chosen and total > AT_MOST:
            break
        chosen.append(name)
    return chosen


def is_killed(mutant: Mutant, tests: list[str], repo: pathlib.Path) -> bool:
    if not tests:
        return False
    file = repo / mutant.file
    original = file.read_text()
    file.write_text(mutant.text)
    try:
        arguments = ["-x", *ALL, *tests]
        return in_child(lambda: pytest_in(repo, arguments), repo / "log.txt", TIME_LIMIT) != 0
    finally:
        file.write_text(original)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("paths", nargs="*", default=PACKAGES)
    parser.add_argument("--number", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tests", nargs="+", default=["tests"], help="those that are run")
    parser.add_argument("--slow", action="store_true", help="run those marked slow, too")
    args = parser.parse_args()
    tests = [*args.tests, *(ALL if args.slow else ())]
    names = [
        str(file.relative_to(ROOT))
        for path in args.paths
        for file in sorted((ROOT / path).rglob("*.py") if (ROOT / path).is_dir() else [ROOT / path])
    ]
    found = [mutant for name in names for mutant in mutants(name)]
    chosen = random.Random(args.seed).sample(found, min(args.number, len(found)))
    chosen.sort(key=lambda mutant: (mutant.file, mutant.lines.start))
    with tempfile.TemporaryDirectory() as folder:
        repo = pathlib.Path(folder) / "repo"
        hidden = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist")
        shutil.copytree(ROOT, repo, ignore=hidden)
        print(f"{len(found)} changes, of which {len(chosen)} are tried", flush=True)
        runs = record(repo, tests)
        print(f"{len(runs)} tests, {sum(run.seconds for run in runs.values()):.0f} s", flush=True)
        num_killed = 0
        for name, group in itertools.groupby(chosen, lambda mutant: mutant.file):
            killed = []
            for mutant in group:
                killed.append(is_killed(mutant, tests_of(mutant, runs), repo))
                if not killed[-1]:
                    print("alive:", mutant.change, flush=True)
            print(f"{name}: {sum(killed)} of {len(killed)}", flush=True)
            num_killed += sum(killed)
    print(f"killed: {num_killed} of {len(chosen)}, {num_killed / len(chosen):.1%}")


if __name__ == "__main__":
    main()
