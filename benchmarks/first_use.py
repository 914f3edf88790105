"""How soon somebody with the wheel alone has a first result, and what an install weighs.

    python benchmarks/first_use.py --json figures.json
    python benchmarks/first_use.py --quick

The wheel is built from this checkout and installed without its dependencies beside those that are
here. In an empty folder, `fedpref demo --offline` runs to its end; `help_seconds` is `fedpref
--help`. Megabytes are those of the files of all packages that `pip install fedpref` and `pip
install "fedpref[all]"` bring, as they are installed here, without torch's CUDA where torch has
none. Where `--data FOLDER` has them, 1,200 rows of UltraFeedback are given to `fedpref check` as
they are, each refusal's own advice is followed, and the checks are counted until one passes.
`--quick` is the same, for there is nothing to leave out.

Figures: `seconds_to_first_result_wheel`, `help_seconds`, `install_mb_minimal`, `install_mb_all`,
`attempts_ultrafeedback` (with --data), `page_px_demo` (where there is a browser).
"""

from __future__ import annotations

import argparse
import gzip
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from packaging.requirements import Requirement

from ending import end_with_children

ROOT = Path(__file__).resolve().parent.parent
ROWS = "ultrafeedback_sample.jsonl.gz"
MOST_CHECKS = 12
ADVICE = re.compile(r"((?:data|task|partition)\.[a-z_]+=[a-z0-9_]+)")


def installed(folder: Path) -> Path:
    """Build the wheel and install it into a folder."""
    quietly = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    subprocess.run([*build, str(ROOT)], **quietly)
    (wheel,) = folder.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target"]
    subprocess.run([*pip, str(folder / "site"), str(wheel)], **quietly)
    return folder / "site"


def called(site: Path, cwd: Path, *arguments: str) -> tuple[int, str, float]:
    """Call the installed command: its exit code, what it said, and seconds."""
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "fedpref", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr, time.perf_counter() - begun


def packages(
    distribution: importlib.metadata.Distribution,
    extras: frozenset[str],
    known: set[tuple[str, frozenset[str]]],
) -> dict[str, importlib.metadata.Distribution]:
    """The packages that an install brings, by name, by what is installed here."""
    found: dict[str, importlib.metadata.Distribution] = {}
    for text in distribution.requires or ():
        wanted = Requirement(text)
        name, more = re.sub(r"[-_.]+", "-", wanted.name).lower(), frozenset(wanted.extras)
        if (name, more) in known or not (
            wanted.marker is None
            or any(wanted.marker.evaluate({"extra": extra}) for extra in ("", *extras))
        ):
            continue
        known.add((name, more))
        try:
            # the extras of fedpref's own are those of the wheel
            part = distribution if name == "fedpref" else importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} is not installed here, and not counted")
            continue
        found |= {name: part, **packages(part, more, known)}
    return found


def megabytes(site: Path, *extras: str) -> float:
    """Megabytes of all files of an install."""
    (folder,) = site.glob("fedpref-*.dist-info")
    own = importlib.metadata.Distribution.at(folder)
    brought = packages(own, frozenset(extras), set())
    paths = {
        Path(str(file.locate()))
        for distribution in ({"fedpref": own} | brought).values()
        for file in distribution.files or ()
        if file.suffix != ".pyc"
    }
    return sum(path.stat().st_size for path in paths if path.is_file()) / 1e6


def attempts(site: Path, folder: Path, data: Path) -> int:
    """Checks that 1,200 rows of UltraFeedback need, each with the advice of the last."""
    rows = [json.loads(line) for line in gzip.open(data / ROWS)]
    content = [
        json.dumps({k: row[k] for k in ("prompt", "chosen", "rejected")} | {"hospital": i % 8})
        for i, row in enumerate(rows)
    ]
    (folder / "rows.jsonl").write_text("\n".join(content) + "\n")
    (folder / "own.yaml").write_text(
        "data: {name: files, path: rows.jsonl}\npartition: {name: natural, column: hospital}\n"
    )
    settings: list[str] = []
    for attempt in range(1, MOST_CHECKS + 1):
        code, text, _ = called(site, folder, "check", "own.yaml", *settings)
        if code == 0:
            return attempt
        settings = list(dict.fromkeys([*settings, *ADVICE.findall(text)]))
    return MOST_CHECKS


def page_pixels(page: Path) -> float:
    """The height of a page at 1280 pixels' width."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        sheet = browser.new_page(viewport={"width": 1280, "height": 800})
        sheet.goto(page.resolve().as_uri())
        sheet.wait_for_timeout(1000)
        height = float(sheet.evaluate("document.documentElement.scrollHeight"))
        browser.close()
    return height


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the same")
    parser.add_argument(
        "--data",
        type=Path,
        default=ROOT.parent / "shared/data",
        help="the folder of ultrafeedback_sample.jsonl.gz",
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    end_with_children()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as place:
        site, empty = installed(Path(place)), Path(place) / "empty"
        empty.mkdir()
        figures["help_seconds"] = min(called(site, empty, "--help")[2] for _ in range(3))
        code, text, seconds = called(site, empty, "demo", "--offline", "--output", "demo")
        if code:
            sys.exit(text)
        figures["seconds_to_first_result_wheel"] = seconds
        try:
            figures["page_px_demo"] = page_pixels(empty / "demo/report.html")
        except Exception as error:  # no browser here
            print(f"the page was not measured: {str(error).splitlines()[0]}")
        figures["install_mb_minimal"] = megabytes(site)
        figures["install_mb_all"] = megabytes(site, "all")
        if (arguments.data / ROWS).exists():
            figures["attempts_ultrafeedback"] = attempts(site, empty, arguments.data)
    for name, value in figures.items():
        print(f"{name:34s} {value:.4g}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
