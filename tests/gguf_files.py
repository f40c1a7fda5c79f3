"""GGUF files for tests, written by ggml's own package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFEndian, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

ROWS = 8


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    name: str | None = None,
    tensors: int = 1,
    tensor_type: str = "F32",
    endianess: GGUFEndian = GGUFEndian.LITTLE,
    **pairs: Any,
) -> Path:
    """Write a file with `tensors` tensors of `ROWS` × 256 elements; parents are made.

    Args:
        pairs: metadata by key, ``__`` for a dot; one that begins with it is the architecture's own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, architecture, endianess=endianess)
    if name is not None:
        writer.add_name(name)
    for key, value in pairs.items():
        _add(writer, (architecture if key.startswith("__") else "") + key.replace("__", "."), value)
    for number in range(tensors):
        _add_tensor(writer, f"blk.{number}.weight", GGMLQuantizationType[tensor_type])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_split(folder: Path, stem: str, count: int, *, leave_out: int | None = None, **about: Any) -> list[Path]:
    """Write a model of `count` files; returns those, from the first on. `leave_out`: a number, from 1."""
    written = []
    for number in range(1, count + 1):
        if number == leave_out:
            continue
        path = folder / f"{stem}-{number:05}-of-{count:05}.gguf"
        written.append(write_gguf(path, split__no=np.uint16(number - 1), split__count=np.uint16(count), **about))
    return written


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, np.uint16):
        writer.add_uint16(key, int(value))
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _add_tensor(writer: GGUFWriter, name: str, kind: GGMLQuantizationType) -> None:
    block_elements, block_bytes = GGML_QUANT_SIZES[kind]
    if kind is GGMLQuantizationType.F32:
        writer.add_tensor(name, np.zeros((ROWS, 256), dtype=np.float32))
    else:
        writer.add_tensor(name, np.zeros((ROWS, 256 // block_elements * block_bytes), dtype=np.uint8), raw_dtype=kind)
