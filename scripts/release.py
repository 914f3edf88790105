"""Build what is uploaded: a wheel and a source distribution, checked, into build/release.

python scripts/release.py --url https://HOST/PROJECT/blob/v1.0    # `make release URL=...`

They are built from the last commit. The README becomes the long description, whose links are made
absolute: to `--url`, where the repository's files of this version can be read.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "build" / "release"
LINK = re.compile(r"(!?\[[^\]]*\])\((?!https?:|#)([^)]+)\)")


def absolute(text: str, url: str) -> str:
    """Return a Markdown text whose links into the repository lead to a URL."""
    raw = url.replace("/blob/", "/raw/")  # pictures themselves, not the pages about them

    def linked(found: re.Match[str]) -> str:
        return f"{found[1]}({raw if found[1][0] == '!' else url}/{found[2]})"

    return LINK.sub(linked, text)


def build(url: str, output: Path) -> list[Path]:
    """Build both distributions of the last commit, and check them."""
    with tempfile.TemporaryDirectory() as place:
        tree = Path(place) / "fedpref"
        archive = subprocess.run(
            ["git", "archive", "--prefix=fedpref/", "HEAD"],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
        subprocess.run(["tar", "-x", "-C", place], input=archive.stdout, check=True)
        readme = tree / "README.md"
        readme.write_text(absolute(readme.read_text(), url))
        subprocess.run(
            [sys.executable, "-m", "build", "--outdir", str(output), str(tree)], check=True
        )
    made = sorted(output.glob("fedpref-*"))
    subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *map(str, made)], check=True
    )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", required=True, help="where this version's files can be read")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    if arguments.output.exists() and any(arguments.output.iterdir()):
        sys.exit(f"{arguments.output} is not empty; a release is built into an empty folder.")
    made = build(arguments.url.rstrip("/"), arguments.output)
    for file in made:
        print(f"{file}  {file.stat().st_size / 1e6:.1f} MB")
    print("checked. To publish: python -m twine upload", *map(str, made))


if __name__ == "__main__":
    main()
