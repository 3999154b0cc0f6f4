"""Which prompts are read, and which answers get a token, next: sequences join and leave between steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from parallel.engine.engine import Engine
from parallel.engine.page_allocator import OutOfPagesError
from parallel.engine.prefill.shares import share_pass
from parallel.engine.sampling import sequence_key
from parallel.engine.sequence import Part, TokenSequence


class Scheduler:
    """Sequences in the order they came: waiting, being prefilled, running.

    - Ranks agree unasked: decisions depend on the prompts added, the limits and the tokens so far, never on time.
    - A sequence has all the pages that it may need before its first token is read, so none is ever thrown out again.
    - None starves. Prompts are taken in in their order: the first that waits gets its row and its pages as those before
      it end, and they end: with each pass of prompts, whose tokens `EngineLimits.chunk` limits, every running sequence
      takes a step, and the oldest prompt has half of each pass (see share_pass). The price is that a prompt that is
      short of pages holds up shorter ones behind it; with `EngineLimits.num_pages` pages, whoever has a row has pages.
    - A prompt reads what another before it has, or will have, put into shared pages (see PrefixCache) after that one.
    """

    def __init__(self, engine: Engine, sequences: Iterable[TokenSequence] = ()) -> None:
        self.engine = engine
        self.waiting: deque[TokenSequence] = deque()
        self.prefilling: list[TokenSequence] = []
        self.running: list[TokenSequence] = []
        self.add(sequences)

    @property
    def is_idle(self) -> bool:
        return not (self.waiting or self.prefilling or self.running)

    def add(self, sequences: Iterable[TokenSequence]) -> None:
        for sequence in sequences:
            sequence.key = self.key_of(sequence)
            self.waiting.append(sequence)

    def key_of(self, sequence: TokenSequence) -> int:
        """By a seed of its own, wherever it stands, that of a run's only prompt by this seed."""
        if sequence.seed is not None:
            return sequence_key(sequence.seed, 0)
        return sequence_key(self.engine.sampler.params.seed, sequence.index)

    def admit(self) -> list[TokenSequence]:
        """Takes waiting sequences in for as long as there are rows and pages for them; returns those."""
        admitted = []
        while self.waiting and self.num_open < self.engine.limits.batch_size and self.reserve(self.waiting[0]):
            admitted.append(self.waiting.popleft())
            self.prefilling.append(admitted[-1])
        return admitted

    @property
    def num_open(self) -> int:
        return len(self.prefilling) + len(self.running)

    def reserve(self, sequence: TokenSequence) -> bool:
        """Gives a sequence its pages; False where it must wait for others to give theirs back.

        Raises:
            OutOfPagesError: there is nobody to wait for.
        """
        try:
            pages, num_reused = self.engine.pages.reserve(
                sequence.prompt, self.engine.limits.pages_of(sequence.num_tokens)
            )
        except OutOfPagesError:
            if self.num_open == 0:
                raise
            return False
        sequence.pages, sequence.num_reused, sequence.num_prefilled = pages, num_reused, num_reused
        return True

    def next_parts(self) -> list[Part]:
        """What to prefill next: less where answers are under way, each of which waits for it before its next token."""
        return share_pass(self.prefilling, self.engine.limits.chunk(is_decoding=bool(self.running)))

    def start_running(self) -> list[TokenSequence]:
        """Moves on those whose prompt is in the cache; returns them."""
        started = [sequence for sequence in self.prefilling if sequence.is_prefilled]
        self.prefilling = [sequence for sequence in self.prefilling if not sequence.is_prefilled]
        self.running += started
        return started

    def retire(self, sequence: TokenSequence) -> None:
        """Frees the row and the pages of a sequence that needs no more steps. What is queued may still write to them,
        before anything that is queued later."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.engine.pages.release(sequence.pages)
            # One that its first token ended has no row yet, and is to get none.
            self.engine.fresh.pop(sequence, None)

    def retire_sampled(self) -> None:
        for sequence in [sequence for sequence in self.running if sequence.is_sampled]:
            self.retire(sequence)
