"""Passes of parts of prompts, with what comes before them in the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from parallel.engine.engine import Engine
from parallel.engine.sequence import Part, TokenSequence
from parallel.kernels.pages import pages_for


@contextmanager
def parts_of(engine: Engine, prompts: Sequence[list[int]], places: Sequence[tuple[int, int]]) -> Iterator[list[Part]]:
    """The part from start to end of each prompt, which is in the cache up to there; pages are given back afterwards."""
    sequences = [TokenSequence(row, prompt, 1) for row, prompt in enumerate(prompts)]
    for sequence in sequences:
        sequence.pages = engine.pages.allocate(pages_for(sequence.num_tokens))
    pairs = list(zip(sequences, places, strict=True))
    before = [Part(sequence, 0, start) for sequence, (start, _) in pairs if start]
    if before:
        engine.hidden_states(before)
    yield [Part(sequence, start, end) for sequence, (start, end) in pairs]
    for sequence in sequences:
        engine.pages.release(sequence.pages)
