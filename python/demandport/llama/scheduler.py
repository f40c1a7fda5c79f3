"""Decides what the model computes next. One step is one decode, so that messages are looked at in between."""

from __future__ import annotations

import bisect
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp

from demandport.errors import Cancelled, ContextOverflow, DeadlineExceeded, DemandportError, Internal, TypeMismatch
from demandport.inference import caches
from demandport.inference.backend import FinishReason
from demandport.inference.requests import DEFAULT_MAX_TOKENS, GenerateRequest, draw_seed
from demandport.llama.cells import Cells, Slot
from demandport.llama.logprobs import logprobs
from demandport.llama.model import BATCH_TOKENS, Adapters, Model
from demandport.llama.pace import Pace
from demandport.llama.prompt import PromptBuilder
from demandport.llama.sampling import Sampler
from demandport.llama.text import Output

Emit = Callable[[list[Any]], None]


class _Sequence:
    """One generation with all it needs; most of it is made when its turn comes."""

    def __init__(self, request_id: int, request: GenerateRequest, deadline: float | None, save: Path | None) -> None:
        self.id = request_id
        self.request = request
        self.deadline = deadline
        #: Where its cells are to be saved, in place of a token being chosen.
        self.save = save
        self.seed = draw_seed() if request.seed is None else request.seed
        self.adapters: Adapters = tuple((one["path"], _scale(one.get("scale"))) for one in request.adapters)
        self.prompt: list[int] = []
        #: Most tokens it may generate, and how many it has.
        self.limit = 0
        #: Tokens in the file of its KV cache, if there is one.
        self.saved = 0
        self.generated = 0
        #: Tokens of the prompt that were computed, not found.
        self.computed = 0
        self.slot: Slot | None = None
        self.sampler: Sampler | None = None
        self.output = Output(request.stop)
        self.logprobs: list[dict[str, Any]] = []


