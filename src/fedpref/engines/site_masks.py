"""A site's part in sums under masks, phase by phase; what it has unmasked is never forgotten."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from fedpref.engines import site_folder
from fedpref.engines.messages import RefusedError
from fedpref.errors import UserError
from fedpref.numerics import files, trees
from fedpref.numerics.trees import Tree
from fedpref.privacy.masks import Advert, MaskError, Sender, context_of, signed_part
from fedpref.privacy.settings import Masks
from fedpref.privacy.shamir import BYTES

FILE = (
    "sums.json"  # in a run's folder: of each sum, the value's digest and for whom it was unmasked
)
VALUES = "summed.txt"  # in the folder of all runs: of values that were unmasked, in which sum
AHEAD = 8  # sums whose keys lie here
LISTED = "listed"  # in FILE, of a round's figures: whose they are
FIGURES = 10**6  # calls from here on are of sums of figures, each of which has a place
PLACES = ("report", "start", "glance", "validate", "conclude", "evaluate")  # of figures in a round


def call_of(place: str) -> int:
    """Return the number of the call by which figures of a place are summed."""
    return FIGURES + PLACES.index(place)


class Identity(Protocol):
    """Who a site is to other sites, whoever relays what it says."""

    @property
    def certificate(self) -> str:
        """What others know it by."""
        ...

    def sign(self, content: bytes) -> bytes:
        """Return a signature."""
        ...

    def verify(self, site: str, content: bytes, signature: bytes, certificate: str) -> bool:
        """Return whether a site has signed this."""
        ...


class Unsigned:
    """Sites of one machine, which nobody stands between."""

    certificate = ""

    def sign(self, content: bytes) -> bytes:
        return b""

    def verify(self, site: str, content: bytes, signature: bytes, certificate: str) -> bool:
        return True


@dataclass
class _Sum:
    """A sum that the site takes part in."""

    sites: list[str]
    sender: Sender
    told: str
    needed: int | None = None
    """How many shares give a secret, where that hangs on whom sites have drawn."""
    value_name: str = ""
    """What the sites' values are called, of which all are of one piece of work."""
    threshold: int = 0
    context: bytes = b""
    adverts: Mapping[str, Any] | None = None
    plan: Mapping[str, Mapping[int, float]] | None = None
    value: str = ""
    made: str = ""
    """What tells the site's clients' values from all others; empty if they say nothing."""
    agreed: list[str] | None = None


