"""A site at work: the clients that it hosts, and what it does when a coordinator asks."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter
from torch import Tensor

from fedpref.channel import Sender
from fedpref.channel.lattice import fixed
from fedpref.engines import site_folder
from fedpref.engines.engine import compressed, hostile_weight, mixed
from fedpref.engines.host import SETTLED, Host, Hosted, Peers
from fedpref.engines.mailbox import Mailbox
from fedpref.engines.many import MANY, DrawnShard, when_needed
from fedpref.engines.messages import (
    NO_TENSORS,
    Header,
    RefusedError,
    finite,
    pack,
    refuse_other_format,
    unpack,
    version,
)
from fedpref.engines.neighbours import Neighbours
from fedpref.engines.phases import Phases
from fedpref.engines.requests import Masked, Noisy, Place, SumAddress, beneath, freed, parsed
from fedpref.engines.site_masks import (
    FIGURES,
    PLACES,
    Identity,
    SiteMasks,
    Unsigned,
    told_after,
)
from fedpref.engines.site_privacy import SitePrivacy
from fedpref.engines.store import Store
from fedpref.engines.values import Kept, Later, Values, size
from fedpref.engines.workers import one_thread
from fedpref.errors import UserError
from fedpref.federation.leaving import Audience, fits, is_metrics, labels
from fedpref.federation.private_steps import PrivateSteps
from fedpref.federation.verbs import WORK, Client, WithheldError, Work
from fedpref.numerics import files, seeds, trees
from fedpref.numerics.tallies import tally
from fedpref.numerics.trees import Tree

OWN_FIGURES = "figures.jsonl"  # in a run's folder: clients' figures that left in sums alone
LOG = logging.getLogger("fedpref")
Answer = tuple[Header, Tree]
T = TypeVar("T")


def _failed(error: Exception) -> str:
    """Return what others are told of an error: no text of it, which may hold somebody's data."""
    LOG.exception("what the coordinator asked for failed")
    return f"it failed ({type(error).__name__}); the site's log says more"


