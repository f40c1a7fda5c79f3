"""KV caches: a text that goes on from one is the text that is computed at once; files that are damaged are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from demandport.errors import DemandportError, Forbidden, ModelNotFound, TypeMismatch
from demandport.inference import caches
from demandport.inference.caches import KvCache

CACHE = KvCache(
    "f" * 32, (1, 5, 2**31 - 1, 0, 7), (("/adapters/one.gguf", 0.5),), "mine", {"model": "tiny", "threads": 2}
)
STATE = bytes(range(40))


def saved(folder: Path, cache: KvCache = CACHE, state: bytes = STATE) -> Path:
    path = caches.file_of(folder, "mine")
    assert caches.write(path, cache, state) == path.stat().st_size
    return path


# --------------------------------------------------------------------------------------------- as plain data


def test_it_survives_the_way_through_plain_data():
    plain = json.loads(json.dumps(CACHE.to_plain()))
    assert KvCache.from_plain(plain) == CACHE


PLAIN = CACHE.to_plain()
WRONG = [
    {}, {"tokens": 5}, PLAIN | {"tokens": "AAA="}, PLAIN | {"tokens": "?"}, PLAIN | {"tokens": None},
    PLAIN | {"adapters": 5}, PLAIN | {"adapters": [["a"]]}, PLAIN | {"adapters": [["a", "much"]]},
    PLAIN | {"adapters": [["a", 10**400]]}, PLAIN | {"fingerprint": None}, PLAIN | {"name": 5},
    PLAIN | {"model": None}, PLAIN | {"model": "tiny"}, PLAIN | {"model": {"model": b"bytes"}},
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_what_is_none_is_refused(number):
    with pytest.raises(TypeMismatch, match="no KV cache"):
        KvCache.from_plain(WRONG[number])


@pytest.mark.parametrize(("tokens", "left"), [(3, 3), (5, 5), (-1, 4), (-4, 1)])
def test_it_is_cut_to_so_many_tokens_or_by_so_many(tokens, left):
    assert CACHE.truncated(tokens).tokens == CACHE.tokens[:left]
    assert CACHE.truncated(tokens).adapters == CACHE.adapters


@pytest.mark.parametrize("tokens", [0, 6, -5, -6, 2**40])
def test_it_is_cut_neither_to_nothing_nor_to_more(tokens):
    with pytest.raises(TypeMismatch, match="5 tokens"):
        CACHE.truncated(tokens)


# ------------------------------------------------------------------------------------------------- as a file


def test_a_file_holds_all_of_it(tmp_path):
    path = saved(tmp_path / "new" / "folder")
    assert caches.read(path) == CACHE and caches.read_whole(path)[1] == STATE


NAMES = ["", ".", "..", "../mine", "a/b", "/etc/passwd", ".hidden", "a\0b", "a\n", "x" * 129, "über", "a b", "-x", "~"]


@pytest.mark.parametrize("name", NAMES)
def test_no_name_leads_out_of_the_folder(tmp_path, name):
    with pytest.raises(Forbidden):
        caches.file_of(tmp_path, name)


def test_without_a_folder_there_are_no_files():
    with pytest.raises(Forbidden, match="cache_directory"):
        caches.file_of(None, "mine")


def test_one_that_is_not_there_is_not_found(tmp_path):
    for read in (caches.read, caches.read_whole):
        with pytest.raises(ModelNotFound, match="mine"):
            read(caches.file_of(tmp_path, "mine"))


def read_all(path):
    """What a generation that goes on from the file uses, fingerprint and adapters checked as it does."""
    cache = caches.read(path)
    caches.check_use(cache, CACHE.fingerprint, CACHE.adapters)
    return cache, caches.read_whole(path)[1]


def test_no_flipped_bit_goes_unseen(tmp_path):
    path = saved(tmp_path)
    good = path.read_bytes()
    for place in range(len(good)):
        for bit in (0x01, 0x20, 0x80):
            path.write_bytes(good[:place] + bytes([good[place] ^ bit]) + good[place + 1 :])
            with pytest.raises(TypeMismatch):
                read_all(path)
    path.write_bytes(good)
    assert read_all(path) == (CACHE, STATE)


def test_a_file_that_is_cut_or_longer_is_refused(tmp_path):
    path = saved(tmp_path)
    good = path.read_bytes()
    for content in [*(good[:end] for end in range(len(good))), good + b"x", good * 2]:
        path.write_bytes(content)
        with pytest.raises(TypeMismatch):
            read_all(path)


def rewritten(path: Path, text: bytes) -> None:
    """Give a file another header, with a checksum that fits: it was not damaged but made so."""
    good = path.read_bytes()
    start = len(caches._MAGIC) + caches._LENGTH.size
    (size,) = caches._LENGTH.unpack(good[len(caches._MAGIC) : start])
    body = good[start + caches._CHECKSUM_BYTES + size :]
    path.write_bytes(
        caches._MAGIC + caches._LENGTH.pack(len(text)) + caches.hashlib.sha256(text).digest() + text + body
    )


FIELDS = ["fingerprint", "adapters", "model", "tokens", "state_bytes", "state_sha256", "tokens_sha256"]
VALUES = ["null", "5", "-1", "1e999", '"x"', '["a"]', '[["a", "b"]]', '[["a", 1' + "0" * 400 + "]]", "{}", "9" * 5000]


def header_of(path):
    good = path.read_bytes()
    start = len(caches._MAGIC) + caches._LENGTH.size + caches._CHECKSUM_BYTES
    return json.JSONDecoder().raw_decode(good[start:].decode("latin-1"))[0]


@pytest.mark.parametrize("field", FIELDS)
def test_a_header_with_a_wrong_field_is_refused(tmp_path, field):
    path = saved(tmp_path)
    header = header_of(path)
    assert set(header) == set(FIELDS)
    rewritten(path, json.dumps({name: value for name, value in header.items() if name != field}).encode())
    with pytest.raises(TypeMismatch):
        read_all(path)
    for value in VALUES:
        if json.dumps(header[field]) == value or (field, value) == ("model", "{}"):
            continue
        text = json.dumps(header | {field: "HERE"}).replace('"HERE"', value)
        rewritten(path, text.encode())
        with pytest.raises(TypeMismatch):
            read_all(path)[0].to_plain()


@pytest.mark.parametrize("text", [b"", b"[]", b"5", b"[" * 100_000, b"\xff\xfe", b"{", b'{"a": NaN}'])
def test_a_header_that_is_no_map_is_refused(tmp_path, text):
    path = saved(tmp_path)
    rewritten(path, text)
    with pytest.raises(TypeMismatch):
        caches.read(path)


def test_a_folder_in_its_place_is_refused(tmp_path):
    (tmp_path / "mine.kv").mkdir()
    with pytest.raises(TypeMismatch):
        caches.read(tmp_path / "mine.kv")
    with pytest.raises(Forbidden):
        saved(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.kv"]


@pytest.mark.parametrize("below", ["file", "file/below"])
def test_a_file_in_place_of_the_folder_is_refused(tmp_path, below):
    (tmp_path / "file").write_text("x")
    with pytest.raises(Forbidden, match="mine"):
        saved(tmp_path / below)


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_what_cannot_be_written_leaves_the_old_file_as_it_was(tmp_path, monkeypatch, fails):
    path = saved(tmp_path)
    good = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os if fails == "fsync" else Path, fails, full)
    with pytest.raises(Forbidden, match="No space left"):
        saved(tmp_path, CACHE.truncated(2), b"other")
    monkeypatch.undo()
    assert path.read_bytes() == good and list(tmp_path.iterdir()) == [path]


def test_it_is_on_the_disk_before_it_takes_the_old_one_s_place(tmp_path, monkeypatch):
    path = saved(tmp_path)
    done = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(("fsync", os.fstat(fd).st_size)) or fsync(fd))
    monkeypatch.setattr(Path, "replace", lambda one, to: done.append(("replace", to)) or replace(one, to))
    saved(tmp_path, CACHE, STATE * 9)
    assert done == [("fsync", path.stat().st_size), ("replace", path)]
    assert caches.read_whole(path)[1] == STATE * 9


def test_only_what_computed_it_can_use_it():
    caches.check_use(CACHE, CACHE.fingerprint, list(CACHE.adapters))
    for fingerprint, adapters in (
        ("other", CACHE.adapters),
        (CACHE.fingerprint, ()),
        (CACHE.fingerprint, (("x", 1.0),)),
    ):
        with pytest.raises(DemandportError):
            caches.check_use(CACHE, fingerprint, adapters)
