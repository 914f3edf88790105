"""Sums of which nobody learns the parts: every sender adds masks that cancel in the whole.

Each pair of senders agrees on a mask that one adds and the other subtracts, and each adds one of
its own. Both kinds can be taken away from the sum by shares that the others hold: of who has sent
something its own mask, of who fell out the key of its masks with others, and never both.
Among very many senders each shares with some that it has drawn by itself (`neighbours`).
Source: Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine
Learning". Every key and mask is of one sum alone.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpref.privacy import shamir

Words = NDArray[np.uint32]
CHUNK = bytes(1 << 20)  # zeros, which a stream cipher turns into its stream
KEY = 32  # bytes of an X25519 key


class MaskError(Exception):
    """A sum that cannot be, or a message that does not fit; the text holds nothing of values."""


@dataclass(frozen=True)
class Advert:
    """What a sender makes known before a sum: public keys of its masks and of its boxes.

    Attributes:
        holders: The others that it has drawn to hold shares of its secrets; None for all.
    """

    mask: bytes
    box: bytes
    holders: frozenset[int] | None = None


class Holders(dict[int, set[int]]):
    """By sender, who holds shares of its secrets, of those that are there; itself does."""

    def __init__(self, adverts: Mapping[int, Advert]) -> None:
        super().__init__(
            (i, {i} | (adverts.keys() if one.holders is None else one.holders & adverts.keys()))
            for i, one in adverts.items()
        )

    def are_near(self, i: int, j: int) -> bool:
        """Return whether two senders have a mask with each other: one holds shares of the other's.

        Nobody has one with itself.
        """
        return i != j and i in self and j in self and (j in self[i] or i in self[j])


def context_of(*parts: Any) -> bytes:
    """Return what a sum is told by: masks of another one are others, and boxes do not open."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()


