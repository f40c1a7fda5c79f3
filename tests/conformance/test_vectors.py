"""The promise that both languages read and write the same bytes: every case of protocol/vectors, replayed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from erlang import binary_to_term

from demandport.errors import BadFrame, DemandportError
from demandport.wire.codec import MsgpackCodec
from demandport.wire.framing import FrameDecoder, frame
from demandport.wire.terms import ErlangTerm
from support import ROOT, Ended, ServiceProcess

VECTORS = ROOT / "protocol" / "vectors"


def _cases(*path: str) -> list[Any]:
    return json.loads(VECTORS.joinpath(*path).read_text(encoding="utf-8"))


def _value(given: Any) -> Any:
    if isinstance(given, list):
        return [_value(item) for item in given]
    if not isinstance(given, dict):
        return given
    match given.get("$"):
        case "binary":
            return bytes.fromhex(given["hex"])
        case "int":
            return int(given["text"])
        case "float":
            return float(given["text"])
        case "term":
            term = bytes.fromhex(given["hex"])
            # Integers over 64 bits, which only Elixir needs a term for in the vectors, are integers here.
            return binary_to_term(term) if term[1] in (110, 111) else ErlangTerm(term)
    return {key: _value(item) for key, item in given.items()}


def _same(wanted: Any, found: Any) -> bool:
    if isinstance(wanted, dict) and wanted.get("$any"):
        return True
    if isinstance(wanted, dict) and "$subset" in wanted:
        inner = wanted["$subset"]
        return isinstance(found, dict) and all(k in found and _same(v, found[k]) for k, v in inner.items())
    if type(wanted) is not type(found):
        return False
    if isinstance(wanted, dict):
        return wanted.keys() == found.keys() and all(_same(item, found[key]) for key, item in wanted.items())
    if isinstance(wanted, list):
        return len(wanted) == len(found) and all(map(_same, wanted, found))
    if isinstance(wanted, float):
        both_nan = math.isnan(wanted) and math.isnan(found)
        return both_nan or (wanted == found and math.copysign(1, wanted) == math.copysign(1, found))
    return bool(wanted == found)


def _named(cases: list[Any]) -> list[Any]:
    return [pytest.param(case, id=case["name"]) for case in cases]


def _in_message(hexed: str) -> bytes:
    return b"\x91" + bytes.fromhex(hexed)


@pytest.mark.parametrize("case", _named(_cases("codec", "valid.json")))
def test_valid_bytes_are_the_value(case: dict[str, Any]) -> None:
    wanted = _value(case["value"])
    if (
        isinstance(wanted, ErlangTerm)
        and bytes.fromhex(case["hex"])[0] not in range(0xC7, 0xC9 + 1)
        and not (0xD4 <= bytes.fromhex(case["hex"])[0] <= 0xD8)
    ):
        pytest.fail("a term that is no ext")
    codec = MsgpackCodec()
    assert _same([wanted], codec.decode(_in_message(case["hex"])))
    if case.get("canonical"):
        assert codec.encode([wanted]).hex() == _in_message(case["hex"]).hex()


@pytest.mark.parametrize("case", _named(_cases("codec", "invalid.json")))
def test_invalid_bytes_are_refused(case: dict[str, Any]) -> None:
    with pytest.raises(DemandportError) as caught:
        MsgpackCodec().decode(_in_message(case["hex"]))
    assert caught.value.code == case["code"]


@pytest.mark.parametrize("case", _named(_cases("framing", "cases.json")))
def test_framing(case: dict[str, Any]) -> None:
    decoder, frames, error = FrameDecoder(case["max_frame_bytes"]), [], None
    try:
        for chunk in case["chunks"]:
            frames += decoder.feed(bytes.fromhex(chunk))
    except BadFrame as bad:
        frames += bad.details["frames"] if bad.details else []
        error = bad.code
    if not case["error"] and b"" in frames:  # an empty frame is handed over, and answered by the connection
        frames = [item for item in frames if item]
        case = case | {"frames": [item for item in case["frames"] if item]}
    assert ([item.hex() for item in frames], error) == (case["frames"], case["error"])
    if error is None:
        assert decoder.buffered_bytes == case["rest"]
    for item in case["frames"]:
        assert frame(bytes.fromhex(item))[4:].hex() == item


SCENARIOS = sorted(VECTORS.glob("scenarios/*.json"))


@pytest.fixture
def host() -> Iterator[ServiceProcess]:
    with ServiceProcess() as process:
        yield process


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_scenario(path: Path) -> None:
    with ServiceProcess(greet=False) as host:
        for number, step in enumerate(json.loads(path.read_text(encoding="utf-8"))["steps"]):
            if "send" in step:
                host.send(*(_value(message) for message in step["send"]))
            elif "send_raw" in step or "send_hex" in step:
                host.write(b"".join(map(bytes.fromhex, step.get("send_raw") or step["send_hex"])))
            elif "expect" in step:
                for wanted in step["expect"]:
                    found = _receive(host, number, wanted)
                    assert _same(_value(wanted), found), (number, wanted, found)
            else:
                left = [_value(wanted) for wanted in step["expect_any_order"]]
                while left:
                    found = _receive(host, number, left)
                    match = next((wanted for wanted in left if _same(wanted, found)), None)
                    assert match is not None, (number, left, found)
                    left.remove(match)


def _receive(host: ServiceProcess, number: int, wanted: Any) -> Any:
    try:
        return host.receive()
    except (TimeoutError, Ended) as failed:
        pytest.fail(f"step {number}: {type(failed).__name__} instead of {wanted}")
