"""Shamir's secret sharing over a prime field: any t of the shares give the secret, fewer nothing.

Source: Shamir 1979, "How to Share a Secret".
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping

PRIME = 2**521 - 1  # a Mersenne prime, with room for secrets of 32 bytes
BYTES = 66  # of a share
SECRET = 32  # bytes


def split(secret: bytes, holders: Collection[int], threshold: int) -> dict[int, int]:
    """Return a share of a secret for each holder.

    Args:
        secret: 32 bytes.
        holders: Numbers from 0.
        threshold: How many shares give the secret.

    Raises:
        ValueError: There are fewer holders than that, or a secret of another size.
    """
    if not 1 <= threshold <= len(set(holders)) or len(secret) != SECRET:
        raise ValueError(f"{threshold} of {len(set(holders))} shares of {len(secret)} bytes")
    polynomial = [int.from_bytes(secret, "big")]
    polynomial += [secrets.randbelow(PRIME) for _ in range(threshold - 1)]

    def at(x: int) -> int:
        value = 0
        for coefficient in reversed(polynomial):
            value = (value * x + coefficient) % PRIME
        return value

    return {holder: at(holder + 1) for holder in holders}  # at zero is the secret


def join(shares: Mapping[int, int], threshold: int) -> bytes:
    """Return the secret that shares are of.

    Args:
        shares: By holder.
        threshold: How many of them give it.

    Raises:
        ValueError: There are too few, or they do not belong together.
    """
    if len(shares) < threshold:
        raise ValueError(f"{len(shares)} shares, of which {threshold} are needed")
    some = sorted(shares)[:threshold]
    secret = 0
    for i in some:
        above = below = 1
        for j in some:
            if j != i:
                above = above * -(j + 1) % PRIME
                below = below * (i - j) % PRIME
        secret = (secret + shares[i] * above * pow(below, -1, PRIME)) % PRIME
    if secret >= 1 << (8 * SECRET):
        raise ValueError("the shares do not belong together")
    return secret.to_bytes(SECRET, "big")