def stream(seed: bytes, count: int) -> Words:
    """Return words that cannot be told from random ones without the seed (AES-256 in CTR mode)."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    encryptor = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()
    sizes = [len(CHUNK)] * (4 * count // len(CHUNK)) + [4 * count % len(CHUNK)]
    drawn = b"".join(encryptor.update(CHUNK[:size]) for size in sizes)
    return np.frombuffer(drawn, "<u4")


class Sender:
    """One sender's part in one sum.

    Args:
        number: Of the sender, from 0.
        holders: The others that are to hold shares of its secrets; None for all.
    """

    def __init__(self, number: int, holders: frozenset[int] | None = None) -> None:
        self.number, self._drawn = number, holders
        self._mask, self._box = _fresh_key(), _fresh_key()
        self._own = secrets.token_bytes(KEY)
        self._adverts: dict[int, Advert] = {}
        self._holders = Holders({})
        self._held: dict[int, tuple[int, int]] = {}
        self._heard: set[int] = set()  # whose boxes came
        self._context = b""
        self._threshold = 0
        self._answered: frozenset[int] | None = None

    @property
    def advert(self) -> Advert:
        """What is made known."""
        return Advert(_public(self._mask), _public(self._box), self._drawn)

    def boxes(
        self, adverts: Mapping[int, Advert], threshold: int, context: bytes
    ) -> tuple[dict[int, bytes], bytes]:
        """Return a sealed box for each sender it has a mask with, and a commitment to the own mask.

        There are shares in the boxes of those that it has drawn; others learn that it is there.

        Args:
            adverts: Of all senders, this one among them.
            threshold: How many shares give a secret.
            context: What tells the sum from all others.

        Raises:
            MaskError: Too few senders, or a key that comes twice.
        """
        if self._adverts:
            raise MaskError("boxes of this sum were made already")
        keys = [key for one in adverts.values() for key in (one.mask, one.box)]
        if adverts.get(self.number) != self.advert or len(set(keys)) < len(keys):
            raise MaskError("a key comes twice, or is not the one that was told")
        self._holders = Holders(adverts)
        holders = self._holders[self.number]
        if not len(holders) / 2 < threshold <= len(holders):
            raise MaskError(f"a threshold of {threshold} does not fit {len(holders)} holders")
        self._adverts, self._threshold, self._context = dict(adverts), threshold, context
        of_key = shamir.split(_private(self._mask), sorted(holders), threshold)
        of_own = shamir.split(self._own, sorted(holders), threshold)
        # a share of its own too: without it a sum of exactly so many senders would fail
        self._held = {self.number: (of_key[self.number], of_own[self.number])}

        def sealed(other: int) -> bytes:
            shares = (of_key[other], of_own[other]) if other in holders else ()
            content = b"".join(share.to_bytes(shamir.BYTES, "big") for share in shares)
            return bytes(
                self._cipher(other, self.number, other).encrypt(bytes(12), content, context)
            )

        boxes = {
            other: sealed(other) for other in adverts if self._holders.are_near(self.number, other)
        }
        return boxes, _commitment(self._own, context)

    def open(self, boxes: Mapping[int, bytes]) -> None:
        """Take the boxes that other senders have sealed for this one.

        Raises:
            MaskError: One does not open: it is of another sum, or of somebody else.
        """
        from cryptography.exceptions import InvalidTag

        for other, box in boxes.items():
            if not self._holders.are_near(self.number, other):
                raise MaskError(f"a box of {other}, who is none of the others")
            try:
                opened = self._cipher(other, other, self.number).decrypt(
                    bytes(12), box, self._context
                )
            except (InvalidTag, ValueError) as error:
                raise MaskError(f"the box of {other} does not open") from error
            is_holder = self.number in self._holders[other]
            if len(opened) != (2 * shamir.BYTES if is_holder else 0):
                raise MaskError(f"the box of {other} holds something else")
            self._heard.add(other)
            if is_holder:
                first, second = opened[: shamir.BYTES], opened[shamir.BYTES :]
                self._held[other] = int.from_bytes(first, "big"), int.from_bytes(second, "big")

    def masked(self, words: Words) -> Words:
        """Return words with the masks of all whose boxes came.

        Raises:
            MaskError: Fewer came than must be left for a sum.
        """
        there = self._holders[self.number] & (self._heard | {self.number})
        if len(there) < self._threshold:
            raise MaskError(f"{len(there)} senders, of which {self._threshold} are needed")
        total = words + stream(_derived(self._own, self._context, "self"), len(words))
        for other in sorted(self._heard):
            mask = stream(_agreed(self._mask, self._adverts[other].mask, self._context), len(words))
            total = total + mask if self.number < other else total - mask
        return total

    @property
    def heard(self) -> frozenset[int]:
        """Whose boxes came, so that there is a mask with each of them."""
        return frozenset(self._heard)

    def shares(
        self,
        survivors: frozenset[int],
        least: int,
        heard: Mapping[int, frozenset[int]] | None = None,
    ) -> dict[int, int]:
        """Return a share of each survivor's own mask, and of the keys of those who fell out.

        Args:
            survivors: Whose words are in the sum.
            least: How many there must be.
            heard: By survivor, whose boxes came to it, as it says itself. Where senders share with
                some alone, its own mask is not helped away if a survivor near it is none of them:
                with the others it may have no mask that is left. None where all share with all.

        Raises:
            MaskError: There are too few, or others were answered already.
        """
        if self._answered is not None and self._answered != survivors:
            raise MaskError("another set of survivors was answered already")
        if self.number not in survivors or len(survivors) < max(least, self._threshold):
            raise MaskError(f"{len(survivors)} survivors are too few")
        near = {other for other in survivors if self._holders.are_near(self.number, other)}
        if not near <= self._heard:
            raise MaskError("a survivor whose box never came")
        self._answered = survivors

        def is_hidden(other: int) -> bool:
            if heard is None or other == self.number:
                return True
            near = {one for one in survivors if self._holders.are_near(other, one)}
            return near <= heard.get(other, frozenset())

        return {
            other: own if other in survivors else key
            for other, (key, own) in self._held.items()
            if other not in survivors or is_hidden(other)
        }

    def _cipher(self, other: int, sender: int, receiver: int) -> Any:
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

        shared = _exchanged(self._box, self._adverts[other].box)
        # a key for each direction, so that the nonce of zeros is used once with each
        return ChaCha20Poly1305(_derived(shared, self._context, f"{sender}>{receiver}"))


def unmasked(
    total: Words,
    survivors: frozenset[int],
    adverts: Mapping[int, Advert],
    commitments: Mapping[int, bytes],
    shares: Mapping[int, Mapping[int, int]],
    threshold: int,
    context: bytes,
) -> Words:
    """Return a sum without its masks.

    Args:
        total: Of the survivors' masked words.
        survivors: Whose words are in it.
        adverts: Of all senders whose masks are in it.
        commitments: Of survivors to their own masks.
        shares: By survivor, what it has told of all others.
        threshold: How many shares give a secret.
        context: What tells the sum from all others.

    Raises:
        MaskError: Too few shares, or wrong ones.
    """
    total, holders = total.copy(), Holders(adverts)
    for i in sorted(adverts):
        told = {holder: some[i] for holder, some in shares.items() if i in some}
        try:
            secret = shamir.join(told, threshold)
        except ValueError as error:
            raise MaskError(f"the shares of sender {i}: {error}") from error
        if i in survivors:
            if _commitment(secret, context) != commitments[i]:
                raise MaskError(f"a share of the mask of sender {i} is wrong")
            total -= stream(_derived(secret, context, "self"), len(total))
            continue
        key = _key_of(secret)
        if _public(key) != adverts[i].mask:
            raise MaskError(f"a share of the key of sender {i} is wrong")
        for j in (j for j in sorted(survivors) if holders.are_near(i, j)):
            mask = stream(_agreed(key, adverts[j].mask, context), len(total))
            # as the survivor has added or subtracted it
            total = total - mask if j < i else total + mask
    return total


def signed_part(context: bytes, survivors: Sequence[int]) -> bytes:
    """Return what senders sign before they give shares: one set of survivors, of one sum."""
    return context_of(context.hex(), sorted(survivors))


def _fresh_key() -> Any:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.generate()


def _key_of(content: bytes) -> Any:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(content)


def _public(key: Any) -> bytes:
    return bytes(key.public_key().public_bytes_raw())


def _private(key: Any) -> bytes:
    return bytes(key.private_bytes_raw())


def _exchanged(key: Any, other: bytes) -> bytes:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

    try:
        return bytes(key.exchange(X25519PublicKey.from_public_bytes(other)))
    except ValueError as error:
        raise MaskError("a key that is none") from error


def _agreed(key: Any, other: bytes, context: bytes) -> bytes:
    return _derived(_exchanged(key, other), context, "pair")


def _derived(secret: bytes, context: bytes, purpose: str) -> bytes:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(hashes.SHA256(), KEY, context, purpose.encode()).derive(secret)


def _commitment(own: bytes, context: bytes) -> bytes:
    return hashlib.sha256(b"own mask" + context + own).digest()
