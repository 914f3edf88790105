"""What a site's clients tell those of other sites, and hear from them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from fedpref.channel import Chain
from fedpref.channel.compression import alike
from fedpref.engines.host import Peers
from fedpref.engines.mailbox import Mailbox
from fedpref.engines.messages import RefusedError, finite, pack, unpack
from fedpref.numerics import trees
from fedpref.numerics.trees import Tree


class Neighbours:
    """A site's exchanges with the other sites of a run.

    Args:
        name: The site's.
        peers: Its way to the others.
        mailbox: Where what they send lies until its exchange.
        site_of: Each client's site.
        links: What values pass on their way.
        most: Bytes of a message, at most; None for any.
    """

    def __init__(
        self,
        name: str,
        peers: Peers,
        mailbox: Mailbox,
        site_of: Mapping[int, str],
        links: Chain,
        most: int | None,
    ) -> None:
        self._name, self._peers, self._mailbox = name, peers, mailbox
        self._site_of, self._links, self._most = site_of, links, most

    def exchange(
        self,
        told: Mapping[int, Tree],
        weights: Mapping[int, Mapping[int, float]],
        round: int,
        call: int,
        seconds: float,
    ) -> dict[int, Tree]:
        """Tell the others what clients here say, wait for theirs, and return what was heard.

        Args:
            told: Messages of clients here, encoded.
            weights: By hearer, by who is heard; of clients at all sites.
            round: From 0.
            call: The number of the verb within the round.
            seconds: To wait at most.

        Returns:
            By client at another site, what it says; who was not heard in time, or cannot be read,
            is not there.
        """
        self._send(told, weights, round, call)
        heard = {self._site_of[j] for i in told for j in weights[i] if j not in told}
        messages = self._mailbox.wait(heard - {self._name}, round, call, seconds)
        return self._read(messages, next(iter(told.values())))

    def _send(
        self,
        told: Mapping[int, Tree],
        weights: Mapping[int, Mapping[int, float]],
        round: int,
        call: int,
    ) -> None:
        """Send each other site what its clients are to hear of those here."""
        for site in set(self._site_of.values()) - {self._name}:
            heard = {i for j, row in weights.items() if self._site_of[j] == site for i in row}
            if message := {i: tree for i, tree in told.items() if i in heard}:
                self._peers.tell(site, pack({"round": round, "call": call}, trees.nest(message)))

    def _read(self, messages: Mapping[str, bytes], like: Tree) -> dict[int, Tree]:
        """Return what other sites' clients have told, by client; it is like what is told here."""
        heard: dict[int, Tree] = {}
        for site, message in messages.items():
            with suppress(RefusedError):
                _, theirs = unpack(message, self._most)
                for j in (j for j, other in self._site_of.items() if other == site):
                    with suppress(Exception):  # whatever the neighbour has made up
                        tree = trees.part(theirs, j)
                        if alike(tree, like):
                            heard[j] = finite(self._links.decode(tree, 1))
        return heard
