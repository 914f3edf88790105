"""Sums under masks: exact whoever falls out, nothing of any part, and lies that get nothing."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from conftest import make_rows, write_rows
from fedpref import UserError, config
from fedpref.channel.lattice import unfixed
from fedpref.engines import Patience, Sites, site_masks
from fedpref.engines.coordinator import _contribute
from fedpref.engines.messages import NO_TENSORS, RefusedError, pack, unpack
from fedpref.engines.phases import Phases
from fedpref.engines.secure_sums import SecureSums
from fedpref.engines.site_masks import (
    FIGURES,
    FILE,
    SiteMasks,
    Unsigned,
    call_of,
    tree_of,
    words_of,
)
from fedpref.experiments.clients import SimulatedSite
from fedpref.experiments.run_directory import RunDirectory
from fedpref.federation.aggregation import Product
from fedpref.numerics import trees
from fedpref.privacy import Secret, shamir
from fedpref.privacy.accountant import epsilon_of_discrete
from fedpref.privacy.masks import (
    Advert,
    MaskError,
    Sender,
    context_of,
    signed_part,
    stream,
    unmasked,
)
from fedpref.privacy.neighbours import fewest, shares_needed
from fedpref.privacy.settings import Masks
from fedpref.sites.identity import KitIdentity
from test_private_sites import CLIENTS, KEY, QUANTILE, Here, parsed, run_to

CONTEXT = context_of("run", 3, 1)
SLOW = pytest.mark.slow


# ---- shares


def test_any_of_enough_shares_give_the_secret_and_fewer_do_not() -> None:
    draw = random.Random(0)
    for _ in range(30):
        count = draw.randint(1, 12)
        threshold = draw.randint(1, count)
        secret = draw.randbytes(32)
        holders = draw.sample(range(50), count)
        shares = shamir.split(secret, holders, threshold)
        some = draw.sample(holders, threshold)
        assert shamir.join({holder: shares[holder] for holder in some}, threshold) == secret
        with pytest.raises(ValueError, match="are needed"):
            shamir.join({holder: shares[holder] for holder in some[1:]}, threshold)
        if threshold > 1:
            wrong = {holder: shares[holder] for holder in some}
            wrong[some[0]] = (wrong[some[0]] + 1) % shamir.PRIME
            with contextlib.suppress(ValueError):  # they mostly do not belong together
                assert shamir.join(wrong, threshold) != secret
    with pytest.raises(ValueError, match="3 of 2 shares"):
        shamir.split(bytes(32), [0, 1], 3)
    with pytest.raises(ValueError, match="of 5 bytes"):
        shamir.split(bytes(5), [0, 1], 2)


# ---- one sum


class Sum:
    """A sum of some senders, with what any of them might do."""

    def __init__(
        self, senders: int, threshold: int, words: int = 200, drawn: int | None = None
    ) -> None:
        self.threshold, self.count = threshold, senders
        draw = random.Random(senders)
        others = {i: [j for j in range(senders) if j != i] for i in range(senders)}
        self.senders = [
            Sender(i, None if drawn is None else frozenset(draw.sample(others[i], drawn)))
            for i in range(senders)
        ]
        self.adverts = {one.number: one.advert for one in self.senders}
        made = [one.boxes(self.adverts, threshold, CONTEXT) for one in self.senders]
        self.commitments = {i: commitment for i, (_, commitment) in enumerate(made)}
        self.boxes = {i: sealed for i, (sealed, _) in enumerate(made)}
        for one in self.senders:
            one.open({j: some[one.number] for j, some in self.boxes.items() if one.number in some})
        rng = np.random.default_rng(senders)
        self.values = [rng.integers(2**32, size=words, dtype=np.uint32) for _ in self.senders]

    def upload(self, gone: set[int]) -> dict[int, Any]:
        return {
            i: one.masked(self.values[i]) for i, one in enumerate(self.senders) if i not in gone
        }

    def end(self, uploads: dict[int, Any], silent: set[int] = frozenset()) -> Any:  # type: ignore[assignment]
        survivors = frozenset(uploads)
        shares = {i: self.senders[i].shares(survivors, 2) for i in survivors if i not in silent}
        return self.finish(uploads, shares)

    def finish(self, uploads: dict[int, Any], shares: dict[int, dict[int, int]]) -> Any:
        total = np.zeros_like(self.values[0])
        for one in uploads.values():
            total = total + one
        return unmasked(
            total,
            frozenset(uploads),
            self.adverts,
            self.commitments,
            shares,
            self.threshold,
            CONTEXT,
        )

    def plain(self, survivors: Any) -> Any:
        total = np.zeros_like(self.values[0])
        for i in survivors:
            total = total + self.values[i]
        return total


@pytest.mark.parametrize(("senders", "threshold", "lost"), [(2, 2, 0), (4, 3, 1), (10, 7, 3)])
def test_a_sum_is_exact_whoever_falls_out(senders: int, threshold: int, lost: int) -> None:
    one = Sum(senders, threshold)
    uploads = one.upload(set(range(lost)))
    assert np.array_equal(one.end(uploads), one.plain(uploads))
    if senders - lost > threshold:
        other = Sum(senders, threshold)
        uploads = other.upload(set(range(lost)))
        silent = {senders - 1}
        assert np.array_equal(other.end(uploads, silent), other.plain(uploads))


def test_a_sum_is_exact_where_senders_share_with_some_whom_they_drew() -> None:
    one = Sum(16, 4, drawn=6)
    uploads = one.upload({0, 1, 2})
    assert np.array_equal(one.end(uploads), one.plain(uploads))
    near = {i: set(sealed) for i, sealed in one.boxes.items()}
    assert min(map(len, near.values())) < 15, "not everybody has a mask with everybody"
    for i, some in near.items():
        assert all(i in near[j] for j in some), "masks are of two"
        assert one.adverts[i].holders <= some  # type: ignore[operator]
    alone = next((i, j) for i in near for j in near if i != j and j not in near[i])
    with pytest.raises(MaskError, match="who is none of the others"):
        one.senders[alone[0]].open({alone[1]: bytes(16)})
    few = Sum(16, 6, drawn=6)
    uploads = few.upload({0, 1, 2, 3})
    with pytest.raises(MaskError, match="of which 6 are needed"):
        few.end(uploads)


def test_as_many_neighbours_as_chances_ask_for() -> None:
    for senders, lost, corrupt in ((120, 36, 12), (300, 90, 30), (1000, 300, 100)):
        found = fewest(senders, lost, corrupt)
        assert found is not None
        others, needed = found
        law = scipy.stats.hypergeom(senders - 1, corrupt, others)
        assert senders * law.sf(-(-needed // 2) - 1) <= 2**-40
        left = scipy.stats.hypergeom(senders - 1, senders - 1 - lost, others)
        assert senders * left.cdf(needed - 2) <= 2**-30, "the others' shares and its own"
        assert 2 * needed > others + 1
        assert shares_needed(others - 1, senders, lost, corrupt) is None
        assert others < senders / 1.5
    assert fewest(10, 3, 3) is None
    masks = Masks(threshold=0.7)
    assert masks.drawn(100) is None
    assert masks.drawn(101) == fewest(101, 30, 11)
    assert Masks(neighbours="all").drawn(1000) is None
    assert Masks(neighbours=100).drawn(60) is None
    with pytest.raises(UserError, match=r"20 are too few for 200 sites, of which .* are enough"):
        Masks(neighbours=20).drawn(200)


def test_boxes_that_are_withheld_do_not_give_a_sender_away() -> None:
    # one is given boxes of a few that share with it, who are then said to have fallen out: with
    # all others it has no mask, and those hold enough shares of its own
    draw, count, drawn, threshold = random.Random(0), 13, 8, 5
    others = {i: [j for j in range(count) if j != i] for i in range(count)}
    senders = [Sender(i, frozenset(draw.sample(others[i], drawn))) for i in range(count)]
    adverts = {one.number: one.advert for one in senders}
    boxes = {one.number: one.boxes(adverts, threshold, CONTEXT)[0] for one in senders}
    target, holders = senders[0], senders[0].advert.holders or frozenset()
    few = sorted(holders)[: threshold - 1]
    for one in senders:
        from_whom = few if one is target else others[one.number]
        one.open({j: boxes[j][one.number] for j in from_whom if one.number in boxes[j]})
        one.masked(np.zeros(5, np.uint32))
    survivors = frozenset(range(count)) - set(few)
    heard = {one.number: one.heard for one in senders}
    told = [one.shares(survivors, 2, heard) for one in senders if one.number in survivors - {0}]
    assert sum(0 in shares for shares in told) == 0, "nobody helps its own mask away"
    assert sum(1 in shares for shares in told) >= threshold, "but those of others"


@SLOW
def test_a_hundred_sites_and_more_share_with_some(tmp_path: Path) -> None:
    names = [f"site-{k:03d}" for k in range(104)]
    settings = Masks(threshold=0.7)
    made = {name: SiteMasks(name, Unsigned(), settings, "run", tmp_path / name) for name in names}
    values = {name: {"x": torch.tensor([k, -k, 1])} for k, name in enumerate(names)}
    gone = {"keys": names[:4], "contribute": names[4:20], "unmask": names[20:25]}

    def answered(name: str, header: Any) -> tuple[Any, Any]:
        one, address = made[name], header.get("address")
        if header["verb"] == "keys":
            return one.keys(address, header["sites"], header["told"], header["value_name"]), {}
        if header["verb"] == "boxes":
            return one.boxes(address, header["adverts"], header["threshold"], header["plan"]), {}
        if header["verb"] == "agree":
            return one.agree(address, header["survivors"]), {}
        if header["verb"] == "unmask":
            said = header["survivors"], header["signatures"], header["heard"]
            return one.unmask(address, *said), {}
        (tmp_path / name).mkdir()
        masked = header["masked"]
        sent = one.masked(masked["address"], masked["boxes"], values[name], "4.0")
        return one.heard(masked["address"]), sent

    def ask(asked: Any) -> Any:
        return {
            name: answered(name, header)
            for name, (header, _) in asked.items()
            if name not in gone.get(header["verb"], ())
        }

    plan = {name: {k: 1 / 104} for k, name in enumerate(names)}
    asked = {name: {"verb": "contribute"} for name in names}
    total, left = SecureSums(settings, "run", ask).sum(asked, plan, "train", 0, 1, "told", "4.0")
    assert left == names[20:]
    for k in range(3):
        assert int(total["x"][k]) == sum(int(values[name]["x"][k]) for name in left)


def test_too_few_shares_or_wrong_ones_give_no_sum() -> None:
    one = Sum(5, 4)
    uploads = one.upload({0})
    with pytest.raises(MaskError, match="of which 4 are needed"):
        one.end(uploads, {1})
    for holder, of in ((1, 2), (1, 0)):
        one = Sum(5, 4)
        uploads = one.upload({0})
        shares = {i: dict(one.senders[i].shares(frozenset(uploads), 2)) for i in uploads}
        shares[holder][of] = (shares[holder][of] + 1) % shamir.PRIME
        with pytest.raises(MaskError, match=r"is wrong|do not belong"):
            one.finish(uploads, shares)
    with pytest.raises(MaskError, match="too few"):
        Sum(5, 4).senders[0].shares(frozenset({0, 1}), 2)


def test_an_upload_is_uniform_and_says_nothing_of_its_value() -> None:
    words = 40_000
    one = Sum(4, 3, words)
    for value in (np.zeros(words, np.uint32), np.full(words, 7, np.uint32)):
        one.values[0] = value
        sent = Sum.upload(one, set())[0]
        counts = np.bincount(np.frombuffer(sent.tobytes(), np.uint8), minlength=256)
        assert scipy.stats.chisquare(counts).pvalue > 1e-4
    one.values[0] = np.arange(words, dtype=np.uint32) * 90_000
    sent = one.upload(set())[0]
    apart = abs(np.corrcoef(one.values[0].astype(float), sent.astype(float))[0, 1])
    assert apart < 0.03
    assert not np.array_equal(Sum(4, 3).upload(set())[0], Sum(4, 3).upload(set())[0])


def test_a_sender_answers_for_one_set_of_survivors_once() -> None:
    one = Sum(5, 3)
    one.upload(set())
    first = one.senders[0].shares(frozenset({0, 1, 2, 3}), 2)
    assert one.senders[0].shares(frozenset({0, 1, 2, 3}), 2) == first
    with pytest.raises(MaskError, match="another set of survivors"):
        one.senders[0].shares(frozenset({0, 1, 2}), 2)
    with pytest.raises(MaskError, match="too few"):
        one.senders[1].shares(frozenset({0, 2, 3}), 2)


def test_boxes_of_another_sum_or_of_somebody_else_do_not_open() -> None:
    one, other = Sum(3, 2), Sum(3, 2)
    with pytest.raises(MaskError, match="does not open"):
        one.senders[0].open({1: other.boxes[1][0]})
    with pytest.raises(MaskError, match="does not open"):
        one.senders[0].open({1: one.boxes[2][0]})
    with pytest.raises(MaskError, match="none of the others"):
        one.senders[0].open({7: one.boxes[2][0]})
    with pytest.raises(MaskError, match="were made already"):
        one.senders[0].boxes(one.adverts, 2, CONTEXT)
    fresh = Sender(0)
    twice = {0: fresh.advert, 1: one.adverts[1], 2: Advert(one.adverts[1].mask, bytes(32))}
    with pytest.raises(MaskError, match="a key comes twice"):
        fresh.boxes(twice, 2, CONTEXT)
    with pytest.raises(MaskError, match="a threshold of 1 does not fit"):
        Sender.boxes(fresh, {0: fresh.advert, 1: one.adverts[1]}, 1, CONTEXT)
    lonely = Sender(0)
    lonely.boxes({0: lonely.advert, 1: one.adverts[1]}, 2, CONTEXT)
    with pytest.raises(MaskError, match="1 senders, of which 2 are needed"):
        lonely.masked(np.zeros(3, np.uint32))
    nonsense = Sender(0)
    zeros = {0: nonsense.advert, 1: Advert(bytes(32), bytes([1, *bytes(31)]))}
    with pytest.raises(MaskError, match="a key that is none"):
        nonsense.boxes(zeros, 2, CONTEXT)


def test_a_stream_is_of_its_seed() -> None:
    words = stream(bytes(32), 300_000)
    assert np.array_equal(words[:10], stream(bytes(32), 10))
    assert not np.array_equal(words[:10], stream(bytes([1]) + bytes(31), 10))
    assert signed_part(CONTEXT, [2, 1]) == signed_part(CONTEXT, [1, 2])
    assert signed_part(CONTEXT, [1]) != signed_part(context_of("other"), [1])


def test_words_are_integers_and_back() -> None:
    negative = {"a": torch.tensor([-1, 5]), "b": torch.tensor([[2**31 - 1]])}
    same = tree_of(words_of(negative), negative)
    assert all(torch.equal(same[name].long(), negative[name]) for name in negative)


# ---- sites


@pytest.fixture
def content(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    rows = write_rows(tmp_path / "rows.jsonl", make_rows([12, 12, 13, 12, 12, 12]))
    return deepcopy(
        {
            **settings,
            "data": {"name": "files", "path": str(rows), "test_fraction": 0.3},
            "algorithm": {**settings["algorithm"], "aggregate": {"name": "frozen-a"}},
            "secrecy": {"name": "masks", "min_sites": 2},
            "rounds": 2,
        }
    )


def sites(folder: Path, count: int = 3, kind: Callable[..., Any] = Here) -> Any:
    return kind(folder, [SimulatedSite(k, count) for k in range(count)])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"algorithm": {"name": "scaffold"}}, marks=SLOW),
        pytest.param(
            {"algorithm": {"name": "feddpo", "aggregate": {"name": "product"}}}, marks=SLOW
        ),
        {"federation": {"weighting": "equal"}, "privacy": CLIENTS | QUANTILE},
    ],
    ids=["examples", "scaffold", "product", "private"],
)
@pytest.mark.long
def test_masked_sums_and_those_of_one_process_agree_to_the_bit(
    changes: dict[str, Any],
    content: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "privacy" in changes:
        monkeypatch.setattr(Secret, "of", staticmethod(lambda folder, **_: Secret(KEY)))
    local = content["algorithm"]["local"]
    changes = deepcopy(changes)
    if "algorithm" in changes:
        changes["algorithm"]["local"] = local
    spec = parsed(content, **changes)
    here = run_to(spec, tmp_path / "here")
    there = run_to(spec, tmp_path / "there", sites(tmp_path / "sites"))
    assert checkpoint(here).keys() == checkpoint(there).keys()
    # LAPACK's last bits hang on where a matrix lies in memory, on some machines
    is_decomposed = isinstance(spec.algorithm.aggregate, Product)
    for name, tensor in checkpoint(here).items():
        other = checkpoint(there)[name]
        near = torch.allclose(tensor, other, atol=1e-4)
        assert near if is_decomposed else torch.equal(tensor, other), name


def checkpoint(run: RunDirectory) -> dict[str, Any]:
    last = sorted((run.path / "checkpoints").glob("round-*"))[-1]
    return {
        f"{file.name}:{name}": tensor
        for file in sorted(last.glob("*.safetensors"))
        for name, tensor in trees.load(file).items()
    }


@pytest.mark.long
def test_no_byte_that_the_coordinator_gets_is_a_sites_part(
    content: dict[str, Any], tmp_path: Path
) -> None:
    parts: list[bytes] = []
    updates: list[bytes] = []
    masked = SiteMasks.masked

    def recorded(self: SiteMasks, address: Any, boxes: Any, value: Any, made: str) -> Any:
        parts.append(words_of(value).tobytes())
        if address["call"] < FIGURES:
            updates.append(parts[-1])
        return masked(self, address, boxes, value, made)

    transport = sites(tmp_path / "sites")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SiteMasks, "masked", recorded)
        run_to(parsed(content), tmp_path / "run", transport)
    assert len(updates) == 6, "three sites in two rounds"
    assert len(parts) == 15, "and figures of two rounds and of the end"
    everything = b"".join(transport.up)
    for part in parts:
        assert part not in everything
    for part in updates:
        middle = len(part) // 2
        assert any(part[middle : middle + 32])
        assert part[middle : middle + 32] not in everything
    sent = [tensors for _, tensors in map(unpack, transport.up) if tensors]
    assert all(t.dtype == torch.int32 for tree in sent for t in tree.values())
    for tree, part in zip(sent, parts, strict=True):
        words = words_of(tree)
        counts = np.bincount(np.frombuffer(words.tobytes(), np.uint8), minlength=256)
        assert scipy.stats.chisquare(counts).pvalue > 1e-5
        own = np.frombuffer(part, np.uint32)
        apart = abs(np.corrcoef(own.astype(float), words.astype(float))[0, 1])
        assert apart < 5 / len(own) ** 0.5


class Losing(Here):
    """Sites of which one does not answer a verb."""

    verb = "contribute"

    def ask(self, messages: Any, seconds: float) -> dict[str, bytes]:
        found = super().ask(messages, seconds)
        if any(unpack(one)[0].get("verb") == self.verb for one in messages.values()):
            found.pop("site-1", None)
        return found


@pytest.mark.parametrize(
    "verb",
    [
        pytest.param("keys", marks=SLOW),
        pytest.param("boxes", marks=SLOW),
        "contribute",
        pytest.param("agree", marks=SLOW),
        "unmask",
    ],
)
def test_a_site_that_falls_out_in_any_phase_is_left_out_or_not_needed(
    verb: str, content: dict[str, Any], tmp_path: Path
) -> None:
    kind = type("LosingOne", (Losing,), {"verb": verb})
    spec = parsed(content, patience={"min_clients": 1}, rounds=1)
    run = run_to(spec, tmp_path / "run", sites(tmp_path / "sites", 4, kind))
    assert RunDirectory(run.path).done
    row = run.read_rows("metrics.jsonl")[0]
    assert row["late"] >= 1


class LosingOnce(Here):
    """Sites of which one falls out of the first round's sum."""

    def ask(self, messages: Any, seconds: float) -> dict[str, bytes]:
        found = super().ask(messages, seconds)
        headers = [unpack(one)[0] for one in messages.values()]
        sums = [one["masked"]["address"] for one in headers if one.get("verb") == "contribute"]
        if any(one["round"] == 0 for one in sums):
            found.pop("site-1", None)
        return found


