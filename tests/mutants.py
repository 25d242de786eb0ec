"""Plants faults in the product, one at a time, and says which of them its tests do not see.

    python tests/mutants.py                                     every fault in the core, by its own tests
    python tests/mutants.py --file keepalive/core/plan.py
    python tests/mutants.py --since main                        those in lines that have changed since a commit
    python tests/mutants.py --file keepalive/keeper/keeper.py --sample 100 --seed 7

A file is judged by the test file that bears its name (`TESTS` names the exceptions), and by no other: that one has to
hold it alone. A fault that changes nothing that can be seen stands in `mutants.txt`, as the change that it is and the
reason; one that is found after all, or whose line is gone, has no business there. Exit code 1: a fault was not
seen, or such an entry is out of date.

Each fault is tried in a process of its own, forked before the product was imported, so nothing of it stays. What
bounds it is the time of the processor, not of the clock: a fault that turns a loop into an endless one is found by it.
"""

import argparse
import ast
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import io
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest

PROJECT = Path(__file__).parent.parent
EXPLAINED = Path(__file__).with_suffix(".txt")
# What the socket shows, and what other daemons do, is each one matter in several files.
SHARED = ("tests/core/test_sight.py", "tests/core/test_elsewhere.py")
# Where the name of the test file does not say it, or not all of it.
TESTS: Mapping[str, Sequence[str]] = {
    **{
        f"keepalive/core/{name}.py": (f"tests/core/test_{name}.py", *SHARED)
        for name in ("apply", "calls", "evictions", "facts", "listings", "moves", "primes", "upstreams")
    },
    # What is said of a model, and what is done, is made of what room and openings come to.
    "keepalive/core/explain.py": ("tests/core/test_explain.py", "tests/core/test_room.py", *SHARED),
    "keepalive/core/plan.py": (
        "tests/core/test_plan.py",
        "tests/core/test_explain.py",
        "tests/core/test_room.py",
        "tests/core/test_primes.py",
        *SHARED,
    ),
    "keepalive/core/room.py": ("tests/core/test_room.py", *SHARED),
    # Two of its figures are what the records are given by.
    "keepalive/core/records.py": ("tests/core/test_records.py", "tests/core/test_calls.py", *SHARED),
    # The diagram stands in README, and nowhere else.
    "keepalive/core/states.py": (
        "tests/core/test_states.py",
        "tests/test_readme.py::test_its_diagram_is_the_table_of_the_program",
    ),
    # What a member stands on, and for, shows in what it sees and writes.
    "keepalive/cluster/grounds.py": ("tests/cluster/test_seeing.py", "tests/cluster/test_writing.py"),
    "keepalive/cluster/place.py": ("tests/cluster/test_writing.py",),
    # What is asked for the keeper is what LM Studio and the keeper see of it.
    "keepalive/keeper/errands.py": ("tests/keeper/test_errands.py", "tests/keeper/test_keeper.py"),
    # A call is what callers and upstreams see of it.
    "keepalive/proxy/call.py": (
        "tests/proxy/test_callers.py",
        "tests/proxy/test_held.py",
        "tests/proxy/test_faults.py",
        "tests/proxy/test_silence.py",
    ),
}
# Times what the tests take without a fault, and seconds of the processor on top.
CPU_TIMES, CPU_MORE = 5, 10
# For a fault that waits for ever; a machine that is busy with other things must not be taken for it.
CLOCK_TIMES, CLOCK_MORE = 20, 120

COMPARED: Mapping[type[ast.cmpop], tuple[str, ...]] = {
    ast.Lt: ("<=", ">="),
    ast.LtE: ("<", ">"),
    ast.Gt: (">=", "<="),
    ast.GtE: (">", "<"),
    ast.Eq: ("!=",),
    ast.NotEq: ("==",),
    ast.Is: ("is not",),
    ast.IsNot: ("is",),
    ast.In: ("not in",),
    ast.NotIn: ("in",),
}
COUNTED: Mapping[type[ast.operator], str] = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.FloorDiv: "*",
    ast.Mod: "+",
    ast.BitOr: "&",
    ast.BitAnd: "|",
}
CALLED = {"min": "max", "max": "min", "any": "all", "all": "any"}
OPTIONS = ["-x", "-q", "--assert=plain", "--strict-markers", "-p", "no:cacheprovider"]
OPTIONS += ["--override-ini=addopts=--import-mode=importlib"]


