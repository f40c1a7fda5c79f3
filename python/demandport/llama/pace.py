"""How many tokens of prompts one decode may take, from how long decodes took."""

from __future__ import annotations

#: Beside running generations, prompts make a step longer by this share, so that text goes on flowing.
STRETCH = 0.8
#: With nothing else to do a step lasts about this long at most, so that a cancel or a newcomer is seen.
STEP_S = 0.3
LEAST, MOST = 8, 256
#: What a byte of the model costs per token of a prompt, and per step, until that is measured: as on few cores.
_TOKEN_S, _PLAIN_S = 1e-11, 5e-11
#: Weight of the newest measurement.
_NEW = 0.2


class Pace:
    """Learns what a token costs, alone and in a prompt. Times are seconds.

    Args:
        sequences: most that generate at once.
        model_bytes: size of the model, for a guess before anything is measured.
    """

    def __init__(self, sequences: int, model_bytes: int) -> None:
        self._guessed_token_s, self._guessed_plain_s = model_bytes * _TOKEN_S, model_bytes * _PLAIN_S
        #: A step without prompts, by the number of sequences that generate in it.
        self._plain_s: list[float | None] = [0.0] + [None] * sequences
        #: A token of a prompt, with some generating beside it and with none.
        self._token_s: dict[bool, float] = {}

    def prompt_tokens(self, generating: int, reading: int = 1, backlog: int = MOST) -> int:
        """Tokens of prompts for the next step, `LEAST` to `MOST`.

        Args:
            generating: sequences that generate. reading: those whose prompts are read. backlog: tokens left in these.
        """
        token_s = self._token_s.get(generating > 0, self._guessed_token_s)
        at_once = STEP_S / token_s
        # A burst: no fewer wait for their first token than for their next, and one step is all it takes.
        if generating == 0 or (1 < reading >= generating and backlog <= at_once):
            return _bounded(at_once)
        return _bounded(STRETCH * (self._plain(generating) or self._guessed_plain_s) / token_s)

    def took(self, seconds: float, generating: int, prompt_tokens: int) -> None:
        """A step is done."""
        if not prompt_tokens:
            before = self._plain_s[generating]
            self._plain_s[generating] = seconds if before is None else before + _NEW * (seconds - before)
            return
        plain_s = self._plain(generating)
        if plain_s is not None:
            token_s = max(seconds - plain_s, 1e-9) / prompt_tokens
            before = self._token_s.get(generating > 0, token_s)
            self._token_s[generating > 0] = before + _NEW * (token_s - before)

    def _plain(self, generating: int) -> float | None:
        """What such a step takes without prompts; from the nearest number that was measured, if any was."""
        found = self._plain_s[generating]
        if found is None:
            known = [number for number, seconds in enumerate(self._plain_s) if number and seconds is not None]
            if known:
                found = self._plain_s[min(known, key=lambda number: abs(number - generating))]
        return found


def _bounded(tokens: float) -> int:
    return max(LEAST, min(MOST, int(tokens)))
