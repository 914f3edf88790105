"""Clients on other machines: the federation's verbs as messages to the sites that host them."""

from __future__ import annotations

import json
import math
import secrets
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from pydantic import TypeAdapter

from fedpref.channel import Chain
from fedpref.channel.lattice import unfixed
from fedpref.engines.engine import (
    Mixing,
    Purpose,
    Telling,
    Traffic,
    clipped,
    everybody,
    figures_of,
    restored,
    share_of,
    told,
    weighted_report,
)
from fedpref.engines.gold import told_first
from fedpref.engines.kept_sums import KeptSum, KeptSums
from fedpref.engines.many import MANY
from fedpref.engines.messages import (
    NO_TENSORS,
    Header,
    Shape,
    shape,
)
from fedpref.engines.private_examples import ToldExamples
from fedpref.engines.private_sums import PrivateSums
from fedpref.engines.replies import (
    majority,
    unusable,
    usable_metrics,
)
from fedpref.engines.robust_means import RobustMeans
from fedpref.engines.secure_sums import LostSumError, SecureSums
from fedpref.engines.site_masks import call_of, told_after
from fedpref.engines.sites import NOWHERE, SILENT, Sites
from fedpref.errors import UserError
from fedpref.federation.verbs import PerClient, registered
from fedpref.numerics import tallies, trees
from fedpref.numerics.tallies import Figure
from fedpref.numerics.trees import Tree
from fedpref.privacy import Masks

KEPT = "kept.json"  # in a checkpoint: by field, whose values sites have kept
GROUP = 256 * 10**6  # bytes of clients' messages that lie here at once, or one client's
NOBODYS = "1.0"  # a name, where nobody of a cohort has a value
FIRST_GROUP = 4  # clients, before it is known how large a message is


class Name:
    """The name of a value on one client; when nobody refers to it any more, the client frees the
    value.
    """

    def __init__(self, text: str) -> None:
        self.text = text


class Remote:
    """A value on each client: a name for each.

    It does not take the place of an older one where a client is `gone` from its round.
    """

    def __init__(
        self, names: Mapping[int, Name], gone: Mapping[int, str] = MappingProxyType({})
    ) -> None:
        self.names, self.gone = dict(names), gone

    def __or__(self, newer: Any) -> Remote:
        return Remote(
            self.names | {i: name for i, name in newer.names.items() if i not in newer.gone}
        )


LearnGold = Callable[[int, Tree, Sequence[str]], Tree]
"""(the round, what everybody was sent, names of what is trained) -> what gold pairs teach."""


