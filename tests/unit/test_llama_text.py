"""Text that streams equals the text as a whole, however tokens cut it."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from demandport.llama.text import COALESCE_S, Detokenizer, Output, StopFilter

CUTS = st.lists(st.integers(0, 400), max_size=40)
SMALL = st.text(alphabet="ab<é", max_size=40)


def pieces(data, cuts):
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[a:b] for a, b in pairwise(places)]


def streamed(data, cuts):
    detokenizer = Detokenizer()
    parts = [detokenizer.feed(piece) for piece in pieces(data, cuts)]
    return [*parts, detokenizer.finish()]


def filtered(text, stops, cuts):
    stop_filter = StopFilter(stops)
    shown = "".join(stop_filter.feed(piece) for piece in pieces(text, cuts))
    return shown + stop_filter.finish(), stop_filter.stopped


def expected(text, stops):
    """Character by character: the first place where a stop string is complete, the longest one there."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(st.text(max_size=100), CUTS)
def test_text_comes_out_whole_and_every_piece_is_valid(text, cuts):
    parts = streamed(text.encode(), cuts)
    assert "".join(parts) == text
    assert all("\ufffd" not in part or "\ufffd" in text for part in parts)


@given(st.binary(max_size=100), CUTS)
def test_bytes_that_are_no_text_come_out_as_if_decoded_at_once(data, cuts):
    assert "".join(streamed(data, cuts)) == data.decode("utf-8", "replace")


def test_a_character_cut_off_at_the_end_is_replaced_once():
    assert "".join(streamed("hi 🙂".encode()[:-1], range(10))) == "hi \ufffd"


@given(SMALL, st.lists(st.text(alphabet="ab<é", min_size=1, max_size=5), max_size=4), CUTS)
def test_stop_strings_do_not_hang_on_the_cuts(text, stops, cuts):
    assert filtered(text, stops, cuts) == expected(text, stops)


@given(SMALL, st.lists(st.text(alphabet="ab<é", min_size=1, max_size=5), min_size=1, max_size=4))
def test_what_is_shown_is_never_taken_back(text, stops):
    stop_filter, shown = StopFilter(stops), ""
    whole, _ = expected(text, stops)
    for character in text:
        shown += stop_filter.feed(character)
        assert whole.startswith(shown)


@given(st.text(max_size=50), st.lists(st.text(min_size=1, max_size=4), max_size=3), CUTS, CUTS)
def test_bytes_through_both_equal_the_whole(text, stops, cuts, _):
    detokenizer, stop_filter = Detokenizer(), StopFilter(stops)
    shown = "".join(stop_filter.feed(detokenizer.feed(piece)) for piece in pieces(text.encode(), cuts))
    shown += stop_filter.feed(detokenizer.finish()) + stop_filter.finish()
    assert shown == expected(text, stops)[0]


def test_no_more_is_held_back_than_can_begin_a_stop_string():
    stop_filter = StopFilter(["<|end|>"])
    assert stop_filter.feed("one <|") == "one "
    assert stop_filter.feed("x") == "<|x"
    assert stop_filter.feed("<|end|") == ""
    assert stop_filter.feed("> more") == ""
    assert stop_filter.stopped == "<|end|>"
    assert stop_filter.feed("more") == "" == stop_filter.finish()


# ------------------------------------------------------------------------------------- the text of a generation

TIMES = st.lists(st.sampled_from([0.0, COALESCE_S / 3, COALESCE_S, 1.0]), max_size=41)


def sent(data, stops, cuts, times):
    """What a generation sends, and where it stopped: it takes in no more after that."""
    output, chunks, now = Output(stops), [], 5.0
    for number, piece in enumerate(pieces(data, cuts)):
        now += times[number % len(times)] if times else 0.0
        chunks.append((now, output.add(piece, now)))
        if output.stopped:
            break
    return [*chunks, (now, output.finish())], output.stopped


@given(
    st.text(alphabet="ab<é🙂", max_size=40),
    st.lists(st.text("ab<é🙂", min_size=1, max_size=5), max_size=3),
    CUTS,
    TIMES,
)
def test_neither_cuts_nor_times_change_the_text(text, stops, cuts, times):
    chunks, stopped = sent(text.encode(), stops, cuts, times)
    whole, stop = expected(text, stops)
    assert "".join(chunk for _, chunk in chunks) == whole
    assert stopped == (stop is not None)


@given(st.binary(max_size=60), CUTS, TIMES)
def test_what_is_no_text_comes_out_as_if_decoded_at_once(data, cuts, times):
    chunks, _ = sent(data, [], cuts, times)
    assert "".join(chunk for _, chunk in chunks) == data.decode("utf-8", "replace")


@given(st.text(max_size=60), CUTS, TIMES)
def test_chunks_are_not_sent_more_often_than_they_may(text, cuts, times):
    chunks, _ = sent(text.encode(), [], cuts, times)
    moments = [now for now, chunk in chunks[:-1] if chunk]
    assert all(after - before >= COALESCE_S for before, after in pairwise(moments))


def test_the_first_text_is_sent_at_once_and_a_slow_model_s_every_token():
    output = Output([])
    assert [output.add(piece, now) for now, piece in enumerate([b"one", b" two", b" three"])] == [
        "one",
        " two",
        " three",
    ]
    assert output.finish() == ""


def test_taking_what_is_whole_leaves_what_is_not():
    output = Output(["<|end|>"])
    output.add("a🙂 <|e".encode(), 0.0)
    output.add("🙂".encode()[:2], 0.0)
    assert output.take() == "", "what may begin a stop string stays until the character is there"
    assert output.finish() == "<|e\ufffd"


def test_a_character_cut_in_the_middle_can_complete_a_stop_string():
    output = Output(["x\ufffd"])
    assert output.add(b"ax\xf0\x9f", 0.0) == "a"
    assert output.finish() == "" and output.stopped


def test_nothing_follows_a_stop_string():
    output = Output(["END"])
    assert output.add(b"one EN", 0.0) == "one "
    assert output.add(b"D two", 1.0) == "" and output.stopped
    assert output.take() == "" == output.finish()


def test_a_stop_string_is_seen_at_once_though_no_text_is_due():
    output = Output(["END"])
    output.add(b"one EN", 0.0)
    output.add(b"D", 0.0)
    assert output.stopped
