"""What operators ask: is a site ready, how long do certificates last, what is kept of a client."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509

from fedpref import config
from fedpref.engines.messages import RefusedError
from fedpref.engines.site import OWN_FIGURES
from fedpref.engines.site_folder import CLIENTS, STORE
from fedpref.engines.site_privacy import JOINED
from fedpref.engines.store import INDEX, VALUES
from fedpref.errors import UserError
from fedpref.experiments.experiment import Experiment
from fedpref.experiments.run_directory import OUTCOMES, SAMPLES, client_path
from fedpref.numerics import files
from fedpref.sites.consent import Consenting, SiteFile
from fedpref.sites.kits import LOG, SITE_FILE, refuse_blanks, running

SOON = timedelta(days=30)  # before a certificate's end, from when it is told
REACH = 10.0  # seconds for a connection to the server
TURNED_AWAY = ("client_quit", "disabled by server", "client is disabled")  # in a site's log


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: What.
        is_well: Whether it is as it should be.
        said: How it is.
    """

    what: str
    is_well: bool
    said: str


# ---- certificates


def certificates(kit: Path) -> dict[str, datetime]:
    """Return until when a kit's own certificate and the root's are valid, by their files.

    Raises:
        UserError: The folder is no kit, or a certificate in it is missing or damaged.
    """
    return {name: end for name, (_, end) in _validity(kit).items()}


def _validity(kit: Path) -> dict[str, tuple[datetime, datetime]]:
    """Return from when and until when a kit's certificates are valid, by their files.

    Raises:
        UserError: The folder is no kit, or a certificate in it is missing or damaged.
    """
    names = ("client.crt", "server.crt", "rootCA.pem")
    found = {name: kit / "startup" / name for name in names if (kit / "startup" / name).exists()}
    if "rootCA.pem" not in found:
        raise UserError(f"{kit}: this is no kit (no startup/rootCA.pem).")
    if len(found) < 2:
        raise UserError(
            f"{kit}: its own certificate is missing (startup/client.crt, of the server "
            "server.crt). Put back a whole copy of the kit."
        )
    valid = {}
    for name, file in found.items():
        try:
            certificate = x509.load_pem_x509_certificate(file.read_bytes())
            valid[name] = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        except ValueError as error:
            raise UserError(
                f"{file}: this is no certificate. `fedpref federation renew` makes a new one."
            ) from error
    return valid


def expiry(kit: Path) -> str:
    """Return a sentence where a kit's certificates end within 30 days; empty otherwise."""
    ends = certificates(kit)
    first = min(ends, key=lambda name: ends[name])
    left = ends[first] - datetime.now(UTC)
    if left > SOON:
        return ""
    how = "has ended" if left < timedelta() else f"ends in {left.days} days"
    with_root = " --root" if first == "rootCA.pem" else ""
    return (
        f"{kit.name}: {first} {how} ({ends[first]:%Y-%m-%d}). `fedpref federation renew "
        f"FOLDER{with_root}` makes a new one."
    )


# ---- a site, before the first job


def checked(kit: Path, experiment: Experiment | None = None) -> Iterator[Finding]:
    """Yield what stands in a site's way: its file, data, models, server, clock and disk.

    Args:
        kit: The site's folder.
        experiment: One that the site is to take part in.
    """
    try:
        begins, ends = zip(*_validity(kit).values(), strict=True)
        soon = expiry(kit)
        is_well = max(begins) <= datetime.now(UTC) < min(ends)
        said = soon or f"valid until {min(ends):%Y-%m-%d}"
        yield Finding("certificates, and the clock", is_well, said)
        refuse_blanks(kit)
        yield _reached(kit)
    except (UserError, ValueError) as error:
        yield Finding("kit", False, str(error))
    try:
        file = SiteFile.load(kit / SITE_FILE)
    except UserError as error:
        yield Finding(SITE_FILE, False, str(error))
        return
    algorithms = ", ".join(file.algorithms)
    yield Finding(SITE_FILE, bool(file.algorithms), f"takes part in {algorithms or 'nothing'}")
    for called, where in file.models.items():
        # a Hub id is no path; whether it can be had is seen when it is loaded
        is_there = Path(where).exists() or not where.startswith((".", "/", "~"))
        yield Finding(f"model {called}", is_there, where if is_there else f"{where} is not there")
    folder = Path(file.folder)
    free = shutil.disk_usage(_existing(folder)).free / 1e6
    lent = file.limits.max_disk_mb
    said = f"{free:,.0f} MB are free"
    if free < lent:
        said += f", less than the {lent:,} MB that limits.max_disk_mb lends"
    yield Finding("disk", free > lent / 10, said)
    host = Consenting(kit.name, file)
    content: Any = {} if experiment is None else config.dump(experiment)
    if experiment is not None:
        try:
            host.consent(content)
            yield Finding("consent", True, f"takes part in {experiment.algorithm.name}")
        except RefusedError as error:
            yield Finding("consent", False, str(error))
            return
    try:
        read = host.read(content)
        sizes = ", ".join(
            f"{client.name} ({len(client.train)} training, {len(client.test)} held-out)"
            for client in read
        )
        yield Finding("data", True, sizes)
        about = {one.name: {"train": len(one.train), "test": len(one.test)} for one in read}
        try:
            file.limits.refuse_small(about)
        except RefusedError as error:
            yield Finding("limits", False, str(error))
    except UserError as error:
        yield Finding("data", False, str(error))