@dataclass(frozen=True)
class Mutant:
    path: str
    line: int
    inside: str  # the function or class that it stands in
    source: str
    removed: tuple[str, ...]
    added: tuple[str, ...]

    @property
    def key(self) -> tuple[str, str, tuple[str, ...], tuple[str, ...]]:
        """What it is, wherever in its function the line stands."""
        return self.path, self.inside, self.removed, self.added

    def __str__(self) -> str:
        change = [*(f"- {line}" for line in self.removed), *(f"+ {line}" for line in self.added)]
        return "\n".join([f"{self.path} {self.inside}", *change])


# --- which faults -------------------------------------------------------------------------------------


class Planter:
    """All changes of one source text, each as (start, end, new text)."""

    def __init__(self, source: str) -> None:
        self.tree = ast.parse(source)
        self.lines = source.encode().splitlines(keepends=True)
        self.members: dict[str, set[str]] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.attr.isupper():
                self.members.setdefault(node.value.id, set()).add(node.attr)

    def offset(self, line: int, column: int) -> int:
        return sum(map(len, self.lines[: line - 1])) + column

    def put(self, node: ast.expr | ast.stmt | ast.keyword, new: str) -> tuple[int, int, str]:
        start = self.offset(node.lineno, node.col_offset)
        return start, self.offset(node.end_lineno, node.end_col_offset), new

    def changes(self, node: ast.AST, inside: str = "") -> Iterator[tuple[str, int, int, str]]:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            inside = f"{inside}.{node.name}".lstrip(".")
        for change in self.of(node):
            yield inside, *change
        for name, value in ast.iter_fields(node):
            # Not what only a reader of types sees, not the pieces of a text, and no docstring.
            if name in ("annotation", "returns", "decorator_list", "bases") or isinstance(
                node, ast.JoinedStr
            ):
                continue
            for child in value if isinstance(value, list) else [value]:
                text = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
                if isinstance(child, ast.AST) and not text:
                    yield from self.changes(child, inside)

    def of(self, node: ast.AST) -> Iterator[tuple[int, int, str]]:
        match node:
            case ast.Compare(left, [op], [right]):
                for other in COMPARED[type(op)]:
                    yield self.put(node, f"({ast.unparse(left)} {other} {ast.unparse(right)})")
            case ast.BoolOp(op, values):
                word = " or " if isinstance(op, ast.And) else " and "
                yield self.put(node, f"({word.join(f'({ast.unparse(value)})' for value in values)})")
                for dropped in range(len(values)):
                    left = [value for n, value in enumerate(values) if n != dropped]
                    one = left[0] if len(left) == 1 else ast.BoolOp(op, left)
                    yield self.put(node, f"({ast.unparse(one)})")
            case ast.UnaryOp(_, operand):
                yield self.put(node, f"({ast.unparse(operand)})")
            case ast.BinOp(left, op, right) if type(op) in COUNTED:
                yield self.put(node, f"(({ast.unparse(left)}) {COUNTED[type(op)]} ({ast.unparse(right)}))")
            case ast.IfExp(test, body, orelse):
                swapped = f"({ast.unparse(orelse)}) if {ast.unparse(test)} else ({ast.unparse(body)})"
                yield self.put(node, f"({swapped})")
            case ast.If(test) | ast.While(test):
                yield self.put(test, f"not ({ast.unparse(test)})")
            case ast.comprehension(ifs=[test, *_]):
                yield self.put(test, "True")
            case ast.Call(func, _, keywords):
                if isinstance(func, ast.Name) and func.id in CALLED:
                    yield self.put(func, CALLED[func.id])
                for keyword in keywords:
                    start, end, _ = self.put(keyword, "")
                    rest = b"".join(self.lines)[end:]
                    comma = rest.index(b",") + 1 if rest.lstrip().startswith(b",") else 0
                    yield start, end + comma, ""
            case ast.Constant(bool(value)):
                yield self.put(node, str(not value))
            case ast.Constant(int(number) | float(number)):
                yield self.put(node, repr(number + 1))
            case ast.Constant(str(text)):
                yield self.put(node, '"?"' if text != "?" else '"!"')
            case ast.JoinedStr():
                yield self.put(node, '"?"')
            case ast.Attribute(ast.Name(kind), member) if len(self.members.get(kind, ())) > 1:
                others = sorted(self.members[kind])
                if member in others:
                    yield self.put(node, f"{kind}.{others[others.index(member) - 1]}")
            case ast.Tuple(elts) if {type(e) for e in elts} <= {ast.Name, ast.Constant}:
                # A row of a table: each cell as another one of it.
                names = [e.id if isinstance(e, ast.Name) else repr(getattr(e, "value", None)) for e in elts]
                for cell, name in zip(elts, names, strict=True):
                    other_names = [n for n in names if n != name]
                    if isinstance(cell, ast.Name) and other_names:
                        yield self.put(cell, other_names[0])
            case ast.Return(value) if not is_none(value):
                yield self.put(node, "pass")
            case ast.Assign() | ast.AugAssign() | ast.Expr() | ast.Raise() | ast.Continue() | ast.Break():
                yield self.put(node, "pass")


