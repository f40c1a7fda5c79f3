"""How many threads a decode gets on a machine that others use, too.

The threads of a decode meet hundreds of times, and each time all wait for the last. Where another program has taken a
core from one of them, that is until the kernel gives it back: all cores are many times slower then than one alone.
Nobody says when it is so. It shows in the processor time that decodes are given, and whether one thread is better is
tried.
"""

from __future__ import annotations

#: Decodes are given less than this share of their threads' time: somebody else is on a core.
CROWDED = 0.85
#: How long decodes are looked at together, and what is tried is tried, in seconds.
STRETCH_S = 0.05
#: How much faster another number must be to be taken.
BETTER = 0.9
#: Time until something is tried again: at first, and at most when it was of no use again and again, in seconds.
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 10.0


class ThreadChoice:
    """Decides between all threads and one. Arithmetic alone: it is told what decodes took.

    All are taken unless decodes are given too little time; then, and from time to time while one is taken, a stretch of
    decodes with the other number tells which is faster. Only stretches of decodes of equally many tokens are compared.
    What is right for one sequence need not be for eight: there is a choice for each order of magnitude.

    Args:
        most: threads that there may be, more than one.

    Attributes:
        now: threads of the next decode.
    """

    def __init__(self, most: int) -> None:
        self.now = self.most = most
        self._tokens = self._decodes = 0
        self._wall_s = self._cpu_s = 0.0
        #: Tokens and seconds of a decode before the trial that is on.
        self._before: tuple[int, float] | None = None
        self._until_s, self._wait_s = 0.0, FIRST_WAIT_S

    def took(self, tokens: int, wall_s: float, cpu_s: float, at_s: float) -> None:
        """A decode of so many tokens took that time, until `at_s`, and was given that much of the processors'."""
        if tokens != self._tokens:
            self._begin_stretch(tokens)
        self._decodes += 1
        self._wall_s += wall_s
        self._cpu_s += cpu_s
        if self._wall_s >= STRETCH_S:
            self._judge(self._wall_s / self._decodes, at_s)
            self._begin_stretch(tokens)

    def _judge(self, each_s: float, at_s: float) -> None:
        if self._before is not None:
            tokens, before_s = self._before
            self._before = None
            if tokens == self._tokens and each_s < BETTER * before_s:
                self._wait_s = FIRST_WAIT_S
            else:
                self._change()
                self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_S)
            self._until_s = at_s + self._wait_s
        elif at_s >= self._until_s and (self.now == 1 or self._cpu_s < CROWDED * self._wall_s * self.now):
            self._before = self._tokens, each_s
            self._change()

    def _change(self) -> None:
        self.now = 1 if self.now > 1 else self.most

    def _begin_stretch(self, tokens: int) -> None:
        self._tokens, self._decodes = tokens, 0
        self._wall_s = self._cpu_s = 0.0
