"""What llama.cpp's decode alone takes: the most that any way of serving a model can make of it on this machine.

    python bench/decode_limit.py [MODEL.gguf]

Without a model the random one of bench/random_model.py is written. Each batch holds one token of each of so many
sequences, in cells that are nearly empty; there are no prompts, no sampling and no text. Best of three rounds of 12.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import random_model
from table import Table

from demandport.llama.model import Model

STREAMS = (1, 2, 3, 4, 6, 8, 12, 16)
DECODES, ROUNDS = 12, 3


def decode_s(model: Model, streams: int) -> float:
    """Seconds of the quickest decode of so many sequences."""
    took = []
    for _ in range(ROUNDS):
        model.forget_all()
        for position in range(DECODES):
            model.batch.clear()
            for sequence in range(streams):
                model.batch.add(300 + sequence, position, sequence, True)
            started = time.perf_counter()
            model.decode()
            took.append(time.perf_counter() - started)
    return min(took)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder) / "random.gguf"
        if not path.exists():
            random_model.write(path)
        model = Model(path, sequences=max(STREAMS))
        table = Table("sequences", "one decode", "tokens/s", "of one alone")
        alone = decode_s(model, 1)
        for streams in STREAMS:
            took = decode_s(model, streams)
            table.add(str(streams), f"{took * 1000:.1f} ms", f"{streams / took:.0f}", f"{streams * alone / took:.2f}")
        table.show()
        model.close()


if __name__ == "__main__":
    main()