class RemoteEngine:
    """The federation over sites; see `Federation` and `Engine` for what the methods promise.

    Clients whose site does not answer, or refuses, or answers with what cannot be used, are left
    out of the round; `left_out` says why. Fewer than `min_clients` end the run with these reasons.
    """

    def __init__(
        self,
        sites: Sites,
        *,
        weighting: Literal["examples", "equal"] = "examples",
        newcomers: Collection[int] = (),
        links: Chain = Chain(),
        uplink: Chain = Chain(),
        mixing: Mixing = everybody,
        clip: float | None = None,
        private: PrivateSums | None = None,
        examples: ToldExamples | None = None,
        masks: Masks | None = None,
        figures: Telling = "each",
        robust: RobustMeans | None = None,
        gold: LearnGold | None = None,
        sums: KeptSums | None = None,
    ) -> None:
        self.robust, self._gold = robust, gold
        self._adapter: Tree = {}  # what everybody was sent last
        # each client's are not to be had under masks
        self.figures: Telling = "sums" if masks and figures == "each" else figures
        self.private, self.examples = private, examples
        self._uplink = uplink
        self._secure = SecureSums(masks, sites.run, self._ask) if masks else None
        self._sums, self._saved = sums, 0  # rounds of the checkpoint before
        if masks:
            # who refuses its figures is not out of the round for it
            self._figure_sums = SecureSums(masks, sites.run, partial(self._ask, leaves_out=False))
        self._sites, self._links, self._mixing, self._clip = sites, links, mixing, clip
        self._examples = {
            number: float(about["train"]) for number, about in enumerate(sites.about.values())
        }
        self._newcomers = frozenset(newcomers)
        self.clients = tuple(self._examples)
        self._weights = (
            self._examples if weighting == "examples" else dict.fromkeys(self.clients, 1.0)
        )
        self._freed: list[tuple[int, str]] = []
        # what clients were sent: names of tensors, with their type and last size
        self._sent: dict[str, tuple[str, tuple[int, ...]]] = {}
        # sites remember which value was in which sum: names of a run that goes on are new ones
        self._last = secrets.randbelow(900_000_000)
        self._largest = 0  # bytes of a client's message so far
        self._beginnings: set[str] = set()  # calls by which clients began
        self._lost = {NOWHERE}  # sites that did not answer
        self._kept: dict[str, set[int]] = {}  # by field, clients of which sites have kept a value
        self._place: tuple[int, Purpose] | None = None
        self._told = ""  # a digest of what sites were sent in the phase
        self.begin(0, self.clients, "init")

    def begin(self, round: int, cohort: Sequence[int], purpose: Purpose = "train") -> None:
        self.round, self.active, self._purpose = round, tuple(cohort), purpose
        self.traffic, self._calls = Traffic(), 0
        if self.robust is not None:
            self.robust.begin()
        self._gone: dict[int, str] = {}
        self._unheard: dict[int, str] = {}
        self.lengths: dict[int, float] = {}
        self.ages: Mapping[int, int] = {}
        if self._place != (round, purpose):  # sites count several evaluations in a round as one
            self._place, self._told = (round, purpose), ""
        self._cohort = len(self.active)
        self._leave_out(
            {i: "its site is not there" for i in cohort if self._sites.site_of[i] in self._lost}
        )

    @property
    def share(self) -> float:
        if self.private is not None:  # whoever came
            return self.private.chance
        weights = self._bounded(self._weights)
        return share_of(weights, self._examples, self.active, self._newcomers)

    @property
    def left_out(self) -> Mapping[int, str]:
        return self._unheard | self._gone

    def each(self, work: Callable[..., Any], *args: Any) -> Any:
        self._calls += 1
        name = self._fresh()
        if self._purpose == "init":
            self._beginnings.add(name)
        for arg in args:
            if isinstance(arg, Remote):
                self._present(arg)
        tensors = trees.nest({k: arg for k, arg in enumerate(args) if isinstance(arg, Mapping)})
        self.traffic += Traffic(bytes_down=trees.size(tensors) * len(self.active))
        for arg in args:
            if isinstance(arg, Mapping):
                self._sent |= {name: (kind, size) for name, kind, size in shape(arg)}
        if self._gold is not None:
            self._adapter = told_first(args)
        if self._secure is not None:
            described = [_described(arg, k, ()) for k, arg in enumerate(args)]
            plain = [one["plain"] for one in described if "plain" in one]
            name_of = registered(work).name
            self._told = told_after(self._told, name_of, self._calls, name, plain, tensors)
        head = {
            "verb": "each",
            "work": registered(work).name,
            "purpose": self._purpose,
            "round": self.round,
            "call": self._calls,
            "name": name,
        }
        asked = {}
        for site, clients in self._by_site().items():
            described = [_described(arg, k, clients) for k, arg in enumerate(args)]
            asked[site] = ({**head, "args": described, "clients": clients}, tensors)
        answers = self._ask(asked)
        for header, _ in answers.values():
            self._leave_out(
                {i: reason for i, reason in header["failed"].items() if i in self.active}
            )
            if self.examples is not None:
                self.examples.hear(header.get("spent", {}))
        # whoever says otherwise than the work's declaration, or than most, is at fault
        said = [answers[self._sites.site_of[i]][0]["parts"] for i in self.active]
        declared = registered(work).results
        count = majority(said) if declared is None else None if declared == 1 else declared
        self._leave_out(
            {
                i: "its result has other parts"
                for i in self.active
                if answers[self._sites.site_of[i]][0]["parts"] != count
            }
        )
        columns = [
            Remote({i: self._name(i, f"{name}.{k}") for i in self.active}, self._gone)
            for k in range(count or 1)
        ]
        return columns[0] if count is None else tuple(columns)

    def mean(self, values: PerClient[Tree]) -> Tree:
        self._calls += 1
        names = self._present(values)
        if self._secure is not None:
            return self._secure_sum(self._secure, names)
        if self.private is not None:
            return self._private_sum(self.private, names)
        if self.robust is not None and self._purpose == "train":
            return self._robust_mean(self.robust, names)
        # again where a client fell out, whose share the others then take over
        while (total := self._sum(names)) is None:
            pass
        return total

    def _robust_mean(self, robust: RobustMeans, names: Mapping[int, Name]) -> Tree:
        """Return what a rule makes of the values of those clients that sent them.

        All of them lie here at once.
        """
        values: dict[int, Tree] = {}

        def header(own: Mapping[int, str]) -> Header:
            return _contribute(own, dict.fromkeys(own, 1.0))

        for i, message in self._messages(names, header):
            if reason := unusable(message):
                self._leave_out({i: reason})
                continue
            self._largest = max(self._largest, trees.size(message))
            values[i] = message
        usual = self._usual(map(shape, values.values()))
        self._leave_out(
            {
                i: "names or sizes of tensors are not those of the others"
                for i, value in values.items()
                if shape(value) != usual
            }
        )
        values = {i: value for i, value in values.items() if i in self.active}
        self.traffic += Traffic(bytes_up=sum(map(trees.size, values.values())))
        learn = self._gold and partial(self._gold, self.round, self._adapter)
        return robust.mean(values, self._shares(values), learn)

    def _shares(self, clients: Iterable[int]) -> dict[int, float]:
        """Return clients' weights in a mean of theirs, which add up to one."""
        weights = self._bounded({i: self._weights[i] for i in clients})
        total = sum(weights.values())
        return {i: weight / total for i, weight in weights.items()}

    def _bounded(self, weights: Mapping[int, float]) -> Mapping[int, float]:
        """Return weights of which no site's clients have more together than they may."""
        most = self._sites.patience.max_site_share
        if most is None or not weights:
            return weights
        return bounded_by_site(weights, self._sites.site_of, most)

    def _sum(self, names: Mapping[int, Name]) -> Tree | None:
        """Return the weighted mean of clients' values; None if one of them fell out.

        Clients are asked in groups, and each message is added as soon as it is there, in the
        clients' order, whoever answered first: the sum has the same bits anywhere, and memory does
        not grow with clients.
        """
        present, sent = self.active, 0
        # of who is left, so that a client which fell out does not shrink the mean
        shares = self._shares(present)
        sums: dict[Shape, Tree] = {}
        forms: dict[int, Shape] = {}
        uplink = self._uplink if self._purpose == "train" else Chain()
        place = (self.round, self._calls) if uplink.stages else None

        def header(own: Mapping[int, str]) -> Header:
            return _contribute(own, {i: shares[i] for i in own}, place=place)

        for i, message in self._messages(names, header, stops_short=True):
            size = trees.size(message)
            try:
                message = restored(uplink, message)
            except ValueError as error:
                self._leave_out({i: str(error)})
                continue
            if reason := unusable(message) or self._other_type(message):
                self._leave_out({i: reason})
                continue
            sent += size
            self._largest = max(self._largest, trees.size(message))
            if self._clip is not None and self._purpose == "train":
                message, length = clipped(message, shares[i], self._clip)
                self.lengths[i] = max(length, self.lengths.get(i, 0.0))
            form = shape(message)
            # a few numbers may stand for many, and each form has a sum of its own
            room = sum(map(trees.size, (*sums.values(), message)))
            if form not in sums and room > self._room_for_sums:
                self._leave_out({i: "there is no room for a sum of its form"})
                continue
            forms[i] = form
            sums[form] = trees.add_to(sums[form], message) if form in sums else message
        if not set(present) <= set(self.active):
            return None
        # whoever sends other names or shapes than most is at fault; no template of them is known
        # here
        usual = self._usual(forms.values())
        self._leave_out(
            {
                i: "names or sizes of tensors are not those of the others"
                for i, form in forms.items()
                if form != usual
            }
        )
        if self.active != present:
            return None
        self.traffic += Traffic(bytes_up=sent)
        return sums[usual]

    def _secure_sum(self, secure: SecureSums, names: Mapping[int, Name]) -> Tree:
        """Return the mean of clients' values, of which none is seen here.

        It is that of the sites whose values are in the sum.
        """
        private = self.private
        if private is not None and self._purpose != "train":
            raise ValueError(f"no sum is private in the phase to {self._purpose}")
        shares = self._shares(self.active)
        noisy: Header | None = None
        if private is not None:
            noisy = {"round": self.round, "call": self._calls, "norm": private.norm}
        by_site = self._by_site()
        if private is not None:
            # a site of whose clients none was drawn adds nothing, and a part of the noise
            everywhere = self._by_site(i for i in self.clients if i not in self._gone)
            by_site = {site: by_site.get(site, []) for site in everywhere}
        place = self.round, self._calls
        known = self._sums.find(*place) if self._sums and self._purpose == "train" else None
        if known is None:
            plan = {
                site: {i: 1.0 if noisy else shares[i] for i in some}
                for site, some in by_site.items()
            }
            total, left = secure.sum(
                {
                    site: _contribute(
                        {i: names[i].text for i in some},
                        {} if noisy else {i: shares[i] for i in some},
                        noisy,
                    )
                    for site, some in by_site.items()
                },
                plan,
                self._purpose,
                *place,
                self._told,
                _one_name(names),
            )
            known = total, KeptSum(plan, left)
            if self._sums and self._purpose == "train":
                self._sums.keep(*place, *known)
        total, whose = known
        present = {i for site in whose.sites for i in whose.plan[site]}
        absent = [i for i in self.active if i not in present]
        self._leave_out(dict.fromkeys(absent, "its site fell out of a sum"))
        self.traffic += Traffic(bytes_up=len(whose.sites) * trees.size(total))
        if private is not None:
            if not private.holds(total):
                raise UserError("a sum under masks has other tensors than what was promised")
            return private.release((total,), self.round, self._calls)
        if whose.sites == sorted(whose.plan):
            return unfixed(total, 1.0)
        return unfixed(total, sum(sum(whose.plan[site].values()) for site in whose.sites))

    def _private_sum(self, private: PrivateSums, names: Mapping[int, Name]) -> Tree:
        """Return the mean of clients' changes with noise, whoever came.

        Nobody is asked again for what another did not send: the divisor does not hang on it, and
        two sums over almost the same clients would tell them apart.
        """
        if self._purpose != "train":
            raise ValueError(f"no sum is private in the phase to {self._purpose}")
        noisy = {"round": self.round, "call": self._calls, "norm": private.norm}

        def fitting() -> Iterator[Tree]:
            for i, message in self._messages(names, lambda own: _contribute(own, {}, noisy)):
                if not private.fits(message):
                    self._leave_out({i: "what it sent is no change as it was promised"})
                    continue
                self._largest = max(self._largest, trees.size(message))
                self.traffic += Traffic(bytes_up=trees.size(message))
                yield message

        return private.release(fitting(), self.round, self._calls)

    def _messages(
        self,
        names: Mapping[int, Name],
        header: Callable[[Mapping[int, str]], Header],
        stops_short: bool = False,
    ) -> Iterator[tuple[int, Tree]]:
        """Yield each active client's message for a mean, in the clients' order.

        Clients are asked in groups of about as much as fits into memory, by the largest message so
        far, which whoever takes the messages notes.

        Args:
            names: Of the clients' values.
            header: Makes the request to a site from its clients' names of values.
            stops_short: Whether nobody is asked any more once a client has fallen out.
        """
        waiting, present = list(self.active), set(self.active)
        while waiting:
            count = max(1, GROUP // self._largest) if self._largest else FIRST_GROUP
            group, waiting = waiting[:count], waiting[count:]
            answers = self._ask(
                {
                    site: (header({i: names[i].text for i in some}), NO_TENSORS)
                    for site, some in self._by_site(group).items()
                }
            )
            for i in (i for i in group if i in self.active):
                yield i, trees.part(answers[self._sites.site_of[i]][1], i)
            del answers
            if stops_short and not present <= set(self.active):
                return

    def _usual(self, shapes: Iterable[Shape]) -> Shape:
        """Return the form that most messages have; of several, the one nearest to what was sent."""
        counts = Counter(shapes)

        def rank(one: Shape) -> tuple[bool, int, int, int]:
            alike = sum(self._sent.get(name) == (kind, size) for name, kind, size in one)
            # many who say nothing do not outvote those who say something
            return one != (), counts[one], alike, sum(name in self._sent for name, *_ in one)

        return max(counts, key=rank)

    @property
    def _room_for_sums(self) -> int:
        """Bytes of sums of all forms: those of a message, or eight for each number that was sent.

        What came compressed may be larger than a message may be.
        """
        sent = sum(math.prod(size) for _, size in self._sent.values())
        return max(self._sites.patience.max_message_mb * 10**6, 8 * sent)

    def _other_type(self, message: Tree) -> str:
        """Return why a message is of other numbers than what was sent; empty if it is not."""
        for name, kind, _ in shape(message):
            wanted = self._sent[name][0] if name in self._sent else kind
            if kind != wanted:
                return f"the tensor {name!r} came in {kind}, and was sent in {wanted}"
        return ""

    def mix(self, values: PerClient[Tree]) -> tuple[PerClient[Tree], PerClient[Tree]]:
        self._calls += 1
        names, name = self._present(values), self._fresh()
        weights = self._mixing(self.round, self.active)
        asked = {}
        rows = {
            i: {j: float(weights[i, j]) for j in self.active if weights[i, j]} for i in self.active
        }
        for site, clients in self._by_site().items():
            own = {i: names[i].text for i in clients}
            header = {
                "verb": "exchange",
                "own": own,
                "weights": rows,
                "round": self.round,
                "call": self._calls,
                "name": name,
            }
            # half of the time for the neighbours' messages, so that the answer still comes in the
            # other half
            asked[site] = ({**header, "wait": self._sites.patience.seconds / 2}, NO_TENSORS)
        answers = self._ask(asked)
        self.traffic += told(
            {i: size for header, _ in answers.values() for i, size in header["sizes"].items()},
            weights,
        )
        self._unheard |= {
            j: "who waited for its message did not hear it"
            for header, _ in answers.values()
            for j in header["unheard"]
        }
        arrived, mixture = (
            Remote({i: self._name(i, f"{name}.{k}") for i in self.active}, self._gone)
            for k in (0, 1)
        )
        return arrived, mixture

    def report(self, metrics: PerClient[Mapping[str, float]]) -> Mapping[str, float]:
        if self.figures in ("private", "none"):
            return {}
        if self._secure is None:
            return weighted_report(self.disclose(metrics), self._examples)
        return {
            name: one.total if name.startswith("num_") else one.weighted / one.weight
            for name, one in self.tally(metrics, "report").items()
        }

    def tally(self, metrics: PerClient[Mapping[str, float]], place: str) -> Mapping[str, Figure]:
        if self._secure is None:
            return figures_of(self.disclose(metrics), self._examples)
        names, by_site = self._present(metrics), self._by_site()
        plan = {site: {i: 1 / len(self.active) for i in some} for site, some in by_site.items()}
        # a sum that sites would refuse is not asked for, and one that is lost ends no round
        if not plan or self._secure.lopsided(plan):
            return {}
        asked = {
            site: {"verb": "tally", "own": {i: names[i].text for i in some}}
            for site, some in by_site.items()
        }
        call = call_of(place)
        try:
            total, _ = self._figure_sums.sum(
                asked, plan, self._purpose, self.round, call, self._told, _one_name(names)
            )
        except LostSumError:
            return {}
        return tallies.read(total)

    def disclose(
        self,
        metrics: PerClient[Mapping[str, float]],
        needs: Collection[str] = (),
        one_of: Collection[str] = (),
    ) -> Mapping[int, Mapping[str, float]]:
        names = self._present(metrics)
        asked: dict[str, tuple[Header, Tree]] = {
            site: ({"verb": "report", "own": {i: names[i].text for i in clients}}, NO_TENSORS)
            for site, clients in self._by_site().items()
        }
        answers = self._ask(asked)
        rows = {i: row for header, _ in answers.values() for i, row in header["metrics"].items()}
        self._leave_out({i: "it reported nothing" for i in self.active if i not in rows})
        usable, unfit = usable_metrics({i: rows[i] for i in self.active}, needs, one_of)
        self._leave_out(unfit)
        return usable

    def having(self, values: Sequence[PerClient[Tree]]) -> Sequence[int]:
        if len(self.clients) <= MANY:
            return self.clients
        return sorted(set().union(*self._kept.values()).intersection(self.clients))

    def save(self, values: Mapping[str, PerClient[Tree]], folder: Path) -> None:
        names = {field: _names(value) for field, value in values.items()}
        asked: dict[str, tuple[Header, Tree]] = {}
        for site, clients in self._by_site(self.clients).items():
            own = {
                field: {i: some[i].text for i in clients if i in some}
                for field, some in names.items()
            }
            asked[site] = (
                {"verb": "save", "own": own, "checkpoint": folder.name.removeprefix(".")},
                NO_TENSORS,
            )
        answers = self._ask(asked) if values else {}
        for field in names:
            here = self._kept.setdefault(field, set())
            for site, (header, _) in answers.items():
                own = asked[site][0]["own"][field]
                kept = own.keys() & header["kept"].get(field, ()) if "kept" in header else own
                # what clients had in the beginning is made again, nothing else is
                calls = {own[i].split(".")[0] for i in own.keys() - kept}
                if not calls <= self._beginnings:
                    self._lose(site, f"does not keep what its clients have ({field})")
                here.update(kept)
        if self._sums is not None:  # the checkpoint before is whole
            self._sums.forget(self._saved)
            self._saved = int(folder.name.rpartition("-")[2])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / KEPT).write_text(
            json.dumps({field: sorted(self._kept[field]) for field in values})
        )

    def load(self, folder: Path, names: Sequence[str]) -> Mapping[str, PerClient[Tree]]:
        self._kept = {
            field: set(clients)
            for field, clients in json.loads((folder / KEPT).read_text()).items()
        }
        name = self._fresh()
        header = {"verb": "load", "checkpoint": folder.name, "fields": list(names), "name": name}
        answers = self._sites.ask(
            {site: (dict(header), NO_TENSORS) for site in self._by_site(self.clients)}
        )
        present: dict[str, dict[int, Name]] = {field: {} for field in names}
        for site, answer in answers.items():
            if isinstance(answer, str):
                self._lose(site, f"does not take up what its clients keep: {answer}")
                continue
            here = self._by_site(self.clients)[site]
            for field in names:
                present[field] |= {
                    i: self._name(i, f"{name}.{field}")
                    for i in answer[0]["present"].get(field, ())
                    if i in here
                }
        for field in names:
            kept = self._kept.get(field, set())
            lost = [i for i in kept if self._is_there(i) and i not in present[field]]
            for site in {self._sites.site_of[i] for i in lost}:
                clients = [
                    list(self._sites.about)[i] for i in lost if self._sites.site_of[i] == site
                ]
                self._lose(
                    site,
                    f"no longer has what its clients {clients[:5]} keep ({field}). Restore its "
                    "folder, or start anew",
                )
        return {field: Remote(some) for field, some in present.items()}

    def names(self) -> dict[int, list[str]]:
        """Return the names of the values that clients hold."""
        answers = self._ask(
            {site: ({"verb": "names"}, NO_TENSORS) for site in self._by_site(self.clients)}
        )
        return {
            i: names
            for header, _ in answers.values()
            for i, names in header["names"].items()
            if i in self.clients
        }

    def close(self) -> None:
        """Do nothing: sites stay as they are."""

    # ---- what they need

    def _is_there(self, client: int) -> bool:
        return self._sites.site_of[client] not in self._lost

    def _lose(self, site: str, reason: str) -> None:
        """Go on without a site, if fewer clients are enough; raises UserError otherwise."""
        if self._sites.patience.min_clients is None:
            raise UserError(f"site {site} {reason}.")
        self._lost.add(site)
        self._sites.notes.append(f"site {site} {reason}; it is left out.")

    def _by_site(self, clients: Iterable[int] | None = None) -> dict[str, list[int]]:
        by_site: dict[str, list[int]] = {}
        for i in self.active if clients is None else clients:
            if (site := self._sites.site_of[i]) not in self._lost:
                by_site.setdefault(site, []).append(i)
        return by_site

    def _ask(
        self, asked: Mapping[str, tuple[Header, Tree]], leaves_out: bool = True
    ) -> dict[str, tuple[Header, Tree]]:
        """Return sites' answers; clients of those that give a reason in its place are left out."""
        freed, self._freed[:] = list(self._freed), []
        for site, (header, _) in asked.items():
            header["free"] = [entry for entry in freed if self._sites.site_of[entry[0]] == site]
        self._freed += [entry for entry in freed if self._sites.site_of[entry[0]] not in asked]
        replies = self._sites.ask(asked)
        reasons = {site: answer for site, answer in replies.items() if isinstance(answer, str)}
        self._lost |= {site for site, reason in reasons.items() if reason.startswith(SILENT)}
        if leaves_out:
            active = {i: self._sites.site_of[i] for i in self.active}
            self._leave_out({i: reasons[at] for i, at in active.items() if at in reasons})
        return {site: answer for site, answer in replies.items() if not isinstance(answer, str)}

    def _present(self, values: Any) -> dict[int, Name]:
        """Return a value's names; clients without one are left out."""
        names = _names(values)
        self._leave_out({i: "it has no value yet" for i in self.active if i not in names})
        return names

    def _leave_out(self, reasons: Mapping[int, str]) -> None:
        self._gone |= reasons
        self.active = tuple(i for i in self.active if i not in reasons)
        needed = min(self._sites.patience.min_clients or self._cohort, self._cohort)
        if reasons and len(self.active) < needed:
            names = list(self._sites.about)
            said = "; ".join(
                f"{names[i]} at {self._sites.site_of[i]}: {reason}"
                for i, reason in self._gone.items()
            )
            raise UserError(
                f"round {self.round + 1}: {len(self.active)} clients are left, {needed} are "
                f"needed. {said}"
            )

    def _fresh(self) -> str:
        self._last += 1
        return str(self._last)

    def _name(self, client: int, text: str) -> Name:
        name = Name(text)
        weakref.finalize(name, self._freed.append, (client, text))
        return name


