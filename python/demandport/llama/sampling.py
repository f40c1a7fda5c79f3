"""The sampler chain of one generation, made from its parameters, each of which is honoured or refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from demandport.errors import Internal, TypeMismatch
from demandport.inference.requests import GenerateRequest
from demandport.llama.grammar import grammar_text

#: What a request leaves open; those of llama.cpp's own programs.
_DEFAULTS: dict[str, float] = {
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.05,
    "repeat_penalty": 1.0,
    "repeat_last_n": 64,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
}


class Sampler:
    """Chooses the next token of one sequence. Belongs to the thread that owns the context; free it with `close`.

    Args:
        vocabulary: llama.cpp's handle of the model's vocabulary.
        tokens: number of tokens in the vocabulary.
        context_length: tokens of context, what `repeat_last_n` = -1 stands for.
        request: the parameters.
        seed: used when `temperature` is over 0.
        prompt: tokens of the prompt, which count for the penalties.

    Raises:
        TypeMismatch: the grammar is not valid.
        TooLarge: the grammar is over a limit.
    """

    def __init__(
        self,
        vocabulary: Any,
        tokens: int,
        context_length: int,
        request: GenerateRequest,
        seed: int,
        prompt: Sequence[int] = (),
    ) -> None:
        import llama_cpp

        self._llama = llama_cpp
        grammar = grammar_text(request)
        chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        if not chain:
            raise Internal("llama.cpp gives no sampler chain")
        self.handle: Any = chain
        try:
            if grammar is not None:
                self._add_grammar(vocabulary, grammar, "grammar" if request.json_schema is None else "json_schema")
            self._add_penalties(request, tokens, context_length, prompt)
            self._add_choice(request, seed)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Free it; harmless when it is freed."""
        handle, self.handle = self.handle, None
        if handle:
            self._llama.llama_sampler_free(handle)

    def _add(self, sampler: Any) -> None:
        if not sampler:
            raise Internal("llama.cpp gives no sampler")
        self._llama.llama_sampler_chain_add(self.handle, sampler)

    def _add_grammar(self, vocabulary: Any, grammar: str, parameter: str) -> None:
        made = self._llama.llama_sampler_init_grammar(vocabulary, grammar.encode(errors="replace"), b"root")
        if not made:
            raise TypeMismatch(
                f"parameter {parameter} is no valid grammar with a rule named root", details={"parameter": parameter}
            )
        self._add(made)

    def _add_penalties(self, request: GenerateRequest, tokens: int, context_length: int, prompt: Sequence[int]) -> None:
        last = int(_said(request, "repeat_last_n"))
        if last < 0:
            last = context_length
        repeat, frequency, presence = (
            _said(request, name) for name in ("repeat_penalty", "frequency_penalty", "presence_penalty")
        )
        if last == 0 or (repeat == 1 and frequency == 0 and presence == 0):
            return
        penalties = self._llama.llama_sampler_init_penalties(tokens, last, repeat, frequency, presence)
        for token in prompt[-last:]:
            self._llama.llama_sampler_accept(penalties, token)
        self._add(penalties)

    def _add_choice(self, request: GenerateRequest, seed: int) -> None:
        llama = self._llama
        temperature, top_k, top_p, min_p = (_said(request, name) for name in ("temperature", "top_k", "top_p", "min_p"))
        if temperature == 0:  # the most likely token survives top_k, top_p and min_p whatever they are
            self._add(llama.llama_sampler_init_greedy())
            return
        if top_k > 0:
            self._add(llama.llama_sampler_init_top_k(int(top_k)))
        if top_p < 1:
            self._add(llama.llama_sampler_init_top_p(top_p, 1))
        if min_p > 0:
            self._add(llama.llama_sampler_init_min_p(min_p, 1))
        self._add(llama.llama_sampler_init_temp(temperature))
        self._add(llama.llama_sampler_init_dist(seed))


def _said(request: GenerateRequest, name: str) -> float:
    value: float | None = getattr(request, name)
    return _DEFAULTS[name] if value is None else value
