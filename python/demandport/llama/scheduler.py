"""Decides what the model computes next. One step is one decode, so that messages are looked at in between.

This one runs one sequence at a time, in the order of arrival; its callers see only `submit`, `cancel`, `step`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import llama_cpp

from demandport.errors import Cancelled, ContextOverflow, DeadlineExceeded, DemandportError, Internal
from demandport.inference.backend import DEFAULT_MAX_TOKENS, FinishReason, GenerateRequest
from demandport.llama.model import BATCH_TOKENS, Model
from demandport.llama.prompt import PromptBuilder
from demandport.llama.sampling import Sampler, draw_seed
from demandport.llama.text import Detokenizer, StopFilter

#: Text is held back at most this long: a hundred messages a second are as many as anyone sees, and each one takes the
#: cores some tenths of a millisecond of computing. A model of up to a hundred tokens a second sends each at once.
COALESCE_S = 0.010
_SEQUENCE = 0

Emit = Callable[[list[Any]], None]


class _Sequence:
    """One generation with all it needs; made when its turn comes."""

    def __init__(self, request_id: int, request: GenerateRequest, deadline: float | None) -> None:
        self.id = request_id
        self.request = request
        self.deadline = deadline
        self.seed = draw_seed() if request.seed is None else request.seed
        self.prompt: list[int] = []
        self.filled = 0
        self.last = 0
        self.generated = 0
        self.limit = 0
        self.sampler: Sampler | None = None
        self.detokenizer = Detokenizer()
        self.stops = StopFilter(request.stop)
        #: Bytes of tokens that have not been read as text yet, and text that has not been sent.
        self.pieces: list[bytes] = []
        self.pending: list[str] = []
        self.sent_at = 0.0


class Scheduler:
    """Runs generations on one model. Everything but `cancel` belongs to the thread that owns the model.

    Args:
        emit: gets ``["chunk", id, text]``, ``["progress", id, {done, total, unit}]`` and, once per request
            at its end, ``["done", id, {finish_reason, usage, seed}]`` or ``["error", id, error]``.
        clock: seconds, monotonic.
    """

    def __init__(self, model: Model, emit: Emit, clock: Callable[[], float] = time.monotonic) -> None:
        self._model, self._emit, self._clock = model, emit, clock
        self._prompts = PromptBuilder(model)
        self._waiting: deque[_Sequence] = deque()
        self._running: _Sequence | None = None
        self._cancelled: set[int] = set()
        self._sample = llama_cpp.llama_sampler_sample

    @property
    def busy(self) -> bool:
        """There is something to do for `step`."""
        return self._running is not None or bool(self._waiting)

    def submit(self, request_id: int, request: GenerateRequest) -> None:
        """Take a request in; what becomes of it is emitted, errors too."""
        deadline = None if request.deadline_ms is None else self._clock() + request.deadline_ms / 1000
        self._waiting.append(_Sequence(request_id, request, deadline))

    def cancel(self, request_id: int) -> None:
        """End a request with `cancelled` before its next token. From any thread, also before its `submit`.

        The id is remembered until `settle_cancel`.
        """
        self._cancelled.add(request_id)

    def settle_cancel(self, request_id: int) -> None:
        """Carry a cancel out now and forget the id; to be called where the cancel stands among the
        messages."""
        self._cancelled.add(request_id)
        self._drop_cancelled()
        self._cancelled.discard(request_id)

    def step(self) -> bool:
        """One decode, of a chunk of a prompt or of one token; blocks for its time. False when nothing is
        left."""
        if self._cancelled:
            self._drop_cancelled()
        sequence = self._running
        try:
            if sequence is None:
                sequence = self._begin_next()
                if sequence is None:
                    return False
            if sequence.deadline is not None and self._clock() >= sequence.deadline:
                raise DeadlineExceeded(f"the deadline of {sequence.request.deadline_ms} ms has passed")
            if sequence.filled < len(sequence.prompt):
                self._fill(sequence)
            else:
                self._continue(sequence)
        except DemandportError as failed:
            self._fail(failed)
        return self.busy

    def close(self) -> None:
        """Free what the running sequence holds; nothing is emitted."""
        if self._running is not None:
            self._release(self._running)
        self._waiting.clear()

    # ------------------------------------------------------------------------------------ one sequence

    def _begin_next(self) -> _Sequence | None:
        if not self._waiting:
            return None
        sequence = self._running = self._waiting.popleft()
        request, room = sequence.request, self._model.context_length
        sequence.prompt = self._prompts.tokens(request)
        count = len(sequence.prompt)
        wanted = request.max_tokens or 1
        if count + wanted > room:
            raise ContextOverflow(
                f"the prompt of {count} tokens and {wanted} to generate do not fit the {room} of the context",
                details={"prompt_tokens": count, "max_tokens": wanted, "context_length": room},
            )
        if not count:
            raise ContextOverflow(
                "the prompt has no tokens",
                details={"prompt_tokens": 0, "max_tokens": wanted, "context_length": room},
            )
        sequence.limit = request.max_tokens or min(DEFAULT_MAX_TOKENS, room - count)
        sequence.sampler = Sampler(
            self._model.vocabulary, self._model.tokens, room, request, sequence.seed, sequence.prompt
        )
        return sequence

    def _fill(self, sequence: _Sequence) -> None:
        """Compute the next chunk of the prompt; after the last one the first token is chosen."""
        start, total = sequence.filled, len(sequence.prompt)
        end = min(start + BATCH_TOKENS, total)
        batch = self._model.batch
        batch.clear()
        batch.extend(sequence.prompt[start:end], start, _SEQUENCE, last=end == total)
        self._model.decode()
        sequence.filled = end
        if total > BATCH_TOKENS:
            self._emit(["progress", sequence.id, {"done": end, "total": total, "unit": "prompt_tokens"}])
        if end == total:
            self._choose(sequence)

    def _continue(self, sequence: _Sequence) -> None:
        """Compute the token chosen last, and choose the next one."""
        batch = self._model.batch
        batch.clear()
        batch.add(sequence.last, len(sequence.prompt) + sequence.generated - 1, _SEQUENCE, True)
        self._model.decode()
        self._choose(sequence)

    def _choose(self, sequence: _Sequence) -> None:
        assert sequence.sampler is not None
        token: int = self._sample(sequence.sampler.handle, self._model.context, -1)
        if token < 0:
            raise Internal("llama.cpp chooses no token")
        sequence.generated += 1
        if token in self._model.ends:
            self._finish(sequence, "stop")
            return
        sequence.last = token
        sequence.pieces.append(self._model.piece(token))
        now = self._clock()
        due = now - sequence.sent_at >= COALESCE_S
        if due or sequence.request.stop:
            self._read(sequence)
        if due and sequence.pending:
            sequence.sent_at = now
            self._flush(sequence)
        if sequence.stops.stopped is not None:
            self._finish(sequence, "stop")
        elif sequence.generated >= sequence.limit:
            self._finish(sequence, "length")

    # ------------------------------------------------------------------------------------------ output
    #
    # Text is sent at most every `COALESCE_S`, the first at once. No timer is needed: while text is held back the next
    # token is being computed, and a model slow enough for that to matter has let more than `COALESCE_S` pass since the
    # last chunk, so that nothing is held back. Bytes are read as text only then, unless a stop string is looked for.

    def _read(self, sequence: _Sequence) -> None:
        text = sequence.stops.feed(sequence.detokenizer.feed(b"".join(sequence.pieces)))
        sequence.pieces.clear()
        if text:
            sequence.pending.append(text)

    def _flush(self, sequence: _Sequence) -> None:
        if sequence.pending:
            text = "".join(sequence.pending)
            sequence.pending.clear()
            self._emit(["chunk", sequence.id, text])

    def _finish(self, sequence: _Sequence, reason: FinishReason) -> None:
        self._read(sequence)
        if sequence.stops.stopped is None:
            rest = sequence.stops.feed(sequence.detokenizer.finish())
            if sequence.stops.stopped is None:
                rest += sequence.stops.finish()
            if rest:
                sequence.pending.append(rest)
        self._flush(sequence)
        usage = {"prompt_tokens": len(sequence.prompt), "completion_tokens": sequence.generated}
        self._emit(["done", sequence.id, {"finish_reason": reason, "usage": usage, "seed": sequence.seed}])
        self._release(sequence)

    def _fail(self, failed: DemandportError) -> None:
        sequence = self._running
        assert sequence is not None
        self._read(sequence)
        self._flush(sequence)
        self._emit(["error", sequence.id, failed.to_wire()])
        self._release(sequence)

    def _release(self, sequence: _Sequence) -> None:
        self._running = None
        if sequence.sampler is not None:
            sequence.sampler.close()
        if sequence.filled:
            self._model.forget(_SEQUENCE)

    def _drop_cancelled(self) -> None:
        running = self._running
        if running is not None and running.id in self._cancelled:
            self._fail(Cancelled("the generation was cancelled"))
        if any(sequence.id in self._cancelled for sequence in self._waiting):
            for sequence in [one for one in self._waiting if one.id in self._cancelled]:
                self._waiting.remove(sequence)
                self._emit(["error", sequence.id, Cancelled("the generation was cancelled").to_wire()])