def is_none(value: ast.expr | None) -> bool:
    return value is None or (isinstance(value, ast.Constant) and value.value is None)


def mutants(path: str, source: bytes | None = None) -> list[Mutant]:
    """Those of the file as it is, or of another text in its place."""
    if source is None:
        source = (PROJECT / path).read_bytes()
    lines, found, seen = source.decode().split("\n"), [], set()
    planter = Planter(source.decode())
    for inside, start, end, new in planter.changes(planter.tree):
        changed = (source[:start] + new.encode() + source[end:]).decode()
        if changed in seen:
            continue
        seen.add(changed)
        try:
            compile(changed, path, "exec")
        except SyntaxError:
            continue
        first, after = source[:start].count(b"\n"), source[end:].count(b"\n")
        removed, added = lines[first : len(lines) - after], changed.split("\n")[first:]
        added = added[: len(added) - after]
        found.append(
            Mutant(path, first + 1, inside or "(module)", changed, stripped(removed), stripped(added))
        )
    return found


def known(path: str, revision: str) -> set[object]:
    """By what they are, those that were there in an earlier commit."""
    shown = subprocess.run(["git", "show", f"{revision}:{path}"], capture_output=True, cwd=PROJECT)
    return {mutant.key for mutant in mutants(path, shown.stdout)} if shown.returncode == 0 else set()


def stripped(lines: Sequence[str]) -> tuple[str, ...]:
    return tuple(line.strip() for line in lines if line.strip())


# --- which are seen -----------------------------------------------------------------------------------


class Planted(importlib.abc.MetaPathFinder):
    """Finds one module of the product with the fault in it, and leaves the others to be found as ever."""

    def __init__(self, path: str, source: str) -> None:
        self.name = ".".join(Path(path).with_suffix("").parts).removesuffix(".__init__")
        self.path, self.source = str(PROJECT / path), source

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        if name != self.name:
            return None
        code = compile(self.source, self.path, "exec")
        loader = importlib.machinery.SourceFileLoader(name, self.path)
        loader.get_code = lambda _: code  # type: ignore[method-assign]
        return importlib.util.spec_from_file_location(name, self.path, loader=loader)


class Quickly:
    """Examples are enough: nobody reads here which of them is the smallest."""

    def pytest_configure(self) -> None:
        phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
        hypothesis.settings.register_profile("mutants", hypothesis.settings(), phases=phases, database=None)
        hypothesis.settings.load_profile("mutants")


