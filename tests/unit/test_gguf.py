"""What is read of GGUF files: real ones, and ones that are damaged or made to harm."""

from __future__ import annotations

import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFEndian
from gguf.constants import GGML_QUANT_SIZES, LlamaFileType
from hypothesis import example, given
from hypothesis import strategies as st

from demandport.errors import ModelLoadFailed, ModelNotFound
from demandport.inference import gguf
from demandport.inference.gguf import GgufMetadata, read_metadata
from demandport.inference.library import tiny_path
from gguf_files import ROWS, write_gguf

ELEMENTS = ROWS * 256
STRING, ARRAY = 8, 9


def refused(path: Path) -> str:
    with pytest.raises(ModelLoadFailed) as caught:
        read_metadata(path)
    assert str(path) in caught.value.message
    return caught.value.message


# ------------------------------------------------------------------------------------------------ by hand, for the odd

HEADER = struct.Struct("<4sIQQ")


def text(value: bytes | str) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def gguf_of(*pairs: bytes, tensors: bytes = b"", n_tensors: int = 0, version: int = 3) -> bytes:
    return HEADER.pack(b"GGUF", version, n_tensors, len(pairs)) + b"".join(pairs) + tensors


def tensor(shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text("t") + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def read_bytes(file: Path, data: bytes) -> GgufMetadata:
    file.write_bytes(data)
    return read_metadata(file)


def refusal_of(file: Path, data: bytes) -> str:
    file.write_bytes(data)
    return refused(file)


# ------------------------------------------------------------------------------------------------------- sound files


def test_the_model_of_the_package() -> None:
    found = read_metadata(tiny_path())
    assert (found.name, found.architecture, found.type) == ("demandport-tiny", "llama", "model")
    assert (found.parameters, found.context_length, found.quantization) == (694_080, 512, "F32")
    assert found.chat_template and "add_generation_prompt" in found.chat_template
    assert found.size_bytes == tiny_path().stat().st_size and found.version == 3 and found.tensors == 38
    assert (found.split_no, found.split_count, found.pooling, found.embedding_only) == (None, 1, None, False)
    assert found.array_lengths["tokenizer.ggml.tokens"] == 2613


def test_a_file_says_all_that_it_can(file: Path) -> None:
    write_gguf(
        file, architecture="qwen3", name="Qwen3 Ünïcode", tensors=3, tensor_type="Q4_K", general__file_type=15,
        __context_length=40960, tokenizer__chat_template="{{ x }}", tokenizer__ggml__tokens=["a", "bc", ""] * 30_000,
        tokenizer__ggml__scores=[0.5] * 7, split__no=1, split__count=3,
    )  # fmt: skip
    assert read_metadata(file) == GgufMetadata(
        size_bytes=file.stat().st_size,
        version=3,
        name="Qwen3 Ünïcode",
        architecture="qwen3",
        elements=3 * ELEMENTS,
        context_length=40960,
        quantization="Q4_K_M",
        chat_template="{{ x }}",
        split_no=1,
        split_count=3,
        tensors=3,
        array_lengths={"tokenizer.ggml.tokens": 90_000, "tokenizer.ggml.scores": 7},
    )


def test_a_file_that_says_nothing(file: Path) -> None:
    assert read_bytes(file, gguf_of(version=2)) == GgufMetadata(size_bytes=HEADER.size, version=2)


@pytest.mark.parametrize(
    ("pairs", "pooling", "embedding_only"),
    [
        ({}, None, False),
        ({"__attention__causal": True}, None, False),
        ({"__attention__causal": False}, None, True),
        ({"__pooling_type": 0}, "none", False),
        ({"__pooling_type": 1}, "mean", True),
        ({"__pooling_type": 4}, "rank", True),
        ({"__pooling_type": 9}, "9", True),
        ({"other__pooling_type": 1}, None, False),
    ],
)
def test_a_model_that_makes_vectors(file: Path, pairs: Any, pooling: str | None, embedding_only: bool) -> None:
    found = read_metadata(write_gguf(file, **pairs))
    assert (found.pooling, found.embedding_only) == (pooling, embedding_only)


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        ({"architecture": "clip"}, "mmproj"),
        ({"architecture": "clip", "general__type": "mmproj"}, "mmproj"),
        ({"general__type": "adapter"}, "adapter"),
        ({"general__type": "model"}, "model"),
    ],
)
def test_what_is_no_model_says_so(file: Path, about: Any, expected: str) -> None:
    assert read_metadata(write_gguf(file, **about)).type == expected


