"""Sites with an experiment open: who answers, where each client is, and what is known of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fedpref.engines.messages import (
    NO_TENSORS,
    Header,
    RefusedError,
    pack,
    refuse_other_format,
    unpack,
    version,
)
from fedpref.engines.replies import (
    LONGEST_REASON,
    answered,
)
from fedpref.errors import UserError, printable
from fedpref.numerics.trees import Tree
from fedpref.types import Count, Portion, Positive

SILENT = "no answer"  # what is said of a site that is not there
NOWHERE = ""  # the site of a client whose site has never answered


class Transport(Protocol):
    """A coordinator's way to sites."""

    @property
    def sites(self) -> Sequence[str]:
        """The sites' names."""
        ...

    def ask(self, messages: Mapping[str, bytes], seconds: float) -> Mapping[str, bytes]:
        """Ask several sites at once; return the answers of those that answer in time.

        Args:
            messages: By site.
            seconds: How long is waited.
        """
        ...


@dataclass(frozen=True)
class Patience:
    """How long sites are waited for, how few clients are enough, and what one site may bring."""

    seconds: Positive = 600.0
    """How long an answer is waited for; longer than the longest local training."""
    rounds_per_job: Count = 50
    """Rounds after which sites are called together anew, with those that have come back."""
    min_sites: Count = 1
    """Sites that a job waits for."""
    min_clients: Count | None = None
    """Clients of a round that must stay to its end; null asks for all of its cohort."""
    max_message_mb: Count = 2048
    """The largest answer of a site that is taken, in MB."""
    max_site_clients: Count | None = None
    """The most clients that one site may have; null is any number."""
    max_site_share: Portion | None = None
    """The largest share of the weight in means that one site's clients may have together; null is
    any."""


