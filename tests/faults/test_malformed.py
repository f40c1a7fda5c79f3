"""Messages that are wrong in every place, and frames that are no messages: each is answered, and none does harm."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from demandport.errors import DemandportError
from demandport.wire.codec import Codec
from malformed import GRAPH, MESSAGES, ODD, all_wrong, bend
from support import ServiceProcess, count, framed

CODECS = ["msgpack", "etf"]


@pytest.fixture(scope="module", params=CODECS)
def host(request: pytest.FixtureRequest) -> Iterator[ServiceProcess]:
    """A service with a session that the messages name, and one that they do not."""
    with ServiceProcess("--codec", request.param) as service:
        for session in ("named", "untouched"):
            assert service.request("open", session, GRAPH)[0] == "ok"
        yield service


def answers(host: ServiceProcess, payloads: list[bytes]) -> Counter[str]:
    """Send frames; returns how many were answered by which code. None is a bug of the service's, and a good one after
    them is answered."""
    good = host.new_id()
    host.write(b"".join(map(framed, [*payloads, host.codec.encode(["ping", good])])))
    silent = sum(is_credit(host.codec, payload) for payload in payloads)
    found: Counter[str] = Counter()
    bugs, ponged = [], False
    while not ponged or found.total() < len(payloads) - silent:
        message = host.receive(logs=True)
        if message[:2] == ["ok", good]:
            ponged = True
        elif message[0] in ("ok", "demand_complete"):
            found["ok"] += 1
        elif message[0] in ("error", "demand_error"):
            found[message[2]["code"]] += 1
        elif message[0] == "log" and message[1] not in ("info", "warning"):
            bugs.append(message)
    last = host.new_id()
    host.send(["ping", last])
    late = host.until(lambda message: message == ["ok", last, "pong"])[:-1]
    assert all(message[0] == "node_event" for message in late), late  # one of them may have subscribed
    assert not bugs and not found["internal"] and found.total() <= len(payloads)
    assert host.request("demand", "untouched", "b")[2] == {"text": "<x>"}
    return found


def is_credit(codec: Codec, payload: bytes) -> bool:
    """Whether it need not be answered."""
    try:
        return codec.decode(payload)[0] == "credit"
    except (DemandportError, IndexError):
        return False


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message[0])
def test_a_message_that_is_wrong_in_any_place_is_answered(host: ServiceProcess, message: list[Any]) -> None:
    wrong = [host.codec.encode(bent) for bent in all_wrong(message, host.new_id)]
    assert answers(host, wrong)["bad_message"]


def test_an_operation_that_is_none_is_a_bad_message(host: ServiceProcess) -> None:
    wrong = [["edit", host.new_id(), "named", [{"op": odd, "node": "a"}]] for odd in ODD]
    assert answers(host, [host.codec.encode(message) for message in wrong]) == {"bad_message": len(wrong)}


def test_random_and_bent_frames_are_answered(host: ServiceProcess) -> None:
    rng = random.Random(5)
    good = [host.codec.encode(message) for message in MESSAGES]
    left, found = count(3_000, 5_000_000), Counter()
    while left:
        left -= (number := min(left, 500))
        random_ones = [rng.randbytes(rng.randrange(60)) for _ in range(number // 5)]
        bent = [bend(rng, rng.choice(good), rng.choice(good)) for _ in range(number - len(random_ones))]
        # A credit may be answered and need not be: beside what is answered late, nothing could be counted.
        credits, others = [], []
        for payload in random_ones + bent:
            (credits if is_credit(host.codec, payload) else others).append(payload)
        found += answers(host, others) + answers(host, credits)
    assert found["bad_message"] and found["bad_frame"] and found["ok"]
