"""What sums under masks cost, what they survive, and what a coordinator that lies gets.

    python benchmarks/secure_sums.py --quick
    python benchmarks/secure_sums.py --json sums.json

Sums of many senders are compared with plain ones, to the bit, whoever falls out. Processor seconds
are those of one thread. Sites of the runs are processes of their own behind sockets; a site, and
then the coordinator, is killed (SIGKILL) in each of the five phases of a sum. The time of a sum is
held beside that of ten local steps of the demo's model, if it has been fetched
(`fedpref model smollm2-q4`), and else of the shipped one.

Figures: `sum_errors`, `bytes_over_plain`, `site_cpu_seconds_1m_100`,
`server_cpu_seconds_1m_100_lost_30_percent`, `phases_killed` and `phases_survived`, `attacks_tried`
and `attacks_succeeded`, `round_overhead_10_sites_share`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import secrets
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Client as Connect
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ending import end_with_children
from fedpref import Experiment, UserError, config
from fedpref.engines.messages import pack, unpack
from fedpref.engines.site import Site
from fedpref.engines.workers import keep_freed_memory
from fedpref.experiments.clients import SimulatedSite
from fedpref.experiments.experiment import encoded
from fedpref.experiments.rounds import events
from fedpref.experiments.run_directory import RunDirectory
from fedpref.federation.local_training import train_locally
from fedpref.federation.verbs import Client
from fedpref.numerics import seeds, trees
from fedpref.privacy.masks import Sender, context_of, unmasked
from fedpref.privacy.settings import Masks

PHASES = ("keys", "boxes", "contribute", "agree", "unmask")
HONEST = "no lie"
LIES = (
    "two sets of survivors",
    "unequal adapters",
    "swapped keys",
    "in the clear",
    "a low threshold",
    "replayed boxes",
)
CONTEXT = context_of("benchmark")
MILLION = 10**6


class Sum:
    """A sum of senders, up to their uploads."""

    def __init__(self, count: int, words: int, threshold: int, drawn: int | None = None) -> None:
        self.count, self.words, self.threshold = count, words, threshold
        draw = secrets.SystemRandom()
        others = [[j for j in range(count) if j != i] for i in range(count)]
        self.senders = [
            Sender(i, None if drawn is None else frozenset(draw.sample(others[i], drawn)))
            for i in range(count)
        ]
        self.adverts = {one.number: one.advert for one in self.senders}
        begun = time.process_time()
        made = [one.boxes(self.adverts, threshold, CONTEXT) for one in self.senders]
        self.seconds = (time.process_time() - begun) / count  # of one sender
        self.commitments = {i: commitment for i, (_, commitment) in enumerate(made)}
        self.boxes = {i: sealed for i, (sealed, _) in enumerate(made)}
        begun = time.process_time()
        for one in self.senders:
            one.open({j: some[one.number] for j, some in self.boxes.items() if one.number in some})
        self.seconds += (time.process_time() - begun) / count

    def end(self, lost: int, seed: int = 0) -> tuple[bool, float]:
        """Return whether the sum is that of the plain values, and the coordinator's seconds."""
        rng = np.random.default_rng(seed)
        survivors = range(lost, self.count)
        plain = np.zeros(self.words, np.uint32)
        total = np.zeros(self.words, np.uint32)
        for i in survivors:
            value = rng.integers(2**32, size=self.words, dtype=np.uint32)
            plain += value
            total += self.senders[i].masked(value)
        shares = {i: self.senders[i].shares(frozenset(survivors), 2) for i in survivors}
        begun = time.process_time()
        found = unmasked(
            total,
            frozenset(survivors),
            self.adverts,
            self.commitments,
            shares,
            self.threshold,
            CONTEXT,
        )
        return bool(np.array_equal(found, plain)), time.process_time() - begun


