"""Tokens per second of llama.cpp's calls made directly: decode, sample, piece, in one loop.

For every line on stdin it generates once and prints "tokens seconds".
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp

from demandport.inference.requests import GenerateRequest
from demandport.llama.model import BATCH_TOKENS, Model
from demandport.llama.prompt import PromptBuilder
from demandport.llama.sampling import Sampler


def generate(model: Model, prompts: PromptBuilder, request: GenerateRequest) -> tuple[int, str]:
    prompt = prompts.tokens(request)
    sampler = Sampler(model.vocabulary, model.tokens, model.context_length, request, request.seed or 0, prompt)
    sample, batch, pieces = llama_cpp.llama_sampler_sample, model.batch, []
    for start in range(0, len(prompt), BATCH_TOKENS):
        batch.clear()
        for position in range(start, min(start + BATCH_TOKENS, len(prompt))):
            batch.add(prompt[position], position, 0, position == len(prompt) - 1)
        model.decode()
    count, position = 0, len(prompt)
    while True:
        token = sample(sampler.handle, model.context, -1)
        count += 1
        if token in model.ends:
            break
        pieces.append(model.piece(token))
        if count >= request.max_tokens:
            break
        batch.clear()
        batch.add(token, position, 0, True)
        position += 1
        model.decode()
    sampler.close()
    model.forget(0)
    return count, b"".join(pieces).decode("utf-8", "replace")


def main() -> None:
    options: dict[str, Any] = json.loads(sys.argv[2])
    model = Model(Path(sys.argv[1]))
    prompts = PromptBuilder(model)
    for _ in sys.stdin:
        start = time.perf_counter()
        count, _text = generate(model, prompts, GenerateRequest.from_options(options))
        print(count, time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