@pytest.mark.parametrize("private", [False, True])
def test_a_round_that_lost_a_site_goes_on_after_a_stop_with_the_sum_as_it_was(
    private: bool, content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"patience": {"min_clients": 1}, "rounds": 1}
    if private:
        monkeypatch.setattr(Secret, "of", staticmethod(lambda folder, **_: Secret(KEY)))
        changes |= {"privacy": CLIENTS, "federation": {"weighting": "equal"}}
    spec = parsed(content, **changes)
    whole = run_to(spec, tmp_path / "whole", sites(tmp_path / "a", 4, LosingOnce))

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            run_to(spec, tmp_path / "stopped", sites(tmp_path / "b", 4, LosingOnce))
    assert list((tmp_path / "stopped/sums").glob("round-000000-*.json"))
    again = run_to(spec, tmp_path / "stopped", sites(tmp_path / "b", 4))
    assert checkpoint(again).keys() == checkpoint(whole).keys()
    for name, tensor in checkpoint(whole).items():
        assert torch.equal(tensor, checkpoint(again)[name]), name
    assert not (tmp_path / "stopped/sums").exists()


@pytest.mark.long
def test_too_few_sites_end_the_round_with_a_sentence(
    content: dict[str, Any], tmp_path: Path
) -> None:
    spec = parsed(content, secrecy={"name": "masks", "min_sites": 3})
    with pytest.raises(UserError, match="2 sites take part in a sum, and 3 are needed"):
        run_to(spec, tmp_path / "run", sites(tmp_path / "sites", 2))
    kind = type("LosingOne", (Losing,), {"verb": "contribute"})
    masks = {"name": "masks", "min_sites": 3}
    spec = parsed(content, secrecy=masks, patience={"min_clients": 1})
    with pytest.raises(UserError, match="3 are needed"):
        run_to(spec, tmp_path / "other", sites(tmp_path / "more", 3, kind))


