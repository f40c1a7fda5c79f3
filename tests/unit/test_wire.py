"""The wire's promises without I/O: frames, values, messages, credit, parts, and the connection's states."""

from __future__ import annotations

import gc
import struct
from typing import Any

import pytest

from demandport.errors import BadFrame, BadMessage, DemandportError, TooLarge, TypeMismatch
from demandport.wire import messages as m
from demandport.wire.codec import Codec, EtfCodec, MsgpackCodec, codec_named
from demandport.wire.connection import Connection, Farewell, Refused
from demandport.wire.credit import StreamWindow
from demandport.wire.framing import FrameDecoder, frame
from demandport.wire.outbox import Outbox
from demandport.wire.terms import ErlangTerm

PAYLOADS = [b"a", b"", b"\0" * 300, b"xyz"]
STREAM = b"".join(map(frame, PAYLOADS))
CODECS = [MsgpackCodec(), EtfCodec()]
each_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)


# ----------------------------------------------------------------------------------------------- frames


def test_a_byte_at_a_time() -> None:
    decoder = FrameDecoder()
    assert [item for byte in STREAM for item in decoder.feed(bytes([byte]))] == PAYLOADS
    assert decoder.buffered_bytes == 0


def test_every_split_in_two() -> None:
    for at in range(len(STREAM) + 1):
        decoder = FrameDecoder()
        assert decoder.feed(STREAM[:at]) + decoder.feed(STREAM[at:]) == PAYLOADS


@pytest.mark.parametrize("length", [65, 1 << 31, (1 << 32) - 1])
def test_a_length_over_the_limit_keeps_nothing_and_hands_over_what_came_before(length: int) -> None:
    decoder = FrameDecoder(64)
    with pytest.raises(BadFrame) as caught:
        decoder.feed(frame(b"good") + struct.pack(">I", length) + b"x" * 1000)
    assert caught.value.details and caught.value.details["frames"] == [b"good"]
    assert decoder.buffered_bytes == 0


# ----------------------------------------------------------------------------------------------- values


@each_codec
@pytest.mark.parametrize("value", [{1}, object(), 1j, "\ud800", {"\udfff": 1}, int, [range(3)]], ids=repr)
def test_what_cannot_travel_is_a_type_mismatch(codec: Codec, value: Any) -> None:
    with pytest.raises(TypeMismatch):
        codec.encode(["ok", 1, value])


@each_codec
@pytest.mark.parametrize("key", [1, None, b"k", 1.5], ids=repr)
def test_a_key_that_is_no_string_does_not_travel(codec: Codec, key: Any) -> None:
    with pytest.raises(TypeMismatch):
        codec.encode(["ok", 1, {key: 1}])


@each_codec
def test_what_the_peer_must_refuse_for_its_depth_does_not_travel(codec: Codec) -> None:
    value: Any = 0
    for _ in range(150):
        value = [value]
    with pytest.raises(TypeMismatch):
        codec.encode(["ok", 1, value])


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_etf_reads_the_infinities_that_it_writes(value: float) -> None:
    assert EtfCodec().decode(EtfCodec().encode(["ping", value])) == ["ping", value]


def test_every_ext_code_but_69_is_refused() -> None:
    for code in range(256):
        payload = b"\x92\xa4ping\xd5" + bytes([code]) + b"\x83j"
        if code == 69:
            assert MsgpackCodec().decode(payload)[1] == ErlangTerm(b"\x83j")
        else:
            with pytest.raises(BadMessage):
                MsgpackCodec().decode(payload)


