"""The secret of a trust domain: who has it can take the noise away, and who has not cannot."""

from __future__ import annotations

import hashlib
import os
import secrets
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedpref.errors import UserError
from fedpref.numerics import files

BYTES = 32
FILE = ".secret"


class Secret:
    """32 bytes, from which all that a guarantee rests on is drawn by address.

    A stream is SHAKE-256 of the secret and the address (FIPS 202): without the secret it cannot be
    told from random bits, however much else is known.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != BYTES:
            raise ValueError(f"a secret has {BYTES} bytes, not {len(key)}")
        self._key = key

    def __repr__(self) -> str:
        return "Secret(...)"

    @staticmethod
    def of(folder: Path, *, is_over: bool = False) -> Secret:
        """Return a folder's secret, which only its owner may read; a new one where there is none.

        Args:
            folder: Where it lies, with the ledgers of what was drawn by it.
            is_over: Nothing more is drawn by it, so that it may have been forgotten.

        Raises:
            UserError: The file is no secret, others may read it, or it is gone.
        """
        file = folder / FILE
        if not file.exists():
            if not is_over and any(ledger.stat().st_size for ledger in folder.rglob("*.jsonl")):
                raise UserError(
                    f"{file}: the run's secret is gone, by which its noise and its cohorts were "
                    "drawn: what has been spent is not known. Put the file back; without it the "
                    "run cannot go on."
                )
            Secret._make(file)
        return Secret._read(file)

    @staticmethod
    def _make(file: Path) -> None:
        """Write a new secret, whole or not at all; another process's stays."""
        beside = None
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor, beside = tempfile.mkstemp(prefix=f"{FILE}.", dir=file.parent)
            with os.fdopen(descriptor, "wb") as opened:
                opened.write(secrets.token_bytes(BYTES))
                opened.flush()
                os.fsync(opened.fileno())
            try:
                os.link(beside, file)
            except FileExistsError:
                pass
            except OSError:  # a file system without links
                Path(beside).replace(file)
            files.sync(file.parent)
        except OSError as error:
            raise UserError(f"{file}: the run's secret cannot be written: {error}") from error
        finally:
            if beside is not None:
                Path(beside).unlink(missing_ok=True)

    @staticmethod
    def forget(folder: Path) -> None:
        """Remove a folder's secret: who keeps it keeps the noise."""
        for file in folder.glob(f"{FILE}*"):  # also one that a kill has left half-way
            file.unlink(missing_ok=True)

    @staticmethod
    def _read(file: Path) -> Secret:
        try:
            mode, key = file.stat().st_mode, file.read_bytes()
        except OSError as error:
            raise UserError(f"{file}: the run's secret cannot be read: {error}") from error
        if mode & 0o077:
            raise UserError(
                f"{file}: others may read the run's secret, and could take its noise away. "
                f"`chmod 600 {file}` if nobody has; otherwise begin the run anew."
            )
        if len(key) != BYTES:
            raise UserError(
                f"{file}: expected {BYTES} bytes, found {len(key)}. The run cannot go on with the "
                "noise that it had; begin it anew."
            )
        return Secret(key)

    def words(
        self,
        count: int,
        purpose: str,
        *,
        round: int = 0,
        call: int = 0,
        client: int = -1,
        attempt: int = 0,
    ) -> NDArray[np.uint64]:
        """Return 64-bit words of an address's stream [count].

        Args:
            count: How many.
            purpose: What they are for.
            round: From 0.
            call: The number of the verb within the round.
            client: The client's number; -1 for the coordinator.
            attempt: Of the same draw, where what it is added to has changed.
        """
        address = f"{purpose}/{round}/{call}/{client}/{attempt}".encode()
        stream = hashlib.shake_256(self._key + address).digest(8 * count)
        return np.frombuffer(stream, "<u8")

    def key_of(self, purpose: str) -> bytes:
        """Return a key of 32 bytes for a purpose, from which the secret cannot be found."""
        return self.words(4, f"key/{purpose}").tobytes()

    def digest(self, text: str) -> str:
        """Return a digest of a text that nobody can compute who has not the secret."""
        return hashlib.blake2b(
            text.encode(), key=self.key_of("digests"), digest_size=16
        ).hexdigest()

    def number(self, purpose: str, *, round: int = 0) -> int:
        """Return a 63-bit number, such as the root of a private run's draws."""
        return int(self.words(1, purpose, round=round)[0]) >> 1

    def generator(self, purpose: str, *, round: int = 0) -> torch.Generator:
        """Return a CPU generator whose draws nobody can repeat without the secret."""
        return torch.Generator().manual_seed(self.number(purpose, round=round))
