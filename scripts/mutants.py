"""Mutation testing: how many small errors, put into the code one at a time, the tests notice.

    python scripts/mutants.py                       # 100 mutants; `make mutants` does it
    python scripts/mutants.py --sample 20 --seed 1 --json mutants.json

The errors are those of cosmic-ray (another operator, another number, a condition turned round).
A place in the code is drawn first and then one error for it, so that an expression with many
operators does not fill the sample. Each mutant meets the tests that run its line, quickest first,
until one fails or `--budget` seconds of them have passed. A change that cannot
show while the program runs, as of an annotation, is not drawn.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import accumulate, islice, zip_longest
from pathlib import Path
from queue import SimpleQueue
from xml.etree import ElementTree

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names
from coverage import CoverageData

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("losses", "numerics", "federation", "algorithms")
# These two of cosmic-ray need names of variables
WITHOUT_ARGUMENTS = [
    name
    for name in operator_names()
    if name not in ("core/VariableReplacer", "core/VariableInserter")
]
QUICK = 1.5  # seconds of a quick test
SLACK = 60  # seconds that a mutant may take beyond three times its tests' budget


@dataclass(frozen=True)
class Mutant:
    """One error in one file: line, cosmic-ray's name of it, the text without and with it."""

    file: str
    line: int
    operator: str
    original: str
    text: str


def observable(code: str) -> str:
    """The program as a tree in text, without what cannot show while it runs.

    That are annotations under `from __future__`, overloads, and the check of lengths by `zip`,
    which is an assertion: no test can see it go.
    """
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign):
            node.annotation = ast.Constant(None)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
            node.decorator_list = [
                decorator
                for decorator in node.decorator_list
                if ast.unparse(decorator) != "overload"
            ]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "zip":
            node.keywords = []
    return ast.dump(tree)


def places(root: Path, file: str) -> dict[tuple[str, tuple[int, int]], list[tuple[str, int]]]:
    """Where a file can be mutated: (file, (line, column)) to (operator, occurrence) pairs."""
    nodes = list(ast_nodes(get_ast((root / file).read_text())))
    found: dict[tuple[str, tuple[int, int]], list[tuple[str, int]]] = {}
    for name in WITHOUT_ARGUMENTS:
        operator = get_operator(name)()
        starts = [start for node in nodes for start, _ in operator.mutation_positions(node)]
        for occurrence, start in enumerate(starts):
            found.setdefault((file, start), []).append((name, occurrence))
    return found


def drawn(root: Path, seed: int) -> Iterator[Mutant]:
    """All mutants of a tree in the order of the draw, each at a place of its own."""
    files = sorted(
        str(path.relative_to(root))
        for folder in FOLDERS
        for path in (root / "src/fedpref" / folder).glob("**/*.py")
    )
    rng = random.Random(seed)
    candidates = [place for file in files for place in places(root, file).items()]
    rng.shuffle(candidates)
    for (file, (line, _)), choices in candidates:
        operator, occurrence = rng.choice(choices)
        code = (root / file).read_text()
        text = mutate_code(code, get_operator(operator)(), occurrence)
        try:
            differs = text is not None and observable(text) != observable(code)
        except SyntaxError:  # some of cosmic-ray's errors are no Python; nothing can miss these
            continue
        if differs:
            yield Mutant(file, line, operator, code, text)


