"""What benchmarks need to run a BEAM: the compiled client, and where Python and the package are."""

from __future__ import annotations

import compileall
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
SOURCE = Path(os.environ.get("BENCH_SOURCE", ROOT / "python"))  # another copy of the package, to try a change


def environment() -> dict[str, str]:
    """Of the programs that run the package."""
    return {**os.environ, "PYTHON": sys.executable, "SOURCE": str(SOURCE), "PYTHONPATH": str(SOURCE)}


def compiled(folder: Path, script: str = "port.exs") -> list[str]:
    """Compile client and package; returns the command that runs a script of this folder; arguments are added to it."""
    # As an installed package is; the environment may forbid the interpreter to do it by itself.
    compileall.compile_dir(SOURCE / "demandport", quiet=2)
    built = {**environment(), "MIX_ENV": "prod", "MIX_BUILD_PATH": str(folder / "build")}
    subprocess.run(["mix", "compile"], cwd=ROOT, env=built, check=True, stdout=subprocess.DEVNULL)
    return ["elixir", "-pa", str(folder / "build/lib/demand_port/ebin"), str(BENCH / script)]
