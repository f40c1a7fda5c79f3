"""`demandport models`: what it prints, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from demandport.cli import USAGE_ERROR, main
from gguf_files import write_gguf, write_split
from support import environment

LONG = "vision/Big-Model-With-A-Long-Name-That-No-Narrow-Table-Has-Room-For-Q4_K_M"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("DEMANDPORT_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """A directory with one model of each kind."""
    folder = tmp_path / "models"
    write_split(
        folder / "vision", LONG.removeprefix("vision/"), 2, name="Big [b]One[/b]", architecture="qwen2vl",
        general__file_type=15, general__parameter_count=3_600_000_000, __context_length=32768,
        tokenizer__chat_template="{{ x }}",
    )  # fmt: skip
    write_gguf(folder / "vision" / "mmproj.gguf", architecture="clip")
    write_gguf(folder / "rank.gguf", architecture="bert", __pooling_type=4, name="evil\x1b[2Jname\nnext")
    write_gguf(folder / "embed.gguf", architecture="bert", __attention__causal=False)
    (folder / "cut[b].gguf").write_bytes(write_gguf(folder / "x").read_bytes()[:100])
    (folder / "embed").mkdir()
    write_gguf(folder / "pumas" / "m.gguf")
    (folder / "pumas" / "metadata.json").write_text('{"model_id": "llm/x/m"}')
    return folder


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["models", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_a_table_with_a_line_per_model(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line.rstrip() for line in printed(capsys, str(shelf)).splitlines()]
    assert lines[0].split() == ["id", "name", "arch", "params", "quant", "size", "context", "template", "notes"]
    assert [line.split()[0] for line in lines[1:7]] == ["tiny", "cut[b]", "embed", "pumas/m", "rank", LONG]
    by_id = {line.split()[0]: " ".join(line.split()) for line in lines[1:7]}
    assert by_id["tiny"] == "tiny demandport-tiny llama 694 K F32 2.7 MiB 512 yes"
    assert by_id["embed"].endswith("embeddings") and by_id["pumas/m"].endswith("no Pumas")
    assert "evil�[2Jname�next" in by_id["rank"] and by_id["rank"].endswith("no reranker")
    assert "Big [b]One[/b] qwen2vl 3.6 B Q4_K_M " in by_id[LONG]
    assert by_id[LONG].endswith("32768 yes 2 files; sees with mmproj.gguf")
    assert by_id["cut[b]"] == "cut[b] cut[b] 100 B no unusable"
    assert lines[7].startswith("cut[b] is no sound GGUF file: at byte ") and len(lines) == 8


def test_json_is_plain_and_says_all(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {one["id"]: one for one in json.loads(printed(capsys, "--json", str(shelf)))}
    assert list(found) == ["tiny", "cut[b]", "embed", "pumas/m", "rank", LONG]
    assert found["rank"]["name"] == "evil\x1b[2Jname\nnext" and found["rank"]["pooling"] == "rank"
    big = found[LONG]
    assert len(big["shards"]) == 2 and big["path"] == big["shards"][0] and big["mmproj"].endswith("vision/mmproj.gguf")
    assert found["cut[b]"]["unusable"].startswith("is no sound GGUF file") and found["cut[b]"]["parameters"] is None
    assert found["pumas/m"]["pumas"] == {"model_id": "llm/x/m"}


def test_directories_come_from_the_configuration_or_from_the_command(
    shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ids(*arguments: str) -> list[str]:
        return [one["id"] for one in json.loads(printed(capsys, "--json", *arguments))]

    config = tmp_path / "models.toml"
    config.write_text('[inference]\nmodel_directories = ["models/pumas"]')
    assert ids() == ["tiny"]
    assert ids("--config", str(config)) == ["tiny", "m"]
    assert ids("--config", str(config), str(shelf / "embed"), str(shelf / "vision")) == ["tiny", LONG.split("/")[1]]
    monkeypatch.setenv("DEMANDPORT_MODEL_DIRECTORIES", str(shelf / "pumas"))
    assert ids() == ["tiny", "m"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["/nowhere"], "demandport: /nowhere: no such directory"),
        (["--config", "/nowhere.toml"], "/nowhere.toml"),
        (["--config", "wrong.toml"], "there is no table infrence"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_what_is_asked_wrongly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: Any, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.toml").write_text("[infrence]")
    try:
        status = main(["models", *arguments])
    except SystemExit as ended:
        status = int(ended.code or 0)
    out, err = capsys.readouterr()
    assert (status, out) == (USAGE_ERROR, "") and says in err


def test_a_name_that_is_no_utf8_reaches_a_terminal_of_any_kind(tmp_path: Path) -> None:
    os.rename(write_gguf(tmp_path / "m"), os.fsencode(tmp_path) + b"/caf\xe9.gguf")
    for arguments in ([], ["--json"]):
        command = [sys.executable, "-m", "demandport", "models", *arguments, str(tmp_path)]
        done = subprocess.run(command, env=environment(), capture_output=True, check=True)
        assert b"rename it" in done.stdout and done.stderr == b""
