"""Who holds which cells of the KV cache. Cells are reserved before they are used: none runs out of them half way.

A slot is llama.cpp's sequence id. What a generation leaves in its cells stays until they are needed: a prompt that
begins like it goes on there. One that begins like what another generation holds, or is about to compute, has it copied.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from demandport.llama.model import Model

#: A shorter beginning is not worth waiting for until another has computed it.
WORTH_COPYING = 32
#: So much of what was left is put in order, at most; it is held twice meanwhile.
MOST_TIDIED_BYTES = 128 * 1024 * 1024


@dataclass(eq=False, slots=True)
class Slot:
    """One sequence of llama.cpp.

    Attributes:
        tokens: what lies in its cells, or will. placed: how many of them do.
        adapters: with which LoRA adapters they are computed; cells of others are of no use.
        cells: how many are reserved for it; 0 while it is free.
        source: the slot from which the first `copies` tokens are copied once they lie there.
    """

    number: int
    tokens: list[int] = field(default_factory=list)
    placed: int = 0
    adapters: Hashable = None
    cells: int = 0
    source: Slot | None = None
    copies: int = 0


class Cells:
    """All slots of one context and the count of cells. Belongs to the thread that owns the model."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.free_cells = model.cells
        #: Free slots, those that were left longest ago first.
        self.free = [Slot(number) for number in range(model.sequences)]
        self.taken: list[Slot] = []
        #: Sequences that ran together left cells that lie in turns. What of them was read already, to be put in order.
        self._scattered = False
        self._states: dict[Slot, bytes] = {}
        for slot in self.free:
            model.forget(slot.number)

    def fits(self, cells: int) -> bool:
        """There is a slot, and that many cells for it."""
        return bool(self.free) and cells <= self.free_cells

    def take(self, prompt: Sequence[int], cells: int, adapters: Hashable) -> Slot:
        """A slot with `cells` reserved, its `placed` first tokens of `prompt` there already or soon copied."""
        source, shared = self._most_alike(prompt, adapters)
        slot = self._target(source, shared, len(prompt))
        kept = shared if slot is source else 0
        if not (kept and self._model.forget(slot.number, kept)):
            self._model.forget(slot.number)
            kept = 0
        if slot is source:
            source, shared = None, 0
        slot.tokens, slot.placed, slot.adapters = list(prompt), kept, adapters
        slot.cells, slot.source, slot.copies = cells, source, shared
        self.free.remove(slot)
        self._scattered = self._scattered or bool(self.taken)
        self._states.clear()
        self.taken.append(slot)
        self.free_cells -= cells
        if source is not None and source.placed >= shared:
            self._copy(source, slot, shared)
        self._make_room()
        return slot

    def copy_what_is_there(self) -> None:
        """Between two decodes: copy what slots wait for, where it lies in the cells now."""
        for slot in self.taken:
            if slot.source is not None and slot.source.placed >= slot.copies:
                self._copy(slot.source, slot, slot.copies)

    def gains(self, slot: Slot, tokens: Sequence[int]) -> bool:
        """To restore a state of `tokens` spares more computing than what it holds or will have copied."""
        here = slot.copies if slot.source is not None else slot.placed
        return len(tokens) <= slot.cells and shared_tokens(tokens, slot.tokens) > here and self._model.forgets_parts

    def restore(self, slot: Slot, tokens: Sequence[int], state: bytes) -> None:
        """Fill it from the saved `state` of `tokens`, as far as its prompt begins so."""
        self._model.forget(slot.number)
        slot.source, slot.placed = None, 0
        if self._model.restore(slot.number, state):
            slot.placed = shared_tokens(tokens, slot.tokens)
            self._model.forget(slot.number, slot.placed)

    @property
    def untidy(self) -> bool:
        """There is something for `tidy`."""
        return self._scattered and not self.taken

    def tidy(self) -> None:
        """While nothing runs, a step towards having what was left lie in one piece each: attention passes over the
        cells of others far quicker then. A step takes some milliseconds."""
        slot = next((one for one in self.free if one.placed and one not in self._states), None)
        if slot is not None:
            self._states[slot] = self._model.state(slot.number)
            if sum(map(len, self._states.values())) <= MOST_TIDIED_BYTES:
                return
        else:
            for one in self._states:
                self._model.forget(one.number)
            for one, state in self._states.items():
                if not self._model.restore(one.number, state):
                    one.placed = 0
                    one.tokens.clear()
        self._states.clear()
        self._scattered = False

    def give_back(self, slot: Slot) -> None:
        """It is free again; its tokens stay for whoever begins alike. Those who wait for it get what is there."""
        for other in self.taken:
            if other.source is slot:
                self._copy(slot, other, min(other.copies, slot.placed))
        self.taken.remove(slot)
        self.free.append(slot)
        self.free_cells += slot.cells
        slot.cells, slot.source = 0, None
        del slot.tokens[slot.placed :]
        if not slot.placed:
            self._model.forget(slot.number)

    def spoil(self, slot: Slot) -> None:
        """Nobody knows what its cells hold: they are emptied."""
        slot.placed = 0

    # ---------------------------------------------------------------------------------------------- inside

    def _most_alike(self, prompt: Sequence[int], adapters: Hashable) -> tuple[Slot | None, int]:
        """The slot that holds most of the prompt's beginning, and how much: now, or, if that is worth waiting for, once
        the prompt it reads has been computed."""
        best: tuple[Slot | None, int] = (None, 0)
        for slot in (*self.free, *self.taken) if self._model.forgets_parts else ():
            if slot.adapters == adapters:
                shared = shared_tokens(slot.tokens, prompt)
                there = min(shared, slot.placed)
                count = shared if shared >= there + WORTH_COPYING else there
                if count > best[1]:
                    best = slot, count
        return best

    def _target(self, source: Slot | None, shared: int, wanted: int) -> Slot:
        """The free slot by whose taking least is lost; of several the source, else the one left longest ago. Where a
        prompt comes again as it is, its former answer is no loss."""

        def lost(slot: Slot) -> tuple[int, bool]:
            if slot is not source:
                return slot.placed, True
            return 0 if shared == wanted - 1 else slot.placed - shared, False

        return min(self.free, key=lost)

    def _copy(self, source: Slot, target: Slot, count: int) -> None:
        target.source = None
        if count:
            self._model.copy(source.number, target.number, count)
            target.placed = count

    def _make_room(self) -> None:
        """Empty what was left longest ago, until what is left fits into the cells that are not reserved."""
        left = sum(slot.placed for slot in self.free)
        for slot in self.free:
            if left <= self.free_cells:
                return
            if slot.placed:
                left -= slot.placed
                slot.placed = 0
                slot.tokens.clear()
                self._model.forget(slot.number)


def shared_tokens(tokens: Sequence[int], prompt: Sequence[int]) -> int:
    """How many tokens both begin with; at least one of the prompt is left to be computed."""
    most = min(len(tokens), len(prompt) - 1)
    # Whole slices are compared in C; only the one that differs is looked through.
    count = 0
    while count < most:
        end = min(count + 256, most)
        if tokens[count:end] != prompt[count:end]:
            break
        count = end
    while count < most and tokens[count] == prompt[count]:
        count += 1
    return count