class Scheduler:
    """Runs generations on one model, many in one decode: continuous batching. Everything but `cancel` belongs to the
    thread that owns the model.

    Between two decodes sequences join and leave. One joins, by priority and then in the order of arrival, when there is
    a slot for it and cells for all it may become. Each step holds one token of every sequence that generates, and
    beside them as much of prompts as does not make the others stutter (`Pace`). Prompts that begin like something in
    the cells are computed from where they part (`Cells`). Sequences with different LoRA adapters take turns.

    Args:
        emit: gets ``["chunk", id, text]``, ``["progress", id, {done, total, unit}]`` and, once per request
            at its end, ``["done", id, result]`` or ``["error", id, error]``.
        clock: seconds, monotonic.
    """

    def __init__(self, model: Model, emit: Emit, clock: Callable[[], float] = time.monotonic) -> None:
        self._model, self._emit, self._clock = model, emit, clock
        self._prompts = PromptBuilder(model)
        self._cells = Cells(model)
        self._pace = Pace(model.sequences, model.size_bytes)
        #: By priority, then by arrival; their prompts are read when there is time.
        self._waiting: list[_Sequence] = []
        self._unread = 0
        #: Of all that run or wait, those that have a deadline.
        self._hurried = 0
        self._running: list[_Sequence] = []
        self._turn = 0
        self._cancelled: set[int] = set()
        self._sample = llama_cpp.llama_sampler_sample

    @property
    def busy(self) -> bool:
        """There is something to do for `step`."""
        return bool(self._running or self._waiting or self._cells.untidy)

    def submit(self, request_id: int, request: GenerateRequest, save: Path | None = None) -> None:
        """Take a request in; what becomes of it is emitted, errors too.

        Args:
            save: compute the prompt alone, and save what the cells then hold in this file.

        Raises:
            TypeMismatch: there is no KV cache to save.
        """
        if save is not None and request.kv_cache is None:
            raise TypeMismatch("there is no kv_cache to save")
        deadline = None if request.deadline_ms is None else self._clock() + request.deadline_ms / 1000
        sequence = _Sequence(request_id, request, deadline, save)
        bisect.insort(self._waiting, sequence, key=lambda one: -one.request.priority)
        self._unread += 1
        self._hurried += deadline is not None

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
        started = self._clock()
        if self._hurried:
            self._drop_expired(started)
        if self._waiting:
            self._read_prompts()
            self._admit()
        if not self._running:
            if self._cells.untidy:
                self._cells.tidy()
            return self.busy
        self._cells.copy_what_is_there()
        running = self._whose_turn()
        try:
            choosing, generating, prompt_tokens = self._compose(running)
            started = self._clock()
            self._model.decode()
        except DemandportError as failed:
            for sequence in running:
                assert sequence.slot is not None
                self._cells.spoil(sequence.slot)
                self._fail(sequence, failed)
            return self.busy
        now = self._clock()
        self._pace.took(now - started, generating, prompt_tokens)
        for sequence, index in choosing:
            try:
                self._choose(sequence, index, now)
            except Exception as failed:
                self._fail_alone(sequence, failed)
        return self.busy

    def close(self) -> None:
        """Free what the running sequences hold; nothing is emitted."""
        for sequence in list(self._running):
            self._release(sequence)
        self._waiting.clear()
        self._unread = self._hurried = 0

    # -------------------------------------------------------------------------------------- what joins

    def _read_prompts(self) -> None:
        """Tokenise for as many as may join now, and at least one: what cannot be run is refused soon, and a thousand
        that arrive together hold nobody up."""
        room = max(1, len(self._cells.free))
        for sequence in [one for one in self._waiting if not one.prompt][:room] if self._unread else ():
            with self._alone(sequence):
                self._read_prompt(sequence)
                self._unread -= 1

    def _read_prompt(self, sequence: _Sequence) -> None:
        request, room = sequence.request, self._model.context_length
        prompt = self._prompts.tokens(request)
        if request.kv_cache is not None:
            cache = caches.KvCache.from_plain(request.kv_cache)
            caches.check_use(cache, self._model.fingerprint, sequence.adapters)
            if any(not 0 <= token < self._model.tokens for token in cache.tokens):
                raise TypeMismatch("the KV cache holds tokens that the model has not")
            prompt = [*cache.tokens, *prompt]
        count, wanted = len(prompt), request.max_tokens or 1
        facts = {"prompt_tokens": count, "max_tokens": wanted, "context_length": room}
        if count + wanted > room:
            said = f"the prompt of {count} tokens and {wanted} to generate do not fit the {room} of the context"
            raise ContextOverflow(said, details=facts)
        if not count:
            raise ContextOverflow("the prompt has no tokens", details=facts)
        file = _cache_file(request)
        sequence.saved = 0 if file is None else len(caches.read(file).tokens)
        sequence.limit = request.max_tokens or min(DEFAULT_MAX_TOKENS, room - count)
        sequence.prompt = prompt

    def _admit(self) -> None:
        """Let in who stands first: one that finds no room holds those behind it, so that it gets its turn."""
        while self._waiting and self._waiting[0].prompt:
            sequence = self._waiting[0]
            cells = self._cells_for(sequence)
            if not self._cells.fits(cells):
                return
            with self._alone(sequence):
                self._model.load_adapters(sequence.adapters)
                sequence.sampler = self._sampler(sequence)
                self._waiting.pop(0)
                sequence.slot = self._cells.take(sequence.prompt, cells, sequence.adapters)
                self._running.append(sequence)
                self._restore(sequence)

    def _sampler(self, sequence: _Sequence) -> Sampler:
        model = self._model
        return Sampler(
            model.vocabulary, model.tokens, model.context_length, sequence.request, sequence.seed, sequence.prompt
        )

    def _cells_for(self, sequence: _Sequence) -> int:
        """What it may become; a saved state, of which it may need only the beginning, is read as a whole."""
        return min(max(len(sequence.prompt) + sequence.limit, sequence.saved), self._model.cells)

    def _restore(self, sequence: _Sequence) -> None:
        """Fill its cells from where its KV cache was saved, unless they hold as much already."""
        file, slot = _cache_file(sequence.request), sequence.slot
        if file is None:
            return
        assert slot is not None
        # Read anew: another may have been saved under the name since the request came.
        saved, state = caches.read_whole(file)
        caches.check_use(saved, self._model.fingerprint, sequence.adapters)
        if self._cells.gains(slot, saved.tokens):
            self._cells.restore(slot, saved.tokens, state)

    # -------------------------------------------------------------------------------------- what runs

    def _compose(self, running: list[_Sequence]) -> tuple[list[tuple[_Sequence, int]], int, int]:
        """Fill the batch; returns the sequences that choose a token after the decode, each with its output's index, and
        how many tokens of generations and of prompts there are."""
        batch = self._model.batch
        batch.clear()
        choosing, reading, backlog = [], [], 0
        for sequence in running:
            slot = sequence.slot
            assert slot is not None
            place = slot.placed
            if slot.source is not None:
                continue  # another computes what it begins with
            if place >= len(sequence.prompt):
                choosing.append((sequence, batch.add(slot.tokens[place], place, slot.number, True)))
                slot.placed = place + 1
            else:
                reading.append(sequence)
                backlog += len(sequence.prompt) - place
        generating = len(choosing)
        if not reading:
            return choosing, generating, 0
        room = min(self._pace.prompt_tokens(generating, len(reading), backlog), BATCH_TOKENS - generating)
        for sequence in reading:
            room -= self._read_on(sequence, room, choosing)
        return choosing, generating, batch.size - generating

    def _whose_turn(self) -> list[_Sequence]:
        """All that run; where they have different adapters, those of one set after the other."""
        first = self._running[0].adapters
        running = self._running.copy()
        if len(running) > 1 and any(sequence.adapters != first for sequence in running):
            sets = list(dict.fromkeys(sequence.adapters for sequence in running))
            self._turn += 1
            first = sets[self._turn % len(sets)]
            running = [sequence for sequence in running if sequence.adapters == first]
        self._model.apply(first)
        return running

    def _read_on(self, sequence: _Sequence, room: int, choosing: list[tuple[_Sequence, int]]) -> int:
        """Put up to `room` more tokens of its prompt into the batch; returns how many."""
        slot, batch, total = sequence.slot, self._model.batch, len(sequence.prompt)
        assert slot is not None
        start = slot.placed
        end = min(start + room, total)
        if start == end:
            return 0
        batch.extend(sequence.prompt[start:end], start, slot.number, last=end == total)
        slot.placed = end
        sequence.computed += end - start
        if total > BATCH_TOKENS:
            self._emit(["progress", sequence.id, {"done": end, "total": total, "unit": "prompt_tokens"}])
        if end == total:
            choosing.append((sequence, batch.size - 1))
        return end - start

    def _choose(self, sequence: _Sequence, index: int, now: float) -> None:
        assert sequence.sampler is not None and sequence.slot is not None
        if sequence.save is not None:
            self._save(sequence, sequence.save)
            return
        token: int = self._sample(sequence.sampler.handle, self._model.context, index)
        if token < 0:
            raise Internal("llama.cpp chooses no token")
        sequence.generated += 1
        if token in self._model.ends:
            self._finish(sequence, "stop")
            return
        if sequence.request.logprobs is not None:
            sequence.logprobs.append(logprobs(self._model, index, token, sequence.request.logprobs))
        sequence.slot.tokens.append(token)
        text = sequence.output.add(self._model.piece(token), now)
        if text:
            self._emit(["chunk", sequence.id, text])
        if sequence.output.stopped:
            self._finish(sequence, "stop")
        elif sequence.generated >= sequence.limit:
            self._finish(sequence, "length")

    # -------------------------------------------------------------------------------------- what leaves

    def _finish(self, sequence: _Sequence, reason: FinishReason) -> None:
        rest = sequence.output.finish()
        if rest:
            self._emit(["chunk", sequence.id, rest])
        result: dict[str, Any] = {
            "finish_reason": reason,
            "usage": {
                "prompt_tokens": len(sequence.prompt),
                "completion_tokens": sequence.generated,
                "cached_tokens": len(sequence.prompt) - sequence.computed,
            },
            "seed": sequence.seed,
            "kv_cache": self._kv_cache(sequence).to_plain(),
        }
        if sequence.request.logprobs is not None:
            result["logprobs"] = sequence.logprobs
        self._emit(["done", sequence.id, result])
        self._release(sequence)

    def _kv_cache(self, sequence: _Sequence) -> caches.KvCache:
        assert sequence.slot is not None
        tokens = (*sequence.slot.tokens, *self._prompts.turn_end(sequence.request))
        return caches.KvCache(self._model.fingerprint, tokens, sequence.adapters)

    def _save(self, sequence: _Sequence, path: Path) -> None:
        assert sequence.slot is not None and sequence.request.kv_cache is not None
        cache = replace(caches.KvCache.from_plain(sequence.request.kv_cache), name=path.stem)
        size = caches.write(path, cache, self._model.state(sequence.slot.number))
        self._emit(["done", sequence.id, {"bytes": size, "kv_cache": cache.to_plain()}])
        self._release(sequence)

    @contextmanager
    def _alone(self, sequence: _Sequence) -> Iterator[None]:
        """Whatever goes wrong in the block ends that sequence and no other."""
        try:
            yield
        except Exception as failed:
            self._fail_alone(sequence, failed)

    def _fail_alone(self, sequence: _Sequence, failed: Exception) -> None:
        if isinstance(failed, DemandportError):
            self._fail(sequence, failed)
        else:  # of what a request brings along: templates, grammars
            wrapped = Internal(f"{type(failed).__name__}: {failed}")
            wrapped.traceback = "".join(traceback.format_exception(failed))
            self._fail(sequence, wrapped)

    def _fail(self, sequence: _Sequence, failed: DemandportError) -> None:
        text = sequence.output.take()
        if text:
            self._emit(["chunk", sequence.id, text])
        self._emit(["error", sequence.id, failed.to_wire()])
        self._release(sequence)

    def _release(self, sequence: _Sequence) -> None:
        self._hurried -= sequence.deadline is not None
        if sequence.sampler is not None:
            sequence.sampler.close()
        if sequence.slot is None:
            self._waiting.remove(sequence)
            self._unread -= not sequence.prompt
        else:
            self._running.remove(sequence)
            self._cells.give_back(sequence.slot)

    def _drop_cancelled(self) -> None:
        for sequence in [one for one in (*self._running, *self._waiting) if one.id in self._cancelled]:
            self._fail(sequence, Cancelled("the generation was cancelled"))

    def _drop_expired(self, now: float) -> None:
        for sequence in [one for one in (*self._running, *self._waiting) if one.deadline is not None]:
            if sequence.deadline is not None and now >= sequence.deadline:
                late = f"the deadline of {sequence.request.deadline_ms} ms has passed"
                self._fail(sequence, DeadlineExceeded(late))


def _cache_file(request: GenerateRequest) -> Path | None:
    """Where the KV cache that it goes on from was saved, if it was."""
    file = None if request.kv_cache is None else request.kv_cache.get("file")
    return None if file is None else Path(file)


def _scale(given: float | None) -> float:
    return 1.0 if given is None else float(given)
