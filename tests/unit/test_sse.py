"""Server-sent events and lines: what the specification says, wherever the bytes are split."""

from __future__ import annotations

import codecs
import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from demandport.errors import TooLarge
from demandport.inference.sse import EventStream, Lines, ServerSentEvent

ENDS = ["\n", "\r", "\r\n"]
texts = st.text(st.characters(exclude_characters="\r\n", codec="utf-8"), max_size=12)
raw_lines = st.one_of(
    texts,
    st.builds("{}:{}".format, st.sampled_from(["data", "event", "id", "retry", "", "other"]), texts),
    st.builds("{}: {}".format, st.sampled_from(["data", "event", "id", "retry", "", "other"]), texts),
    st.sampled_from(["", "", "data", "data:", ":", ": ping", "data: [DONE]", "id"]),
)
streams = st.lists(st.tuples(raw_lines, st.sampled_from(ENDS)), max_size=12)


def reference(lines: list[str]) -> list[ServerSentEvent]:
    """The specification's own steps, over whole lines."""
    found, data, event, last_id = [], "", "", ""
    for line in lines:
        if line == "":
            if data:
                found.append(ServerSentEvent(data.removesuffix("\n"), event or "message", last_id))
            data, event = "", ""
            continue
        if line.startswith(":"):
            continue
        name, value = line.split(":", 1) if ":" in line else (line, "")
        value = value[1:] if value.startswith(" ") else value
        if name == "data":
            data += value + "\n"
        elif name == "event":
            event = value
        elif name == "id" and "\0" not in value:
            last_id = value
    return found


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:end] for start, end in itertools.pairwise(places)]


def all_events(parts: list[bytes]) -> list[ServerSentEvent]:
    stream = EventStream()
    return [event for part in parts for event in stream.feed(part)]


@given(streams, st.lists(st.integers(0, 500), max_size=8), st.booleans())
@example([("data: é", "\r\n"), ("", "\r\n")], [7, 8, 9, 10], True)
@example([("data: a", "\r"), ("", "\n"), ("", "\n")], [8], False)
def test_events_are_those_of_the_specification_wherever_the_bytes_are_split(stream, cuts, mark):
    text = "".join(line + end for line, end in stream)
    data = (codecs.BOM_UTF8 if mark else b"") + text.encode()
    # A CR that ends one line and an LF that is an empty one read as one end: so the reference reads the text.
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    expected = reference(text.split("\n")[:-1])
    if not mark and text.startswith("\ufeff"):
        expected = reference(text[1:].split("\n")[:-1])
    assert all_events([data]) == expected
    assert all_events([data[place : place + 1] for place in range(len(data))]) == expected
    assert all_events(pieces(data, cuts)) == expected


def test_an_event_is_handed_out_at_the_first_byte_that_ends_it():
    for end in ENDS:
        stream = EventStream()
        body = f"data: [DONE]{end}{end}".encode()
        first = len(body) - (end == "\r\n")
        assert stream.feed(body[: first - 1]) == []
        assert [event.data for event in stream.feed(body[first - 1 : first])] == ["[DONE]"]
        assert stream.feed(body[first:]) == []


def test_data_lines_are_joined_and_comments_and_unknown_fields_are_left_out():
    assert all_events([b": ping\nretry: 5\nevent: delta\nid: 7\ndata: a\ndata\ndata:  b\nx: y\n\n"]) == [
        ServerSentEvent("a\n\n b", "delta", "7")
    ]


def test_an_event_that_the_end_cuts_off_is_dropped_and_empty_data_is_an_event():
    assert all_events([b"data: whole\n\ndata: cut\n"]) == [ServerSentEvent("whole")]
    assert all_events([b"data\n\n", b"event: x\n\n", b"\n\n"]) == [ServerSentEvent("")]


def test_bytes_that_are_no_utf8_are_replaced():
    assert all_events([b"data: \xff\xc3\n\n"]) == [ServerSentEvent("\ufffd\ufffd")]


def test_a_line_without_an_end_is_refused_before_it_fills_the_memory():
    lines = Lines(max_line_bytes=10)
    assert lines.feed(b"0123456789\n0123") == [b"0123456789"]
    lines.feed(b"456789")
    with pytest.raises(TooLarge):
        lines.feed(b"x")
    with pytest.raises(TooLarge):
        Lines(max_line_bytes=10).feed(b"0123456789a\n")


def test_an_event_of_many_lines_is_bounded_as_well():
    stream = EventStream(max_event_bytes=40)
    stream.feed(b"data: 0123456789\n")
    stream.feed(b"data: 0123456789\n")
    with pytest.raises(TooLarge):
        stream.feed(b"data: 0123456789\n")
    # The bound is of each event, not of the stream.
    stream = EventStream(max_event_bytes=40)
    assert sum(len(stream.feed(b"data: 0123456789\n\n")) for _ in range(10)) == 10


@given(st.lists(st.binary(max_size=20), max_size=6), st.lists(st.integers(0, 200), max_size=8))
def test_lines_keep_what_follows_the_last_end(parts, cuts):
    data = b"{" + b"\n".join(parts)
    expected = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    lines = Lines()
    found = [line for piece in pieces(data, cuts) for line in lines.feed(piece)]
    assert [*found, lines.rest()] == expected