def _contribute(
    own: Mapping[int, str],
    shares: Mapping[int, float],
    noisy: Header | None = None,
    *,
    place: tuple[int, int] | None = None,
) -> Header:
    header: Header = {"verb": "contribute", "own": own, "shares": shares}
    if place is not None:
        header["place"] = {"round": place[0], "call": place[1]}
    return {**header, "noisy": noisy} if noisy else header


def _one_name(names: Mapping[int, Name]) -> str:
    """Return what values are called, of which all are of one piece of work."""
    found = {name.text for name in names.values()} or {NOBODYS}
    if len(found) > 1:
        raise ValueError("a sum under masks of values of several pieces of work")
    return found.pop()


def _described(arg: Any, number: int, clients: Sequence[int]) -> Header:
    if isinstance(arg, Remote):
        return {"own": {i: arg.names[i].text for i in clients}}
    if isinstance(arg, Mapping):
        return {"tree": number}
    return {"plain": TypeAdapter(type(arg)).dump_python(arg, mode="json")}


def bounded_by_site(
    weights: Mapping[int, float], site_of: Mapping[int, str], most: float
) -> dict[int, float]:
    """Return clients' weights, less where a site's clients would have more than a share of all.

    Args:
        weights: By client.
        site_of: Each client's site.
        most: The share; where there are too few sites for it, all have equal ones.
    """
    totals: Counter[str] = Counter()
    for client, weight in weights.items():
        totals[site_of[client]] += weight  # type: ignore[assignment]
    most = max(most, 1 / len(totals))
    bounded: set[str] = set()
    while True:
        free = sum(total for site, total in totals.items() if site not in bounded)
        # what those at the bound have together is `most` each of the new total
        left = 1 - most * len(bounded)
        whole = free / left if left > 1e-9 else 0.0
        over = {
            site
            for site, total in totals.items()
            if site not in bounded and total > most * whole * (1 + 1e-12)
        }
        if not over:
            break
        bounded |= over
    factors = {site: (most * whole if whole else 1.0) / totals[site] for site in bounded}
    return {
        client: weight * factors.get(site_of[client], 1.0) for client, weight in weights.items()
    }


def _names(values: Any) -> dict[int, Name]:
    if not isinstance(values, Remote):
        raise TypeError(f"{type(values).__name__} is a value of another engine")
    return values.names
