"""Properties of the wire: any split, any value, any bytes, any order of grants."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from demandport.errors import BadMessage, TypeMismatch
from demandport.wire.codec import Codec, EtfCodec, MsgpackCodec
from demandport.wire.credit import StreamWindow
from demandport.wire.framing import FrameDecoder, frame
from demandport.wire.messages import parse
from demandport.wire.outbox import Outbox
from demandport.wire.terms import LARGE, ErlangTerm

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
BINARY = st.binary(max_size=20).map(lambda data: b"\xff" + data)  # never UTF-8: ETF has one type for both
TERMS = st.sampled_from([ErlangTerm(b"\x83h\x02a\x01a\x02"), ErlangTerm(b"\x83w\x02ok")])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT | BINARY
VALUES = st.recursive(
    LEAVES | TERMS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=12
)
CODECS: list[Codec] = [MsgpackCodec(), EtfCodec()]
each_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)


@given(st.lists(st.binary(max_size=200), max_size=8), st.lists(st.integers(0, 1600), max_size=10))
def test_frames_survive_any_split(payloads: list[bytes], cuts: list[int]) -> None:
    stream, decoder, found, before = b"".join(map(frame, payloads)), FrameDecoder(), [], 0
    for cut in [*sorted(cut for cut in cuts if cut <= len(stream)), len(stream)]:
        found += decoder.feed(stream[before:cut])
        before = cut
    assert found == payloads and decoder.buffered_bytes == 0


@each_codec
@given(value=VALUES)
def test_values_return_unchanged(codec: Codec, value: Any) -> None:
    back = codec.decode(codec.encode(["ping", value]))
    assert back == ["ping", value] and repr(back) == repr(["ping", value])


def test_nan_returns() -> None:
    assert math.isnan(MsgpackCodec().decode(MsgpackCodec().encode(["a", math.nan]))[1])


@each_codec
@given(data=st.binary(max_size=300))
def test_random_bytes_are_a_message_or_refused(codec: Codec, data: bytes) -> None:
    for payload in (data, b"\x83" + data, b"\x83h\x02w\x04ping" + data, b"\x92\xa4ping" + data):
        with contextlib.suppress(BadMessage):
            parse(codec.decode(payload))


@each_codec
@given(value=VALUES, changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=5))
def test_mutated_messages_are_a_message_or_refused(codec: Codec, value: Any, changes: list[tuple[int, int]]) -> None:
    data = bytearray(codec.encode(["demand", 1, "s", value]))
    for position, byte in changes:
        data[position % len(data)] = byte
    with contextlib.suppress(BadMessage):
        parse(codec.decode(bytes(data)))


STEPS = st.lists(
    st.tuples(st.sampled_from(["text", "value"]), TEXT, st.sampled_from("pq"), st.booleans())
    | st.tuples(st.just("grant"), st.integers(1, 4)),
    max_size=40,
)


@given(steps=STEPS, credit=st.none() | st.integers(0, 3), coalescing=st.booleans(), size=st.integers(0, 10))
@example(steps=[("text", "a", "p", True), ("text", "b", "p", True)], credit=0, coalescing=False, size=0)
def test_a_window_loses_nothing_and_never_overdraws(
    steps: list[Any], credit: int | None, coalescing: bool, size: int
) -> None:
    window = StreamWindow(credit, coalesce_bytes=size, coalescing=coalescing)
    given_credit, sent, offered = credit, [], {"p": [], "q": []}
    for step in steps:
        if step[0] == "grant":
            window.grant(step[1])
            given_credit = None if given_credit is None else given_credit + step[1]
            sent += window.release(True, held=False)
        else:
            kind, text, port, room = step
            chunk = text if kind == "text" else {"v": text}
            if kind == "text" or not window.unwanted:  # values from before the first credit are not kept
                offered[port].append(chunk)
            now = window.offer("n", port, chunk, room)
            sent += [now] if now else []
        assert given_credit is None or len(sent) <= given_credit
    window.grant(1000)
    sent += window.release(True)
    assert not window.kept
    for port, chunks in offered.items():
        mine = [item for item in sent if item[1] == port]
        assert [seq for _, _, seq, _ in mine] == list(range(len(mine)))
        assert _flat([chunk for *_, chunk in mine]) == _flat(chunks)


def _flat(chunks: list[Any]) -> list[Any]:
    """The chunks with neighbouring text joined."""
    found: list[Any] = []
    for chunk in chunks:
        if isinstance(chunk, str) and found and isinstance(found[-1], str):
            found[-1] += chunk
        else:
            found.append(chunk)
    return [item for item in found if item != ""]


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 3), st.booleans()), max_size=25))
def test_an_outbox_delivers_each_message_whole_and_lanes_in_order(puts: list[tuple[int, int, bool]]) -> None:
    codec, outbox, frames = MsgpackCodec(), Outbox(MsgpackCodec(), 64), []
    for number, (size, lane, pump) in enumerate(puts):
        now = outbox.put(["m", number, lane, "x" * size], lane)
        frames += [now] if now else []
        frames += outbox.next_frames() if pump else []
    while more := outbox.next_frames():
        frames += more
    pieces: dict[int, bytes] = {}
    found = []
    for item in frames:
        message = codec.decode(item[4:])
        if message[0] == "part":
            pieces[message[1]] = pieces.get(message[1], b"") + message[3]
            if not message[2]:
                continue
            message = codec.decode(pieces.pop(message[1]))
        found.append(message)
    assert not pieces and outbox.waiting_bytes == 0
    assert sorted(message[1] for message in found) == list(range(len(puts)))
    for lane in (1, 2, 3):
        mine = [message[1] for message in found if message[2] == lane]
        assert mine == sorted(mine)
    assert all(len(message[3]) == puts[message[1]][0] for message in found)


# ------------------------------------------------------------------------------------------------ large values

LARGE_LEAVES = st.sampled_from(["x" * (LARGE + 1), "é" * (LARGE + 1), b"\xff\x00" * LARGE, "small", b"small", 1, None])


@given(
    st.recursive(
        LARGE_LEAVES,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=4,
    ),
    st.integers(1, 1 << 20),
)
@settings(max_examples=20)
def test_large_values_in_pieces_are_what_they_are_in_one(value: Any, size: int) -> None:
    codec = MsgpackCodec()
    message = ["demand_complete", "node", value, 7, {}]
    whole, pieces = codec.encode(message), codec.pieces(message)
    if isinstance(pieces, bytes):
        assert pieces == whole
        return
    assert pieces.size == len(whole)
    taken = list(iter(lambda: pieces.take(max(size, len(whole) // 50)), b""))
    assert b"".join(taken) == whole
    assert len({len(one) for one in taken[:-1]}) <= 1, "every piece but the last is as long as was asked for"


def test_a_large_text_that_cannot_travel_is_refused_in_pieces_too() -> None:
    with pytest.raises(TypeMismatch):
        MsgpackCodec().pieces(["demand_complete", "node", {"text": "x" * (LARGE + 1) + "\ud800"}, 7, {}])