class Lying(Here):
    """A coordinator that changes what it relays."""

    lie = ""

    def ask(self, messages: Any, seconds: float) -> dict[str, bytes]:
        changed = {}
        for site, message in messages.items():
            header, tensors = unpack(message)
            verb = header.get("verb")
            if self.lie == "two sets" and verb == "unmask" and site == "site-0":
                header["survivors"] = header["survivors"][:-1]
            if self.lie == "unequal adapters" and verb == "each" and site == "site-0":
                tensors = {name: tensor + 0.01 for name, tensor in tensors.items()}
            if self.lie == "swapped keys" and verb == "boxes" and site == "site-0":
                header["adverts"]["site-1"] |= {"mask": Sender(9).advert.mask.hex()}
            if self.lie == "in the clear" and verb == "contribute":
                header.pop("masked")
            if self.lie == "nothing of the others" and verb == "contribute" and site != "site-0":
                header["shares"] = dict.fromkeys(header["shares"], 0.0)
            if self.lie == "nothing planned of the others" and verb in ("boxes", "contribute"):
                for other in ("site-1", "site-2"):
                    if verb == "boxes":
                        plan = header["plan"][other]
                        header["plan"][other] = dict.fromkeys(plan, 0.0)
                if verb == "contribute" and site != "site-0":
                    header["shares"] = dict.fromkeys(header["shares"], 0.0)
            if self.lie == "other work" and verb == "each" and site == "site-0":
                header["call"] += 1
            if self.lie == "old boxes" and verb == "contribute" and site == "site-0":
                boxes = header["masked"]["boxes"]
                known = self.__dict__.setdefault("kept", dict(boxes))
                header["masked"]["boxes"] = known
            if self.lie == "low threshold" and verb == "boxes":
                header["threshold"] = 2
            changed[site] = pack(header, tensors)
        return super().ask(changed, seconds)


