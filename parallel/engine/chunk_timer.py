"""A pass of prompts timed by itself, with its all-reduces or without."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from parallel.communicator import Communicator
from parallel.engine.engine import Engine, Part
from parallel.engine.limits import EngineLimits
from parallel.engine.pages import pages_for
from parallel.engine.sequence import Sequence as EngineSequence
from parallel.engine.step_timer import milliseconds
from parallel.linear import swapped_communicator


def chunk_lengths(limits: EngineLimits, num_prompt_tokens: int) -> list[int]:
    """Tokens of the prompts of that length, the last one cut, that a pass reads."""
    num_tokens = min(limits.prefill_chunk, limits.batch_size * num_prompt_tokens)
    return [min(num_prompt_tokens, num_tokens - start) for start in range(0, num_tokens, num_prompt_tokens)]


def time_chunks(engine: Engine, lengths: Sequence[int], num_passes: int, communicator: Communicator) -> list[float]:
    """Milliseconds of each of `num_passes` passes; see `prepared_chunk`."""
    with prepared_chunk(engine, lengths, communicator) as run:
        return [milliseconds(run, engine.device) for _ in range(1 + num_passes)][1:]


@contextmanager
def prepared_chunk(engine: Engine, lengths: Sequence[int], communicator: Communicator) -> Iterator[Callable[[], None]]:
    """A pass through all layers of prompts of so many tokens each: each call queues the same one again.

    Layers talk through `communicator`. The engine must have no sequences open.
    """
    sequences = [EngineSequence(index, [0] * length, max_tokens=1) for index, length in enumerate(lengths)]
    try:
        for sequence in sequences:
            sequence.pages = engine.pages.allocate(pages_for(len(sequence.prompt)))
        parts = [Part(sequence, 0, len(sequence.prompt)) for sequence in sequences]
        with swapped_communicator(engine.models, communicator), swapped_graphs(engine, communicator, sum(lengths)):

            def run() -> None:
                engine.hidden_states(parts)

            yield run
    finally:
        for sequence in sequences:
            engine.pages.release(sequence.pages)


@contextmanager
def swapped_graphs(engine: Engine, communicator: Communicator, num_tokens: int) -> Iterator[None]:
    """Passes of so many tokens are captured anew where others than those of `communicator` would be replayed."""
    before, graphs = engine.target, engine.target.graphs
    if graphs is not None and num_tokens <= graphs.max_rows and communicator is not engine.communicator:
        engine.target = replace(before, graphs=graphs.anew(num_tokens))
    try:
        yield
    finally:
        engine.target = before
