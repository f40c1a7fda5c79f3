"""What docs/writing-a-node.md shows is what works: its files are put together and its tests are run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from support import ROOT, environment


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