@pytest.mark.parametrize(
    "lie",
    [
        "two sets",
        "unequal adapters",
        pytest.param("swapped keys", marks=SLOW),
        "in the clear",
        pytest.param("old boxes", marks=SLOW),
        pytest.param("low threshold", marks=SLOW),
        "nothing of the others",
        "nothing planned of the others",
        pytest.param("other work", marks=SLOW),
    ],
)
def test_a_coordinator_that_lies_gets_nothing(
    lie: str, content: dict[str, Any], tmp_path: Path
) -> None:
    spec = parsed(content, secrecy={"name": "masks", "min_sites": 3, "threshold": 1.0})
    kind = type("LyingOne", (Lying,), {"lie": lie})
    with pytest.raises(UserError, match=r"site-|sum under masks is lost|secrecy"):
        run_to(spec, tmp_path / "run", sites(tmp_path / "sites", 3, kind))
    run = tmp_path / "run"
    done = RunDirectory(run).read_rows("metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    assert len(done) == (1 if lie == "old boxes" else 0)


NAMES = ["a", "b", "c"]
EVEN = {name: {k: 1 / 3} for k, name in enumerate(NAMES)}


def attempt(
    folder: Path,
    number: int = 0,
    value: int = 5,
    survivors: list[str] = NAMES,
    plan: Any = EVEN,
    call: int = 1,
    means: int = 1,
) -> None:
    """One sum of three sites, each of which begins anew and has what it wrote down."""
    address = {"purpose": "train", "round": 0, "call": call, "attempt": number}
    made = {
        name: SiteMasks(name, Unsigned(), Masks(min_sites=2), "run", folder / name, means)
        for name in NAMES
    }
    adverts = {name: one.keys(address, NAMES, "told", "4.0") for name, one in made.items()}
    sealed = {name: one.boxes(address, adverts, 3, plan) for name, one in made.items()}
    for name, one in made.items():
        (folder / name).mkdir(exist_ok=True)
        boxes = {other: said["boxes"][name] for other, said in sealed.items() if other != name}
        one.masked(address, boxes, {"x": torch.tensor([value])}, str(value))
    signatures = {name: made[name].agree(address, survivors)["signature"] for name in survivors}
    for name in survivors:
        made[name].unmask(address, survivors, signatures, {})
    with pytest.raises(RefusedError, match="another list of survivors was signed already"):
        made["a"].agree(address, ["a", "b"])


def figures_of(
    folder: Path,
    place: str,
    plan: Any,
    names: Any = NAMES,
    own: str | None = None,
    made_as: str = "4.0",
) -> None:
    """A sum of figures of some sites of three, up to what they send."""
    address = {"purpose": "evaluate", "round": 0, "call": call_of(place), "attempt": 0}
    settings, made = Masks(min_sites=2), dict[str, SiteMasks]()
    for name in names:
        made[name] = SiteMasks(name, Unsigned(), settings, "run", folder / name, everybody=3)
        (folder / name).mkdir(exist_ok=True, parents=True)
    adverts = {name: one.keys(address, names, "told", made_as) for name, one in made.items()}
    sealed = {name: one.boxes(address, adverts, len(names), plan) for name, one in made.items()}
    for k, (name, one) in enumerate(made.items()):
        boxes = {other: said["boxes"][name] for other, said in sealed.items() if other != name}
        one.planned(address, {k: own or made_as})
        one.masked(address, boxes, {"x": torch.tensor([k])}, made_as)


def test_figures_are_of_all_sites_of_one_list_and_of_one_piece_of_work(tmp_path: Path) -> None:
    figures_of(tmp_path, "glance", EVEN)
    # which in one round may be told of more than one look, but of each once
    figures_of(tmp_path, "conclude", EVEN, made_as="5.0")
    with pytest.raises(RefusedError, match="these values were summed already"):
        figures_of(tmp_path, "start", EVEN)
    fewer = {"a": {0: 0.5}, "b": {1: 0.5}, "c": {}}
    with pytest.raises(RefusedError, match="were summed over others already"):
        figures_of(tmp_path, "validate", fewer, made_as="6.0")
    with pytest.raises(RefusedError, match="a sum of a few sites, which is to be one of all"):
        figures_of(tmp_path / "two", "glance", {"a": {0: 0.5}, "b": {1: 0.5}}, ["a", "b"])
    with pytest.raises(RefusedError, match="all clients have the same share"):
        figures_of(tmp_path / "uneven", "glance", {**EVEN, "a": {0: 0.2}})
    with pytest.raises(RefusedError, match="values of another piece of work"):
        figures_of(tmp_path / "other", "glance", EVEN, own="5.0")


class Asking:
    """A coordinator that asks four sites as it likes."""

    count, run = 4, "run"

    def __init__(self, content: dict[str, Any], folder: Path, **changes: Any) -> None:
        folder.mkdir(exist_ok=True)
        masks = {"name": "masks", "min_sites": 3, "threshold": 0.75}
        data = {**content["data"], "path": str(write_rows(folder / "r.jsonl", make_rows([12] * 4)))}
        equal = {"weighting": "equal"}
        said = {"secrecy": masks, "data": data, "federation": equal, **changes}
        self.spec = parsed(content, **said)
        self.here = sites(folder / "sites", self.count)
        Sites(self.here, config.dump(self.spec), "run", Patience(seconds=30))
        task: Any = self.of(0)._opened.task
        theta = task.init(torch.Generator().manual_seed(0))
        self.adapter = {f"0/{name}": tensor for name, tensor in theta.items()}
        for k in range(self.count):
            self.each(k, "common.no_moments", [], "init", 0, "1")

    def of(self, k: int) -> Any:
        return self.here.all[f"site-{k}"]

    def said(self, k: int, tensors: Any = NO_TENSORS, **header: Any) -> Any:
        answer, found = unpack(self.of(k).answer(pack(header, tensors)))
        if "refused" in answer:
            raise RefusedError(answer["refused"])
        return {name: answer[name] for name in answer if name not in ("format", "fedpref")}, found

    def each(
        self, k: int, work: str, args: Any, purpose: str, round: int, name: str, tree: Any = None
    ) -> None:
        where = {"clients": [k], "purpose": purpose, "round": round, "call": 1, "name": name}
        header, _ = self.said(k, tree or NO_TENSORS, verb="each", work=work, args=args, **where)
        assert not header["failed"]

    def train(self, round: int, name: str, more: float = 0.0) -> None:
        """Let each site train, from adapters that differ by so much."""
        plain = {"plain": config.dump(self.spec)["algorithm"]}
        for k in range(self.count):
            tree = {key: tensor + k * more for key, tensor in self.adapter.items()}
            args = [{"tree": 0}, {"own": {str(k): "1.0"}}, plain]
            self.each(k, "feddpo.train", args, "train", round, name, tree)

    def sum(
        self,
        value: str,
        round: int,
        call: int = 1,
        who: Sequence[int] = range(4),
        after_keys: Callable[[], None] = lambda: None,
    ) -> Any:
        """Return a sum of a value of some sites, if they give it."""

        def ask(messages: Any) -> Any:
            found = {
                site: self.said(int(site[-1]), tree, **header)
                for site, (header, tree) in messages.items()
            }
            if next(iter(messages.values()))[0]["verb"] == "keys":
                after_keys()
            return found

        plan = {f"site-{k}": {k: 1 / len(who)} for k in who}
        asked = {f"site-{k}": _contribute({k: value}, {k: 1 / len(who)}) for k in who}
        sums = SecureSums(self.spec.secrecy or Masks(), self.run, ask)
        told = self.of(0)._told
        digest = told[2] if told[:2] == ("train", round) else "00"
        return unfixed(sums.sum(asked, plan, "train", round, call, digest, value)[0])


def test_a_plan_is_of_sites_that_are_in_the_sum_and_of_those_who_are_left(
    content: dict[str, Any], tmp_path: Path
) -> None:
    asking = Asking(content, tmp_path)
    asking.train(0, "2")
    told = asking.of(0)._told[2]
    shares = {0: 0.6, 1: 0.0, 2: 0.0}
    asked = {f"site-{k}": _contribute({k: "2.0"}, {k: share}) for k, share in shares.items()}
    whole = {f"site-{k}": {k: share} for k, share in shares.items()}
    ghosts = {**whole, "x": {7: 0.2}, "y": {8: 0.2}}

    def lying(messages: Any) -> Any:
        for header, _ in messages.values():
            if header["verb"] == "boxes":
                header["plan"] = ghosts
        return {
            site: asking.said(int(site[-1]), tree, **header)
            for site, (header, tree) in messages.items()
        }

    masks: Any = asking.spec.secrecy
    with pytest.raises(RefusedError, match="sites that have made no keys"):
        SecureSums(masks, "run", lying).sum(asked, ghosts, "train", 0, 1, told, "2.0")
    # whose parts are withheld are not in the sum that is left
    lopsided = {0: 0.34, 1: 0.33, 2: 0.33, 3: 0.0}
    plan = {f"site-{k}": {k: share} for k, share in lopsided.items()}
    asked = {f"site-{k}": _contribute({k: "2.0"}, {k: share}) for k, share in lopsided.items()}

    def withholding(messages: Any) -> Any:
        if next(iter(messages.values()))[0]["verb"] == "contribute":
            messages = {site: one for site, one in messages.items() if site != "site-2"}
        return {
            site: asking.said(int(site[-1]), tree, **header)
            for site, (header, tree) in messages.items()
        }

    with pytest.raises(RefusedError, match=r"fewer sites than secrecy\.min_sites"):
        SecureSums(masks, "run", withholding).sum(asked, plan, "train", 0, 2, told, "2.0")


@pytest.mark.parametrize("torn", ["", "0a1b"])
def test_values_of_one_run_are_not_summed_again_with_others_in_another(
    content: dict[str, Any], tmp_path: Path, torn: str
) -> None:
    asking = Asking(content, tmp_path)
    for k in range(asking.count):  # a line that a full disk has cut short
        masks = asking.of(k)._masks
        assert masks is not None
        (masks._root / site_masks.VALUES).write_text(torn)
    asking.train(0, "2")
    asking.sum("2.0", 0)
    Sites(asking.here, config.dump(asking.spec), "again", Patience(seconds=30))
    asking.run = "again"
    for k in range(asking.count):
        asking.each(k, "common.no_moments", [], "init", 0, "1")
    asking.train(0, "2")
    with pytest.raises(RefusedError, match="summed with other sites, or other shares"):
        asking.sum("2.0", 0, who=range(3))


def test_sites_sum_what_this_phase_has_made_of_what_all_were_sent(
    content: dict[str, Any], tmp_path: Path
) -> None:
    honest = Asking(content, tmp_path / "honest")
    honest.train(0, "2")
    true = [honest.of(k)._values.get(k, "2.0").value for k in range(4)]
    for name, tensor in honest.sum("2.0", 0).items():
        mean = sum(one[name] for one in true) / 4
        assert torch.allclose(tensor, mean, atol=1e-6)
    # the same once more in the next round, without one: its value would be the difference
    honest.train(1, "5")
    with pytest.raises(RefusedError, match="values of another phase"):
        honest.sum("2.0", 1, who=range(3))

    def unequal() -> None:
        other.train(0, "2", more=0.5)

    other = Asking(content, tmp_path / "other")
    with pytest.raises(RefusedError, match="was sent more since its keys"):
        other.sum("2.0", 0, after_keys=unequal)
    # numbers that a sum of integers would carry over
    large = Asking(content, tmp_path / "large")
    large.train(0, "2")
    for k in range(4):
        for tensor in large.of(k)._values.get(k, "2.0").value.values():
            tensor.fill_(200.0)
    with pytest.raises(RefusedError, match="too large"):
        large.sum("2.0", 0)


def test_a_value_that_is_made_again_is_the_same_value(
    content: dict[str, Any], tmp_path: Path
) -> None:
    for means, told in ((1, "this would be one more"), (2, "were summed already")):
        asking = Asking(content, tmp_path / str(means))
        for k in range(4):
            masks = asking.of(k)._masks
            assert masks is not None
            masks._means = means  # as of an algorithm with so many sums
        asking.train(0, "2")
        asking.sum("2.0", 0, call=1)
        for k in range(4):  # as after a restart, under another name
            asking.of(k)._phases = Phases()
        asking.train(0, "7")
        with pytest.raises(RefusedError, match=told):
            asking.sum("7.0", 0, call=2, who=range(3))


def test_neighbours_are_told_nothing_where_nobody_gossips(
    content: dict[str, Any], tmp_path: Path
) -> None:
    for secrecy in (content["secrecy"], None):
        one = Asking(content, tmp_path / str(bool(secrecy)), secrecy=secrecy)
        one.train(0, "2")
        weights = {str(j): {"0": 1.0} for j in range(4)}
        where = {"round": 0, "call": 2, "name": "3", "wait": 1.0}
        with pytest.raises(RefusedError, match="neighbours are told nothing"):
            one.said(0, verb="exchange", own={"0": "2.0"}, weights=weights, **where)


def test_a_sum_is_of_one_value_and_one_list_over_restarts(tmp_path: Path) -> None:
    attempt(tmp_path)
    assert json.loads((tmp_path / "a" / FILE).read_text())["train/0/1"]["survivors"] == NAMES
    attempt(tmp_path, 1)  # the same once more, as a coordinator that was killed asks
    with pytest.raises(RefusedError, match="another value of this sum was sent already"):
        attempt(tmp_path, 2, value=6)
    with pytest.raises(RefusedError, match="a phase has 1 sums, and this would be one more"):
        attempt(tmp_path, 3, call=2)
    with pytest.raises(RefusedError, match="these values were summed already"):
        attempt(tmp_path, 4, call=2, means=2)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"a": {0: 1.0}, "b": {1: 0.0}, "c": {2: 0.0}}, "fewer sites than secrecy.min_sites"),
        ({"a": {0: 0.98}, "b": {1: 0.01}, "c": {2: 0.01}}, "more of the sum than"),
        ({"a": {0: 1.0}, "b": {}, "c": {}}, "fewer sites than secrecy.min_sites"),
    ],
)
def test_a_sum_that_is_hardly_more_than_one_sites_value_is_refused(
    plan: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(RefusedError, match=message):
        attempt(tmp_path, plan=plan)


@pytest.mark.long
def test_noise_that_sites_add_is_enough_with_the_fewest_that_must_be_left(
    content: dict[str, Any], tmp_path: Path
) -> None:
    privacy = {"noise_multiplier": 1.0, "delta": 0.01, "against": "coordinator"}
    changes: dict[str, Any] = {
        "privacy": privacy,
        "federation": {"weighting": "equal"},
        "secrecy": {"name": "masks", "min_sites": 2, "corrupt": 0.0},
        "rounds": 1,
    }
    spec = parsed(content, **changes)
    with pytest.raises(UserError, match="in one process there is no coordinator to hide from"):
        run_to(spec, tmp_path / "here")
    moved = []
    for number in range(2):
        run = run_to(spec, tmp_path / f"run-{number}", sites(tmp_path / f"sites-{number}", 4))
        moved.append(trees.load(run.path / "adapter/adapter_model.safetensors"))
    row = run.read_rows("metrics.jsonl")[-1]
    assert row["epsilon"] == pytest.approx(epsilon_of_discrete([1.0], 0.01), rel=1e-3)
    # of two runs the noise is apart: of three of four sites' parts each is a third of what is asked
    names = [name for name in moved[0] if "lora_B" in name]
    apart = torch.cat([(moved[0][name] - moved[1][name]).flatten() for name in names])
    clip, clients, needed = spec.promises[0].norm, 6, 3
    asked = clip * (4 / needed) ** 0.5 / clients
    assert float(apart.std()) / 2**0.5 == pytest.approx(asked, rel=0.1)


@pytest.mark.long
def test_a_client_that_may_come_twice_is_not_refused_late_in_a_run(
    content: dict[str, Any], tmp_path: Path
) -> None:
    privacy = {"noise_multiplier": 1.0, "delta": 0.01, "against": "coordinator"}
    few = {"clients_per_round": 3, "sampling": "poisson", "max_participations": 2}
    spec = parsed(
        content,
        privacy=privacy,
        federation={"weighting": "equal", **few},
        secrecy={"name": "masks", "min_sites": 2},
        rounds=5,
    )
    run = run_to(spec, tmp_path / "run", sites(tmp_path / "sites"))
    rows = run.read_rows("metrics.jsonl")
    assert all(row["late"] == 0 for row in rows)
    assert sum(row["clients"] for row in rows) <= 12
    assert rows[-1]["epsilon"] <= epsilon_of_discrete([1.0] * 2, 0.01) * 1.001


@pytest.mark.long
def test_sites_without_anybody_in_the_cohort_take_part_in_a_noisy_sum(
    content: dict[str, Any], tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "privacy": CLIENTS,
        "federation": {"weighting": "equal", "sampling": "poisson", "clients_per_round": 1},
        "rounds": 6,
    }
    run = run_to(parsed(content, **changes), tmp_path / "run", sites(tmp_path / "sites"))
    took_part = [row["clients"] for row in run.read_rows("metrics.jsonl")]
    assert min(took_part) < 3, "some sites have nobody in a round"
    assert len(took_part) == 6


def test_what_masks_cannot_do_is_refused(content: dict[str, Any]) -> None:
    for changes, message in (
        ({"algorithm": {"name": "decdpo"}}, "decdpo has no sum"),
        ({"federation": {"clip": 1.0}}, "cannot shorten what it does not see"),
        ({"diagnostics": ["disagreement"]}, "they tell the coordinator of each client"),
        ({"algorithm": {"name": "clustered"}}, "a group of one client is its own sum"),
        (
            {
                "algorithm": {"name": "fedbuff"},
                "federation": {"concurrency": 3, "clients_per_round": 2},
            },
            "a sum may be one client's",
        ),
        ({"secrecy": {"name": "masks", "threshold": 0.4}}, "secrecy.threshold"),
    ):
        with pytest.raises(UserError, match=message):
            parsed(content, **changes)
    assert Masks().needed(10) == 7
    assert Masks().needed(3) == 3
    assert Masks(threshold=0.51, min_sites=2).needed(4) == 3


# ---- who says so


def kits(folder: Path, names: list[str]) -> dict[str, Path]:
    """Keys and certificates of one root, as provisioning makes them."""
    from datetime import UTC, datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import rsa
    from cryptography.x509.oid import NameOID

    def name_of(text: str) -> Any:
        role = "coordinator" if text == "server" else f"site_{text}"
        return x509.Name(
            [
                x509.NameAttribute(NameOID.COMMON_NAME, text),
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, role),
            ]
        )

    def certificate(subject: str, key: Any, issuer: Any) -> Any:
        begins = datetime.now(UTC) - timedelta(days=1)
        return (
            x509.CertificateBuilder()
            .subject_name(name_of(subject))
            .issuer_name(name_of("root"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begins)
            .not_valid_after(begins + timedelta(days=30))
            .sign(issuer, hashes.SHA256())
        )

    pem = serialization.Encoding.PEM
    root = rsa.generate_private_key(65537, 2048)
    made = {}
    for name in names:
        key = rsa.generate_private_key(65537, 2048)
        made[name] = folder / name
        made[name].mkdir(parents=True)
        (made[name] / "rootCA.pem").write_bytes(certificate("root", root, root).public_bytes(pem))
        (made[name] / "client.crt").write_bytes(certificate(name, key, root).public_bytes(pem))
        (made[name] / "client.key").write_bytes(
            key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )
    return made


def test_keys_that_another_root_has_signed_are_refused(tmp_path: Path) -> None:
    mine, theirs = kits(tmp_path / "a", ["one", "two", "server"]), kits(tmp_path / "b", ["one"])
    one, two = (KitIdentity(mine[name]) for name in ("one", "two"))
    forged, server = KitIdentity(theirs["one"]), KitIdentity(mine["server"])
    signed = server.sign(b"content")
    assert not two.verify("server", b"content", signed, server.certificate), "it is no site"
    said = one.sign(b"content")
    assert two.verify("one", b"content", said, one.certificate)
    assert not two.verify("two", b"content", said, one.certificate), "of another site"
    assert not two.verify("one", b"other", said, one.certificate)
    assert not two.verify("one", b"content", forged.sign(b"content"), forged.certificate)
    assert not two.verify("one", b"content", forged.sign(b"content"), one.certificate)
    assert not two.verify("one", b"content", said, "no certificate")
    with pytest.raises(UserError, match="the kit's key or certificate"):
        KitIdentity(tmp_path / "nowhere")


@pytest.mark.long
def test_sites_with_kits_sum_under_masks_and_swapped_keys_are_noticed(
    content: dict[str, Any], tmp_path: Path
) -> None:
    made = kits(tmp_path / "kits", [f"site-{k}" for k in range(3)])

    class Swapping(Here):
        """A coordinator that puts keys of its own in the place of a site's."""

        swaps = False

        def ask(self, messages: Any, seconds: float) -> dict[str, bytes]:
            changed = {}
            for site, message in messages.items():
                header, tensors = unpack(message)
                if self.swaps and header.get("verb") == "boxes" and site == "site-0":
                    own = Sender(1).advert
                    header["adverts"]["site-1"] |= {"mask": own.mask.hex(), "box": own.box.hex()}
                changed[site] = pack(header, tensors)
            return super().ask(changed, seconds)

    for swaps in (False, True):
        transport = sites(tmp_path / f"sites-{swaps}", 3, Swapping)
        for name, site in transport.all.items():
            site._identity = KitIdentity(made[name])
        transport.swaps = swaps
        if not swaps:
            run_to(parsed(content, rounds=1), tmp_path / "run", transport)
            continue
        with pytest.raises(UserError, match="keys of 'site-1' are not signed by that site"):
            run_to(parsed(content, rounds=1), tmp_path / "other", transport)
