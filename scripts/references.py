"""Write what documents say by reading the code: settings, commands, layers, pages of the API.

python scripts/references.py            # `make references`
python scripts/references.py --check    # fails where a document is not what the code says
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import typer
from typer.cli import get_docs_for_click
from typer.main import get_command

import fedpref
from fedpref.cli import app
from fedpref.reports.settings import markdown
from layers import LAYERS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src/fedpref"
API = (
    "losses",
    "numerics",
    "channel",
    "data",
    "rewards",
    "models",
    "tasks",
    "federation",
    "algorithms",
)
"""Layers with a page of the API; the others are behind `fedpref.run` and the commands."""
STABLE = (
    "What `import fedpref` offers is stable. The modules of the other pages are for those who "
    "write algorithms, tasks and rewards. CONTRIBUTING.md says how public names change."
)


def commands() -> str:
    """The page of all commands, as typer writes it, with whole sentences in the list."""
    group = get_command(app)
    context = typer.Context(group)
    page = get_docs_for_click(obj=group, ctx=context, name="fedpref", title="Commands")
    return _in_whole_sentences(page, group, "").rstrip() + "\n"


def _in_whole_sentences(page: str, group: Any, heading: str) -> str:
    """The page with the list of a group's commands, the first below its heading, uncut."""
    head, found, rest = page.partition(heading) if heading else ("", "", page)
    for name, command in getattr(group, "commands", {}).items():
        first = (command.help or "").strip().split("\n\n")[0].replace("\n", " ")
        said = f"* `{name}`: {first}"
        rest = re.sub(rf"(?m)^\* `{name}`: .*$", lambda _, said=said: said, rest, count=1)
        rest = _in_whole_sentences(rest, command, f"\n## `fedpref {name}`\n")
    return head + found + rest


def public() -> str:
    """What `import fedpref` offers: its text, or a link where a layer's page has it."""
    links, texts = [], []
    for name in fedpref.__all__:
        module = getattr(fedpref, name).__module__
        if module.split(".")[1] in API:
            links.append(f"- [`fedpref.{name}`][{module}.{name}]")
        else:
            texts.append(f"::: {module}.{name}\n")
    return "\n".join([*links, "", *texts])


def api() -> dict[str, str]:
    """Pages of the API by file: what `import fedpref` offers, then a page for each layer of API."""
    pages = {"docs/api/index.md": f"# fedpref\n\n{STABLE}\n\n{public()}"}
    for layer in API:
        modules = sorted(
            path.stem for path in (PACKAGE / layer).glob("*.py") if path.stem != "__init__"
        )
        blocks = "\n".join(f"::: fedpref.{layer}.{module}\n" for module in modules)
        pages[f"docs/api/{layer}.md"] = f"# fedpref.{layer}\n\nLayer: {LAYERS[layer]}.\n\n{blocks}"
    return pages


def between(file: str, block: str) -> str:
    """The text of a file with `block` between its two `layers` marks."""
    text = (ROOT / file).read_text()
    begin, end = "<!-- layers: make references -->\n", "<!-- /layers -->"
    head, rest = text.split(begin)
    return f"{head}{begin}{block}\n{end}{rest.split(end, 1)[1]}"


def layers_table() -> str:
    """The layers as a Markdown table, a number for each."""
    rows = [f"| {n} | `{layer}` | {what} |" for n, (layer, what) in enumerate(LAYERS.items(), 1)]
    return "\n".join(["| | layer | what is in it |", "|---|---|---|", *rows])


def layers_tree() -> str:
    """The layers as a tree of folders."""
    rows = [f"  {f'{layer}/':14}{what}" for layer, what in LAYERS.items()]
    return "\n".join(["```", "src/fedpref/", *rows, "```"])


def documents() -> dict[str, str]:
    """All that is made from the code: file -> its text."""
    return {
        "docs/settings.md": markdown(),
        "docs/commands.md": commands(),
        "docs/architecture.md": between("docs/architecture.md", layers_table()),
        "README.md": between("README.md", layers_tree()),
        **api(),
    }


def main() -> None:
    """Write the documents, or say which are not as the code has them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = [
        name
        for name, text in documents().items()
        if not (ROOT / name).is_file() or (ROOT / name).read_text() != text
    ]
    if check and stale:
        sys.exit(f"not what the code says: {', '.join(stale)}; `make references` writes them")
    for name in stale:
        (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / name).write_text(documents()[name])
        print(f"written: {name}")


if __name__ == "__main__":
    main()
