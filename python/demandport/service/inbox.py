"""What the host has sent and nobody has handled yet; the one place where the loop and the watchdog's thread meet.

The loop takes messages in and handles them in order. While it stands, the watchdog's thread reads in its place: it gets
the ids of the pings, to answer them, and all else is kept for the loop. Each ping is answered by one of the two.
"""

from __future__ import annotations

import threading
from collections import deque
from itertools import chain
from typing import Any

from demandport.wire.connection import Connection
from demandport.wire.messages import Ping

#: As much as this the thread reads and keeps for a loop that stands; then it leaves the rest in the pipe. A frame that
#: is not complete yet does not count.
KEPT_BYTES = 4 << 20
#: Of what was kept, about as many messages as one read may bring come back at once, so that the loop turns in between.
TURN_MESSAGES = 4096


class Inbox:
    """Messages in the order of the pipe.

    `take` and `keep` must never run at the same time: the reader's lock sees to that. All else needs no lock, since
    adding to one end of a deque and taking from the other are single steps.

    Attributes:
        read: what the loop handles next; it takes from the left.
        kept: what comes after that, as (messages, bytes) of one read each; empty unless the loop has stood.
        taken: how often the loop has taken something in.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.read: deque[Any] = deque()
        self.kept: deque[tuple[list[Any], int]] = deque()
        self.taken = 0
        self._kept_bytes = self._given_back_bytes = 0
        self._answering = threading.Lock()
        #: Pings that the thread has answered and the loop has still to pass by; by identity, since the host may use
        #: their ids again.
        self._answered: set[int] = set()

    # ------------------------------------------------------------------------------------ for the loop

    def take(self, data: bytes) -> None:
        """Take in what the loop has read."""
        self.taken += 1
        events = self._connection.receive(data)
        if self.kept:
            self._keep(events, len(data))
        else:
            self.read.extend(events)

    def give_back(self) -> None:
        """Move some of what was kept behind what is handled next."""
        while self.kept and len(self.read) < TURN_MESSAGES:
            events, size = self.kept.popleft()
            self.read.extend(events)
            self._given_back_bytes += size

    def claim(self, ping: Ping) -> bool:
        """Whether the loop is to answer this ping, which it has taken from `read`."""
        with self._answering:
            if id(ping) in self._answered:
                self._answered.remove(id(ping))
                return False
        return True

    # ------------------------------------------------------------------------------------ for the thread

    @property
    def full(self) -> bool:
        """So much is kept that no more should be read."""
        return self._kept_bytes - self._given_back_bytes >= KEPT_BYTES

    def keep(self, data: bytes) -> list[int]:
        """Take in what was read in the loop's place; returns the ids of the pings in it, to be answered at once."""
        before = self._connection.buffered_bytes
        events = self._connection.receive(data)
        others = [event for event in events if type(event) is not Ping]
        if others:
            self._keep(others, before + len(data) - self._connection.buffered_bytes)
        return self._finished([event for event in events if type(event) is Ping])

    def standing_pings(self) -> list[int]:
        """The ids of the pings that were read and not handled, to be answered at once; each comes only once."""
        with self._answering:
            kept = list(self.kept)  # first: what the loop moves on meanwhile is then seen twice rather than never
            standing = chain(list(self.read), *(events for events, _ in kept))
            found = {id(event): event for event in standing if type(event) is Ping and id(event) not in self._answered}
            self._answered.update(found)
        return self._finished(list(found.values()))

    def _keep(self, events: list[Any], size: int) -> None:
        self.kept.append((events, size))
        self._kept_bytes += size

    def _finished(self, pings: list[Ping]) -> list[int]:
        for ping in pings:
            self._connection.finish(ping.id)
        return [ping.id for ping in pings]
