"""A pass over prompts that can be queued again and again, as calibrations time it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from launcher.tasks.requests import random_prompts
from parallel.engine.engine import Engine
from parallel.engine.sequence import Part, TokenSequence
from parallel.kernels.pages import pages_for


@contextmanager
def prompt_pass(engine: Engine, vocab_size: int, lengths: list[int], start: int = 0) -> Iterator[Callable[[], Tensor]]:
    """A pass over `lengths` tokens of as many prompts, those before `start` being in the cache, and their first draws:
    each call queues the same one again."""
    # Equal tokens would make equal rows, whose products draw less power and so run faster.
    prompts = random_prompts(len(lengths), start + max(lengths), vocab_size, "calibrate")
    sequences = [
        TokenSequence(index, prompt[: start + tokens], max_tokens=1)
        for index, (prompt, tokens) in enumerate(zip(prompts, lengths, strict=True))
    ]
    for sequence in sequences:
        sequence.pages = engine.pages.allocate(pages_for(sequence.num_tokens))
    parts = [Part(sequence, start, len(sequence.prompt)) for sequence in sequences]

    def run() -> Tensor:
        return engine.start_answers(sequences, engine.prefill(parts))

    try:
        yield run
    finally:
        for sequence in sequences:
            engine.pages.release(sequence.pages)
