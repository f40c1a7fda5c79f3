"""How many tokens of prompts one decode may take, from how long decodes took."""

from __future__ import annotations

#: Beside running generations, prompts make a step this much longer: their tokens come somewhat later, none is missed.
STRETCH = 1.2
#: With nothing else to do a step lasts about this long at most, so that a cancel or a newcomer is seen.
STEP_S = 0.25
LEAST, MOST = 8, 256
#: Before anything is known: little, since it may be a model of a second per token.
FIRST = 64
#: Weight of the newest measurement.
_NEW = 0.2


class Pace:
    """Learns what a token costs, alone and in a prompt. Times are seconds."""

    def __init__(self, sequences: int) -> None:
        #: A step without prompts, by the number of sequences that generate in it.
        self._plain_s: list[float | None] = [0.0] + [None] * sequences
        #: A token of a prompt, with some generating beside it and with none.
        self._token_s: dict[bool, float] = {}

    def prompt_tokens(self, generating: int) -> int:
        """Tokens of prompts for the next step, `LEAST` to `MOST`, beside `generating` sequences."""
        token_s = self._token_s.get(generating > 0)
        if generating == 0:
            return FIRST if token_s is None else _bounded(STEP_S / token_s)
        plain_s = self._plain(generating)
        if token_s is None or plain_s is None:
            return LEAST
        return _bounded(STRETCH * plain_s / token_s)

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
