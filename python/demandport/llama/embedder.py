"""Vectors and scores of texts: many texts in one decode, from all requests that wait."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from demandport.errors import Cancelled, ContextOverflow, DeadlineExceeded, DemandportError
from demandport.inference.backend import packed
from demandport.inference.requests import EmbedRequest, RerankRequest
from demandport.llama.model import Model
from demandport.llama.scheduler import Emit


@dataclass(eq=False, slots=True)
class _Job:
    """One request: its texts' tokens, and the results that are there."""

    id: int
    request: EmbedRequest | RerankRequest
    deadline: float | None
    texts: list[list[int]] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)
    #: Texts that have been given to a decode.
    started: int = 0


class Embedder:
    """Runs `embed` and `rerank` requests on one model. Everything but `cancel` belongs to the thread that owns it.

    A decode takes the next texts in order, of as many requests as fit its tokens and sequences.

    Args:
        model: loaded for ``embed`` or ``rerank``.
        emit: gets ``["done", id, result]`` or ``["error", id, error]`` once per request.
        clock: seconds, monotonic.
    """

    def __init__(self, model: Model, emit: Emit, clock: Callable[[], float] = time.monotonic) -> None:
        self._model, self._emit, self._clock = model, emit, clock
        self._jobs: deque[_Job] = deque()
        self._cancelled: set[int] = set()

    @property
    def busy(self) -> bool:
        """There is something to do for `step`."""
        return bool(self._jobs)

    def submit(self, request_id: int, request: EmbedRequest | RerankRequest) -> None:
        """Take a request in; what becomes of it is emitted, errors too."""
        deadline = None if request.deadline_ms is None else self._clock() + request.deadline_ms / 1000
        job = _Job(request_id, request, deadline)
        try:
            job.texts = list(self._tokenised(request))
        except DemandportError as failed:
            self._emit(["error", request_id, failed.to_wire()])
            return
        self._jobs.append(job)

    def cancel(self, request_id: int) -> None:
        """End a request with `cancelled` before its next decode. From any thread; remembered until `settle_cancel`."""
        self._cancelled.add(request_id)

    def settle_cancel(self, request_id: int) -> None:
        """Carry a cancel out now and forget the id."""
        self._cancelled.add(request_id)
        self._drop()
        self._cancelled.discard(request_id)

    def step(self) -> bool:
        """One decode; blocks for its time. False when nothing is left."""
        self._drop()
        places = self._compose()
        if not places:
            return self.busy
        try:
            self._model.decode()
        except DemandportError as failed:
            for job in dict.fromkeys(places):
                self._fail(job, failed)
        else:
            for sequence, job in enumerate(places):
                job.results.append(self._result(job.request, sequence))
        self._model.forget_all()
        for job in dict.fromkeys(places):
            if len(job.results) == len(job.texts):
                self._finish(job)
        return self.busy

    def close(self) -> None:
        """Drop what waits; nothing is emitted."""
        self._jobs.clear()

    # ------------------------------------------------------------------------------------------------ inside

    def _tokenised(self, request: EmbedRequest | RerankRequest) -> Iterator[list[int]]:
        model, most = self._model, self._model.context_length
        if isinstance(request, RerankRequest):
            texts = [rerank_tokens(model, request.query, document) for document in request.documents]
        else:
            texts = [model.tokenize(text, special=False, ends=True) for text in request.texts]
        for position, tokens in enumerate(texts):
            if not 0 < len(tokens) <= most:
                said = f"text {position} has {len(tokens)} tokens; the model reads 1 to {most} at once"
                raise ContextOverflow(said, details={"position": position, "tokens": len(tokens), "limit": most})
            yield tokens

    def _compose(self) -> list[_Job]:
        """Fill the batch; returns the job of each sequence in it."""
        batch, room = self._model.batch, self._model.context_length
        places: list[_Job] = []
        batch.clear()
        for job in self._jobs:
            while job.started < len(job.texts):
                tokens = job.texts[job.started]
                if batch.size + len(tokens) > room or len(places) == self._model.sequences:
                    return places
                batch.extend(tokens, 0, len(places), last=True, every=True)
                places.append(job)
                job.started += 1
        return places

    def _result(self, request: EmbedRequest | RerankRequest, sequence: int) -> Any:
        if isinstance(request, RerankRequest):
            return self._model.vector(sequence, 1)[0]
        return packed(self._model.vector(sequence, self._model.dimensions), normalize=request.normalize)

    def _finish(self, job: _Job) -> None:
        self._jobs.remove(job)
        tokens = sum(map(len, job.texts))
        result: dict[str, Any] = {"usage": {"prompt_tokens": tokens, "completion_tokens": 0}}
        if isinstance(job.request, RerankRequest):
            result["scores"] = job.results
        else:
            result |= {"vectors": job.results, "dimensions": self._model.dimensions}
        self._emit(["done", job.id, result])

    def _fail(self, job: _Job, failed: DemandportError) -> None:
        self._jobs.remove(job)
        self._emit(["error", job.id, failed.to_wire()])

    def _drop(self) -> None:
        now = self._clock()
        for job in list(self._jobs):
            if job.id in self._cancelled:
                self._fail(job, Cancelled("the request was cancelled"))
            elif job.deadline is not None and now >= job.deadline:
                self._fail(job, DeadlineExceeded(f"the deadline of {job.request.deadline_ms} ms has passed"))


def rerank_tokens(model: Model, query: str, document: str) -> list[int]:
    """What a reranker reads: by the template of its file, or both texts with what the vocabulary puts between.

    Source: `format_prompt_rerank` in llama.cpp's tools/server/server-common.cpp.
    """
    template = model.template("rerank")
    if template is not None:
        pieces = re.split(r"(\{query\}|\{document\})", template)
        texts = {"{query}": query, "{document}": document}
        return [t for piece in pieces for t in model.tokenize(texts.get(piece, piece), special=piece not in texts)]
    ends = model.vocabulary_ends
    return [
        *ends.begin,
        *model.tokenize(query, special=False),
        *ends.end,
        *ends.separator,
        *model.tokenize(document, special=False),
        *ends.end,
    ]
