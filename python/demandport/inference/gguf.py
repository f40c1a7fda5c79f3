"""What a GGUF file says of itself, read without loading it. The format: ggml's docs/gguf.md, versions 2 and 3.

Nothing is allocated for a length that the file claims: lengths are held against what is left of the file first, and
what is not wanted is stepped over.
"""

from __future__ import annotations

import os
import stat
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from demandport.errors import ModelLoadFailed, ModelNotFound

VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
#: Largest string that is kept; chat templates are the long ones.
MAX_STRING_BYTES = 1 << 20
#: The format's own limit.
MAX_KEY_BYTES = (1 << 16) - 1
#: Real files have some hundred pairs and a thousand tensors: more is a damaged or a hostile file.
MAX_PAIRS = 1 << 16
MAX_TENSORS = 1 << 16
#: Strings in arrays, all together; each one must be looked at. Vocabularies have up to some hundred thousand.
MAX_ARRAY_STRINGS = 1 << 24
MAX_DIMENSIONS = 4
_WINDOW_BYTES = 1 << 16
_MAX_INT64 = (1 << 63) - 1

_STRING, _ARRAY = 8, 9
_SCALARS = {
    number: struct.Struct(code)
    for number, code in {
        0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
    }.items()
}  # fmt: skip
_U32, _U64 = _SCALARS[4], _SCALARS[10]

#: Tensor types of ggml.h: number → name, elements of a block, bytes of a block.
_TENSOR_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18), 42: ("Q2_0", 64, 18),
}  # fmt: skip
#: Values of `general.file_type`, as llama.h's `llama_ftype` names them.
_FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE", 39: "NVFP4",
    40: "Q1_0", 41: "Q2_0",
}  # fmt: skip
_POOLING = ("none", "mean", "cls", "last", "rank")

#: Keys whose values are kept, and endings of those that begin with the architecture.
_KEYS = frozenset((
    "general.architecture", "general.name", "general.type", "general.file_type", "general.parameter_count",
    "general.alignment", "split.no", "split.count", "tokenizer.chat_template",
))  # fmt: skip
_ENDINGS = (".context_length", ".attention.causal", ".pooling_type")
_MAX_WANTED_KEY = 128


@dataclass(frozen=True, slots=True)
class GgufMetadata:
    """What a GGUF file says of itself.

    Attributes:
        size_bytes: of the file.
        version: of the format.
        name, architecture: as stated; None where they are not.
        type: ``model``, ``mmproj`` (the projector of a vision model), ``adapter`` (LoRA), ``imatrix``, or what else the
            file calls itself.
        stated_parameters: of the whole model, where the file says so. elements: of all tensors in this file.
        context_length: tokens that the model was trained with.
        quantization: such as ``Q4_K_M``: of the stated file type, else of the type most elements have.
        chat_template: Jinja text.
        pooling: ``none``, ``mean``, ``cls``, ``last`` or ``rank``, where stated.
        embedding_only: it makes vectors or scores, no text: its attention is not causal, or it pools.
        split_no, split_count: which file of how many this is, from 0; None and 1 for a whole one.
        tensors: how many tensors this file has.
        array_lengths: elements of every array in the metadata, by key.
    """

    size_bytes: int
    version: int
    name: str | None = None
    architecture: str | None = None
    type: str = "model"
    stated_parameters: int | None = None
    elements: int = 0
    context_length: int | None = None
    quantization: str | None = None
    chat_template: str | None = None
    pooling: str | None = None
    embedding_only: bool = False
    split_no: int | None = None
    split_count: int = 1
    tensors: int = 0
    array_lengths: Mapping[str, int] = field(default_factory=dict)

    @property
    def parameters(self) -> int | None:
        """As stated, else the elements of this file's tensors; None when it has none."""
        return self.stated_parameters or self.elements or None


def read_metadata(path: Path) -> GgufMetadata:
    """Read a GGUF file's header, metadata and tensor list; not the tensors. Blocks.

    Checks also that the file is long enough for its tensors, so that a download that broke off is found.

    Raises:
        ModelNotFound: there is no such file.
        ModelLoadFailed: it cannot be read, or is no sound GGUF file; the message names the place in it.
    """
    with _opened(path) as (file, size):
        reader = _Reader(file, size, path)
        version, tensors, pairs = _header(reader)
        values, arrays = _pairs(reader, pairs)
        elements = _tensors(reader, tensors, _alignment(reader, values))
    return _metadata(path, size, version, values, arrays, tensors, elements)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    try:
        # Opening a FIFO would otherwise wait for ever.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb", buffering=0) as file:
            about = os.fstat(fd)
            if not stat.S_ISREG(about.st_mode):
                raise ModelLoadFailed(f"{path} is a directory or a device, not a GGUF file")
            yield file, about.st_size
    except (FileNotFoundError, NotADirectoryError):
        raise ModelNotFound(f"there is no model file {path}") from None
    except IsADirectoryError:
        raise ModelLoadFailed(f"{path} is a directory or a device, not a GGUF file") from None
    except (OSError, ValueError) as failed:  # ValueError: a NUL in the path
        raise ModelLoadFailed(f"{path} cannot be read: {getattr(failed, 'strerror', None) or failed}") from None


