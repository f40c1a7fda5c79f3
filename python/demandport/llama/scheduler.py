"""Decides what the model computes next. One step is one decode, so that messages are looked at in between."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import llama_cpp

from demandport.errors import Cancelled, ContextOverflow, DeadlineExceeded, DemandportError, Internal
from demandport.inference.backend import FinishReason
from demandport.inference.requests import DEFAULT_MAX_TOKENS, GenerateRequest
from demandport.llama.model import BATCH_TOKENS, Model
from demandport.llama.prompt import PromptBuilder
from demandport.llama.sampling import Sampler, draw_seed
from demandport.llama.text import Detokenizer, StopFilter

#: Text is held back at most this long: a hundred messages a second are as many as anyone sees, and each one takes the
#: cores some tenths of a millisecond of computing. A model of up to a hundred tokens a second sends each at once.
COALESCE_S = 0.010
#: Tokens of prompts in a step beside running generations; with nothing else to do a step takes `BATCH_TOKENS`.
PROMPT_SHARE = 64

Emit = Callable[[list[Any]], None]


class _Sequence:
    """One generation with all it needs; made when its turn comes."""

    def __init__(self, request_id: int, request: GenerateRequest, deadline: float | None) -> None:
        self.id = request_id
        self.request = request
        self.deadline = deadline
        self.seed = draw_seed() if request.seed is None else request.seed
        self.slot = -1
        #: Cells that it may come to need.
        self.cells = 0
        self.prompt: list[int] = []
        self.filled = 0
        #: Tokens chosen, and how many of prompt and chosen ones have cells.
        self.made: list[int] = []
        self.placed = 0
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
    """Runs generations on one model, many in one decode: continuous batching. Everything but `cancel` belongs to the
    thread that owns the model.

    Between two decodes sequences join and leave. One joins, in the order of arrival, when there is a slot for it, and
    cells for all it may become, so that none ever runs out of them. Each step holds one token of every sequence that
    generates, and beside them a bounded share of prompts, so that a long prompt does not make the others stutter.

    What a sequence leaves in its cells stays until they are needed: a prompt that begins like it goes on there.

    Args:
        emit: gets ``["chunk", id, text]``, ``["progress", id, {done, total, unit}]`` and, once per request
            at its end, ``["done", id, {finish_reason, usage, seed}]`` or ``["error", id, error]``.
        clock: seconds, monotonic.
    """

    def __init__(self, model: Model, emit: Emit, clock: Callable[[], float] = time.monotonic) -> None:
        self._model, self._emit, self._clock = model, emit, clock
        self._prompts = PromptBuilder(model)
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._free_slots = list(reversed(range(model.sequences)))
        self._free_cells = model.cells
        #: Tokens that lie in the cells of free slots, the oldest first.
        self._left: dict[int, list[int]] = {}
        for slot in self._free_slots:
            model.forget(slot)
        self._cancelled: set[int] = set()
        self._sample = llama_cpp.llama_sampler_sample

    @property
    def busy(self) -> bool:
        """There is something to do for `step`."""
        return bool(self._running or self._waiting)

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
        """Carry a cancel out now and forget the id; to be called where the cancel stands among the messages."""
        self._cancelled.add(request_id)
        self._drop_cancelled()
        self._cancelled.discard(request_id)

    def step(self) -> bool:
        """One decode; blocks for its time. False when nothing is left."""
        if self._cancelled:
            self._drop_cancelled()
        self._drop_expired()
        if self._waiting:
            self._admit()
        if not self._running:
            return self.busy
        choosing = self._compose()
        try:
            self._model.decode()
        except DemandportError as failed:
            for sequence in list(self._running):
                sequence.placed = 0  # nobody knows what its cells hold
                self._fail(sequence, failed)
            return self.busy
        for sequence, index in choosing:
            try:
                self._choose(sequence, index)
            except DemandportError as failed:
                self._fail(sequence, failed)
        return self.busy

    def close(self) -> None:
        """Free what the running sequences hold; nothing is emitted."""
        for sequence in list(self._running):
            self._release(sequence)
        self._waiting.clear()

    # -------------------------------------------------------------------------------------- what runs

    def _admit(self) -> None:
        """Let waiting sequences in, in the order they came: one that finds no room holds those behind it."""
        while self._waiting and self._free_slots:
            sequence = self._waiting[0]
            try:
                if not sequence.prompt:
                    self._prepare(sequence)
                if sequence.cells > self._free_cells:
                    return
                sequence.sampler = self._sampler(sequence)
            except DemandportError as failed:
                self._fail(sequence, failed)
                continue
            self._waiting.popleft()
            self._free_cells -= sequence.cells
            self._take_slot(sequence)
            self._running.append(sequence)

    def _take_slot(self, sequence: _Sequence) -> None:
        """Give it the free slot whose cells hold most of its prompt, or else an empty one, or else the oldest."""
        shared = {slot: _shared(tokens, sequence.prompt) for slot, tokens in self._left.items()}
        slot = max(shared, key=lambda slot: shared[slot], default=-1)
        if slot < 0 or not shared[slot]:
            slot = next((slot for slot in reversed(self._free_slots) if slot not in self._left), slot)
        kept = shared.get(slot, 0)
        if self._left.pop(slot, None) is not None and not (kept and self._model.forget(slot, kept)):
            self._model.forget(slot)
            kept = 0
        self._free_slots.remove(slot)
        sequence.slot, sequence.filled, sequence.placed = slot, kept, kept
        while sum(map(len, self._left.values())) > self._free_cells:
            oldest = next(iter(self._left))
            del self._left[oldest]
            self._model.forget(oldest)

    def _prepare(self, sequence: _Sequence) -> None:
        """Tokenise the prompt and see what it needs at most."""
        request, room = sequence.request, self._model.context_length
        prompt = self._prompts.tokens(request)
        count, wanted = len(prompt), request.max_tokens or 1
        facts = {"prompt_tokens": count, "max_tokens": wanted, "context_length": room}
        if count + wanted > room:
            said = f"the prompt of {count} tokens and {wanted} to generate do not fit the {room} of the context"
            raise ContextOverflow(said, details=facts)
        if not count:
            raise ContextOverflow("the prompt has no tokens", details=facts)
        sequence.prompt = prompt
        sequence.limit = request.max_tokens or min(DEFAULT_MAX_TOKENS, room - count)
        sequence.cells = count + sequence.limit

    def _sampler(self, sequence: _Sequence) -> Sampler:
        model = self._model
        return Sampler(
            model.vocabulary, model.tokens, model.context_length, sequence.request, sequence.seed, sequence.prompt
        )

    def _compose(self) -> list[tuple[_Sequence, int]]:
        """Fill the batch; returns the sequences that choose a token after the decode, each with its output's index."""
        batch = self._model.batch
        batch.clear()
        choosing = []
        for sequence in self._running:
            if sequence.filled == len(sequence.prompt):
                position = sequence.filled + sequence.generated - 1
                choosing.append((sequence, batch.add(sequence.made[-1], position, sequence.slot, True)))
                sequence.placed = position + 1
        if len(choosing) == len(self._running):
            return choosing
        room = min(PROMPT_SHARE, BATCH_TOKENS - len(choosing)) if choosing else BATCH_TOKENS
        for sequence in self._running:
            start, total = sequence.filled, len(sequence.prompt)
            end = min(start + room, total)
            if start == end:
                continue
            batch.extend(sequence.prompt[start:end], start, sequence.slot, last=end == total)
            sequence.filled = sequence.placed = end
            room -= end - start
            if total > BATCH_TOKENS:
                self._emit(["progress", sequence.id, {"done": end, "total": total, "unit": "prompt_tokens"}])
            if end == total:
                choosing.append((sequence, batch.size - 1))
        return choosing

    def _choose(self, sequence: _Sequence, index: int) -> None:
        assert sequence.sampler is not None
        token: int = self._sample(sequence.sampler.handle, self._model.context, index)
        if token < 0:
            raise Internal("llama.cpp chooses no token")
        sequence.generated += 1
        if token in self._model.ends:
            self._finish(sequence, "stop")
            return
        sequence.made.append(token)
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

    def _fail(self, sequence: _Sequence, failed: DemandportError) -> None:
        self._read(sequence)
        self._flush(sequence)
        self._emit(["error", sequence.id, failed.to_wire()])
        self._release(sequence)

    def _release(self, sequence: _Sequence) -> None:
        if sequence.slot < 0:
            self._waiting.remove(sequence)
            return
        self._running.remove(sequence)
        self._free_slots.append(sequence.slot)
        self._free_cells += sequence.cells
        if sequence.sampler is not None:
            sequence.sampler.close()
        if sequence.placed:
            self._left[sequence.slot] = [*sequence.prompt, *sequence.made][: sequence.placed]
        else:
            self._model.forget(sequence.slot)

    def _drop_cancelled(self) -> None:
        for sequence in [one for one in (*self._running, *self._waiting) if one.id in self._cancelled]:
            self._fail(sequence, Cancelled("the generation was cancelled"))

    def _drop_expired(self) -> None:
        hurried = [one for one in (*self._running, *self._waiting) if one.deadline is not None]
        now = self._clock() if hurried else 0.0
        for sequence in hurried:
            if sequence.deadline is not None and now >= sequence.deadline:
                late = f"the deadline of {sequence.request.deadline_ms} ms has passed"
                self._fail(sequence, DeadlineExceeded(late))


def _shared(tokens: list[int], prompt: list[int]) -> int:
    """How many tokens both begin with; at least one of the prompt is left to be computed."""
    count = 0
    for one, other in zip(tokens, prompt[:-1], strict=False):
        if one != other:
            break
        count += 1
    return count
