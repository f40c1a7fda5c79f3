"""llama.cpp's low-level calls: a loaded model with one context. Everything here belongs to one thread.

A bad file or a failed assertion inside llama.cpp aborts the whole process; that is why this runs in a worker.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp

from demandport.errors import Internal, ModelLoadFailed, OutOfMemory
from demandport.inference.backend import Operation
from demandport.inference.gguf import read_metadata
from demandport.llama.batch import Batch
from demandport.llama.log import start_library
from demandport.llama.threads import ThreadChoice

DEFAULT_CONTEXT_LENGTH = 4096
#: Most tokens in one decode. Small chunks let a cancel through soon.
BATCH_TOKENS = 256
#: Most cells that sequences share, unless one alone may have more.
SHARED_CELLS = 8192
#: Below this size the cost of waking a second thread is more than what it computes.
SINGLE_THREAD_BYTES = 16 * 1024 * 1024

_FINGERPRINT_BYTES = 1 << 20

#: LoRA adapters: (path, scale) each.
Adapters = tuple[tuple[str, float], ...]


class Model:
    """A model file in memory with its vocabulary and one context.

    Args:
        path: a GGUF file; it is mapped, not read.
        context_length: tokens that one sequence may have; None: what the model was trained with, at most
            `DEFAULT_CONTEXT_LENGTH`.
        gpu_layers: layers to put on a GPU; -1: all.
        threads: threads that compute; None: one per core that this process may use, and one alone where that is
            faster: for a very small model, and while others take the cores.
        sequences: most sequences at a time; they share `cells`, as many for each while there are few.
        purpose: ``generate``, or ``embed`` or ``rerank``: then its outputs are vectors, or scores, of sequences.
        progress: called with 0.0 to 1.0 while it loads.

    Raises:
        ModelNotFound, ModelLoadFailed: as `read_metadata`; or llama.cpp refuses it.
        OutOfMemory: its context finds no memory.
    """

    def __init__(
        self,
        path: Path,
        *,
        context_length: int | None = None,
        gpu_layers: int = 0,
        threads: int | None = None,
        sequences: int = 1,
        purpose: Operation = "generate",
        progress: Callable[[float], None] | None = None,
    ) -> None:
        read_metadata(path)  # llama.cpp can be brought down by what it refuses
        self._route = start_library()
        self.path = path
        self._model: Any = None
        self.context: Any = None
        self._batch: Batch | None = None
        self._adapters: dict[str, Any] = {}
        self._applied: Adapters = ()
        try:
            self._load(gpu_layers, progress)
            self.metadata = self._read_metadata()
            self._check_purpose(purpose)
            self._open_context(context_length, threads, sequences, purpose)
            self._read_vocabulary()
        except BaseException:
            self.close()
            raise

    def _load(self, gpu_layers: int, progress: Callable[[float], None] | None) -> None:
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = gpu_layers if gpu_layers >= 0 else 2**31 - 1
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP

        def report(share: float, _: Any) -> bool:
            if progress is not None:
                progress(share)
            return True

        callback = llama_cpp.llama_progress_callback(report)
        params.progress_callback = callback
        self._route.last_error = ""
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(self.path), params)
        if not self._model:
            why = self._route.last_error or "llama.cpp gives no reason"
            raise ModelLoadFailed(f"{self.path} cannot be loaded: {why}")
        if not llama_cpp.llama_model_has_decoder(self._model) or llama_cpp.llama_model_has_encoder(self._model):
            raise ModelLoadFailed(f"{self.path} is an encoder-decoder model, which cannot be run here")
        #: Of all its tensors.
        self.size_bytes = int(llama_cpp.llama_model_size(self._model))
        #: A part of a sequence can be forgotten or copied: not so where a state stands for all that was read.
        self.forgets_parts = not (
            llama_cpp.llama_model_is_recurrent(self._model) or llama_cpp.llama_model_is_hybrid(self._model)
        )

    def _check_purpose(self, purpose: Operation) -> None:
        if purpose == "generate" and self._said("attention.causal") == "false":
            raise ModelLoadFailed(f"{self.path} is a model for embeddings; it cannot generate text")
        if purpose == "rerank" and self._said("pooling_type") != str(llama_cpp.LLAMA_POOLING_TYPE_RANK):
            raise ModelLoadFailed(f"{self.path} is no reranker: it gives no scores")

    def _said(self, key: str) -> str | None:
        """What the file says of its architecture under that key."""
        return self.metadata.get(f"{self.metadata.get('general.architecture')}.{key}")

    def _open_context(
        self, context_length: int | None, threads: int | None, sequences: int, purpose: Operation
    ) -> None:
        self.training_context = int(llama_cpp.llama_model_n_ctx_train(self._model))
        if self.training_context < 0:  # llama.cpp holds what the file says in 32 bits, and would take it for billions
            raise ModelLoadFailed(f"{self.path} says that it was trained with more than {2**31 - 1} tokens of context")
        wanted = context_length or min(self.training_context or DEFAULT_CONTEXT_LENGTH, DEFAULT_CONTEXT_LENGTH)
        self.threads = threads or self._default_threads()
        self._chooses_threads = threads is None and self.threads > 1
        self._choices: dict[int, ThreadChoice] = {}
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = max(wanted, min(wanted * sequences, SHARED_CELLS))
        params.n_batch = params.n_ubatch = BATCH_TOKENS
        if purpose != "generate":  # a sequence is read in one go
            params.n_ctx = params.n_batch = params.n_ubatch = wanted
            params.embeddings = True
            params.pooling_type = llama_cpp.LLAMA_POOLING_TYPE_RANK if purpose == "rerank" else self._pooling()
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = self.threads
        params.kv_unified = True
        params.no_perf = True
        # It warns of more cells than the model was trained with, but no sequence gets more than its share.
        self._route.least = logging.ERROR if wanted <= self.training_context else logging.DEBUG
        self.context = llama_cpp.llama_init_from_model(self._model, params)
        self._route.least = logging.DEBUG
        if not self.context:
            why = self._route.last_error or "llama.cpp gives no reason"
            raise OutOfMemory(f"no context of {wanted} tokens for {self.path}: {why}")
        # llama.cpp rounds the length up; what was asked for is what is promised.
        self.cells = int(llama_cpp.llama_n_ctx(self.context))
        self.context_length = min(wanted, self.cells)
        self.sequences = sequences
        self._memory = llama_cpp.llama_get_memory(self.context)
        if purpose == "generate" and not self._memory:
            raise ModelLoadFailed(f"{self.path} is a model for embeddings; it cannot generate text")
        self._batch = Batch(int(params.n_batch))

    def _pooling(self) -> int:
        """How a sequence's vectors become one: as the file says, or by their mean."""
        kinds = (llama_cpp.LLAMA_POOLING_TYPE_MEAN, llama_cpp.LLAMA_POOLING_TYPE_CLS, llama_cpp.LLAMA_POOLING_TYPE_LAST)
        said = self._said("pooling_type")
        return next((int(kind) for kind in kinds if str(kind) == said), int(kinds[0]))

    def _default_threads(self) -> int:
        if self.size_bytes < SINGLE_THREAD_BYTES:
            return 1
        return _cores()

    def _read_vocabulary(self) -> None:
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        if not vocabulary:
            raise ModelLoadFailed(f"{self.path} has no vocabulary")
        self.vocabulary: Any = vocabulary
        self.tokens = int(llama_cpp.llama_vocab_n_tokens(vocabulary))
        if not self.tokens:
            raise ModelLoadFailed(f"{self.path} has an empty vocabulary")
        everything = range(self.tokens)
        #: Tokens that end a generation.
        self.ends = frozenset(t for t in everything if llama_cpp.llama_vocab_is_eog(vocabulary, t))
        special = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
        texts = {
            (llama_cpp.llama_vocab_get_text(vocabulary, t) or b"").decode("utf-8", "replace")
            for t in everything
            if llama_cpp.llama_vocab_get_attr(vocabulary, t) & special
        }
        #: Texts that `tokenize` with `special` reads as control tokens.
        self.special_texts = frozenset(texts - {""})
        self.begin = int(llama_cpp.llama_vocab_bos(vocabulary))
        self.adds_begin = bool(llama_cpp.llama_vocab_get_add_bos(vocabulary)) and self.begin >= 0
        self._pieces: dict[int, bytes] = {}

    @property
    def batch(self) -> Batch:
        """The batch to fill for the next `decode`."""
        if self._batch is None:
            raise Internal("the model is closed")
        return self._batch

    @property
    def chat_template(self) -> str | None:
        """The Jinja template that the file carries, or None."""
        return self.template(None)

    def template(self, name: str | None) -> str | None:
        """The template of that name that the file carries, or None; without a name the one for chats."""
        template = llama_cpp.llama_model_chat_template(self._model, None if name is None else name.encode())
        return template.decode("utf-8", "replace") if template else None

    def token_text(self, token: int) -> str:
        """The text of a special token as templates write it; empty for -1, which stands for "has none"."""
        if token < 0:
            return ""
        return (llama_cpp.llama_vocab_get_text(self.vocabulary, token) or b"").decode("utf-8", "replace")

    @property
    def begin_text(self) -> str:
        """What templates know as ``bos_token``."""
        return self.token_text(self.begin)

    @property
    def end_text(self) -> str:
        """What templates know as ``eos_token``."""
        return self.token_text(int(llama_cpp.llama_vocab_eos(self.vocabulary)))

    def _read_metadata(self, limit_bytes: int = 512) -> dict[str, str]:
        """The file's key-value pairs; longer values are left out."""
        pairs: dict[str, str] = {}
        key, value = ctypes.create_string_buffer(256), ctypes.create_string_buffer(limit_bytes)
        for index in range(llama_cpp.llama_model_meta_count(self._model)):
            key_size = llama_cpp.llama_model_meta_key_by_index(self._model, index, key, len(key))
            value_size = llama_cpp.llama_model_meta_val_str_by_index(self._model, index, value, len(value))
            if 0 <= key_size < len(key) and 0 <= value_size < len(value):
                pairs[key.value.decode("utf-8", "replace")] = value.value.decode("utf-8", "replace")
        return pairs

    def info(self) -> dict[str, Any]:
        """Facts about the loaded model, as plain data."""
        description = ctypes.create_string_buffer(256)
        llama_cpp.llama_model_desc(self._model, description, len(description))
        return {
            "description": description.value.decode("utf-8", "replace"),
            "parameters": int(llama_cpp.llama_model_n_params(self._model)),
            "size_bytes": self.size_bytes,
            "context_length": self.context_length,
            "training_context_length": self.training_context,
            "vocabulary_tokens": self.tokens,
            "threads": self.threads,
            "chat_template": self.chat_template is not None,
            "name": self.metadata.get("general.name", ""),
        }

    def tokenize(self, text: str, *, special: bool, ends: bool = False) -> list[int]:
        """The tokens of `text`; with `ends`, and what the vocabulary puts before and after it. Only with `special` are
        control tokens read from it."""
        data = text.encode("utf-8", "replace")
        room = len(data) + 8
        while True:
            tokens = (llama_cpp.llama_token * room)()
            count = llama_cpp.llama_tokenize(self.vocabulary, data, len(data), tokens, room, ends, special)
            if count >= 0:
                return tokens[:count]
            if -count <= room:
                raise Internal(f"llama.cpp cannot tokenise {len(data)} bytes")
            room = -count

    def piece(self, token: int) -> bytes:
        """The bytes that `token` stands for; empty for control tokens."""
        found = self._pieces.get(token)
        if found is None:
            found = self._pieces[token] = self._read_piece(token)
        return found

    def _read_piece(self, token: int) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = llama_cpp.llama_token_to_piece(self.vocabulary, token, buffer, size, 0, False)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def decode(self) -> None:
        """Compute what the batch holds; blocks, without the interpreter's lock.

        Raises:
            OutOfMemory: there is no room for it in the context.
            Internal: llama.cpp fails.
        """
        status = self._compute()
        if status == 1:
            raise OutOfMemory(f"no room in the context of {self.context_length} tokens")
        if status:
            raise Internal(f"llama.cpp cannot decode: {self._route.last_error or status}")

    def _compute(self) -> int:
        if not self._chooses_threads:
            return int(llama_cpp.llama_decode(self.context, self.batch.handle))
        size = self.batch.size
        choice = self._choices.get(size.bit_length())
        if choice is None:
            choice = self._choices[size.bit_length()] = ThreadChoice(self.threads)
        llama_cpp.llama_set_n_threads(self.context, choice.now, choice.now)
        started, given = time.perf_counter(), time.process_time()
        status = int(llama_cpp.llama_decode(self.context, self.batch.handle))
        ended = time.perf_counter()
        choice.took(size, ended - started, time.process_time() - given, ended)
        return status

    def forget(self, sequence: int, start: int = -1) -> bool:
        """Free the cells of a sequence, from position `start` on if it is given.

        Returns:
            False when the model cannot forget a part (recurrent ones cannot); then nothing was freed.
        """
        return bool(llama_cpp.llama_memory_seq_rm(self._memory, sequence, start, -1))

    def copy(self, source: int, target: int, count: int) -> None:
        """Give the empty sequence `target` the cells of the first `count` tokens of `source`; both share them."""
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, 0, count)

    def load_adapters(self, adapters: Adapters) -> None:
        """Load the files of LoRA adapters that are not loaded yet.

        Raises:
            ModelNotFound, ModelLoadFailed: a file is no adapter of this model.
        """
        for path, _ in adapters:
            if path not in self._adapters:
                self._adapters[path] = self._load_adapter(path)

    def apply(self, adapters: Adapters) -> None:
        """Have the next decodes use these LoRA adapters, which are loaded, and no others."""
        if adapters == self._applied:
            return
        count = len(adapters)
        array = (llama_cpp.llama_adapter_lora_p_ctypes * count)(*(self._adapters[path] for path, _ in adapters))
        scales = (ctypes.c_float * count)(*(scale for _, scale in adapters))
        if llama_cpp.llama_set_adapters_lora(self.context, array, count, scales):
            raise Internal("llama.cpp cannot apply the adapters")
        self._applied = adapters

    def _load_adapter(self, path: str) -> Any:
        read_metadata(Path(path))
        self._route.last_error = ""
        handle = llama_cpp.llama_adapter_lora_init(self._model, os.fsencode(path))
        if not handle:
            why = self._route.last_error or "llama.cpp gives no reason"
            raise ModelLoadFailed(f"{path} is no adapter for {self.path}: {why}")
        return handle

    def logits(self, index: int) -> Any:
        """The scores of all tokens at an output of the last decode: floats of numpy, valid until the next."""
        import numpy

        found = llama_cpp.llama_get_logits_ith(self.context, index)
        return numpy.ctypeslib.as_array(found, shape=(self.tokens,))

    def vector(self, sequence: int, size: int) -> list[float]:
        """The first `size` numbers that the last decode gave for a sequence.

        Raises:
            Internal: it gave none.
        """
        found = llama_cpp.llama_get_embeddings_seq(self.context, sequence)
        if not found:
            raise Internal("llama.cpp gives no vector for the sequence")
        return [float(found[index]) for index in range(size)]

    @property
    def dimensions(self) -> int:
        """Length of the vectors of an embedding model."""
        return int(llama_cpp.llama_model_n_embd(self._model))

    def state(self, sequence: int) -> bytes:
        """What its cells hold, for `restore`."""
        size = llama_cpp.llama_state_seq_get_size(self.context, sequence)
        buffer = (ctypes.c_uint8 * size)()
        written = llama_cpp.llama_state_seq_get_data(self.context, buffer, size, sequence)
        return bytes(memoryview(buffer)[:written])

    def restore(self, sequence: int, state: bytes) -> bool:
        """Fill the empty sequence from `state` of the same model; False, and it stays empty, if it does not fit."""
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if llama_cpp.llama_state_seq_set_data(self.context, buffer, len(state), sequence) == 0:
            self.forget(sequence)
            return False
        return True

    @functools.cached_property
    def fingerprint(self) -> str:
        """Names the file's content: size, beginning and end of it, hashed."""
        with self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(_FINGERPRINT_BYTES)
            file.seek(max(0, size - _FINGERPRINT_BYTES))
            return hashlib.sha256(b"%d" % size + head + file.read()).hexdigest()[:32]

    def forget_all(self) -> None:
        """Free the cells of all sequences."""
        if self._memory:  # models that only read have none
            llama_cpp.llama_memory_clear(self._memory, False)

    @property
    def vocabulary_ends(self) -> Ends:
        """The tokens around texts, those that the vocabulary asks for."""
        vocabulary = self.vocabulary
        separator = int(llama_cpp.llama_vocab_sep(vocabulary))
        end = int(llama_cpp.llama_vocab_eos(vocabulary))
        return Ends(
            [self.begin] if self.adds_begin else [],
            [separator if end < 0 else end] if llama_cpp.llama_vocab_get_add_eos(vocabulary) else [],
            [separator] if llama_cpp.llama_vocab_get_add_sep(vocabulary) else [],
        )

    def close(self) -> None:
        """Free everything; harmless when it is freed."""
        batch, self._batch = self._batch, None
        if batch is not None:
            batch.close()
        context, self.context = self.context, None
        if context:
            llama_cpp.llama_free(context)
        model, self._model = self._model, None
        if model:
            llama_cpp.llama_model_free(model)


class Ends(NamedTuple):
    """Tokens before a text, after it, and between two."""

    begin: list[int]
    end: list[int]
    separator: list[int]


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
