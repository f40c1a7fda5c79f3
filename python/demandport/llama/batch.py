"""Tokens for one decode."""

from __future__ import annotations

from collections.abc import Sequence

import llama_cpp


class Batch:
    """Tokens for one decode, each with its place and sequence.

    The arrays are held on to: looking each up in the structure again costs more than writing to it.
    """

    def __init__(self, size: int) -> None:
        self.handle = llama_cpp.llama_batch_init(size, 0, 1)
        self._tokens, self._positions, self._outputs = self.handle.token, self.handle.pos, self.handle.logits
        self._sequences = [self.handle.seq_id[index] for index in range(size)]
        for index in range(size):
            self.handle.n_seq_id[index] = 1

    @property
    def size(self) -> int:
        """Tokens in it."""
        count: int = self.handle.n_tokens
        return count

    def clear(self) -> None:
        """Empty it."""
        self.handle.n_tokens = 0

    def add(self, token: int, position: int, sequence: int, output: bool) -> int:
        """Put one token in; returns its index, by which its output is sampled."""
        index: int = self.handle.n_tokens
        self._tokens[index] = token
        self._positions[index] = position
        self._sequences[index][0] = sequence
        self._outputs[index] = output
        self.handle.n_tokens = index + 1
        return index

    def extend(
        self, tokens: Sequence[int], position: int, sequence: int, last: bool = False, every: bool = False
    ) -> None:
        """Put several in, the output of the last one wanted if `last`, of each if `every`."""
        for offset, token in enumerate(tokens):
            self.add(token, position + offset, sequence, every)
        if last and tokens:
            self._outputs[self.handle.n_tokens - 1] = True

    def close(self) -> None:
        """Free it."""
        llama_cpp.llama_batch_free(self.handle)