class SiteMasks:
    """A site's sums under masks.

    Args:
        name: The site's.
        identity: Who it is to other sites.
        settings: Of the experiment.
        run: The run's name, and its folder.
        folder: Where the site keeps its side of the run.
        means: How many sums a phase has at most.
        is_noisy: Whether sums have noise, and are of cohorts that may be of one site alone.
        everybody: How many sites the run has.
        root: Where all runs of the site lie; by default the run's folder.
    """

    def __init__(
        self,
        name: str,
        identity: Identity,
        settings: Masks,
        run: str,
        folder: Path,
        means: int = 1,
        is_noisy: bool = False,
        everybody: int = 0,
        root: Path | None = None,
    ) -> None:
        self._everybody, self._root = everybody, root or folder
        self._means, self._is_noisy = means, is_noisy
        self._name, self._identity, self._settings = name, identity, settings
        self._run, self._file = run, folder / FILE
        self._sums: dict[str, _Sum] = {}

    def keys(
        self, address: Mapping[str, Any], sites: Sequence[str], told: str, value_name: str
    ) -> dict[str, Any]:
        """Return the site's public keys for a sum, and who is to hold shares of its secrets.

        Args:
            address: Which sum.
            sites: Whose.
            told: A digest of all that the site was sent in the phase; who was sent something else
                has masks of another sum.
            value_name: What the values are called of which it is, the same at all sites.
        """
        key = _key(address)
        if key in self._sums:
            raise RefusedError("keys of this sum were made already")
        if self._name not in sites or len(set(sites)) < len(sites):
            raise RefusedError("a sum of other sites, or of one twice")
        is_of_all = self._is_noisy or address["call"] >= FIGURES
        if is_of_all and len(sites) < self._settings.needed(self._everybody):
            raise RefusedError("a sum of a few sites, which is to be one of all")
        number, holders, needed = sorted(sites).index(self._name), None, None
        if (drawn := _tried(lambda: self._settings.drawn(len(sites)))) is not None:
            count, needed = drawn
            others = [other for other in range(len(sites)) if other != number]
            holders = frozenset(secrets.SystemRandom().sample(others, count))
        self._sums[key] = _Sum(sorted(sites), Sender(number, holders), told, needed, value_name)
        for older in list(self._sums)[:-AHEAD]:
            del self._sums[older]
        advert = self._sums[key].sender.advert
        signature = self._identity.sign(self._said(address, advert))
        return {
            "mask": advert.mask.hex(),
            "box": advert.box.hex(),
            "holders": None if advert.holders is None else sorted(advert.holders),
            "signature": signature.hex(),
            "certificate": self._identity.certificate,
        }

    def boxes(
        self,
        address: Mapping[str, Any],
        adverts: Mapping[str, Mapping[str, Any]],
        threshold: int,
        plan: Mapping[str, Mapping[int, float]],
    ) -> dict[str, Any]:
        """Return sealed shares for the other sites, whose keys these are.

        Args:
            address: Which sum.
            adverts: Other sites' keys, and this one's.
            threshold: How many of them must be left.
            plan: By site, whose values it adds up and with what share of the whole: all sites are
                told the same, or there is no sum.
        """
        one = self._of(address)
        if not set(adverts) <= set(one.sites):
            raise RefusedError("keys of sites that are none of the sum's")
        if not set(plan) <= set(adverts):
            raise RefusedError("a plan for sites that have made no keys for the sum")
        self._refuse_lopsided(address, plan)
        one.plan = plan
        if threshold < self._settings.needed(len(adverts)):
            raise RefusedError(f"a threshold of {threshold} is below the experiment's")
        known = {}
        for site, said in adverts.items():
            advert = advert_of(said)
            is_theirs = self._identity.verify(
                site,
                self._said(address, advert),
                bytes.fromhex(said["signature"]),
                said["certificate"],
            )
            if not is_theirs:
                raise RefusedError(f"the keys of {site[:80]!r} are not signed by that site")
            known[one.sites.index(site)] = advert
        one.threshold, one.adverts = threshold, adverts
        told = context_of(one.told, one.value_name).hex()
        one.context = sum_context(self._run, address, one.sites, adverts, threshold, plan, told)
        needed = one.needed or threshold
        sealed, commitment = _tried(lambda: one.sender.boxes(known, needed, one.context))
        by_site = {one.sites[number]: box.hex() for number, box in sealed.items()}
        return {"boxes": by_site, "commitment": commitment.hex()}

    def _refuse_lopsided(
        self, address: Mapping[str, Any], plan: Mapping[str, Mapping[int, float]]
    ) -> None:
        """Raise RefusedError where a sum would be hardly more than one site's value."""
        if self._is_noisy and address["call"] < FIGURES:
            return
        shares = {share for some in plan.values() for share in some.values()}
        if address["call"] >= FIGURES and len(shares) > 1:
            raise RefusedError("in a sum of figures all clients have the same share")
        if reason := self._settings.lopsided([sum(shares.values()) for shares in plan.values()]):
            raise RefusedError(reason)

    def planned(self, address: Mapping[str, Any], own: Mapping[int, str]) -> Mapping[int, float]:
        """Return whose values of this site are in a sum, and with what share, as all were told.

        Args:
            address: Which sum.
            own: What the values are called.

        Raises:
            RefusedError: They are called otherwise than all were told.
        """
        one = self._of(address)
        if set(own.values()) - {one.value_name}:
            raise RefusedError("values of another piece of work than all sites were told")
        return (one.plan or {}).get(self._name, {})

    def told(self, address: Mapping[str, Any]) -> str:
        """Return the digest of what the site was sent, as its keys of a sum were made."""
        return self._of(address).told

    def masked(
        self, address: Mapping[str, Any], boxes: Mapping[str, str], value: Tree, made: str
    ) -> Tree:
        """Return the site's integers under masks.

        Args:
            address: Which sum.
            boxes: That other sites have sealed for this one.
            value: The sum of the site's own clients, as integers.
            made: What tells it from the phase's other values, after a restart too; empty if it says
                nothing.
        """
        one = self._of(address)
        if one.value:
            raise RefusedError("the site's value of this sum was sent already")
        if not set(boxes) <= set(one.sites):
            raise RefusedError("boxes of sites that are none of the sum's")
        words = words_of(value)
        one.value = hashlib.sha256(words.tobytes()).hexdigest()
        known, key = self._known(), _key(address, attempt=False)
        if known.setdefault(key, {"value": one.value})["value"] != one.value:
            raise RefusedError("another value of this sum was sent already")
        phase = f"{address['purpose']}/{address['round']}/"
        calls = [name.rsplit("/", 1)[1] for name in known if name.startswith(phase)]
        if sum(call != LISTED and int(call) < FIGURES for call in calls) > self._means:
            raise RefusedError(f"a phase has {self._means} sums, and this would be one more")
        # in two sums, of which others fall out, a value would be their difference
        one.made = made
        where, call = f"value {phase}{made}", str(address["call"])
        if made and known.setdefault(where, {"value": call})["value"] != call:
            raise RefusedError("these values were summed already")
        if address["call"] >= FIGURES:
            # of one round's figures one list: two would differ by one site's
            where = f"{address['purpose']}/{address['round']}/{LISTED}"
            listed = context_of(one.plan or {}).hex()
            if known.setdefault(where, {"value": listed})["value"] != listed:
                raise RefusedError("figures of this round were summed over others already")
        files.write(self._file, json.dumps(known))
        numbered = {one.sites.index(site): bytes.fromhex(box) for site, box in boxes.items()}
        _tried(lambda: one.sender.open(numbered))
        return tree_of(_tried(lambda: one.sender.masked(words)), value)

    def noisy(self, address: Mapping[str, Any]) -> int:
        """Return how many sites' parts of the noise a sum can count on."""
        return self._settings.noisy(self._of(address).threshold, self._everybody)

    def heard(self, address: Mapping[str, Any]) -> dict[str, str]:
        """Return whose boxes came, and a signature; nothing where all sites share with all."""
        one = self._of(address)
        if one.needed is None:
            return {}
        heard = bits_of(one.sender.heard)
        return {"heard": heard, "signature": self._identity.sign(self._heard(one, heard)).hex()}

    def _heard(self, one: _Sum, heard: str, site: str = "") -> bytes:
        return context_of("heard", one.context.hex(), site or self._name, heard)

    def agree(self, address: Mapping[str, Any], survivors: Sequence[str]) -> dict[str, str]:
        """Return a signature under the set of sites whose values are in a sum, the first asked."""
        one = self._of(address)
        if one.agreed is not None and one.agreed != sorted(survivors):
            raise RefusedError("another list of survivors was signed already")
        # of those who are left too, a sum is not to be hardly more than one site's value
        left = {site: shares for site, shares in (one.plan or {}).items() if site in survivors}
        self._refuse_lopsided(address, left)
        one.agreed = sorted(survivors)
        return {"signature": self._identity.sign(self._signed(one, survivors)).hex()}

    def unmask(
        self,
        address: Mapping[str, Any],
        survivors: Sequence[str],
        signatures: Mapping[str, str],
        heard: Mapping[str, Mapping[str, str]],
    ) -> dict[str, Any]:
        """Return shares of survivors' own masks, and of the keys of those who fell out.

        It is written down first: of one sum, one value and one set of survivors.

        Args:
            address: Which sum.
            survivors: Whose values are in it.
            signatures: Of sites, under that list.
            heard: Of survivors, whose boxes came to them, signed; where sites share with some.
        """
        one = self._of(address)
        if not one.value or one.adverts is None:
            raise RefusedError("the site's value is not in this sum")
        content = self._signed(one, survivors)
        agreed = [
            site
            for site, signature in signatures.items()
            if site in survivors
            and site in one.adverts
            and self._identity.verify(
                site, content, bytes.fromhex(signature), one.adverts[site]["certificate"]
            )
        ]
        if len(agreed) < one.threshold:
            raise RefusedError(f"{len(agreed)} sites have signed; {one.threshold} are needed")
        if one.agreed != sorted(survivors):
            raise RefusedError("this list of survivors was not signed here")
        key, known = _key(address, attempt=False), self._known()
        if known[key].get("survivors", sorted(survivors)) != sorted(survivors):
            raise RefusedError("this sum was unmasked for others already")
        self._refuse_summed(one, survivors)
        numbers = frozenset(one.sites.index(site) for site in survivors)
        known_heard = None if one.needed is None else self._all_heard(one, heard)
        shares = _tried(lambda: one.sender.shares(numbers, one.threshold, known_heard))
        known[key] = {"value": one.value, "survivors": sorted(survivors)}
        files.write(self._file, json.dumps(known))
        return {
            "shares": {
                one.sites[number]: share.to_bytes(BYTES, "big").hex()
                for number, share in shares.items()
            }
        }

    def _refuse_summed(self, one: _Sum, survivors: Sequence[str]) -> None:
        """Raise RefusedError where the same values were in another sum, of any run of the site.

        Of the same sum in another run, as of one that is begun anew, nothing more is learned.
        """
        if not one.made:
            return
        whose = context_of(sorted(survivors), one.plan or {}).hex()
        self._root.mkdir(parents=True, exist_ok=True)
        with site_folder.alone(self._root / f".{VALUES}.lock"):
            file = self._root / VALUES
            text = file.read_text() if file.exists() else ""
            known = dict(line.split() for line in text.split("\n") if len(line.split()) == 2)
            if known.get(one.made, whose) != whose:
                raise RefusedError(
                    "these values were summed with other sites, or other shares, in another run; "
                    "resume that one, or begin with another seed"
                )
            if one.made not in known:
                begins = "\n" if text and not text.endswith("\n") else ""  # behind a torn line
                with file.open("a") as more:
                    more.write(f"{begins}{one.made} {whose}\n")
                files.sync(file)

    def _all_heard(
        self, one: _Sum, said: Mapping[str, Mapping[str, str]]
    ) -> dict[int, frozenset[int]]:
        """Return whose boxes came to each site, of those that have signed it."""
        adverts = one.adverts or {}
        return {
            one.sites.index(site): numbers_of(entry["heard"])
            for site, entry in said.items()
            if site in adverts
            and self._identity.verify(
                site,
                self._heard(one, entry["heard"], site),
                bytes.fromhex(entry["signature"]),
                adverts[site]["certificate"],
            )
        }

    def _signed(self, one: _Sum, survivors: Sequence[str]) -> bytes:
        if not one.context or not set(survivors) <= set(one.sites):
            raise RefusedError("survivors of another sum")
        return signed_part(one.context, [one.sites.index(site) for site in survivors])

    def _said(self, address: Mapping[str, Any], advert: Advert) -> bytes:
        holders = None if advert.holders is None else sorted(advert.holders)
        said = advert.mask.hex(), advert.box.hex(), holders
        return context_of("keys", self._run, _key(address), *said)

    def _of(self, address: Mapping[str, Any]) -> _Sum:
        if (one := self._sums.get(_key(address))) is None:
            raise RefusedError("no keys of this sum were made here")
        return one

    def _known(self) -> dict[str, Any]:
        if not self._file.exists():
            return {}
        known: dict[str, Any] = json.loads(self._file.read_text())
        return known


