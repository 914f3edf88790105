"""Sites for tests: each is an operating system process at the end of a pipe, which the transport
relays between.
"""

from __future__ import annotations

import importlib
import multiprocessing
import threading
import time
from collections.abc import Mapping, Sequence
from itertools import count
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from fedpref.engines import Patience, RemoteEngine, Sites
from fedpref.engines.host import Host
from fedpref.engines.messages import unpack
from fedpref.engines.site import Site
from fedpref.experiments.clients import SimulatedSite

NUMBERS = count()


def other_processes() -> Any:
    """For processes of their own, which need not import everything anew."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "peft", "fedpref.experiments.rounds"])
    return context


class Relayed:
    """The way to other sites, through the parent."""

    def __init__(self, connection: Connection) -> None:
        self.connection, self.lock = connection, threading.Lock()

    def send(self, *content: Any) -> None:
        with self.lock:
            self.connection.send(content)

    def tell(self, site: str, message: bytes) -> None:
        self.send("tell", site, message)


def serve(
    connection: Connection, name: str, host: Host, folder: Path, modules: Sequence[str]
) -> None:
    torch.set_num_threads(1)
    for module in modules:
        importlib.import_module(module)
    peers = Relayed(connection)
    site = Site(name, host, folder, peers)
    while True:
        try:
            kind, *content = connection.recv()
        except EOFError:
            return
        if kind == "hear":
            site.hear(*content)
        else:  # in a thread of its own, for an exchange waits for what is heard
            threading.Thread(
                target=lambda message=content[0]: peers.send("answer", site.answer(message))
            ).start()


class Processes:
    """Sites, and what was sent between them and their coordinator."""

    def __init__(
        self, hosts: Mapping[str, Host], folder: Path, modules: Sequence[str] = ()
    ) -> None:
        context = other_processes()
        self.sites, self.folder = list(hosts), folder
        self.connections: dict[str, Connection] = {}
        self.processes: dict[str, Any] = {}
        self.wire: list[bytes] = []  # all that was sent, any way
        self.up: list[bytes] = []  # of it, what sites sent
        for name, host in hosts.items():
            ours, theirs = context.Pipe()
            process = context.Process(
                target=serve, args=(theirs, name, host, folder / name, modules), daemon=True
            )
            process.start()
            theirs.close()
            self.connections[name], self.processes[name] = ours, process

    def ask(self, messages: Mapping[str, bytes], seconds: float) -> dict[str, bytes]:
        until, found = time.monotonic() + seconds, dict[str, bytes]()
        missing = set()
        for name, message in messages.items():
            self.wire.append(message)
            try:
                self.connections[name].send(("ask", message))
            except OSError:
                missing.add(name)
        names = {connection: name for name, connection in self.connections.items()}
        while messages.keys() - found.keys() - missing and (left := until - time.monotonic()) > 0:
            for connection in wait(
                [self.connections[name] for name in self.sites if name not in missing], left
            ):
                name = names[connection]
                try:
                    kind, *content = connection.recv()
                except (EOFError, OSError):
                    missing.add(name)
                    continue
                self.wire.append(content[-1])
                self.up.append(content[-1])
                if kind == "tell":
                    self.connections[content[0]].send(("hear", name, content[1]))
                else:
                    found[name] = content[0]
        return found

    def stop(self) -> None:
        for process in self.processes.values():
            process.terminate()
            process.join()


def shares(sites: int) -> dict[str, Host]:
    """Simulated sites by name."""
    return {f"site-{k}": SimulatedSite(k, sites) for k in range(sites)}


def process_engine(
    processes: Processes, content: dict[str, Any], run: str = "", began: Any = None, **settings: Any
) -> Any:
    """An engine over sites that open the experiment anew."""
    processes.wire.clear()
    processes.up.clear()
    run = run or f"run-{next(NUMBERS)}"
    engine = RemoteEngine(
        Sites(
            processes, content, run, settings.pop("patience", Patience(seconds=100)), began=began
        ),
        **settings,
    )
    engine.processes, engine.run, engine.about = processes, run, engine._sites.about  # type: ignore[attr-defined]
    return engine


def sent_up(processes: Processes) -> list[str]:
    """Names of tensors in what sites sent."""
    return [name for message in processes.up for name in unpack(message)[1]]