class Site:
    """Clients' values lie here by name; what the coordinator no longer refers to is freed.

    A message is parsed by `requests` before a verb sees it. Whether a value leaves is said by
    its label alone; see `fedpref.federation.leaving`.
    """

    def __init__(
        self,
        name: str,
        host: Host,
        folder: Path,
        peers: Peers,
        identity: Identity = Unsigned(),
    ) -> None:
        self.name, self._host, self._folder, self._peers = name, host, folder, peers
        self._identity = identity
        self._masks: SiteMasks | None = None
        # a digest of all that was sent to be worked on in the phase
        self._told: tuple[str, int, str] = ("", 0, "")
        self._calls: set[str] = set()  # whose values were made in the phase
        self._hosted: Hosted | None = None
        self._resumes = False
        self._names: dict[int, str] = {}  # of clients, by their ids
        self._values = Values()
        self._privacy: SitePrivacy | None = None
        self._site_of: dict[int, str] = {}  # every client's site
        self._mailbox = Mailbox()
        self._phases = Phases()
        verbs = (
            self.split,
            self.consent,
            self.open,
            self.number,
            self.each,
            self.contribute,
            self.tally,
            self.keys,
            self.boxes,
            self.agree,
            self.unmask,
            self.exchange,
            self.report,
            self.save,
            self.load,
            self.names,
        )
        self._verbs: dict[str, Callable[..., Answer]] = {verb.__name__: verb for verb in verbs}

    def answer(self, message: bytes) -> bytes:
        """Do what the coordinator asks, and return the answer.

        What is refused or fails is said in the answer, without what it is about, and changes
        nothing.
        """
        try:
            header, tensors = unpack(message, self._hosted.bounds.message if self._hosted else None)
            for client, name in freed(header.pop("free", [])):
                self._values.drop(client, name)
            verb = header.pop("verb", None)
            # said in these alone: what follows comes from the same coordinator
            if verb in ("split", "consent", "open"):
                refuse_other_format(header, "the coordinator")
            asked = parsed(verb, header)
            with one_thread():
                answer, tensors = self._verbs[verb](finite(tensors), **asked)
            return pack(version() | answer, tensors)
        except (RefusedError, WithheldError, UserError) as error:
            return pack(version() | {"refused": str(error)})
        except Exception as error:
            return pack(version() | {"refused": _failed(error)})

    def hear(self, sender: str, message: bytes) -> None:
        """Take what another site's clients tell clients here; it waits for its exchange.

        What nobody waits for is dropped.
        """
        if sender not in self._site_of.values():
            return
        if len(message) <= (self._opened.bounds.message or sys.maxsize):
            self._mailbox.put(sender, message)

    # ---- verbs

    def split(self, tensors: Tree, experiment: Any, everything: bool) -> Answer:
        """Say what tells prompts that are held out here, for sites to compare; see `Host`."""
        return asdict(self._host.held_out(experiment, everything)), NO_TENSORS

    def consent(self, tensors: Tree, experiments: Sequence[Any]) -> Answer:
        """Say of each experiment why the site takes no part in it; nothing is begun."""
        reasons = []
        for experiment in experiments:
            try:
                self._host.consent(experiment)
                reasons.append("")
            except RefusedError as error:
                reasons.append(str(error))
        return {"reasons": reasons}, NO_TENSORS

    def open(
        self,
        tensors: Tree,
        experiment: Any,
        run: str,
        resumes: bool,
        is_known: bool,
        held_out: Sequence[str],
    ) -> Answer:
        """Begin an experiment, or go on with it, and say which clients there are.

        A run is begun anew only if the coordinator knows it; what its clients kept before is set
        aside.
        """
        folder = beneath(self._folder, run)
        if not is_known and list(folder.glob("checkpoints/round-*")):
            raise RefusedError(
                f"it has kept the clients of a run {run!r} that the coordinator does not know; "
                "its folder of runs is another"
            )
        is_new = not folder.exists()
        with nullcontext() if resumes else site_folder.without(folder / SETTLED):
            hosted = self._host.host(experiment, folder, held_out)
            if is_new:  # one that goes on may be what makes room
                try:
                    site_folder.refuse_full(self._folder, 0, hosted.bounds.disk)
                except RefusedError:
                    shutil.rmtree(folder, ignore_errors=True)  # what was read for it
                    raise
            folder.mkdir(parents=True, exist_ok=True)
            digest = site_folder.digest(experiment)
            bound = folder / site_folder.EXPERIMENT
            if resumes and bound.exists() and bound.read_text() != digest:
                raise RefusedError("the run was begun with another experiment; begin a new one")
            site_folder.count_opening(folder, hosted.bounds.openings)
            if not resumes:
                site_folder.set_aside(folder)
        files.write(bound, digest)
        self._hosted, self._run, self._resumes = hosted, folder, resumes
        self._store = Store(folder / site_folder.STORE)
        self._store.tidy()
        self._values, self._names, self._site_of = Values(), {}, {}
        self._privacy = self._masks = None
        self._told, self._calls = ("", 0, ""), set()
        self._mailbox.clear()
        self._phases = Phases()
        return {"about": hosted.about}, NO_TENSORS

    def number(
        self, tensors: Tree, ids: Mapping[str, int], sites: Mapping[str, Sequence[int]]
    ) -> Answer:
        """Learn the numbers of the clients here, and at which sites all others are."""
        if not ids.keys() <= self._opened.shards.keys():
            raise RefusedError("ids of clients that are not those here")
        # what a client was asked for is counted by its number
        if self._site_of:
            raise RefusedError("clients have their numbers already")
        file = self._run / site_folder.CLIENTS
        before = json.loads(file.read_text()) if self._resumes and file.exists() else {}
        if any(ids[name] != number for name, number in before.items() if name in ids):
            raise RefusedError("clients had other numbers in this run")
        everybody = [number for numbers in sites.values() for number in numbers]
        here = set(sites.get(self.name, ()))
        if len(set(everybody)) < len(everybody) or set(ids.values()) != here:
            raise RefusedError("ids of clients that do not fit those of the sites")
        self._names = {number: name for name, number in ids.items()}
        files.write(file, json.dumps({**before, **ids}))
        self._values = Values(self._names, self._opened.bounds.memory)
        self._site_of = {number: site for site, numbers in sites.items() for number in numbers}
        self._privacy = self._opened.privacy(self._names, len(everybody), len(sites), self._folder)
        if (settings := self._opened.masks) is not None:
            run = self._run.relative_to(self._folder).as_posix()
            self._masks = SiteMasks(
                self.name,
                self._identity,
                settings,
                run,
                self._run,
                self._opened.means,
                self._privacy is not None and self._privacy.sums is not None,
                len(sites),
                self._folder,
            )
        return {}, NO_TENSORS

    def each(
        self,
        tensors: Tree,
        work: str,
        args: Sequence[Mapping[str, Any]],
        clients: Sequence[int],
        purpose: str,
        round: int,
        call: int,
        name: str,
    ) -> Answer:
        """Do registered work for some clients and keep what comes of it."""
        hosted = self._opened
        function = WORK.get(work)
        if function is None or not hosted.does(work, purpose):
            raise RefusedError(f"{work!r} is no work that is done here to {purpose}")
        if round > hosted.rounds:
            raise RefusedError(f"round {round} is none of the {hosted.rounds} of the experiment")
        if purpose == "init" and round:
            raise RefusedError("clients begin before the first round")
        self._values.refuse_taken(clients, name)
        common = self._arguments(function, tensors, args, purpose)
        names = {
            i: {k: _said_for(i, arg["own"]) for k, arg in enumerate(args) if "own" in arg}
            for i in clients
        }
        for i, own_names in names.items():
            # what is made when it is asked for is looked at as its client's turn comes
            if all(self._values.is_kept(i, text) for text in own_names.values()):
                self._own(i, own_names, function, len(args))
        self._phases.count(purpose, round, call, clients, hosted.bounds)
        if self._privacy is not None:
            self._privacy.refuse_joined(purpose, clients)
        if self._masks is not None:
            before = self._told[2]
            if self._told[:2] != (purpose, round):
                before, self._calls = "", set()
            self._calls.add(name)
            plain = [arg["plain"] for arg in args if "plain" in arg]
            self._told = purpose, round, told_after(before, work, call, name, plain, tensors)
        is_alike = not any(names.values())
        if purpose == "init" and is_alike and len(clients) > MANY and self._privacy is None:
            return self._when_needed(function, common, clients, call, name)
        begun = time.monotonic()
        parts: int | None = None
        failed: dict[int, str] = {}
        spent: dict[int, float] = {}
        for i in clients:
            try:
                private = self._steps(i, purpose, round, call)
            except RefusedError as error:
                failed[i] = str(error)
                continue
            try:
                own = self._own(i, names[i], function, len(args))
                given = {**common, **{k: kept.value for k, kept in own.items()}}
                client = self._client(i, purpose, function, round, call, private)
                result = function(client, *(given[k] for k in sorted(given)))
                if private is not None and self._privacy is not None:
                    private.settle()
                    spent[i] = self._privacy.spent(i)
                values = result if isinstance(result, tuple) else (result,)
                # Checked before it is kept, so that a client that diverges keeps its earlier state.
                # Where privacy is promised nothing is refused here: a change that is not finite
                # counts as zero in the noisy sum, and refusing it would tell of a client's rows.
                if self._privacy is None:
                    _refuse_infinite(values)
                said = labels(function, {k: kept.label for k, kept in own.items()}, values)
                for k, (part, label) in enumerate(zip(values, said, strict=True)):
                    self._values.put(i, f"{name}.{k}", Kept(part, label))
            except (RefusedError, WithheldError) as error:
                failed[i] = str(error)
                continue
            except Exception as error:
                failed[i] = _failed(error)
                continue
            parts = len(result) if isinstance(result, tuple) else None
        self._phases.spend(purpose, round, time.monotonic() - begun)
        answer = {"parts": parts, "failed": failed}
        return {**answer, "spent": spent} if spent else answer, NO_TENSORS

    def _when_needed(
        self,
        work: Work[..., Any],
        args: Mapping[int, Any],
        clients: Sequence[int],
        call: int,
        name: str,
    ) -> Answer:
        """Let what many clients have before the first round be made when it is asked for."""

        def done(i: int) -> Any:
            try:
                client = self._client(i, "init", work, 0, call)
                result = work(client, *(args[k] for k in sorted(args)))
                _refuse_infinite(result if isinstance(result, tuple) else (result,))
            except (RefusedError, WithheldError):
                raise
            except Exception as error:  # whose text may hold rows, whoever asks for the value
                raise RefusedError(_failed(error)) from error
            return result

        each = when_needed(work, done, remembered=1)
        needed = sum(size(arg) for arg in args.values() if isinstance(arg, Mapping))
        for k, made in enumerate(each):
            self._values.put_later(clients, f"{name}.{k}", Later(made, needed))
        return {"parts": len(each) if len(each) > 1 else None, "failed": {}}, NO_TENSORS

    def _own(
        self, client: int, names: Mapping[int, str], work: Work[..., Any], arguments: int
    ) -> dict[int, Kept]:
        """Return a client's own arguments, by place; raises RefusedError where one does not fit."""
        own = {k: self._values.get(client, name) for k, name in names.items()}
        labels = {k: own[k].label if k in own else None for k in range(arguments)}
        if strange := [k for k, label in labels.items() if not fits(work, k, label)]:
            raise RefusedError(
                f"argument {strange[0]} of {work.name!r} is not of the kind that is read there"
            )
        return own

    def _client(
        self,
        i: int,
        purpose: str,
        work: Work[..., Any],
        round: int,
        call: int,
        private: PrivateSteps | None = None,
    ) -> Client:
        """Return a client for a piece of work.

        Raises:
            UserError: Rows of it cannot be used, which of many is found when it is drawn.
        """
        hosted = self._opened
        return Client(
            i,
            hosted.task,
            self._shard(i, purpose, work),
            # the same address as in a simulation, therefore the same numbers
            seeds.generator(hosted.seed, purpose, round=round, call=call, client=i),
            round,
            hosted.rounds,
            self._run,
            hosted.bounds.examples,
            hosted.bounds.evaluated,
            private,
        )

    @property
    def _is_promised(self) -> bool:
        """Whether sums have noise."""
        return self._privacy is not None and self._privacy.sums is not None

    def _shard(self, client: int, purpose: str, work: Work[..., Any]) -> Any:
        """Return a client's data for a piece of work.

        Where privacy is promised there are none to train on as a run begins, nor, when somebody
        joins it, for work that sends anything: none of that has noise.
        """
        shard = self._opened.shards[self._names[client]]
        sends = bool(work.sends or work.tells)
        if self._privacy is not None and (purpose == "init" or (purpose == "join" and sends)):
            return replace(shard, train=())
        # what a client has in the beginning is seldom of its data
        if purpose == "init" or not isinstance(shard, DrawnShard):
            return shard
        shard, bounds = shard.opened(), self._opened.bounds
        for side, least in (
            ("train", bounds.examples),
            ("test", bounds.evaluated),
            ("validation", bounds.evaluated),
        ):
            # what was counted as the site joined was rows, some of which cannot be used
            if 0 < len(getattr(shard, side)) < least:
                raise RefusedError(f"fewer than {least} examples can be used")
        return shard

    def _steps(self, client: int, purpose: str, round: int, call: int) -> PrivateSteps | None:
        """Return what makes a client's local steps private; None where nothing is promised."""
        if self._privacy is None or purpose != "train":
            return None
        return self._privacy.steps(client, round, call)

    def _arguments(
        self,
        work: Work[..., Any],
        tensors: Tree,
        args: Sequence[Mapping[str, Any]],
        purpose: str,
    ) -> dict[int, Any]:
        """Return the arguments that all clients have in common, by place.

        They are read by the types that the work declares; nothing is unpickled.

        Raises:
            RefusedError: They do not fit, or ask for more than the site consents to.
        """
        if empty := [name for name, tensor in tensors.items() if not tensor.numel()]:
            raise RefusedError(f"the tensor {empty[0][:80]!r} is empty")
        hints = [hint for key, hint in get_type_hints(work.function).items() if key != "return"][1:]
        hints += hints[-1:] * (len(args) - len(hints))  # a work's *parts
        common: dict[int, Any] = {
            k: trees.part(tensors, arg["tree"]) for k, arg in enumerate(args) if "tree" in arg
        }
        try:
            for k, (arg, hint) in enumerate(zip(args, hints, strict=True)):
                if "plain" in arg:
                    common[k] = TypeAdapter(hint).validate_python(arg["plain"])
                    self._opened.bounds.check(common[k], purpose)
        except ValueError as error:  # pydantic's among them
            raise RefusedError(f"arguments of {work.name!r} that do not fit: {error}") from error
        return common

    def contribute(
        self,
        tensors: Tree,
        own: Mapping[int, str],
        shares: Mapping[int, float],
        noisy: Noisy | None = None,
        masked: Masked | None = None,
        place: Place | None = None,
    ) -> Answer:
        """Send each client's share of a sum, or its change for one that noise is added to.

        Under masks the site sends the sum of its own clients alone. What is promised of sums is
        kept whatever is asked for.
        """
        is_promised = self._is_promised
        if (noisy is not None) != is_promised or (masked is not None) != bool(self._masks):
            raise RefusedError("the experiment's promise is not that of the sum that is asked for")
        if masked is not None and self._masks is not None:
            self._refuse_unplanned(self._masks, own, shares, noisy, masked)
        values = {i: self._leaving(i, name, Audience.COORDINATOR) for i, name in own.items()}
        if self._privacy is not None and noisy is not None:
            round, call, norm = noisy["round"], noisy["call"], noisy["norm"]
            messages = {
                i: self._privacy.message(i, value, round, call, norm) for i, value in values.items()
            }
        else:
            if masked is not None:
                for value in values.values():
                    _fixed(value)  # before it is scaled: its sum is of shares, which fit then
            messages = {i: trees.scale(value, _said_for(i, shares)) for i, value in values.items()}
            if place is not None:
                messages = self._compressed(messages, place)
        if self._masks is None or masked is None:
            return {}, trees.nest(messages)
        address = masked["address"]
        if self._privacy is not None and noisy is not None:
            total = self._privacy.total(
                messages.values(), noisy["round"], noisy["call"], self._masks.noisy(address)
            )
        else:
            total = trees.total(_wide(_fixed(message)) for message in messages.values())
        sent = self._masks.masked(address, masked["boxes"], total, _said_by(values))
        return {**self._masks.heard(address)}, sent

    def _compressed(self, messages: Mapping[int, Tree], place: Place) -> dict[int, Tree]:
        """Return messages as they travel."""
        round, call = place["round"], place["call"]
        sent = {}
        for i, message in messages.items():
            rng = seeds.generator(self._opened.seed, "channel", round=round, call=call, client=i)
            sent[i] = compressed(self._opened.uplink, message, Sender(i, round, rng))
        return sent

    def _refuse_unplanned(
        self,
        masks: SiteMasks,
        own: Mapping[int, str],
        shares: Mapping[int, float],
        noisy: Noisy | None,
        masked: Masked,
    ) -> None:
        """Raise RefusedError for a part of a sum that is not the one all sites were told of."""
        address, plan = masked["address"], masks.planned(masked["address"], own)
        if address["call"] >= FIGURES:
            raise RefusedError("a sum of figures is asked for as one of updates")
        said = dict.fromkeys(own, 1.0) if noisy else {i: _said_for(i, shares) for i in own}
        if said != dict(plan):
            raise RefusedError("the part that is asked for is not the one that all sites were told")
        at = address["round"], address["call"]
        if noisy is not None and (noisy["round"], noisy["call"]) != at:
            raise RefusedError("noise of another sum is asked for")
        self._refuse_elsewhere(masks, address, own)

    def _refuse_elsewhere(
        self, masks: SiteMasks, address: SumAddress, own: Mapping[int, str]
    ) -> None:
        """Raise RefusedError for a sum of anything but what this phase has made of what all sites
        were sent.
        """
        if not own:
            return
        if self._told[:2] != (address["purpose"], address["round"]):
            raise RefusedError("a sum of another phase is asked for")
        if {name.split(".")[0] for name in own.values()} - self._calls:
            raise RefusedError("a sum of values of another phase is asked for")
        if masks.told(address) != self._told[2]:
            raise RefusedError("the site was sent more since its keys of this sum were made")

    def tally(self, tensors: Tree, own: Mapping[int, str], masked: Masked) -> Answer:
        """Send the sums of the figures of the clients here, under masks, and keep each one's."""
        address, masks = masked["address"], self._masked
        if self._opened.is_silent or address["call"] < FIGURES:
            raise RefusedError("the experiment's figures are not told so")
        if own.keys() != masks.planned(address, own).keys():
            raise RefusedError("figures of others are asked for than all sites were told")
        self._refuse_elsewhere(masks, address, own)
        rows = {i: self._metrics(i, name) for i, name in own.items()}
        weights = [self._weight(i, row) for i, row in rows.items()]
        total = tally(list(rows.values()), weights)
        sent = masks.masked(address, masked["boxes"], total, next(iter(own.values())))
        said = {self._names[i]: row for i, row in rows.items()}
        place = PLACES[address["call"] - FIGURES]
        line = json.dumps({"round": address["round"], "place": place, "clients": said})
        with (self._run / OWN_FIGURES).open("a") as file:
            file.write(line + "\n")
        return {**masks.heard(address)}, sent

    def _weight(self, client: int, row: Mapping[str, float]) -> float:
        """Return what a client weighs in a mean of figures: examples that they are of."""
        train = self._opened.about[self._names[client]]["train"]
        return float(row.get("num_examples", train))

    def keys(
        self,
        tensors: Tree,
        address: SumAddress,
        sites: Sequence[str],
        told: str,
        value_name: str,
    ) -> Answer:
        """Make known the site's public keys for a sum under masks.

        A site none of whose clients were asked for anything takes the coordinator's word for what
        the others were told.
        """
        if not set(sites) <= set(self._site_of.values()):
            raise RefusedError("a sum of sites that are none of the run's")
        if self._told[:2] == (address["purpose"], address["round"]):
            told = self._told[2]
        return self._masked.keys(address, sites, told, value_name), NO_TENSORS

    def boxes(
        self,
        tensors: Tree,
        address: SumAddress,
        adverts: Mapping[str, Any],
        threshold: int,
        plan: Mapping[str, Mapping[int, float]],
    ) -> Answer:
        """Seal shares of the site's masks for the sites whose keys these are."""
        return self._masked.boxes(address, adverts, threshold, plan), NO_TENSORS

    def agree(self, tensors: Tree, address: SumAddress, survivors: Sequence[str]) -> Answer:
        """Sign whose values are in a sum."""
        return self._masked.agree(address, survivors), NO_TENSORS

    def unmask(
        self,
        tensors: Tree,
        address: SumAddress,
        survivors: Sequence[str],
        signatures: Mapping[str, str],
        heard: Mapping[str, Mapping[str, str]],
    ) -> Answer:
        """Give shares of masks to the set of survivors that the sites have signed."""
        return self._masked.unmask(address, survivors, signatures, heard), NO_TENSORS

    def exchange(
        self,
        tensors: Tree,
        own: Mapping[int, str],
        weights: Mapping[int, Mapping[int, float]],
        round: int,
        call: int,
        name: str,
        wait: float,
    ) -> Answer:
        """Send this site's values to its neighbours, wait for theirs, and mix.

        A neighbour that does not answer in time is replaced by the receiver's own value.
        """
        if not self._opened.gossips or self._masks is not None or self._is_promised:
            raise RefusedError("neighbours are told nothing in this experiment")
        self._values.refuse_taken(own, name)
        rows = {i: _said_for(i, weights) for i in own}
        if not {j for row in weights.values() for j in row} <= self._site_of.keys():
            raise RefusedError("weights of clients that are nowhere")
        bounds, links, told = self._opened.bounds, self._opened.links, dict[int, Tree]()
        for i, key in own.items():
            rng = seeds.generator(self._opened.seed, "channel", round=round, call=call, client=i)
            value = self._leaving(i, key, Audience.NEIGHBOURS)
            told[i] = links.encode(value, Sender(i, round, rng))
        arrived = {i: links.decode(message, 1) for i, message in told.items()}
        longest = wait if bounds.seconds is None else min(wait, bounds.seconds)
        neighbours = Neighbours(
            self.name, self._peers, self._mailbox, self._site_of, links, bounds.message
        )
        arrived |= neighbours.exchange(told, weights, round, call, longest)
        for i in told:
            # who was not heard is taken to say what the hearer says, so that weights still sum to
            # one
            heard = ((arrived.get(j, arrived[i]), weight) for j, weight in rows[i].items())
            kept = self._values.get(i, own[i])
            told_as = arrived[i] if links.stages else None
            hostile = hostile_weight(self._opened.distrust, rows[i].get(i, 0.0))
            mixture = mixed(kept.value, told_as, heard, hostile)
            for k, value in enumerate((arrived[i], mixture)):
                self._values.put(i, f"{name}.{k}", Kept(value, kept.label.mixed))
        unheard = {j for i in told for j in rows[i]} - arrived.keys()
        return {
            "sizes": {i: trees.size(message) for i, message in told.items()},
            "unheard": sorted(unheard),
        }, NO_TENSORS

    def report(self, tensors: Tree, own: Mapping[int, str]) -> Answer:
        """Send clients' metrics."""
        if self._opened.is_silent or self._masks is not None:
            raise RefusedError("each client's figures are not told")
        return {"metrics": {i: self._metrics(i, name) for i, name in own.items()}}, NO_TENSORS

    def _metrics(self, client: int, name: str) -> dict[str, float]:
        kept = self._values.get(client, name)
        kept.label.refuse(Audience.COORDINATOR, client)
        if not is_metrics(kept.value):
            raise RefusedError("what is no mapping of names to numbers is not reported")
        return dict(kept.value)

    def save(self, tensors: Tree, own: Mapping[str, Mapping[int, str]], checkpoint: str) -> Answer:
        """Keep clients' values in files, all of them or none."""
        kept = {
            field: {
                i: self._values.get(i, name)
                for i, name in names.items()
                if self._values.is_kept(i, name)
            }
            for field, names in own.items()
        }
        more = sum(size(one.value) for some in kept.values() for one in some.values())
        site_folder.refuse_full(self._folder, more, self._opened.bounds.disk)
        folder = beneath(self._run, site_folder.STORE)
        unfinished, place = folder / ".unfinished", beneath(folder, checkpoint)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        self._store.save(unfinished, checkpoint, kept)
        site_folder.replace_checkpoint(unfinished, place)
        if all(len(kept[field]) == len(names) for field, names in own.items()):
            return {}, NO_TENSORS
        return {"kept": {field: sorted(some) for field, some in kept.items()}}, NO_TENSORS

    def load(self, tensors: Tree, checkpoint: str, fields: Sequence[str], name: str) -> Answer:
        """Take up each client's values of the newest checkpoint that has it and is not newer than
        this.
        """
        self._values.refuse_taken(self._names, name)
        present: dict[str, list[int]] = {field: [] for field in fields}
        missing = set(self._names)
        kept = beneath(self._run, site_folder.STORE).glob("round-*")
        for folder in sorted((one for one in kept if one.name <= checkpoint), reverse=True):
            there = missing & self._store.clients(folder)
            missing -= there
            for field, values in self._store.load(folder, fields, there, missing_ok=True).items():
                for i, value in values.items():
                    self._values.put(i, f"{name}.{field}", value)
                    present[field].append(i)
        return {"present": {field: sorted(some) for field, some in present.items()}}, NO_TENSORS

    def names(self, tensors: Tree) -> Answer:
        """Send the names of the values that lie here."""
        return {"names": self._values.names()}, NO_TENSORS

    # ---- what they need

    @property
    def _masked(self) -> SiteMasks:
        if self._masks is None:
            raise RefusedError("the experiment's sums have no masks")
        return self._masks

    @property
    def _opened(self) -> Hosted:
        if self._hosted is None:
            raise RefusedError("no experiment is open here")
        return self._hosted

    def _leaving(self, client: int, name: str, audience: Audience) -> Tree:
        """Return a value that leaves the site; raises an error for one that may not."""
        kept = self._values.get(client, name)
        kept.label.refuse(audience, client)
        tree: Tree = kept.value
        if tree and is_metrics(tree):
            raise RefusedError("metrics are reported, not averaged")
        if withheld := [key for key in tree if not self._opened.gives(key)]:
            raise RefusedError(f"{withheld[0]!r} does not leave this site")
        return tree


def _fixed(tree: Tree) -> Tree:
    """Return numbers as integers; raises RefusedError where one is too large."""
    try:
        return fixed(tree)
    except ValueError as error:
        raise RefusedError(f"its part of the sum is too large: {error}") from error


def _said_by(values: Mapping[int, Tree]) -> str:
    """Return a digest of clients' values, however they are called; empty where they say nothing."""
    whole = trees.nest(values)
    return trees.digest(whole).hex() if any(bool(one.any()) for one in whole.values()) else ""


def _wide(tree: Tree) -> Tree:
    return {name: tensor.long() for name, tensor in tree.items()}


def _refuse_infinite(values: Sequence[Any]) -> None:
    """Raise RefusedError where a tree holds a number that is not finite; metrics may."""
    for part in values:
        if all(isinstance(value, Tensor) for value in part.values()):
            finite(part)


def _said_for(client: int, by_client: Mapping[int, T]) -> T:
    if client not in by_client:
        raise RefusedError(f"nothing is said for client {client}")
    return by_client[client]