def sum_context(
    run: str,
    address: Mapping[str, Any],
    sites: Sequence[str],
    adverts: Mapping[str, Mapping[str, Any]],
    threshold: int,
    plan: Mapping[str, Mapping[int, float]],
    told: str,
) -> bytes:
    """Return what a sum is told by: where it stands, whose keys, and what they all were sent."""
    keys = {site: [said["mask"], said["box"], said["holders"]] for site, said in adverts.items()}
    whose = {site: {str(i): share for i, share in shares.items()} for site, shares in plan.items()}
    return context_of(run, _key(address), list(sites), keys, threshold, whose, told)


def advert_of(said: Mapping[str, Any]) -> Advert:
    """Return what a site has made known of its keys."""
    holders = None if said["holders"] is None else frozenset(said["holders"])
    return Advert(bytes.fromhex(said["mask"]), bytes.fromhex(said["box"]), holders)


def bits_of(numbers: Iterable[int]) -> str:
    """Return small numbers as bits of a hexadecimal text."""
    return f"{sum(1 << number for number in numbers):x}"


def numbers_of(bits: str) -> frozenset[int]:
    """Return the numbers that a text of bits stands for."""
    whole = int(bits or "0", 16)
    return frozenset(number for number in range(whole.bit_length()) if whole >> number & 1)