class _Reader:
    """Reads a file forwards through a small window; whatever a length claims is held against what is left."""

    def __init__(self, file: BinaryIO, size: int, path: Path) -> None:
        self._file = file
        self._size = size
        self._path = path
        self._window = b""
        self._start = 0
        self.position = 0

    def refuse(self, why: str) -> NoReturn:
        raise ModelLoadFailed(f"{self._path} is no sound GGUF file: at byte {self.position}, {why}")

    def need(self, count: int, what: str) -> None:
        """Refuse unless `count` more bytes are there."""
        left = self._size - self.position
        if count > left:
            self.refuse(f"{what} takes {count} bytes, and {left} are left: it is cut off or damaged")

    def skip(self, count: int, what: str) -> None:
        self.need(count, what)
        self.position += count

    def take(self, count: int, what: str) -> bytes:
        self.need(count, what)
        offset = self.position - self._start
        if not 0 <= offset <= len(self._window) - count:
            self._fill(max(count, _WINDOW_BYTES))
            offset = 0
            if len(self._window) < count:
                self.refuse(f"{what} cannot be read: the file has become shorter")
        self.position += count
        return self._window[offset : offset + count]

    def number(self, form: struct.Struct, what: str) -> Any:
        return form.unpack(self.take(form.size, what))[0]

    def string(self, what: str, limit: int) -> bytes:
        length = self.number(_U64, f"the length of {what}")
        if length > limit:
            self.refuse(f"{what} has {length} bytes, more than {limit}")
        return self.take(length, what)

    def skip_string(self, what: str) -> None:
        self.skip(self.number(_U64, f"the length of {what}"), what)

    def _fill(self, count: int) -> None:
        self._file.seek(self.position)
        self._start = self.position
        pieces = []
        while count > 0 and (piece := self._file.read(min(count, _WINDOW_BYTES))):
            pieces.append(piece)
            count -= len(piece)
        self._window = b"".join(pieces)


def _header(reader: _Reader) -> tuple[int, int, int]:
    magic = reader.take(4, "the magic number")
    if magic != b"GGUF":
        reader.refuse(f"it begins with {magic!r}, not with GGUF")
    version = reader.number(_U32, "the version")
    if version & 0xFFFF == 0:
        reader.refuse("its version is written big-endian; only little-endian files can be read")
    if version not in VERSIONS:
        reader.refuse(f"its version is {version}; {' and '.join(map(str, VERSIONS))} can be read")
    tensors = reader.number(_U64, "the number of tensors")
    pairs = reader.number(_U64, "the number of metadata pairs")
    if tensors > MAX_TENSORS or pairs > MAX_PAIRS:
        reader.refuse(f"it claims {tensors} tensors and {pairs} pairs; at most {MAX_TENSORS} and {MAX_PAIRS} are read")
    # Each takes more than this.
    reader.need(tensors * 24 + pairs * 12, f"a list of {tensors} tensors and {pairs} metadata pairs")
    return version, tensors, pairs


def _pairs(reader: _Reader, count: int) -> tuple[dict[str, Any], dict[str, int]]:
    values: dict[str, Any] = {}
    arrays: dict[str, int] = {}
    strings_left = MAX_ARRAY_STRINGS
    for _ in range(count):
        key = reader.string("a key", MAX_KEY_BYTES).decode("utf-8", "replace")
        kind = reader.number(_U32, f"the type of {key:.80}")
        wanted = key in _KEYS or (key.endswith(_ENDINGS) and len(key) <= _MAX_WANTED_KEY)
        if wanted and key in values:
            reader.refuse(f"the key {key} comes twice")
        if kind == _ARRAY:
            length, strings = _skip_array(reader, key, strings_left)
            strings_left -= strings
            if len(key) <= _MAX_WANTED_KEY:
                arrays[key] = length
        elif kind == _STRING and wanted:
            values[key] = reader.string(key, MAX_STRING_BYTES).decode("utf-8", "replace")
        elif kind == _STRING:
            reader.skip_string(f"{key:.80}")
        elif kind in _SCALARS:
            value = reader.number(_SCALARS[kind], f"{key:.80}")
            if wanted:
                values[key] = value
        else:
            reader.refuse(f"{key:.80} is of type {kind}, which there is not")
    return values, arrays


