"""Generates in this process, one job a line: with the project's scheduler, or with llama-cpp-python's own completion.

    python bench/in_process.py scheduler|completion MODEL CONTEXT THREADS

bench/ways.py starts it; bench/jobs.py has the form of the lines.
"""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path
from typing import Any

import jobs
from jobs import Job, Stream
from llama_cpp import Llama

from demandport.inference.requests import GenerateRequest
from demandport.llama.model import Model
from demandport.llama.scheduler import Scheduler
from demandport.llama.worker import SEQUENCES


class Scheduled:
    """The scheduler as its worker runs it, without the worker.

    Text is coalesced, so tokens are timed by steps: each one chooses one token for every stream that has begun and not
    ended. A scheduler that did otherwise would be noticed at the end of the job.
    """

    def __init__(self, path: str) -> None:
        self._scheduler = Scheduler(Model(Path(path), sequences=SEQUENCES), self._emit)
        gc.freeze()  # as the worker does
        self._last_id = 0
        self._running: dict[int, Stream] = {}
        self._messages: dict[int, int] = {}

    def run(self, job: Job) -> list[Stream]:
        streams = [self._submit(request) for request in job["streams"]]
        first, late, busy = self._last_id - len(streams) + 1, job["late"], True
        while busy:
            busy = self._scheduler.step()
            self._stamp(time.perf_counter())
            if late and (not busy or self._messages.get(first, 0) >= job["after"]):
                streams.append(self._submit(late))
                late, busy = None, True
        counted, said = (sum(counts) for counts in zip(*((len(s.times), s.tokens) for s in streams), strict=True))
        if abs(counted - said) > 0.05 * said:
            raise RuntimeError(f"{said} tokens came in {counted} steps: their times are not those of the steps")
        return streams

    def _submit(self, options: dict[str, Any]) -> Stream:
        self._last_id += 1
        stream = self._running[self._last_id] = Stream(time.perf_counter())
        self._scheduler.submit(self._last_id, GenerateRequest.from_options(options))
        return stream

    def _emit(self, message: list[Any]) -> None:
        kind, id, body = message
        if kind == "chunk":
            self._messages[id] = self._messages.get(id, 0) + 1
        elif kind == "done":
            self._running[id].tokens = body["usage"]["completion_tokens"]
            self._running[id].prompt_tokens = body["usage"]["prompt_tokens"]
        elif kind == "error":
            raise RuntimeError(f"the scheduler refuses: {body}")

    def _stamp(self, now: float) -> None:
        for id, stream in list(self._running.items()):
            if id in self._messages:
                stream.times.append(now)
            if stream.tokens:
                stream.end = now
                del self._running[id]


class Completed:
    """`Llama.create_completion`, one after another: it has one sequence and is not for several threads of the caller.

    Args:
        threads: that compute one token at a time; 0: what the library takes.
    """

    def __init__(self, path: str, context: int, threads: int) -> None:
        self._llama = Llama(path, n_ctx=context, n_threads=threads or None, verbose=False)

    def run(self, job: Job) -> list[Stream]:
        start = time.perf_counter()
        streams = [self._serve(request, start) for request in job["streams"]]
        if job["late"]:
            came = streams[0].times[: job["after"]][-1]
            streams.append(self._serve(job["late"], came))
        return streams

    def _serve(self, request: dict[str, Any], start: float) -> Stream:
        options = {name: value for name, value in request.items() if name != "raw"}
        stream, reason = Stream(start), None
        for event in self._llama.create_completion(stream=True, repeat_penalty=1.0, **options):
            choice = event["choices"][0]
            reason = choice["finish_reason"]
            if choice["text"]:
                stream.times.append(time.perf_counter())
        stream.end = time.perf_counter()
        # It does not say how many there were, but what ended it, and there is an event for each.
        stream.tokens = request["max_tokens"] if reason == "length" else len(stream.times)
        stream.prompt_tokens = len(self._llama.tokenize(request["prompt"].encode(), special=True))
        return stream


def main() -> None:
    way, path, context, threads = sys.argv[1:]
    runner = Scheduled(path) if way == "scheduler" else Completed(path, int(context), int(threads))
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(jobs.to_line(runner.run(jobs.job(line))))
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
