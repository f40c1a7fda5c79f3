"""Text that streams equals the text as a whole, however tokens cut it."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from demandport.llama.text import Detokenizer, StopFilter

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
