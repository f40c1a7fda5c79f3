"""A host that records what it sends and receives, and has the history checker judge it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from history import Entry, Fact, Judge, Received, Sent
from support import TIMEOUT_S, Ended, ServiceProcess, framed

#: Of a history this much is kept, to be shown when something is wrong.
KEPT = 3000
SHOWN = 40
#: What `interop/relay.exs` says when the service has ended.
TOLD_OF_THE_END = ("exit_status", "port_closed")


class Recorder(ServiceProcess):
    """A `ServiceProcess` whose messages are judged as they come and go. Takes the same arguments.

    Attributes:
        judge: what judges them.
        history: the latest entries.
    """

    def __init__(self, *arguments: str, **options: Any) -> None:
        self.judge = Judge()
        self.history: deque[Entry] = deque(maxlen=KEPT)
        super().__init__(*arguments, **options)

    def record(self, entry: Entry) -> None:
        """Take an entry: of a message, or of something that the test did to a process."""
        self.judge.note(entry)
        self.history.append(entry)
        assert not self.judge.found, self.shown()

    def send(self, *messages: list[Any]) -> None:
        for message in messages:
            self.record(Sent(message))
        super().send(*messages)

    def send_payload(self, payload: bytes) -> None:
        """Send a frame that holds no message."""
        self.record(Sent(None))
        self.write(framed(payload))

    def heard(self, message: list[Any], size: int, number: int | None = None) -> None:
        told = message[0] in TOLD_OF_THE_END
        self.record(Fact("ended") if told else Received(message, size, number))

    def receive(self, timeout_s: float = TIMEOUT_S, *, logs: bool = False) -> list[Any]:
        try:
            return super().receive(timeout_s, logs=logs)
        except Ended:
            raise Ended(f"its exit status is {self.wait()}; it said:\n{self.stderr()}\n{self.shown()}") from None
        except TimeoutError as failed:
            waiting = "\n".join(map(str, self.judge.waiting))
            raise TimeoutError(f"{failed}; these are open:\n{waiting}\n{self.shown()}") from None

    def hear_until(self, condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> list[list[Any]]:
        """Receive until a condition of the judge's holds; returns the messages."""
        found = []
        while not condition():
            found.append(self.receive(timeout_s))
        return found

    def settle(self, timeout_s: float = TIMEOUT_S) -> list[list[Any]]:
        """Receive until everything that was asked is answered; returns the messages."""
        return self.hear_until(lambda: self.judge.settled, timeout_s)

    def hear_the_end(self) -> list[list[Any]]:
        """Receive until the service says goodbye or closes its output, or a BEAM in between tells of its end."""
        found = []
        try:
            while not self.judge.over:
                found.append(self.receive())
        except Ended:
            self.record(Fact("ended"))
        return found

    def verdict(self) -> None:
        """Fail unless every promise was kept; what is unanswered now counts as broken."""
        if not self.judge.settled:
            self.settle()
        self.says_nothing_more()
        assert not self.judge.finish(), self.shown()

    def shown(self) -> str:
        """What was broken, and the entries before it."""
        broken = "\n".join(f"{v.index} {v.rule}: {v.text}" for v in self.judge.found)
        return f"{broken}\n" + "\n".join(f"{entry!r:.200}" for entry in [*self.history][-SHOWN:])
