"""The configs that come with fedpref, by name."""

from __future__ import annotations

import difflib
import re
from importlib.resources import files
from pathlib import Path

from fedpref.errors import UserError

FOLDER = Path(str(files("fedpref"))) / "configs"
SENTENCE = re.compile(r"(?<!et al)\. ")  # where one ends


def packaged_configs() -> dict[str, str]:
    """Return what each config that comes with fedpref is about, by name."""
    return {file.stem: _about(file) for file in sorted(FOLDER.glob("*.yaml"))}


def _about(file: Path) -> str:
    """Return the first sentence of the comment at the top of a config."""
    lines = file.read_text(encoding="utf-8").splitlines()
    comment = lines[: next((i for i, line in enumerate(lines) if not line.startswith("#")), 0)]
    text = " ".join(line.removeprefix("#").strip() for line in comment)
    # "et al. 2020" is no end of a sentence
    return f"{re.split(SENTENCE, text)[0].rstrip('.')}."


def config_file(config: str | Path) -> Path:
    """Return the file that a config's path or name means.

    A file that is there comes first, then a config of this name that comes with fedpref.

    Raises:
        UserError: There is neither.
    """
    path = Path(config).expanduser()
    if path.is_file():
        return path
    names = packaged_configs()
    # configs/demo.yaml of a checkout is demo elsewhere
    name = path.stem if path.parent in (Path(), Path("configs")) else ""
    if name in names and path.suffix in ("", ".yaml"):
        return FOLDER / f"{name}.yaml"
    near = difflib.get_close_matches(path.stem, names, 1, 0.7)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    if not path.suffix:
        hint += " `fedpref list configs` shows those that come with fedpref, `fedpref init` writes "
        hint += "one for your data."
    raise UserError(f"{config}: there is no such config file.{hint}")