def _reached(kit: Path) -> Finding:
    """Say whether the server's port can be reached from here."""
    settings = kit / "startup/fed_client.json"
    if not settings.exists():
        return Finding("server", True, "this is the server's kit")
    try:
        content = json.loads(settings.read_text())
        server = content["servers"][0]
        place = server["service"].get("target")
        if not place:  # HOST:PORT:PORT
            place = content["overseer_agent"]["args"]["sp_end_point"].rpartition(":")[0]
        host, _, number = str(place).rpartition(":")
        port = int(number)
    except (ValueError, LookupError, TypeError, AttributeError):
        said = f"{settings}: it names no server as HOST:PORT. Put back a whole copy of the kit."
        return Finding("server", False, said)
    try:
        with socket.create_connection((host.strip("[]"), port), REACH):
            return Finding("server", True, f"{host}:{port} can be reached")
    except OSError as error:
        said = f"{host}:{port} cannot be reached: {error}. Is it started, and is the port open?"
        return Finding("server", False, said)


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.parents) if place.exists())


def status(kit: Path) -> str:
    """Return whether a kit's participant runs, and whether the server turns it away, in words."""
    if not running(kit.resolve()):
        return f"{kit.name} is not running."
    log = kit / LOG
    last = log.read_bytes()[-4000:].decode(errors="replace") if log.exists() else ""
    lines = last.splitlines()[-6:]
    if any(word in line for line in lines for word in TURNED_AWAY):
        return (
            f"{kit.name} is running, but the server turns it away: it was expelled, or its name is "
            f"not known there. `fedpref federation admit {kit.name}` at the coordinator's lets it "
            "in."
        )
    return f"{kit.name} is running."


# ---- a client that goes


def forget(folder: Path, client: str) -> list[str]:
    """Remove what a site keeps of a client in its runs: values, own parts, answers, caches.

    Args:
        folder: Where the site keeps its side of runs.
        client: The client's name.

    Returns:
        The runs in which there was something of it.

    Raises:
        UserError: The site has kept nothing of such a client.
    """
    records = {one.parent for one in folder.rglob(CLIENTS)}
    # stores that were set aside have records of their own; a run may be called as one is
    runs = sorted(
        one for one in records if not (one.name.startswith(STORE) and one.parent in records)
    )
    forgotten = [run for run in runs if _forgotten(run, client)]
    if not forgotten:
        raise UserError(f"{folder}: nothing is kept here of a client {client!r}.")
    return [run.relative_to(folder).as_posix() for run in forgotten]


def _forgotten(run: Path, client: str) -> bool:
    """Remove what is kept of a client in a run; return whether there was anything."""
    was_there = False
    for store in run.glob(f"{STORE}*"):
        # one that was set aside has the numbers of its own time
        has_own = store.name != STORE and (store / CLIENTS).exists()
        record = store / CLIENTS if has_own else run / CLIENTS
        number = json.loads(record.read_text()).get(client)
        if number is not None:
            was_there = True
            _take_out(store, number)
    for record in (run / CLIENTS, *run.glob(f"{STORE}*/{CLIENTS}"), run / JOINED):
        names = json.loads(record.read_text()) if record.exists() else []
        if client in names:
            was_there = True
            names.pop(client) if isinstance(names, dict) else names.remove(client)
            files.write(record, json.dumps(names))
    for kind, suffix in (
        ("clients", ""),
        ("newcomers", ""),
        (SAMPLES, ".jsonl"),
        (OUTCOMES, ".json"),
    ):
        if path := client_path(run, kind, client, suffix):
            was_there = True
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if (figures := run / OWN_FIGURES).exists():
        told = [json.loads(line) for line in figures.read_text().split("\n")[:-1]]
        for one in told:
            was_there |= one["clients"].pop(client, None) is not None
        files.write(figures, "".join(json.dumps(one) + "\n" for one in told))
    if was_there:
        # by digests of rows, which do not say whose; what is still needed is computed again
        shutil.rmtree(run / "cache", ignore_errors=True)
    return was_there


def _take_out(store: Path, number: int) -> None:
    """Remove a client's values from a folder of checkpoints."""
    for index in store.glob(f"round-*/{INDEX}"):
        content = json.loads(index.read_text())
        for some in content.values():
            some.pop(str(number), None)
        files.write(index, json.dumps(content))
    for file in store.glob(f"{VALUES}/*/{number}.*"):
        file.unlink()
