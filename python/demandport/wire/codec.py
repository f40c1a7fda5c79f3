"""Messages and bytes: msgpack, and Erlang's External Term Format for hosts that want plain tuples.

Both directions fail only with an error of `demandport.errors`: `BadMessage` for bytes that are no message, and
`TypeMismatch` for a value that the wire cannot carry.
"""

from __future__ import annotations

import math
import struct
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import msgpack

from demandport.errors import BadMessage, DemandportError, TypeMismatch
from demandport.wire.terms import ETF_EXT_TYPE, LARGE, MAX_DEPTH, ErlangTerm, check_depth, check_travels

Message = list[Any]


class Codec(Protocol):
    """One way to write messages as bytes."""

    name: str

    def encode(self, message: Message) -> bytes:
        """The payload of `message`; raises `TypeMismatch` for a value that cannot travel."""
        ...

    def pieces(self, message: Message) -> bytes | Pieces:
        """As `encode`, but what is large may come in pieces."""
        ...

    def decode(self, payload: bytes) -> Message:
        """The message in `payload`; raises `BadMessage`."""
        ...


def codec_named(name: str) -> Codec:
    """The codec that ``--codec`` names: ``msgpack`` or ``etf``."""
    return EtfCodec() if name == "etf" else MsgpackCodec()


# --------------------------------------------------------------------------------------------------------- msgpack


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as failed:
        raise TypeMismatch(f"a value cannot travel over the wire: {failed}") from None


class Pieces:
    """A payload as pieces, to be taken from its beginning on."""

    __slots__ = ("_left", "size")

    def __init__(self, pieces: Iterable[bytes | str]) -> None:
        #: Each with how much of it was taken.
        self._left: deque[tuple[bytes | str, int]] = deque((piece, 0) for piece in pieces)
        self.size = sum(len(piece) for piece, _ in self._left)

    def take(self, size: int) -> bytes:
        """The next `size` bytes; fewer at the end."""
        taken = bytearray()
        while self._left and len(taken) < size:
            piece, start = self._left.popleft()
            end = start + size - len(taken)
            next_bytes = piece[start:end]
            taken += next_bytes.encode() if isinstance(next_bytes, str) else next_bytes
            if end < len(piece):
                self._left.appendleft((piece, end))
        return bytes(taken)


class MsgpackCodec:
    """MessagePack, with ext type 69 for Erlang terms."""

    name = "msgpack"

    def __init__(self) -> None:
        self._packer = msgpack.Packer(default=_pack_other, autoreset=True, use_bin_type=True)
        self._pack = self._packer.pack

    def encode(self, message: Message) -> bytes:
        check_travels(message)
        return self._encode(message)

    def pieces(self, message: Message) -> bytes | Pieces:
        """The payload of `message`, in which large texts and binaries are not copied."""
        if not check_travels(message):
            return self._encode(message)
        return Pieces(self._written(message))

    def _written(self, value: Any) -> Iterator[bytes | str]:
        """What `value` is as bytes, one after the other; a large ASCII text stands for its own."""
        if isinstance(value, dict):
            yield self._packer.pack_map_header(len(value))
            for key, item in value.items():
                yield self._encode(key)
                yield from self._written(item)
        elif isinstance(value, list | tuple):
            yield self._packer.pack_array_header(len(value))
            for item in value:
                yield from self._written(item)
        elif type(value) in (str, bytes) and len(value) > LARGE:
            data = value if type(value) is bytes or value.isascii() else _utf8(value)
            yield struct.pack(">BI", 0xC6 if type(value) is bytes else 0xDB, len(data))
            yield data
        else:
            yield self._encode(value)

    def _encode(self, value: Any) -> bytes:
        try:
            payload: bytes = self._pack(value)
        except (TypeError, ValueError, OverflowError, RecursionError) as failed:
            raise TypeMismatch(f"a value cannot travel over the wire: {failed}") from None
        if b"\xff" in payload and _may_hold_timestamp(payload) and _holds(value, msgpack.Timestamp):
            raise TypeMismatch("a msgpack timestamp cannot travel over the wire; give its text or number")
        return payload

    def decode(self, payload: bytes) -> Message:
        try:
            # No length in it is believed that the payload's own could not hold: unpackb's default since msgpack 1.0.
            message = msgpack.unpackb(payload, object_pairs_hook=_checked_map, ext_hook=_read_ext, strict_map_key=False)
            # Timestamps never reach the ext hook: find them where their bytes may stand at all.
            if b"\xff" in payload and _may_hold_timestamp(payload) and _holds(message, msgpack.Timestamp):
                raise BadMessage("ext type -1 is not one of the protocol's")
        except DemandportError:
            raise
        except Exception as failed:  # msgpack raises ValueError, OverflowError, RuntimeError, … for bad bytes
            raise BadMessage(f"not a msgpack message: {type(failed).__name__} {failed}") from None
        if type(message) is not list or not message:
            raise BadMessage("a message is a non-empty array")
        if len(payload) > MAX_DEPTH:
            check_depth(message)
        return message


