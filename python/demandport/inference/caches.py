"""KV caches as plain data, and the files they are saved in.

A cache is the tokens that were read and made, with what they were computed by; where it was saved, the file also has
what the model computed for them, so that nothing has to be computed again. A file is: `_MAGIC`, the length of the
header as 4 bytes (big-endian), the SHA-256 of the header, the header as JSON, the tokens as little-endian 32-bit
integers, the state.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import json
import os
import re
import secrets
import struct
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from demandport.errors import Forbidden, ModelNotFound, TypeMismatch

_MAGIC = b"demandport kv cache 1\n"
_LENGTH = struct.Struct(">I")
_CHECKSUM_BYTES = 32
_MAX_HEADER_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_SUFFIX = ".kv"
#: What reading a value that is not of the form may raise.
_WRONG = (KeyError, TypeError, ValueError, OverflowError, RecursionError)


@dataclass(frozen=True, slots=True)
class KvCache:
    """What a generation can go on from.

    Attributes:
        fingerprint: names the model file's content; no other model can use it.
        tokens: what was read and made.
        adapters: LoRA adapters it was computed with, (path, scale) each.
        name: under which it was saved; None where it was not.
        model: the model and its settings, as `ModelSpec.from_options` reads them.
    """

    fingerprint: str
    tokens: tuple[int, ...]
    adapters: tuple[tuple[str, float], ...] = ()
    name: str | None = None
    model: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_plain(cls, value: Mapping[str, Any]) -> KvCache:
        """The cache that a map describes.

        Raises:
            TypeMismatch: it is none.
        """
        try:
            tokens = array("i", base64.b64decode(value["tokens"], validate=True))
            adapters = tuple((str(path), float(scale)) for path, scale in value["adapters"])
            fingerprint, name, model = value["fingerprint"], value["name"], value["model"]
            if not isinstance(fingerprint, str) or not isinstance(name, str | None) or not isinstance(model, dict):
                raise TypeError("fingerprint and name must be strings, model a map")
            json.dumps(model)
            return cls(fingerprint, tuple(tokens), adapters, name, model)
        except (*_WRONG, binascii.Error) as wrong:
            raise TypeMismatch(f"that is no KV cache: {wrong}; it comes from the port kv_cache_out") from None

    def to_plain(self) -> dict[str, Any]:
        """A map of plain data that `from_plain` reads back."""
        return {
            "fingerprint": self.fingerprint,
            "tokens": base64.b64encode(array("i", self.tokens).tobytes()).decode(),
            "adapters": [list(adapter) for adapter in self.adapters],
            "name": self.name,
            "model": dict(self.model),
        }

    def truncated(self, tokens: int) -> KvCache:
        """Its first `tokens` tokens; a negative number leaves out that many at the end.

        Raises:
            TypeMismatch: nothing would be left, or there are fewer.
        """
        count = len(self.tokens)
        left = tokens if tokens >= 0 else count + tokens
        if not 0 < left <= count:
            raise TypeMismatch(f"the KV cache has {count} tokens, so it cannot be cut to {tokens}")
        return replace(self, tokens=self.tokens[:left])


def file_of(directory: Path | None, name: str) -> Path:
    """Where a cache of that name is.

    Raises:
        Forbidden: the service has no directory for caches, or the name could lead out of it.
    """
    if directory is None:
        raise Forbidden("no directory for KV caches is configured: set inference.cache_directory")
    if not _NAME.fullmatch(name):
        raise Forbidden(f"{name!r} is no name for a KV cache: letters, digits, '_', '-' and '.', at most 128")
    return directory / f"{name}{_SUFFIX}"


def write(path: Path, cache: KvCache, state: bytes) -> int:
    """Save atomically; returns the file's size in bytes. Blocks.

    Raises:
        Forbidden: the file cannot be written.
    """
    tokens = array("i", cache.tokens).tobytes()
    header = {
        "fingerprint": cache.fingerprint,
        "adapters": [list(adapter) for adapter in cache.adapters],
        "model": dict(cache.model),
        "tokens": len(cache.tokens),
        "state_bytes": len(state),
        "tokens_sha256": hashlib.sha256(tokens).hexdigest(),
        "state_sha256": hashlib.sha256(state).hexdigest(),
    }
    text = json.dumps(header).encode()
    content = b"".join([_MAGIC, _LENGTH.pack(len(text)), hashlib.sha256(text).digest(), text, tokens, state])
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as failed:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise Forbidden(f"the KV cache {path.stem} cannot be saved: {failed.strerror}") from None
    return len(content)


def read(path: Path) -> KvCache:
    """A saved cache without its state. Blocks.

    Raises:
        ModelNotFound: there is none of that name.
        TypeMismatch: the file is damaged.
    """
    return _read(path)[0]


def read_whole(path: Path) -> tuple[KvCache, bytes]:
    """A saved cache and what the model had computed for it. Blocks. Raises as `read`."""
    return _read(path, state=True)


def _read(path: Path, state: bool = False) -> tuple[KvCache, bytes]:
    try:
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise ValueError("it begins like no cache")
            (size,) = _LENGTH.unpack(file.read(_LENGTH.size))
            checksum, text = file.read(_CHECKSUM_BYTES), file.read(min(size, _MAX_HEADER_BYTES))
            _check(text, checksum.hex())
            header = json.loads(text)
            count, state_bytes = int(header["tokens"]), int(header["state_bytes"])
            room = os.fstat(file.fileno()).st_size - file.tell()
            if count < 0 or state_bytes < 0 or count * 4 + state_bytes != room:
                raise ValueError("its length is not what its header says")
            tokens = array("i", _check(file.read(count * 4), header["tokens_sha256"]))
            adapters = tuple((str(path), float(scale)) for path, scale in header["adapters"])
            content = _check(file.read(state_bytes), header["state_sha256"]) if state else b""
            if not isinstance(header["model"], dict):
                raise ValueError("its model is no map")
            return KvCache(str(header["fingerprint"]), tuple(tokens), adapters, path.stem, header["model"]), content
    except FileNotFoundError:
        raise ModelNotFound(f"there is no saved KV cache {path.stem!r}") from None
    except (*_WRONG, OSError, struct.error) as failed:
        raise TypeMismatch(f"the saved KV cache {path.stem!r} cannot be read: {failed}") from None


def _check(content: bytes, checksum: str) -> bytes:
    if hashlib.sha256(content).hexdigest() != checksum:
        raise ValueError("its content does not match its checksum")
    return content


def check_use(cache: KvCache, fingerprint: str, adapters: Sequence[tuple[str, float]]) -> None:
    """Refuse a cache that another model, or the same with other adapters, has computed.

    Raises:
        TypeMismatch: so it is.
    """
    if cache.fingerprint != fingerprint:
        raise TypeMismatch("the KV cache was computed by another model file")
    if cache.adapters != tuple(adapters):
        raise TypeMismatch("the KV cache was computed with other LoRA adapters: give the same")