def told_after(
    before: str, work: str, call: int, name: str, plain: Sequence[Any], tensors: Tree
) -> str:
    """Return a digest of what was sent before and of what follows it: work, its arguments, and
    what its result is called.
    """
    said = json.dumps([before, work, call, name, plain], sort_keys=True)
    return hashlib.sha256(said.encode() + trees.digest(tensors)).hexdigest()


def _key(address: Mapping[str, Any], *, attempt: bool = True) -> str:
    parts = [address["purpose"], address["round"], address["call"]]
    return "/".join(map(str, [*parts, address["attempt"]] if attempt else parts))


def _tried(work: Any) -> Any:
    try:
        return work()
    except (MaskError, UserError) as error:
        raise RefusedError(f"masks: {error}") from error


def words_of(tree: Tree) -> Any:
    """Return a tree of integers as words of 32 bits, in the order of names."""
    flat = torch.cat([tree[name].flatten().long() for name in sorted(tree)])
    return (flat.numpy() & 0xFFFFFFFF).astype(np.uint32)


def tree_of(words: Any, like: Tree) -> Tree:
    """Return words as a tree of integers, from -2^31 to 2^31 - 1, in the form of another."""
    flat = torch.from_numpy(words.view(np.int32).copy())
    names = sorted(like)
    parts = flat.split([like[name].numel() for name in names])
    return {name: part.view(like[name].shape) for name, part in zip(names, parts, strict=True)}
