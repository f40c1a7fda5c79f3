"""What the guides show is what works: the files of docs/writing-a-node.md are put together and its tests are run; the
configuration of docs/models.md and docs/graphs.md is taken."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from demandport.inference import config as models
from demandport.nodes import http, process
from demandport.settings import Tables
from support import ROOT, environment


def configuration(guide: str, folder: Path) -> Tables:
    (block,) = re.findall(r"^```toml\n(.*?)^```$", (ROOT / "docs" / guide).read_text("utf-8"), re.DOTALL | re.MULTILINE)
    (folder / "demandport.toml").write_text(block, "utf-8")
    return Tables.read(folder / "demandport.toml")


def test_writing_a_node(tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "writing-a-node.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n# (\S+)\n(.*?)^```$", guide, re.DOTALL | re.MULTILINE)
    assert {name for name, _ in blocks} == {"my_nodes.py", "test_my_nodes.py"}
    for name, code in blocks:
        with open(tmp_path / name, "a", encoding="utf-8") as file:
            file.write(code + "\n\n")
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", str(tmp_path)]
    env = environment(tmp_path) | {"PYTEST_ADDOPTS": "", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{guide.count('def test_')} passed" in done.stdout, os.linesep + done.stdout


def test_the_configuration_of_models(tmp_path: Path) -> None:
    tables = configuration("models.md", tmp_path)
    found = models.load_config(tables, {})
    tables.require_known()
    assert found.default_model == "assistant"
    assert {name: spec.backend for name, spec in found.models.items()} == {
        "assistant": "llama.cpp",
        "vision": "llama-server",
        "remote": "openai",
        "local": "ollama",
    }


def test_the_configuration_of_programs_and_hosts(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    tables = configuration("graphs.md", tmp_path)
    process.load_config(tables, {"PATH": os.environ["PATH"]})
    assert "api.example.com" in str(http.load_config(tables, {}))
    tables.require_known()