@pytest.mark.parametrize("header", [b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9"])
@pytest.mark.parametrize("length", [b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"])
def test_a_length_that_the_bytes_do_not_hold_is_refused(header: bytes, length: bytes) -> None:
    with pytest.raises(BadMessage):
        MsgpackCodec().decode(b"\x91" + header + length + b"\x45" * 20)


@each_codec
def test_depth_bombs_are_refused(codec: Codec) -> None:
    bomb = b"\x91" * (256 << 10) if codec.name == "msgpack" else b"\x83h\x02w\x04ping" + b"l\0\0\0\1" * 50_000
    with pytest.raises(BadMessage):
        codec.decode(bomb)


def test_a_compressed_term_is_refused() -> None:
    import zlib

    body = zlib.compress(b"h\x02w\x04ping" + b"m" + struct.pack(">I", 1 << 20) + bytes(1 << 20))
    with pytest.raises(BadMessage):
        EtfCodec().decode(b"\x83P" + struct.pack(">I", (1 << 20) + 12) + body)


@each_codec
def test_a_codec_is_found_by_its_name(codec: Codec) -> None:
    assert codec_named(codec.name).name == codec.name


# --------------------------------------------------------------------------------------------- messages

GOOD: dict[str, list[Any]] = {
    "hello": [1, {"protocol": [1, 1]}],
    "open": [1, "s", {"nodes": []}, {}],
    "close": [1, "s"],
    "snapshot": [1, "s"],
    "edit": [1, "s", []],
    "get_output": [1, "s", "n", "p"],
    "demand": [1, "s", "n", {}],
    "demand_many": [1, "s", ["n"], {"mode": "race"}],
    "subscribe": [1, "s", {"since": 0, "kinds": ["task_progress"]}],
    "unsubscribe": [1, "s"],
    "answer": [1, "ok", {}],
    "answer_stream": [1, "chunk", "port"],
    "cancel": [1, 2],
    "credit": [1, 2],
    "validate": [1, {}],
    "node_types": [1, None],
    "models": [1],
    "load_model": [1, {"model": "tiny"}],
    "unload_model": [1, "tiny"],
    "health": [1],
    "ping": [1],
    "drain": [1, 0],
}
#: Fields that take any value.
FREE = {("answer", "value"), ("answer_stream", "chunk")}
BAD_VALUES = [object(), -1, 1.5, b"x", [object()], ["x"], True]


def test_the_table_of_good_messages_has_every_kind() -> None:
    assert GOOD.keys() == m.SHAPES.keys()


@pytest.mark.parametrize("kind", GOOD)
def test_a_good_message_is_read(kind: str) -> None:
    assert m.parse([kind, *GOOD[kind]])


@pytest.mark.parametrize("kind", GOOD)
def test_a_wrong_field_is_named(kind: str) -> None:
    for index, (name, check) in enumerate(m.SHAPES[kind][1]):
        refused = 0
        for bad in BAD_VALUES:
            fields = list(GOOD[kind])
            fields[index] = bad
            try:
                check(name, bad)
            except BadMessage:
                refused += 1
                with pytest.raises(BadMessage, match=name):
                    m.parse([kind, *fields])
        assert refused >= 3 or (kind, name) in FREE, (kind, name)


@pytest.mark.parametrize("kind", GOOD)
def test_a_message_of_the_wrong_length_is_refused(kind: str) -> None:
    for fields in ([], [*GOOD[kind], 1], [*GOOD[kind], {}, {}]):
        with pytest.raises(BadMessage, match=kind):
            m.parse([kind, *fields])


OPTIONS = [
    ("open", "max_running", [0, 100_001, "1", 1.0, True, None]),
    ("open", "max_queued", [-1, "1", None]),
    ("demand", "deadline_ms", [-1, "1", 1.5, True]),
    ("demand", "credit", [-1, 1 << 64, "1", True]),
    ("demand", "priority", [101, -101, None]),
    ("demand", "events", [1, None, "true"]),
    ("demand", "coalesce_ms", [-1, 60_001, None]),
    ("demand", "coalesce_bytes", [-1, "1"]),
    ("hello", "protocol", [None, [1], [2, 1], ["1", 1], 1]),
    ("hello", "client", [1, None]),
    ("hello", "max_frame_bytes", [0, 4095, "1"]),
    ("hello", "part_bytes", [0, 4095, "1"]),
    ("hello", "features", [{}, "x"]),
    ("load_model", "model", ["", 1, None]),
    ("load_model", "context_length", [0, "1"]),
    ("load_model", "gpu_layers", [-2, None]),
    ("load_model", "threads", [0, 1025]),
]


@pytest.mark.parametrize(("kind", "option", "bad"), [(k, o, b) for k, o, values in OPTIONS for b in values], ids=repr)
def test_a_wrong_option_is_named(kind: str, option: str, bad: Any) -> None:
    fields = [*GOOD[kind][:-1], GOOD[kind][-1] | {option: bad}]
    with pytest.raises(BadMessage, match=option):
        m.parse([kind, *fields])


@pytest.mark.parametrize("kind", ["open", "demand", "hello", "load_model"])
def test_an_unknown_option_is_named(kind: str) -> None:
    with pytest.raises(BadMessage, match="creditt"):
        m.parse([kind, *GOOD[kind][:-1], GOOD[kind][-1] | {"creditt": 1}])


@pytest.mark.parametrize("id", [0, -1, 1 << 64, "1", 1.0, True, None], ids=repr)
def test_an_id_is_64_bits_and_not_0(id: Any) -> None:
    with pytest.raises(BadMessage, match="id"):
        m.parse(["ping", id])
    assert m.readable_id(["ping", id]) == 0


@pytest.mark.parametrize("kind", ["nonsense", "", 1, None, b"ping", [], {}], ids=repr)
def test_an_unknown_kind_is_refused(kind: Any) -> None:
    with pytest.raises(BadMessage):
        m.parse([kind, 1])


# ------------------------------------------------------------------------------------------- connection


def _connection(*messages: list[Any]) -> list[Any]:
    return Connection(MsgpackCodec(), 1024).receive(b"".join(frame(MsgpackCodec().encode(item)) for item in messages))


def test_an_id_in_use_is_refused_and_free_once_finished() -> None:
    connection = Connection(MsgpackCodec(), 1024)
    ping = frame(MsgpackCodec().encode(["ping", 7]))
    first, second = connection.receive(ping + ping)
    assert type(first) is m.Ping and type(second) is Refused and second.id == 7
    connection.finish(7)
    assert type(connection.receive(ping)[0]) is m.Ping


def test_hello_must_be_first() -> None:
    _, late = _connection(["ping", 1], ["hello", 2, {"protocol": [1, 1]}])
    assert type(late) is Refused and late.error.code == "bad_message"


def test_after_goodbye_nothing_is_read() -> None:
    events = _connection(["hello", 1, {"protocol": [2, 3]}], ["ping", 2])
    assert type(events[-1]) is Farewell and events[-1].status == 65
    assert not any(type(event) is m.Ping for event in events)


def test_malformed_messages_cost_themselves_alone() -> None:
    connection = Connection(MsgpackCodec(), 1024)
    bad = [b"", b"\xc1", b"\x90", b"\xa1x", MsgpackCodec().encode(["ping", 9, 9])]
    events = connection.receive(b"".join(map(frame, bad)) + frame(MsgpackCodec().encode(["ping", 1])))
    assert [event.id for event in events] == [0, 0, 0, 0, 9, 1]
    assert all(type(event) is Refused for event in events[:-1])


def test_what_is_refused_is_free_at_once() -> None:
    connection = Connection(MsgpackCodec(), 1024)
    bad = [b"", b"\xc1", b"\xa1x", b"\x91\xa1\xff", MsgpackCodec().encode(["ping", 9, 9])]
    gc.collect()
    gc.disable()
    try:
        refused = connection.receive(b"".join(map(frame, bad)))
        assert len(refused) == len(bad)
        del refused
        assert gc.collect() == 0, "the garbage collector has found what nobody needs any more"
    finally:
        gc.enable()


def test_a_frame_over_the_limit_is_the_end() -> None:
    connection = Connection(MsgpackCodec(), 1024)
    good, end = connection.receive(frame(MsgpackCodec().encode(["ping", 1])) + struct.pack(">I", 1025))
    assert type(good) is m.Ping and type(end) is Farewell and isinstance(end.error, BadFrame)
    assert connection.receive(frame(MsgpackCodec().encode(["ping", 2]))) == []


# ----------------------------------------------------------------------------------------------- credit


def test_values_other_than_text_make_their_producer_wait() -> None:
    window = StreamWindow(1)
    assert window.offer("n", "p", {"a": 1}, True) == ("n", "p", 0, {"a": 1})
    assert not window.full
    assert window.offer("n", "p", {"a": 2}, True) is None and window.full
    window.grant(1)
    assert window.release(True) == [("n", "p", 1, {"a": 2})] and not window.full


def test_text_kept_without_credit_holds_up_who_can_be_held_up() -> None:
    window = StreamWindow(1)
    assert window.offer("n", "p", "a", True) and not window.full
    assert window.offer("n", "p", "b", True) is None and window.full
    window.grant(1)
    assert window.release(True) == [("n", "p", 1, "b")] and not window.full


@pytest.mark.parametrize("window", [StreamWindow(0), StreamWindow(None, coalescing=True)])
def test_text_that_waits_for_no_credit_holds_nobody_up(window: StreamWindow) -> None:
    for _ in range(3):
        window.offer("n", "p", "a", True)
    assert window.kept and not window.full


def test_text_kept_without_credit_lies_in_few_pieces() -> None:
    window = StreamWindow(1)
    assert window.offer("n", "p", "first", True)
    for number in range(10_000):
        assert window.offer("n", "p", f"{number} ", True) is None
    assert len(window._kept["n", "p"]) < 20
    window.grant(1)
    assert window.release(True) == [("n", "p", 1, "".join(f"{number} " for number in range(10_000)))]


def test_values_make_their_producer_wait_with_coalescing_too() -> None:
    window = StreamWindow(0, coalescing=True)
    window.grant(1)
    window.offer("n", "p", 1, True)
    window.offer("n", "p", 2, True)
    assert window.full


def test_text_is_held_back_until_it_is_large() -> None:
    window = StreamWindow(None, coalescing=True, coalesce_bytes=4)
    assert window.offer("n", "p", "a", True) == ("n", "p", 0, "a")  # the first goes at once
    assert window.offer("n", "p", "bc", True) is None and window.release(True, held=False) == []
    assert window.offer("n", "p", "de", True) is None
    assert window.release(True, held=False) == [("n", "p", 1, "bcde")]


# ----------------------------------------------------------------------------------------------- outbox


def _drained(outbox: Outbox) -> list[list[Any]]:
    found = []
    while frames := outbox.next_frames():
        found += [MsgpackCodec().decode(item[4:]) for item in frames]
    assert outbox.waiting_bytes == 0
    return found


def _joined(messages: list[list[Any]]) -> list[list[Any]]:
    pieces: dict[int, bytes] = {}
    found = []
    for message in messages:
        if message[0] != "part":
            found.append(message)
            continue
        pieces[message[1]] = pieces.get(message[1], b"") + message[3]
        if message[2]:
            found.append(MsgpackCodec().decode(pieces.pop(message[1])))
    assert not pieces
    return found


def test_a_small_message_does_not_wait_behind_a_large_one() -> None:
    outbox = Outbox(MsgpackCodec(), 100)
    assert outbox.put(["ok", 1, "x" * 1000]) is None
    assert outbox.put(["ok", 2, None]) is not None
    assert outbox.put(["node_stream", 1], 5) is not None


def test_a_lane_keeps_its_order() -> None:
    outbox = Outbox(MsgpackCodec(), 100)
    messages = [["a", "x" * 1000], ["b", 1], ["c", "y" * 500], ["d", 2]]
    assert [outbox.put(message, 9) for message in messages] == [None] * 4
    assert _joined(_drained(outbox)) == messages
    assert outbox.put(["e"], 9) is not None


def test_large_messages_take_turns() -> None:
    outbox = Outbox(MsgpackCodec(), 100)
    outbox.put(["a", "x" * 5000])
    outbox.put(["b", "y" * 150])
    parts = _drained(outbox)
    assert [part[1] for part in parts[:4]] == [1, 2, 1, 2]
    assert [message[0] for message in _joined(parts)] == ["b", "a"]
    assert all(len(part[3]) <= 100 for part in parts)


def test_a_message_of_exactly_the_part_size_is_whole() -> None:
    outbox = Outbox(MsgpackCodec(), 100)
    fits = ["a", "x" * (100 - len(MsgpackCodec().encode(["a", "x" * 50])) + 50)]
    assert len(MsgpackCodec().encode(fits)) == 100
    assert outbox.put(fits) is not None


def test_what_the_peer_does_not_accept_is_too_large_and_nothing_of_it_leaves() -> None:
    outbox = Outbox(MsgpackCodec(), 100)
    outbox.max_bytes = 2000
    for large in ("x" * 2000, b"x" * (1 << 20), "ä" * (1 << 20)):
        with pytest.raises(TooLarge) as refused:
            outbox.put(["a", large], 9)
        assert refused.value.details["max_frame_bytes"] == 2000 < refused.value.details["bytes"]
    assert (outbox.waiting_bytes, outbox.next_frames()) == (0, [])
    outbox.put(["a", "x" * 1990], 9)
    assert _joined(_drained(outbox)) == [["a", "x" * 1990]]


def test_every_error_has_its_wire_form() -> None:
    from demandport.errors import BY_CODE, from_wire

    for code, cls in BY_CODE.items():
        back = from_wire(cls("m", node="n", details={"a": 1}).to_wire())
        assert (type(back), back.code, back.message, back.node) == (cls, code, "m", "n")
    assert isinstance(from_wire({"code": "new"}), DemandportError)