def costs(quick: bool) -> dict[str, float]:
    """Errors of sums, and processor seconds and bytes of a million numbers and a hundred sites."""
    errors = 0
    for seed in range(5 if quick else 20):
        for count, threshold, lost in ((3, 3, 0), (5, 4, 1), (10, 7, 3)):
            errors += not Sum(count, 5000, threshold).end(lost, seed)[0]
    # of more senders each shares with some
    if (drawn := Masks(threshold=0.7).drawn(120 if quick else 250)) is not None:
        errors += not Sum(120 if quick else 250, 5000, drawn[1], drawn[0]).end(30)[0]
    whole = Sum(100, MILLION, 67)
    value = np.zeros(MILLION, np.uint32)
    begun = time.process_time()
    whole.senders[0].masked(value)
    site = whole.seconds + time.process_time() - begun
    # the masks of those who fell out cost alike, so that a tenth of the numbers shows them
    tenth = Sum(100, MILLION // 10 if quick else MILLION, 67)
    equal, server = tenth.end(30)
    errors += not equal
    boxes = sum(map(len, whole.boxes[0].values())) + 64 + 32 + 66 * 100
    bytes_over = (4 * MILLION + boxes) / (4 * MILLION)
    print(f"site {site:.2f} s, coordinator {server * MILLION / tenth.words:.2f} s, errors {errors}")
    return {
        "sum_errors": errors,
        "site_cpu_seconds_1m_100": site,
        "server_cpu_seconds_1m_100_lost_30_percent": server * MILLION / tenth.words,
        "bytes_over_plain": bytes_over,
    }


def experiment(rounds: int, **changes: Any) -> Experiment:
    """FedDPO under masks on a few of the shipped clients."""
    content: dict[str, Any] = {
        "data": {"name": "builtin"},
        "partition": {
            "name": "natural",
            "max_rows": 30,
        },
        "algorithm": {"name": "feddpo", "local": {"steps": 1, "batch_size": 2}},
        "secrecy": {"name": "masks", "min_sites": 2},
        "patience": {"min_clients": 1, "seconds": 60},
        "rounds": rounds,
        "workers": 1,
    }
    known = Experiment.of({"data": {"name": "builtin"}}).clients()[0]
    content["partition"]["only"] = [client.name for client in known[:4]]  # one for each site
    return config.parse(Experiment, {**content, **changes}, "secure sums")


def serve(path: str, number: int, count: int, folder: Path) -> None:
    """A site behind a socket, for one coordinator after another."""
    torch.set_num_threads(1)
    peers: Any = None
    site = Site(f"site-{number}", SimulatedSite(number, count), folder, peers)
    with Listener(path, "AF_UNIX") as listener:
        while True:
            with listener.accept() as connection, suppress(EOFError, OSError):
                while True:
                    connection.send_bytes(site.answer(connection.recv_bytes()))


class Sockets:
    """The way to sites that are processes; one of them, or this one, may be killed in a phase."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        self.kills: tuple[str, str] = ("", "")  # who, in which phase
        self.processes: dict[str, Any] = {}
        self._open: dict[str, Any] = {}
        self._killed = False

    def start(self) -> None:
        context = multiprocessing.get_context("fork")
        for k in range(self.count):
            path = str(self.folder / f"{k}.socket")
            arguments = (path, k, self.count, self.folder / f"site-{k}")
            self.processes[f"site-{k}"] = context.Process(target=serve, args=arguments, daemon=True)
            self.processes[f"site-{k}"].start()
            while not Path(path).exists():
                time.sleep(0.05)

    def stop(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.join()

    @property
    def sites(self) -> Sequence[str]:
        return [f"site-{k}" for k in range(self.count)]

    def ask(self, messages: Mapping[str, bytes], seconds: float) -> dict[str, bytes]:
        who, phase = self.kills
        is_phase = any(unpack(one)[0].get("verb") == phase for one in messages.values())
        if is_phase and who == "site" and not self._killed:
            os.kill(self.processes["site-1"].pid, signal.SIGKILL)
            self._killed = True
        found = {}
        for site, message in messages.items():
            with suppress(OSError, EOFError, ConnectionError):
                if site not in self._open:
                    number = site.rsplit("-", 1)[1]
                    self._open[site] = Connect(str(self.folder / f"{number}.socket"), "AF_UNIX")
                self._open[site].send_bytes(message)
                found[site] = self._open[site].recv_bytes()
        if is_phase and who == "server":
            os.kill(os.getpid(), signal.SIGKILL)
        return found


def run_over(spec: Experiment, folder: Path, transport: Any) -> None:
    for _ in events(spec, RunDirectory(folder), transport=transport):
        pass


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return dict(trees.load(folder / "adapter/adapter_model.safetensors"))


def kills(scratch: Path, phases: Sequence[str]) -> dict[str, float]:
    """SIGKILLs of a site and of the coordinator in each phase of a sum."""
    context = multiprocessing.get_context("fork")
    spec = experiment(2)
    survived = tried = 0
    for phase in phases:
        for who in ("site", "server"):
            folder = scratch / f"{phase}-{who}"
            (folder / "sites").mkdir(parents=True)
            transport = Sockets(folder / "sites", 4)
            transport.start()
            transport.kills = (who, phase)
            run = folder / "run"
            process = context.Process(target=run_over, args=(spec, run, transport))
            process.start()
            process.join()
            if who == "server":  # and another one goes on
                transport.kills = ("", "")
                process = context.Process(target=run_over, args=(spec, run, transport))
                process.start()
                process.join()
            tried += 1
            done = RunDirectory(run).done
            print(f"{who} killed in {phase}: {'done' if done else 'NOT DONE'}", flush=True)
            survived += done
            transport.stop()
    return {"phases_killed": tried, "phases_survived": survived}


class Lying:
    """Sites in this process, and a coordinator that changes what it relays."""

    def __init__(self, folder: Path, lie: str) -> None:
        peers: Any = None
        self.all = {
            f"site-{k}": Site(f"site-{k}", SimulatedSite(k, 3), folder / f"site-{k}", peers)
            for k in range(3)
        }
        self.lie = lie
        self.kept: dict[str, Any] = {}

    @property
    def sites(self) -> Sequence[str]:
        return list(self.all)

    def ask(self, messages: Mapping[str, bytes], seconds: float) -> dict[str, bytes]:
        return {site: self.all[site].answer(self.told(site, m)) for site, m in messages.items()}

    def told(self, site: str, message: bytes) -> bytes:
        header, tensors = unpack(message)
        verb, first = header.get("verb"), site == "site-0"
        if self.lie == LIES[0] and verb == "unmask" and first:
            header["survivors"] = header["survivors"][:-1]
        if self.lie == LIES[1] and verb == "each" and first:
            tensors = {name: tensor + 0.01 for name, tensor in tensors.items()}
        if self.lie == LIES[2] and verb == "boxes" and first:
            own = Sender(1).advert
            header["adverts"]["site-1"] |= {"mask": own.mask.hex(), "box": own.box.hex()}
        if self.lie == LIES[3] and verb == "contribute":
            header.pop("masked")
        if self.lie == LIES[4] and verb == "boxes":
            header["threshold"] = 2
        if self.lie == LIES[5] and verb == "contribute" and first:
            header["masked"]["boxes"] = self.kept.setdefault("boxes", header["masked"]["boxes"])
        return pack(header, tensors)


def attacks(scratch: Path) -> dict[str, float]:
    """Lies of a coordinator; one succeeds if a sum comes out in spite of it. One that relays what
    it is given has all of its rounds, so that what ends the others is the lie.
    """
    succeeded = 0
    for lie in (HONEST, *LIES):
        folder = scratch / lie.replace(" ", "-")
        changes = {"secrecy": {"name": "masks", "threshold": 1.0}}
        honest = 1 if lie == LIES[5] else 0  # the first round's boxes are its own
        said = ""
        try:
            run_over(experiment(2, **changes), folder / "run", Lying(folder / "sites", lie))
        except UserError as error:
            said = f"; {error}"
        rows = folder / "run/metrics.jsonl"
        rounds = len(rows.read_text().splitlines()) if rows.exists() else 0
        print(f"{lie}: {rounds - honest} rounds{said:.160}")
        if lie == HONEST and rounds < 2:
            raise SystemExit("an honest relay has no sums either: nothing is shown")
        succeeded += lie != HONEST and rounds > honest
    return {"attacks_tried": len(LIES), "attacks_succeeded": succeeded}


def overhead() -> dict[str, float]:
    """The seconds of a sum of ten sites, as a share of those of ten local steps beside it."""
    keep_freed_memory()
    torch.set_num_threads(1)
    model: dict[str, Any] = {"path": "smollm2-q4", "lora_layers_to_transform": "last-4"}
    try:
        spec = experiment(1, task={"model": model})
        task: Any = spec.build_task()
    except UserError:
        spec = experiment(1)
        task = spec.build_task()
    shard = encoded(spec, task)[1][0]
    task.move_to(0)
    theta = task.init(seeds.generator(0, "init"))
    words = sum(tensor.numel() for tensor in theta.values())
    local = config.parse(
        type(spec.algorithm.local), {"steps": 10, "batch_size": 4}, "algorithm.local"
    )
    client = Client(0, task, shard, torch.Generator().manual_seed(0), 0, 1)
    train_locally(client, theta, replace(local, steps=1), {})  # the first makes what others find
    begun = time.perf_counter()
    train_locally(client, theta, local, {})
    steps = time.perf_counter() - begun
    begun = time.perf_counter()
    one = Sum(10, words, 7)
    one.end(0)
    # all ten senders' part and the coordinator's: more than anybody waits for elsewhere
    sums = time.perf_counter() - begun
    print(f"{words:,} numbers: ten steps {steps:.1f} s, a sum of ten senders {sums:.2f} s in all")
    return {"round_overhead_10_sites_share": sums / steps}


PARTS = ("costs", "kills", "attacks", "overhead")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer sums, and two phases")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--only", nargs="*", choices=PARTS, metavar="PART", help=" ".join(PARTS))
    arguments = parser.parse_args()
    end_with_children()
    parts = arguments.only or PARTS
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if "costs" in parts:
            figures |= costs(arguments.quick)
        if "kills" in parts:
            figures |= kills(scratch / "kills", PHASES[3:] if arguments.quick else PHASES)
        if "attacks" in parts:
            figures |= attacks(scratch / "attacks")
        if "overhead" in parts:
            figures |= overhead()
    print(json.dumps(figures, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