def _checked_map(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise BadMessage("a map has the same key twice")
    for key in result:
        if type(key) is not str:
            raise BadMessage(f"map keys are strings, not {type(key).__name__}")
    return result


def _read_ext(code: int, data: bytes) -> ErlangTerm | int:
    if code != ETF_EXT_TYPE or len(data) < 2 or data[0] != 131:
        raise BadMessage(f"ext type {code} is not one of the protocol's")
    if data[1] in _BIG:  # an integer over 64 bits is one for nodes too
        header = _BIG[data[1]]
        value = int.from_bytes(data[header + 1 :], "little")
        return -value if data[header] else value
    return ErlangTerm(bytes(data))


#: Tags of large integers (SMALL_BIG_EXT, LARGE_BIG_EXT): where their sign byte stands.
_BIG = {110: 3, 111: 6}


def _may_hold_timestamp(payload: bytes) -> bool:
    return b"\xd6\xff" in payload or b"\xd7\xff" in payload or b"\xc7\x0c\xff" in payload


def _holds(message: Any, cls: type[Any]) -> bool:
    waiting = [message]
    while waiting:
        value = waiting.pop()
        if isinstance(value, cls):
            return True
        if isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list | tuple):
            waiting.extend(value)
    return False


def _pack_other(value: Any) -> Any:
    if type(value) is ErlangTerm:
        return msgpack.ExtType(ETF_EXT_TYPE, value.etf)
    if type(value) is int:  # over 64 bits
        import erlang

        return msgpack.ExtType(ETF_EXT_TYPE, erlang.term_to_binary(value))
    if isinstance(value, memoryview | bytearray):
        return bytes(value)
    raise TypeError(f"{type(value).__name__} has no form on the wire")


# ------------------------------------------------------------------------------------------- External Term Format