class Sites:
    """Sites with an experiment open: where each client is, and what is known of it.

    A run that begins needs an answer of every site; one that refuses takes no part, where
    `min_clients` says how many are enough. A run that goes on goes on without clients whose site is
    gone, and takes no others.

    Args:
        transport: The way to the sites.
        experiment: As plain data.
        run: The run's name.
        patience: How long sites are waited for, and how few clients are enough.
        began: The clients that a run which goes on has begun with.
        resumes: Whether sites take up what they have kept; None if the run `began`.
        is_known: Whether the coordinator knows the run; otherwise sites begin it anew.
        held_out: What told held-out prompts when the run began; None asks the sites.

    Raises:
        UserError: Too few sites answer, or two have a client of the same name.
    """

    def __init__(
        self,
        transport: Transport,
        experiment: Mapping[str, Any],
        run: str,
        patience: Patience,
        *,
        began: Mapping[str, Mapping[str, Any]] | None = None,
        resumes: bool | None = None,  # None: if it began
        is_known: bool = True,
        held_out: Sequence[str] | None = None,
    ) -> None:
        self.transport, self.patience, self.run = transport, patience, run
        resumes = began is not None if resumes is None else resumes
        self.notes: list[str] = []
        self.held_out = (
            self._held_out(experiment, is_new=began is None) if held_out is None else list(held_out)
        )
        header = {
            **version(),
            "verb": "open",
            "experiment": experiment,
            "run": run,
            "resumes": resumes,
            "is_known": is_known,
            "held_out": self.held_out,
        }
        opened = self.ask({site: (dict(header), NO_TENSORS) for site in transport.sites})
        for site, answer in opened.items():
            if not isinstance(answer, str) and (
                strange := next((n for n in answer[0]["about"] if _is_others(n, site, opened)), "")
            ):
                opened[site] = f"its client {strange[:80]!r} is called as another site's"
        if (most := patience.max_site_clients) is not None:
            for site, answer in opened.items():
                if not isinstance(answer, str) and len(answer[0]["about"]) > most:
                    opened[site] = f"{len(answer[0]['about'])} clients are more than the {most}"
        answers = {site: answer for site, answer in opened.items() if not isinstance(answer, str)}
        reasons = {site: answer for site, answer in opened.items() if isinstance(answer, str)}
        silent = [site for site, reason in reasons.items() if reason.startswith(SILENT)]
        if not answers or (reasons and patience.min_clients is None) or (silent and began is None):
            raise UserError(
                "; ".join(f"site {site}: {reason}" for site, reason in reasons.items())
                or "there are no sites."
            )
        offers = [
            (about.get("number", 0), name, site, about)
            for site in answers
            for name, about in answers[site][0]["about"].items()
        ]
        # by the number that clients had, then by name, so that the order does not depend on who
        # answers first
        offers.sort(key=lambda offer: offer[:3])
        shared = {
            name for name, count in Counter(name for _, name, *_ in offers).items() if count > 1
        }
        if shared:
            self.notes.append(
                f"several sites have clients called {', '.join(sorted(shared)[:5])}; each is "
                "called by its site too."
            )
        known = began or {}
        # as its site calls it, and as everybody else does
        owner = {name: _owner(name, offers, known) for name in shared}
        called = {
            (site, name): (
                f"{name}@{site}"
                if (name in shared and owner[name] != site)
                or (name not in known and f"{name}@{site}" in known)
                else name
            )
            for _, name, site, _ in offers
        }
        said = {
            called[site, name]: {key: value for key, value in about.items() if key != "number"}
            for _, name, site, about in offers
        }
        self.about = (
            said
            if began is None
            else {name: said.get(name, about) for name, about in began.items()}
        )
        self.latecomers = [name for name in said if name not in self.about]
        by_name = {called[site, name]: site for _, name, site, _ in offers}
        own_name = {called[site, name]: name for _, name, site, _ in offers}
        self.site_of = {
            number: by_name.get(name, NOWHERE) for number, name in enumerate(self.about)
        }
        by_site = {
            site: [number for number, other in self.site_of.items() if other == site]
            for site in answers
        }
        order = list(self.about)
        for site, numbers in by_site.items():
            self.ask(
                {
                    site: (
                        {
                            "verb": "number",
                            "ids": {own_name[order[number]]: number for number in numbers},
                            "sites": by_site,
                        },
                        NO_TENSORS,
                    )
                }
            )

    def _held_out(self, experiment: Mapping[str, Any], *, is_new: bool) -> list[str]:
        """Return what tells prompts that are held out at any site, where sides are not by rule.

        It is made with a key that only sites have: here it says nothing but whether two are equal.
        """
        told: dict[str, Header] = {}
        for everything in (False, True):
            head = {**version(), "verb": "split", "experiment": experiment}
            asked = {
                site: ({**head, "everything": everything}, NO_TENSORS)
                for site in self.transport.sites
            }
            answers = self.ask(asked)
            silent = [
                site
                for site, answer in answers.items()
                if isinstance(answer, str) and answer.startswith(SILENT)
            ]
            if silent and is_new:
                # it might answer later, and train on what others hold out, or they on its own
                raise UserError(f"site {silent[0]}: {answers[silent[0]]}")
            # who refuses says so once more when the experiment is opened
            told = {
                site: answer[0] for site, answer in answers.items() if isinstance(answer, tuple)
            }
            if not any(header["has_sides"] for header in told.values()):
                return []
        if keyless := [site for site, header in told.items() if not header["is_keyed"]]:
            self.notes.append(
                f"sites {', '.join(keyless)} have no split_key, by which sites tell prompts: what "
                "is held out there may be trained on elsewhere, and the other way round."
            )
        return sorted({digest for header in told.values() for digest in header["held_out"]})

    @staticmethod
    def refusals(
        transport: Transport, experiments: Mapping[str, Mapping[str, Any]], patience: Patience
    ) -> dict[str, str]:
        """Return why sites take no part in some of several experiments, before any is begun.

        Args:
            transport: The way to the sites.
            experiments: As plain data, by what they are called.
            patience: How long sites are waited for.

        Returns:
            By site, for those that refuse one; a site that does not answer says so later.
        """
        header = {**version(), "verb": "consent", "experiments": list(experiments.values())}
        asked = {site: (dict(header), NO_TENSORS) for site in transport.sites}
        refused = {}
        for site, answer in asked_of(transport, asked, patience).items():
            if isinstance(answer, str):
                if not answer.startswith(SILENT):
                    refused[site] = answer
                continue
            said = zip(experiments, answer[0]["reasons"], strict=True)
            if reasons := [f"{name}: {printable(reason)}" for name, reason in said if reason]:
                refused[site] = "; ".join(reasons)
        return refused

    def ask(
        self, messages: Mapping[str, tuple[Header, Tree]]
    ) -> dict[str, tuple[Header, Tree] | str]:
        """Return each site's answer, or why there is none."""
        return asked_of(self.transport, messages, self.patience)


def _is_others(name: str, site: str, sites: Iterable[str]) -> bool:
    """Return whether a client's name is what another site's client is called."""
    return any(name.endswith(f"@{other}") for other in sites if other != site)


def _owner(
    name: str, offers: Sequence[tuple[Any, str, str, Mapping[str, Any]]], known: Mapping[str, Any]
) -> str:
    """Return the one site whose client had a name in a run that goes on, by its data; or none."""
    if name not in known:
        return ""
    wanted = known[name].get("digest")
    found = [site for _, other, site, about in offers if (other, about["digest"]) == (name, wanted)]
    return found[0] if len(found) == 1 else ""


def asked_of(
    transport: Transport, messages: Mapping[str, tuple[Header, Tree]], patience: Patience
) -> dict[str, tuple[Header, Tree] | str]:
    """Return each site's answer, or why there is none."""
    packed = {site: pack(header, tensors) for site, (header, tensors) in messages.items()}
    answers = dict(transport.ask(packed, patience.seconds))
    del packed
    replies: dict[str, tuple[Header, Tree] | str] = {}
    for site in messages:
        if site not in answers:
            replies[site] = f"{SILENT} in {patience.seconds:g} seconds"
            continue
        try:
            header, tensors = unpack(answers.pop(site), patience.max_message_mb * 10**6)
            refuse_other_format(header, f"site {site}")
            if refused := header.get("refused"):
                replies[site] = printable(str(refused)[:LONGEST_REASON])
                continue
            asked = messages[site][0]
            replies[site] = (answered(asked["verb"], header, asked), tensors)
        except RefusedError as error:
            replies[site] = str(error)
    return replies
