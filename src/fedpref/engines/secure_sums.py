"""The coordinator's part in sums under masks: it relays, adds, and takes away what masks are left.

It sees no site's value. Whoever falls out between two phases is left out of the sum, or of what
follows; a sum whose shares do not come is lost, and never asked for again under the same masks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fedpref.engines.messages import NO_TENSORS, Header, Shape, shape
from fedpref.engines.requests import MOST_SITES
from fedpref.engines.site_masks import advert_of, sum_context, tree_of, words_of
from fedpref.errors import UserError
from fedpref.numerics.trees import Tree
from fedpref.privacy.masks import MaskError, context_of, unmasked
from fedpref.privacy.settings import Masks
from fedpref.privacy.shamir import BYTES

SHARE = re.compile(rf"[0-9a-f]{{{2 * BYTES}}}")  # of a secret, as sites send it
Answers = dict[str, tuple[Header, Tree]]
Ask = Callable[[Mapping[str, tuple[Header, Tree]]], Answers]


class LostSumError(UserError):
    """A sum that nobody gets, for too few sites are left."""


class SecureSums:
    """Sums under masks of one run.

    Args:
        settings: Of the experiment.
        run: The run's name.
        ask: Asks sites, and returns the answers of those that gave one.
    """

    def __init__(self, settings: Masks, run: str, ask: Ask) -> None:
        self._settings, self._run, self._ask = settings, run, ask
        self._attempts: Counter[tuple[str, int, int]] = Counter()

    def sum(
        self,
        asked: Mapping[str, Header],
        plan: Mapping[str, Mapping[int, float]],
        purpose: str,
        round: int,
        call: int,
        told: str,
        value_name: str,
    ) -> tuple[Tree, list[str]]:
        """Return the sum of sites' integers, and whose values are in it.

        Args:
            asked: By site, the message by which it contributes; it goes with what masks need.
            plan: By site, the clients whose values it adds up, and their shares of the whole.
            purpose: Of the phase.
            round: From 0.
            call: The number of the verb within the phase.
            told: A digest of all that sites were sent in the phase.
            value_name: What the values are called, at all sites.

        Raises:
            UserError: Too few sites are left.
        """
        place = purpose, round, call
        attempt = self._attempts[place]
        address = {"purpose": purpose, "round": round, "call": call, "attempt": attempt}
        self._attempts[place] += 1
        sites = sorted(asked)
        self._require(len(sites), len(sites), "take part in")
        if len(sites) > MOST_SITES:
            raise UserError(
                f"secrecy: {len(sites)} sites; a sum under masks is of {MOST_SITES} at most. Let "
                "sites host more clients."
            )
        drawn = self._settings.drawn(len(sites))
        header: Header = {"address": address}
        keys = self._told(
            {
                site: {
                    "verb": "keys",
                    "sites": sites,
                    "told": told,
                    "value_name": value_name,
                    **header,
                }
                for site in sites
            }
        )
        threshold = self._settings.needed(len(keys))
        self._require(len(keys), len(sites), "have made keys for")
        plan = {site: plan[site] for site in keys if site in plan}
        sealed = self._told(
            {
                site: {
                    "verb": "boxes",
                    "adverts": keys,
                    "threshold": threshold,
                    "plan": plan,
                    **header,
                }
                for site in keys
            }
        )
        self._require(len(sealed), len(keys), "have sealed shares for")
        values, heard = self._values(asked, sealed, header)
        survivors = sorted(values)
        self._require(len(survivors), len(keys), "have sent their part of")
        signatures = {
            site: answer["signature"]
            for site, answer in self._told(
                {site: {"verb": "agree", "survivors": survivors, **header} for site in survivors}
            ).items()
        }
        number = {site: k for k, site in enumerate(sites)}
        given = self._told(
            {
                site: {
                    "verb": "unmask",
                    "survivors": survivors,
                    "signatures": signatures,
                    # of those alone whose shares it holds
                    "heard": {
                        other: said
                        for other, said in heard.items()
                        if number[site] in (keys[other]["holders"] or ())
                    },
                    **header,
                }
                for site in survivors
            }
        )
        given = {site: said for site, said in given.items() if _is_shares(said.get("shares"))}
        self._require(len(given), len(keys), "have given shares for")
        total = np.zeros_like(words_of(values[survivors[0]]))
        for tree in values.values():
            total = total + words_of(tree)
        try:
            plain = unmasked(
                total,
                frozenset(number[site] for site in survivors),
                {number[s]: advert_of(keys[s]) for s in sealed},
                {number[s]: bytes.fromhex(sealed[s]["commitment"]) for s in sealed},
                {
                    number[holder]: {
                        number[other]: int(share, 16)
                        for other, share in said["shares"].items()
                        if other in number
                    }
                    for holder, said in given.items()
                },
                threshold if drawn is None else drawn[1],
                sum_context(
                    self._run,
                    address,
                    sites,
                    keys,
                    threshold,
                    plan,
                    context_of(told, value_name).hex(),
                ),
            )
        except MaskError as error:
            raise LostSumError(
                f"round {round + 1}: the sum under masks is lost: {error}."
            ) from error
        return tree_of(plain, values[survivors[0]]), survivors

    def _values(
        self, asked: Mapping[str, Header], sealed: Mapping[str, Header], header: Header
    ) -> tuple[dict[str, Tree], dict[str, Header]]:
        """Return sites' masked integers, and what they have signed of boxes that came.

        Whoever sends another form than most has sent none.
        """
        answers = self._ask(
            {
                site: (
                    {
                        **asked[site],
                        "masked": {
                            "boxes": {
                                other: said["boxes"][site]
                                for other, said in sealed.items()
                                if site in said["boxes"]
                            },
                            **header,
                        },
                    },
                    NO_TENSORS,
                )
                for site in sealed
            }
        )
        forms = {site: shape(tree) for site, (_, tree) in answers.items()}
        usual: Shape = Counter(forms.values()).most_common(1)[0][0] if forms else ()
        usable = [site for site in sorted(forms) if forms[site] == usual and usual]
        heard = {site: answers[site][0] for site in usable}
        signed = {
            site: {"heard": said["heard"], "signature": said["signature"]}
            for site, said in heard.items()
            if "heard" in said and "signature" in said
        }
        return {site: answers[site][1] for site in usable}, signed

    def _told(self, asked: Mapping[str, Header]) -> dict[str, Any]:
        answers = self._ask({site: (dict(header), NO_TENSORS) for site, header in asked.items()})
        return {site: header for site, (header, _) in answers.items()}

    def lopsided(self, plan: Mapping[str, Mapping[int, float]]) -> str:
        """Return why sites would refuse a sum; empty if they would not."""
        return self._settings.lopsided([sum(shares.values()) for shares in plan.values()])

    def _require(self, count: int, of: int, done: str) -> None:
        if count < (needed := self._settings.needed(of)):
            raise LostSumError(
                f"secrecy: {count} sites {done} a sum, and {needed} are needed "
                f"(secrecy.threshold {self._settings.threshold:g} of {of}, secrecy.min_sites "
                f"{self._settings.min_sites}). Nobody's value was seen."
            )


def _is_shares(said: Any) -> bool:
    """Return whether what a site says are shares, by whose they are."""
    return isinstance(said, dict) and all(
        isinstance(share, str) and SHARE.fullmatch(share) for share in said.values()
    )
