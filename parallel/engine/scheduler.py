"""Which prompts are read, and which answers get a token, next: sequences join and leave between steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from parallel.engine.engine import Engine, Part
from parallel.engine.pages import pages_for
from parallel.engine.sampling import sequence_key
from parallel.engine.sequence import Sequence


class Scheduler:
    """Sequences in the order they came: waiting, being prefilled, running. Deterministic: ranks agree unasked."""

    def __init__(self, engine: Engine, sequences: Iterable[Sequence] = ()) -> None:
        self.engine = engine
        self.waiting: deque[Sequence] = deque()
        self.prefilling: list[Sequence] = []
        self.running: list[Sequence] = []
        self.add(sequences)

    @property
    def is_idle(self) -> bool:
        return not (self.waiting or self.prefilling or self.running)

    def add(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            sequence.key = sequence_key(self.engine.sampler.params.seed, sequence.index)
            self.waiting.append(sequence)

    def admit(self) -> list[Sequence]:
        """Takes waiting sequences in for as long as there are rows and pages for them; returns those."""
        admitted = []
        while self.waiting and len(self.prefilling) + len(self.running) < self.engine.limits.batch_size:
            needed = pages_for(self.waiting[0].num_tokens)
            if needed > self.engine.pages.num_free:
                break
            sequence = self.waiting.popleft()
            sequence.pages = self.engine.pages.allocate(needed)
            self.prefilling.append(sequence)
            admitted.append(sequence)
        return admitted

    def next_parts(self) -> list[Part]:
        """What to prefill next: as much of the oldest prompts as one pass takes."""
        room, parts = self.engine.limits.prefill_chunk, []
        for sequence in self.prefilling:
            start = sequence.num_prefilled
            end = min(len(sequence.prompt), start + room)
            if end > start:
                parts.append(Part(sequence, start, end))
                room -= end - start
        return parts

    def start_running(self) -> list[Sequence]:
        """Moves on those whose prompt is in the cache; returns them."""
        started = [sequence for sequence in self.prefilling if sequence.is_prefilled]
        self.prefilling = [sequence for sequence in self.prefilling if not sequence.is_prefilled]
        self.running += started
        return started

    def retire(self, sequence: Sequence) -> None:
        """Frees the row and the pages of a sequence that needs no more steps. What is queued may still write to them,
        before anything that is queued later."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.engine.pages.release(sequence.pages)

    def retire_sampled(self) -> None:
        for sequence in [sequence for sequence in self.running if sequence.is_sampled]:
            self.retire(sequence)