class EtfCodec:
    """Erlang's External Term Format, by erlang-py: messages are tuples whose first element is an atom."""

    name = "etf"

    def __init__(self) -> None:
        import erlang  # slower to import and to use than msgpack: only hosts that ask for it pay

        # erlang-py inflates compressed terms wherever they stand, to whatever size they claim: take the means away.
        erlang.zlib = None
        self._erlang = erlang

    def encode(self, message: Message) -> bytes:
        tag, *rest = message
        check_travels(message)
        try:
            term = (self._erlang.OtpErlangAtom(tag), *(self._to_term(value) for value in rest))
            return self._erlang.term_to_binary(term)  # type: ignore[no-any-return]
        except TypeMismatch:
            raise
        except Exception as failed:
            raise TypeMismatch(f"a value cannot travel over the wire: {failed}") from None

    def pieces(self, message: Message) -> bytes:
        return self.encode(message)

    def decode(self, payload: bytes) -> Message:
        try:
            term = self._erlang.binary_to_term(payload)
            if not isinstance(term, tuple) or not term:
                raise BadMessage("a message is a non-empty tuple")
            message = [self._from_tag(term[0]), *(self._from_term(value, 1) for value in term[1:])]
        except DemandportError:
            raise
        except RecursionError:
            raise BadMessage(f"the message is nested deeper than {MAX_DEPTH}") from None
        except Exception as failed:  # erlang-py raises ParseException, IndexError, struct.error, … for bad bytes
            raise BadMessage(f"not a term: {type(failed).__name__} {failed}") from None
        return message

    def _from_tag(self, tag: Any) -> Any:
        if isinstance(tag, self._erlang.OtpErlangAtom):
            return _atom_text(tag)
        return self._from_term(tag, 1)

    def _from_term(self, term: Any, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise BadMessage(f"the message is nested deeper than {MAX_DEPTH}")
        erl = self._erlang
        if term is None or isinstance(term, bool | int | float):
            return term
        if isinstance(term, erl.OtpErlangBinary):
            return self._from_binary(term)
        if isinstance(term, erl.OtpErlangAtom):
            text = _atom_text(term)
            if text in _ATOM_VALUES:
                return _ATOM_VALUES[text]
            return ErlangTerm(erl.term_to_binary(term))
        if isinstance(term, bytes):  # STRING_EXT: how Erlang writes a list of small integers
            return list(term)
        if isinstance(term, erl.OtpErlangList):
            if term.improper:
                return ErlangTerm(erl.term_to_binary(term))
            return [self._from_term(item, depth + 1) for item in term.value]
        if isinstance(term, list):
            return [self._from_term(item, depth + 1) for item in term]
        if isinstance(term, dict):
            return self._from_map(term, depth)
        return ErlangTerm(erl.term_to_binary(term))

    def _from_binary(self, term: Any) -> str | bytes | ErlangTerm:
        if term.bits != 8:
            return ErlangTerm(self._erlang.term_to_binary(term))
        try:
            return str(term.value, "utf-8")
        except UnicodeDecodeError:
            return bytes(term.value)

    def _from_map(self, term: dict[Any, Any], depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in term.items():
            name = _atom_text(key) if isinstance(key, self._erlang.OtpErlangAtom) else self._from_term(key, depth)
            if type(name) is not str:
                raise BadMessage(f"map keys are strings, not {type(name).__name__}")
            if name in result:
                raise BadMessage("a map has the same key twice")
            result[name] = self._from_term(value, depth + 1)
        return result

    def _to_term(self, value: Any) -> Any:
        erl = self._erlang
        if value is None:
            return erl.OtpErlangAtom("nil")
        if isinstance(value, bool | int):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else erl.OtpErlangAtom(_not_finite(value))
        if isinstance(value, str):
            return erl.OtpErlangBinary(value.encode())
        if isinstance(value, bytes | bytearray | memoryview):
            return erl.OtpErlangBinary(bytes(value))
        if isinstance(value, list | tuple):
            return erl.OtpErlangList([self._to_term(item) for item in value])
        if isinstance(value, dict):
            return {self._to_key(key): self._to_term(item) for key, item in value.items()}
        if isinstance(value, ErlangTerm):
            return erl.binary_to_term(value.etf)
        raise TypeMismatch(f"{type(value).__name__} has no form on the wire")

    def _to_key(self, key: Any) -> Any:
        if not isinstance(key, str):
            raise TypeMismatch(f"map keys are strings, not {type(key).__name__}")
        return self._erlang.OtpErlangBinary(key.encode())


def _atom_text(atom: Any) -> str:
    return str(atom.value, "utf-8") if isinstance(atom.value, bytes) else str(atom.value)


#: Atoms that stand for a value of the protocol.
_ATOM_VALUES = {"nil": None, "undefined": None, "nan": math.nan, "infinity": math.inf, "neg_infinity": -math.inf}


def _not_finite(value: float) -> str:
    if math.isnan(value):
        return "nan"
    return "infinity" if value > 0 else "neg_infinity"
