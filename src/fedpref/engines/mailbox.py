"""What other sites' clients have told, until the exchange that it is for."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection

from fedpref.engines.messages import RefusedError, head_of

AHEAD = 4  # messages of a site that may lie here unread


class Mailbox:
    """Messages by round, call and sender; threads may put and wait at once."""

    def __init__(self) -> None:
        self._messages: dict[tuple[int, int, str], bytes] = {}
        self._news = threading.Condition()

    def __len__(self) -> int:
        return len(self._messages)

    def put(self, sender: str, message: bytes) -> None:
        """Take a message; one that does not say what it is for is dropped."""
        try:
            # the header alone; tensors are read by the exchange that waits for them
            header = head_of(message)
            address = (int(header["round"]), int(header["call"]), sender)
        except (RefusedError, KeyError, TypeError, ValueError, OverflowError):
            return  # the exchange counts the sender as missing
        with self._news:
            self._messages[address] = message
            # a site that runs ahead, or sends nonsense, must not fill the memory here
            for older in sorted(known for known in self._messages if known[2] == sender)[:-AHEAD]:
                del self._messages[older]
            self._news.notify_all()

    def wait(
        self, sites: Collection[str], round: int, call: int, seconds: float
    ) -> dict[str, bytes]:
        """Return what sites have sent for an exchange, by site.

        It returns as soon as all are there or the time is over, and forgets what is older.
        """
        addresses = {(round, call, site) for site in sites}
        until = time.monotonic() + seconds
        with self._news:
            while not addresses <= self._messages.keys() and (left := until - time.monotonic()) > 0:
                self._news.wait(left)
            found = {
                address[2]: self._messages[address]
                for address in sorted(addresses & self._messages.keys())
            }
            self._messages = {
                address: message
                for address, message in self._messages.items()
                if address[:2] > (round, call)
            }
        return found

    def clear(self) -> None:
        """Forget all messages."""
        with self._news:
            self._messages.clear()