def test_a_stated_number_of_parameters_counts_more_than_the_tensors(file: Path) -> None:
    found = read_metadata(write_gguf(file, general__parameter_count=7_000_000))
    assert (found.parameters, found.stated_parameters, found.elements) == (7_000_000, 7_000_000, ELEMENTS)
    assert read_metadata(write_gguf(file, tensors=0)).parameters is None


@pytest.mark.parametrize("kind", [kind.name for kind in GGML_QUANT_SIZES])
def test_every_type_of_tensor_is_known_to_the_byte(file: Path, kind: str) -> None:
    found = read_metadata(write_gguf(file, tensor_type=kind))
    assert found.quantization == kind and found.parameters == ELEMENTS
    whole = file.read_bytes()
    assert "takes" in refusal_of(file, whole[: whole.index(b"blk.0.weight") + 100])
    # ggml pads the data; one byte less than all of it is too little.
    block_elements, block_bytes = next(size for known, size in GGML_QUANT_SIZES.items() if known.name == kind)
    padding = -(ELEMENTS // block_elements * block_bytes) % 32
    assert "the data of its tensors takes" in refusal_of(file, whole[: len(whole) - padding - 1])
    assert read_bytes(file, whole[: len(whole) - padding]).quantization == kind


@pytest.mark.parametrize("kind", [kind for kind in LlamaFileType if kind is not LlamaFileType.GUESSED])
def test_every_type_of_file_has_its_name(file: Path, kind: LlamaFileType) -> None:
    expected = kind.name.removeprefix("ALL_").removeprefix("MOSTLY_")
    assert read_metadata(write_gguf(file, tensors=0, general__file_type=int(kind))).quantization == expected


def test_the_most_elements_tell_the_quantization(file: Path) -> None:
    tensors = tensor((256,)) + tensor((256, 4), 12, 1024)
    data = gguf_of(pair("general.file_type", 4, struct.pack("<I", 999)), tensors=tensors, n_tensors=2)
    assert read_bytes(file, data + bytes(4096)).quantization == "Q4_K"


def test_a_type_that_is_newer_than_this_code(file: Path) -> None:
    data = gguf_of(tensors=tensor((256,), 99), n_tensors=1) + bytes(32)
    assert read_bytes(file, data).quantization == "type 99"


# --------------------------------------------------------------------------------------------------- files to refuse


def test_what_is_no_file_or_cannot_be_opened(tmp_path: Path) -> None:
    for missing in (tmp_path / "nope.gguf", tiny_path() / "below"):
        with pytest.raises(ModelNotFound, match="there is no model file"):
            read_metadata(missing)
    assert "is a directory or a device" in refused(tmp_path)
    os.mkfifo(tmp_path / "fifo.gguf")  # opening it would wait for somebody who writes
    assert "is a directory or a device" in refused(tmp_path / "fifo.gguf")
    (tmp_path / "loop.gguf").symlink_to("loop.gguf")
    assert "cannot be read: Too many levels" in refused(tmp_path / "loop.gguf")


def test_a_big_endian_file_is_refused_as_such(file: Path) -> None:
    assert "big-endian" in refused(write_gguf(file, endianess=GGUFEndian.BIG))


HUGE = struct.pack("<Q", 2**64 - 1)
KEY = pair("k", 4, bytes(4))
NAME = "general.name"
REFUSED: list[Any] = [
    (b"", "at byte 0, the magic number takes 4 bytes, and 0 are left"),
    (b"GG", "and 2 are left"),
    (b"PK\x03\x04" + bytes(64), r"at byte 4, it begins with b'PK\x03\x04', not with GGUF"),
    (b"GGUF\x03", "the version takes 4 bytes, and 1 are left"),
    (gguf_of(version=1), "its version is 1; 2 and 3 can be read"),
    (gguf_of(version=4), "its version is 4"),
    (gguf_of(version=0), "big-endian"),
    (HEADER.pack(b"GGUF", 3, 0, 1), "a list of 0 tensors and 1 metadata pairs takes 12 bytes, and 0 are left"),
    (HEADER.pack(b"GGUF", 3, 0, 2**64 - 1), "it claims 0 tensors and 18446744073709551615 pairs"),
    (HEADER.pack(b"GGUF", 3, 2**63, 0), "it claims 9223372036854775808 tensors"),
    (HEADER.pack(b"GGUF", 3, 65536, 0), "a list of 65536 tensors and 0 metadata pairs takes"),
    (gguf_of(HUGE + bytes(32)), "a key has 18446744073709551615 bytes, more than 65535"),
    (gguf_of(struct.pack("<Q", 65535) + bytes(32)), "a key takes 65535 bytes, and 32 are left"),
    (gguf_of(pair("k", 13, bytes(8))), "at byte 37, k is of type 13, which there is not"),
    (gguf_of(pair("k", 2**32 - 1, bytes(8))), "k is of type 4294967295"),
    (gguf_of(pair("k", STRING, HUGE + bytes(8))), "k takes 18446744073709551615 bytes, and 8 are left"),
    (gguf_of(pair(NAME, STRING, HUGE + bytes(8))), "general.name has 18446744073709551615 bytes, more than 1048576"),
    (gguf_of(pair(NAME, STRING, text(bytes(2**20 + 1)))), "general.name has 1048577 bytes, more than 1048576"),
    (gguf_of(pair(NAME, STRING, struct.pack("<Q", 9) + bytes(8))), "general.name takes 9 bytes, and 8 are left"),
    (gguf_of(pair(NAME, 4, bytes(4))), "general.name is 0, which is no str"),
    (gguf_of(pair("general.file_type", 6, bytes(4))), "general.file_type is 0.0, which is no int"),
    (gguf_of(pair("split.count", 7, b"\1")), "split.count is True, which is no int"),
    (gguf_of(*[pair(NAME, STRING, text("x"))] * 2), "the key general.name comes twice"),
    (gguf_of(pair("a", ARRAY, struct.pack("<IQ", 4, 2**62) + bytes(64))), "the array a of 461168601842738790"),
    (gguf_of(pair("a", ARRAY, struct.pack("<IQ", STRING, 2**24 + 1) + bytes(64))), "the array a has 16777217 strings"),
    (gguf_of(pair("a", ARRAY, struct.pack("<IQ", STRING, 9) + bytes(64))), "the array a of 9 strings takes 72 bytes"),
    (gguf_of(pair("a", ARRAY, struct.pack("<IQ", STRING, 2) + text("x") + HUGE)), "the array a takes 184467440737095"),
    (gguf_of(pair("a", ARRAY, struct.pack("<IQ", STRING, 2) + text("x" * 9))), "the array a takes 8 bytes, and 0 are"),
    (gguf_of(pair("a", ARRAY, struct.pack("<IQIQ", ARRAY, 1, 4, 1))), "the array a has elements of type 9"),
    (gguf_of(pair("a", ARRAY, struct.pack("<IQ", 77, 0))), "the array a has elements of type 77"),
    (gguf_of(pair("general.alignment", 4, bytes(4))), "general.alignment is 0, which is no power of 2"),
    (gguf_of(pair("general.alignment", 4, struct.pack("<I", 48))), "general.alignment is 48"),
    (gguf_of(pair("general.alignment", 5, struct.pack("<i", -32))), "general.alignment is -32"),
    (gguf_of(pair("general.alignment", STRING, text("32"))), "general.alignment is '32'"),
    (gguf_of(KEY, tensors=HUGE + bytes(32), n_tensors=1), "the name of tensor 0 of 1 takes"),
    (gguf_of(tensors=tensor((1,) * 5), n_tensors=1), "tensor 0 of 1 has 5 dimensions, more than 4"),
    (gguf_of(tensors=tensor((2**32, 2**31)), n_tensors=1), "has 9223372036854775808 elements, more than 64 bits"),
    (gguf_of(tensors=tensor((8,), 0, 2**64 - 1), n_tensors=1), "the data of its tensors takes 184467440737095516"),
    (gguf_of(tensors=tensor((9,)), n_tensors=1) + bytes(40), "the data of its tensors takes"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "says"), REFUSED, ids=[says[:60] for _, says in REFUSED])
def test_the_place_of_what_is_wrong_is_said(file: Path, data: bytes, says: str) -> None:
    assert says in refusal_of(file, data)


def test_strings_of_several_arrays_are_counted_together(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "MAX_ARRAY_STRINGS", 5)
    three = struct.pack("<IQ", STRING, 3) + text("x") * 3
    assert read_bytes(file, gguf_of(pair("a", ARRAY, three))).array_lengths == {"a": 3}
    assert "the array b has 3 strings" in refusal_of(file, gguf_of(pair("a", ARRAY, three), pair("b", ARRAY, three)))


def test_a_name_that_is_no_utf8_is_still_shown(file: Path) -> None:
    assert read_bytes(file, gguf_of(pair(NAME, STRING, text(b"a\xffb")))).name == "a�b"


# ------------------------------------------------------------------------------------------------- any damage at all


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = write_gguf(
        tmp_path_factory.mktemp("sound") / "m.gguf", name="m", tensors=2, tensor_type="Q8_0", general__file_type=7,
        __context_length=512, __attention__causal=True, tokenizer__chat_template="{{ x }}", split__no=0, split__count=1,
        tokenizer__ggml__tokens=["a", "b", "cc"], tokenizer__ggml__scores=[0.5, 1.5],
    )  # fmt: skip
    return file.read_bytes()


NUMBERS = st.one_of(
    st.sampled_from([0, 1, 9, 2**16, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]), st.integers(0, 2**64 - 1)
)
WHERE = st.floats(0, 1, exclude_max=True)


def read_within_bounds(file: Path, data: bytes) -> None:
    """Reads, or refuses with the error of the project; and takes no more memory than the file could fill."""
    file.write_bytes(data)
    tracemalloc.start()
    try:
        read_metadata(file)
    except ModelLoadFailed as told:
        assert str(file) in told.message and len(told.message) < 1000
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 * len(data) + 300_000


@given(mutations=st.lists(st.tuples(WHERE, st.integers(0, 255)), max_size=8), length=st.floats(0, 1))
@example(mutations=[], length=0.0)
def test_any_bytes_are_read_or_refused(
    sound: bytes, tmp_path_factory: pytest.TempPathFactory, mutations: list[tuple[float, int]], length: float
) -> None:
    data = bytearray(sound)
    header = sound.index(b"blk.1.weight") + 60
    for where, byte in mutations:
        data[int(where * header)] = byte
    kept = len(data) if length > 0.5 else int(length * 2 * header)
    read_within_bounds(tmp_path_factory.getbasetemp() / "any.gguf", bytes(data[:kept]))


@given(where=WHERE, number=NUMBERS, width=st.sampled_from(["<I", "<Q"]))
def test_any_number_anywhere_is_read_or_refused(
    sound: bytes, tmp_path_factory: pytest.TempPathFactory, where: float, number: int, width: str
) -> None:
    header = sound.index(b"blk.1.weight") + 60
    packed = struct.pack(width, number & (2**32 - 1 if width == "<I" else 2**64 - 1))
    start = int(where * header)
    data = sound[:start] + packed + sound[start + len(packed) :]
    read_within_bounds(tmp_path_factory.getbasetemp() / "number.gguf", data)


def test_every_truncation_is_refused(sound: bytes, file: Path) -> None:
    for length in range(0, len(sound) - 64, 3):
        refusal_of(file, sound[:length])


@given(data=st.binary(max_size=400))
def test_bytes_behind_a_good_beginning(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    read_within_bounds(tmp_path_factory.getbasetemp() / "bytes.gguf", HEADER.pack(b"GGUF", 3, 1, 4) + data)


def test_a_claimed_length_in_a_large_file_is_not_allocated(file: Path) -> None:
    """The file is as large as it claims to be, with holes for data: a length that fits is stepped over."""
    steps = pair("k", STRING, struct.pack("<Q", 2**33)), pair("a", ARRAY, struct.pack("<IQ", 0, 2**33))
    with file.open("wb") as out:
        out.write(HEADER.pack(b"GGUF", 3, 0, 3) + steps[0])
        out.seek(2**33, os.SEEK_CUR)
        out.write(steps[1])
        out.seek(2**33, os.SEEK_CUR)
        out.write(pair(NAME, STRING, text("behind it all")))
    tracemalloc.start()
    found = read_metadata(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.name == "behind it all" and found.array_lengths == {"a": 2**33} and peak < 500_000
