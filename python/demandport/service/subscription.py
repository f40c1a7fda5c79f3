"""A session's events on their way to the host, no faster than it reads them."""

from __future__ import annotations

from demandport.engine.events import EventLog, wanted
from demandport.service.streams import Way


class Subscription:
    """Sends the events of a session from one number on.

    While the host does not read, nothing is sent; what is no longer kept when it reads again is told as one event
    `missed` with their `count`.
    """

    def __init__(self, out: Way, session: str, log: EventLog, since: int, kinds: list[str] | None) -> None:
        self._out, self._session, self._log = out, session, log
        self._kinds = None if kinds is None else frozenset(kinds)
        self._at = since
        self._waiting = False
        log.on_event = self.send

    def send(self) -> None:
        """Send what there is, as far as there is room."""
        log = self._log
        while self._at < log.next and not self._waiting:
            if not self._out.has_room():
                self._waiting = True
                self._out.on_room(self._has_room)
                return
            if self._at < log.first:
                missed = {"event": "missed", "node": None, "seq": log.first - 1, "count": log.first - self._at}
                self._at = log.first
                self._out.send(["node_event", self._session, missed])
                continue
            event = log.get(self._at)
            self._at += 1
            if wanted(event, self._kinds):
                self._out.send(["node_event", self._session, event])

    def close(self) -> None:
        """Send no more; the events are kept all the same."""
        self._log.on_event = None
        self._at = 1 << 64

    def _has_room(self) -> None:
        self._waiting = False
        self.send()