def environment(tree: Path) -> dict[str, str]:
    """Variables under which a copied tree's own code runs, without bytecode that could be stale."""
    return os.environ | {
        "PYTHONPATH": str(tree / "src"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }


def pytest(tree: Path, *arguments: str, timeout: float | None = None) -> int:
    """The exit status of pytest in a copied tree; a run over its time counts as failed."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    try:
        return subprocess.run(
            command, cwd=tree, env=environment(tree), capture_output=True, timeout=timeout
        ).returncode
    except subprocess.TimeoutExpired:
        return 1


def copied(tree: Path) -> Path:
    """The files that git knows or would take, copied to `tree`."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    return tree


def coverage_of(tree: Path, jobs: int) -> tuple[dict[str, dict[int, list[str]]], dict[str, float]]:
    """Which tests run which line of which file, and the seconds that each test takes."""
    arguments = ("-n", str(jobs), "--dist", "loadfile", "--cov=fedpref", "--cov-context=test")
    report = tree / "junit.xml"
    # pyproject.toml's own selection of files would hide what is to be mutated
    (tree / ".coveragerc").write_text("[run]\nrelative_files = true\n")
    if pytest(
        tree, *arguments, "--cov-config=.coveragerc", "--cov-report=", f"--junitxml={report}"
    ):
        sys.exit("the tests must pass before they can notice anything; run `make test`")
    seconds = {
        case.get("classname", "").replace(".", "/") + ".py::" + case.get("name", ""): float(
            case.get("time", 0)
        )
        for case in ElementTree.parse(report).iter("testcase")
    }
    data = CoverageData(str(tree / ".coverage"))
    data.read()
    lines: dict[str, dict[int, list[str]]] = {}
    for file in data.measured_files():
        lines[file] = {
            line: sorted({context.split("|")[0] for context in contexts if context})
            for line, contexts in data.contexts_by_lineno(file).items()
        }
    return lines, seconds


def described(mutant: Mutant) -> str:
    """A survivor: its place, and the line before and after."""
    before, after = mutant.original.splitlines(), mutant.text.splitlines()
    old, new = next(pair for pair in zip_longest(before, after) if pair[0] != pair[1])
    where = f"survived: {mutant.file}:{mutant.line} {mutant.operator}"
    return f"{where}\n  - {(old or '').strip()}\n  + {(new or '').strip()}"


def main() -> None:
    """Run the sample and print the share killed, and each survivor's file, line and error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sample", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--budget", type=float, default=60.0, help="seconds of tests that a mutant meets at most"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        trees: SimpleQueue[Path] = SimpleQueue()
        for job in range(arguments.jobs):
            trees.put(copied(Path(scratch, str(job))))
        lines, seconds = coverage_of(Path(scratch, "0"), arguments.jobs)

        def survives(mutant: Mutant) -> bool:
            of_file = lines.get(mutant.file, {})
            # What runs at import has no test of its own: all tests of the file may notice it, and
            # the quick ones, among which are those that look at every module
            of_line = of_file.get(mutant.line) or set().union(
                *of_file.values(), (test for test, took in seconds.items() if took < QUICK)
            )
            tests = sorted(of_line, key=lambda test: seconds.get(test, 0.0))
            totals = accumulate(seconds.get(test, 0.0) for test in tests)
            tests = [t for t, total in zip(tests, totals, strict=True) if total <= arguments.budget]
            tree = trees.get()
            try:
                (tree / mutant.file).write_text(mutant.text)
                limit = 3 * arguments.budget + SLACK
                return pytest(tree, "-x", *tests, timeout=limit) == 0
            finally:
                (tree / mutant.file).write_text(mutant.original)
                trees.put(tree)

        sample = list(islice(drawn(Path(scratch, "0"), arguments.seed), arguments.sample))
        survivors: list[Mutant] = []
        with ThreadPoolExecutor(arguments.jobs) as pool:
            futures = {pool.submit(survives, mutant): mutant for mutant in sample}
            for number, future in enumerate(as_completed(futures), 1):
                if future.result():
                    survivors.append(futures[future])
                    print(described(futures[future]), flush=True)
                if number % 10 == 0:
                    print(f"{number} of {len(sample)}, {len(survivors)} survived", flush=True)
    killed = len(sample) - len(survivors)
    print(f"{killed} of {len(sample)} mutants killed: {killed / len(sample):.0%}")
    if arguments.json:
        figures = {"mutants": len(sample), "killed": killed, "share_killed": killed / len(sample)}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