def _skip_array(reader: _Reader, key: str, strings_left: int) -> tuple[int, int]:
    """Step over an array; its length, and how many strings of it had to be looked at."""
    what = f"the array {key:.80}"
    kind = reader.number(_U32, f"the type of {what}")
    count = reader.number(_U64, f"the length of {what}")
    if kind in _SCALARS:
        reader.skip(count * _SCALARS[kind].size, f"{what} of {count} elements")
        return count, 0
    if kind != _STRING:
        # The format allows arrays of arrays; llama.cpp does not read them.
        reader.refuse(f"{what} has elements of type {kind}, which cannot be read")
    if count > strings_left:
        reader.refuse(f"{what} has {count} strings; at most {MAX_ARRAY_STRINGS} are read")
    reader.need(count * _U64.size, f"{what} of {count} strings")
    _skip_strings(reader, count, what)
    return count, count


def _skip_strings(reader: _Reader, count: int, what: str) -> None:
    """Step over strings. A loop of its own, since vocabularies have hundreds of thousands."""
    take, skip, from_bytes = reader.take, reader.skip, int.from_bytes
    for _ in range(count):
        skip(from_bytes(take(8, what), "little"), what)


def _alignment(reader: _Reader, values: Mapping[str, Any]) -> int:
    alignment = values.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        reader.refuse(f"general.alignment is {alignment!r:.40}, which is no power of 2")
    return alignment


def _tensors(reader: _Reader, count: int, alignment: int) -> Counter[str]:
    """Elements by tensor type; refuses a file that is too short for the data of its tensors."""
    elements: Counter[str] = Counter()
    end = 0
    for number in range(count):
        what = f"tensor {number} of {count}"
        reader.skip_string(f"the name of {what}")
        size = _elements(reader, what)
        kind = reader.number(_U32, f"the type of {what}")
        offset = reader.number(_U64, f"the offset of {what}")
        name, block_elements, block_bytes = _TENSOR_TYPES.get(kind, (f"type {kind}", 1, 0))
        elements[name] += size
        end = max(end, offset + -(-size // block_elements) * block_bytes)
    if count:
        start = -(-reader.position // alignment) * alignment
        reader.need(start - reader.position + end, "the data of its tensors")
    return elements


def _elements(reader: _Reader, what: str) -> int:
    dimensions = reader.number(_U32, f"the number of dimensions of {what}")
    if dimensions > MAX_DIMENSIONS:
        reader.refuse(f"{what} has {dimensions} dimensions, more than {MAX_DIMENSIONS}")
    size = 1
    for _ in range(dimensions):
        size *= reader.number(_U64, f"the shape of {what}")
    if size > _MAX_INT64:
        reader.refuse(f"{what} has {size} elements, more than 64 bits can count")
    return size


def _metadata(
    path: Path,
    size: int,
    version: int,
    values: Mapping[str, Any],
    arrays: Mapping[str, int],
    tensors: int,
    elements: Counter[str],
) -> GgufMetadata:
    def get(key: str, kind: type) -> Any:
        value = values.get(key)
        if value is not None and type(value) is not kind:
            raise ModelLoadFailed(f"{path} is no sound GGUF file: {key} is {value!r:.40}, which is no {kind.__name__}")
        return value

    architecture = get("general.architecture", str)
    pooling = get(f"{architecture}.pooling_type", int)
    causal = get(f"{architecture}.attention.causal", bool)
    file_type = get("general.file_type", int)
    usual = elements.most_common(1)
    return GgufMetadata(
        size_bytes=size,
        version=version,
        name=get("general.name", str) or None,
        architecture=architecture,
        type="mmproj" if architecture == "clip" else get("general.type", str) or "model",
        stated_parameters=get("general.parameter_count", int),
        elements=elements.total(),
        context_length=get(f"{architecture}.context_length", int),
        quantization=_FILE_TYPES.get(file_type) or (usual[0][0] if usual else None),
        chat_template=get("tokenizer.chat_template", str) or None,
        pooling=None if pooling is None else _POOLING[pooling] if 0 <= pooling < len(_POOLING) else str(pooling),
        embedding_only=causal is False or bool(pooling),
        split_no=get("split.no", int),
        split_count=get("split.count", int) or 1,
        tensors=tensors,
        array_lengths=dict(arrays),
    )
