"""What keys and values of a config used to be called, and how an old file becomes a new one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from fedpref.config import refuse_large
from fedpref.errors import UserError
from fedpref.experiments.packaged import FOLDER

KEYS = {
    "references": "baselines",
    "algorithm.solver.normalise": "normalize",
    "task.estimator.normalise": "normalize",
    "network.topology.neighbours": "neighbors",
}
"""The path of a key that has another name now -> the name, in the same place."""

_BASELINES = {"local": "alone", "centralised": "pooled"}
_ALGORITHMS = {**_BASELINES, "scalarised": "scalarized"}
VALUES: Mapping[str, Mapping[str, str]] = {
    "references": _BASELINES,
    "baselines": _BASELINES,
    "algorithm": _ALGORITHMS,
    "algorithm.name": _ALGORITHMS,
    "algorithms": _ALGORITHMS,  # of a site's own file
    "network.compression": {"quantise": "quantize"},
    "network.compression.name": {"quantise": "quantize"},
}
"""The path of a key -> values that have another name now; in a list, each entry."""


def refuse_former_names(content: Any, where: str) -> None:
    """Raise UserError, which says the new names, where a config has former keys or values.

    Args:
        content: The config as plain data, overrides included.
        where: The file, for the message.
    """
    if changes := list(_changes(content)):
        own = Path(where).is_file() and FOLDER not in Path(where).parents
        how = f" `fedpref migrate {where}` rewrites a file." if own else ""
        raise UserError(f"{where}: {'; '.join(changes)}.{how}")


def migrated(content: Any) -> Any:
    """Return a copy of a config, plain data, with today's keys and values."""
    renewed = copy.deepcopy(content)
    for path, parent, key in _entries(renewed):
        parent[key] = _renewed(path, parent[key])
    for path, parent, key in reversed(list(_entries(renewed))):
        if path in KEYS:  # in the place that the key had, for people compare files
            renamed = {KEYS[path] if name == key else name: parent[name] for name in parent}
            parent.clear()
            parent.update(renamed)
    return renewed


def migrated_text(text: str) -> str:
    """Return a YAML file's text with today's keys and values; all else stays, comments too.

    Raises:
        UserError: The text is not YAML, or no mapping of settings.
    """
    try:
        refuse_large(text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(root, yaml.MappingNode):
        raise UserError("expected a mapping of settings, as `rounds: 5`")
    edits: list[tuple[int, int, str]] = []

    def visit(node: Any, path: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                inner = f"{path}.{key.value}" if path else str(key.value)
                if inner in KEYS:
                    edits.append((*_place(text, key), KEYS[inner]))
                visit(value, inner)
        elif isinstance(node, yaml.SequenceNode):
            for value in node.value:
                visit(value, path)
        elif isinstance(node, yaml.ScalarNode) and node.value in VALUES.get(path, {}):
            edits.append((*_place(text, node), VALUES[path][node.value]))

    visit(root, "")
    for start, end, new in sorted(set(edits), reverse=True):  # an alias is visited again
        text = text[:start] + new + text[end:]
    return text


def _place(text: str, node: yaml.ScalarNode) -> tuple[int, int]:
    """Return where a word stands, without its quotes and the anchor or tag before it."""
    begins, ends = node.start_mark.index, node.end_mark.index
    start = text.rfind(node.value, begins, ends)
    # of a word that is written by escapes, all of it
    return (begins, ends) if start < 0 else (start, start + len(node.value))


def _entries(content: Any, path: str = "") -> Iterator[tuple[str, dict[Any, Any], Any]]:
    """Yield each key of nested mappings: its path, the mapping that it is in, and the key."""
    if isinstance(content, dict):
        for key in list(content):
            inner = f"{path}.{key}" if path else str(key)
            yield inner, content, key
            yield from _entries(content[key], inner)


def _renewed(path: str, value: Any) -> Any:
    names = VALUES.get(path, {})
    if isinstance(value, list):
        return [names.get(entry, entry) if isinstance(entry, str) else entry for entry in value]
    return names.get(value, value) if isinstance(value, str) else value


def _changes(content: Any) -> Iterator[str]:
    for path, parent, key in _entries(content):
        if path in KEYS:
            yield f"the key {path!r} is now called {KEYS[path]!r}"
        was, now = parent[key], _renewed(path, parent[key])
        pairs = zip(was, now, strict=True) if isinstance(was, list) else [(was, now)]
        yield from (
            f"{path}: {old!r} is now called {new!r}" for old, new in pairs if old is not new
        )