def warm_up() -> None:
    """Import all that pytest and its plugins need, once, and nothing of the product."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        nothing = Path(folder, "test_nothing.py")
        nothing.write_text("def test_nothing(): pass\n")
        pytest.main(
            [*OPTIONS, f"--rootdir={folder}", f"--config-file={PROJECT / 'pyproject.toml'}", str(nothing)]
        )


def tests_of(path: str) -> list[str]:
    folder, name = Path(path).parts[1:-1], Path(path).stem
    return [*TESTS.get(path, [str(Path("tests", *folder, f"test_{name}.py"))])]


def start(path: str, source: str | None, cpu: float) -> int:
    """The id of a process that ends with 0 when the tests of `path` pass."""
    pid = os.fork()
    if pid:
        return pid
    code: int = pytest.ExitCode.INTERNAL_ERROR
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (int(cpu), int(cpu) + 5))
        if source is not None:
            quiet = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(quiet, stream)
            sys.meta_path.insert(0, Planted(path, source))
        code = pytest.main([*OPTIONS, *tests_of(path)], [Quickly()])
        sys.stdout.flush()
    finally:
        os._exit(code)


def passes(path: str) -> float:
    """Seconds of the processor that the tests take as things are; they have to pass."""
    pid = start(path, None, 3600)
    _, status, used = os.wait4(pid, 0)
    if status:
        sys.exit(f"{' '.join(tests_of(path))}: the tests of {path} fail as it is")
    return used.ru_utime + used.ru_stime


def survivors(path: str, found: Sequence[Mutant], jobs: int) -> list[Mutant]:
    """Those that the tests of `path` do not see."""
    took = passes(path)
    cpu, clock = took * CPU_TIMES + CPU_MORE, took * CLOCK_TIMES + CLOCK_MORE
    running: dict[int, tuple[Mutant, float]] = {}
    waiting, left, done = list(found), [], 0
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop(0)
            running[start(path, mutant.source, cpu)] = (mutant, time.monotonic() + clock)
        for pid, (mutant, until) in list(running.items()):
            ended, status, _ = os.wait4(pid, os.WNOHANG)
            if not ended:
                if time.monotonic() > until:
                    os.kill(pid, 9)
                continue
            del running[pid]
            done += 1
            if status == 0:
                left.append(mutant)
            if sys.stderr.isatty():
                print(f"\r{path}: {done} of {len(found)}, {len(left)} not seen ", end="", file=sys.stderr)
        time.sleep(0.005)
    print(f"\r{path}: {done} of {len(found)}, {len(left)} not seen ", file=sys.stderr)
    return sorted(left, key=lambda mutant: mutant.line)


# --- which need not be --------------------------------------------------------------------------------


def explained() -> dict[tuple[str, str, tuple[str, ...], tuple[str, ...]], str]:
    """By what it is, why a fault changes nothing that can be seen."""
    reasons = {}
    for block in EXPLAINED.read_text().strip().split("\n\n"):
        first, *rest = [line for line in block.split("\n") if not line.startswith("#")] or [""]
        if not first:
            continue
        path, _, inside = first.partition(" ")
        removed = tuple(line[2:] for line in rest if line.startswith("- "))
        added = tuple(line[2:] for line in rest if line.startswith("+ "))
        reasons[path, inside, removed, added] = " ".join(line[2:] for line in rest if line.startswith("= "))
    return reasons


def main() -> int:
    options = argparse.ArgumentParser(
        description="Plant faults in the product and see which the tests do not see."
    )
    options.add_argument("--file", action="append", help="one of keepalive/ (default: all of the core)")
    options.add_argument("--since", metavar="REVISION", help="only faults that this commit did not have")
    options.add_argument("--sample", type=int, metavar="N", help="this many faults of each file, not all")
    options.add_argument("--seed", type=int, default=0, help="which ones (default: 0)")
    options.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many at once")
    chosen = options.parse_args()
    os.chdir(PROJECT)
    sys.path.insert(0, str(PROJECT))
    reasons, odd, summary = explained(), 0, []
    warm_up()
    files = chosen.file or sorted(map(str, Path("keepalive/core").glob("[!_]*.py")))
    for path in files:
        every = mutants(path)
        before = known(path, chosen.since) if chosen.since else set()
        tried = [mutant for mutant in every if mutant.key not in before or mutant.key in reasons]
        if chosen.sample is not None and chosen.sample < len(tried):
            tried = random.Random(chosen.seed).sample(tried, chosen.sample)
        alive = survivors(path, tried, chosen.jobs)
        keys, unfound = {m.key for m in every}, {m.key for m in alive}
        unseen = [m for m in alive if m.key not in reasons]
        for mutant in unseen:
            print(f"\n{mutant.path}:{mutant.line} {mutant.inside}: not seen\n{mutant}")
        stale = [key for key in reasons if key[0] == path and key not in keys]
        stale += [m.key for m in tried if m.key in reasons and m.key not in unfound]
        for key in stale:
            print(f"\n{EXPLAINED.name}: found, or no longer there: {key[0]} {key[1]} {key[2]} {key[3]}")
        odd += len(unseen) + len(stale)
        same = len(alive) - len(unseen)
        summary.append((path, len(every), len(tried), len(tried) - len(alive), same, len(unseen)))
    print(f"\n{'file':<36}{'faults':>8}{'tried':>8}{'seen':>8}{'same':>8}{'unseen':>8}")
    totals = ("all", *(sum(row[n] for row in summary) for n in range(1, 6)))
    for row in [*summary, totals] if len(summary) > 1 else summary:
        print(f"{row[0]:<36}" + "".join(f"{figure:>8}" for figure in row[1:]))
    return 1 if odd else 0


if __name__ == "__main__":
    sys.exit(main())
