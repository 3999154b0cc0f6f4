"""The decode step timed by itself, with its all-reduces or without."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from parallel.communicator import Communicator
from parallel.engine.engine import Engine
from parallel.engine.graphs import capture
from parallel.engine.sequence import TokenSequence
from parallel.layers.linear import swapped_communicator

# The first steps after a change of path are slower.
NUM_WARM_UPS = 2


def time_steps(engine: Engine, contexts: Sequence[int], num_steps: int, communicator: Communicator) -> list[float]:
    """Milliseconds of each of `num_steps` decode steps of sequences that have `contexts` tokens, the new one counted;
    see `prepared_step`."""
    return time_prepared(engine, contexts, num_steps, communicator, engine.step_rows)


def time_drafts(engine: Engine, contexts: Sequence[int], num_steps: int, communicator: Communicator) -> list[float]:
    """As `time_steps`, of the part of a step in which drafts are made; the engine must speculate."""
    assert engine.speculator is not None
    speculator = engine.speculator

    def draft(num_rows: int) -> None:
        speculator.propose(engine.rows.first(num_rows))

    return time_prepared(engine, contexts, num_steps, communicator, draft)


def time_prepared(
    engine: Engine,
    contexts: Sequence[int],
    num_steps: int,
    communicator: Communicator,
    run_rows: Callable[[int], object],
    num_drafts: int | None = None,
    *,
    is_captured: bool = False,
) -> list[float]:
    """As `time_steps`, of `run_rows`; see `prepared_step`."""
    with prepared_step(engine, contexts, communicator, run_rows, num_drafts, is_captured=is_captured) as run:
        return [milliseconds(run, engine.device) for _ in range(NUM_WARM_UPS + num_steps)][NUM_WARM_UPS:]


@contextmanager
def prepared_step(
    engine: Engine,
    contexts: Sequence[int],
    communicator: Communicator,
    run_rows: Callable[[int], object] | None = None,
    num_drafts: int | None = None,
    *,
    is_captured: bool = False,
) -> Iterator[Callable[[], None]]:
    """A decode step of sequences that have `contexts` tokens, the new one counted: each call queues the same one again.

    Layers talk through `communicator`; where steps are captured, this one is, with it. The engine must have no
    sequences open; what lies in their pages is attended to as it is. `run_rows` is run for so many rows in place of the
    step, with room for `num_drafts` that may come true; `is_captured`: it runs a graph of its own.
    """
    if num_drafts is None:
        num_drafts = 0 if engine.speculator is None else engine.speculator.num_drafts
    sequences = [open_sequence(engine, index, length, num_drafts) for index, length in enumerate(contexts)]
    try:
        for sequence in sequences:
            sequence.pages = engine.pages.allocate(engine.limits.pages_of(sequence.num_tokens))
            sequence.num_sampled = 1
            engine.fresh[sequence] = torch.zeros((), dtype=torch.int64, device=engine.device)
        swapped = swapped_communicator(engine.models, communicator), swapped_drafts(engine, communicator)
        with torch.inference_mode(), swapped[0], swapped[1]:
            engine.arrange(sequences)
            step = _same_step(engine, len(sequences), run_rows or engine.step_rows)
            yield capture(step).replay if engine.captures and not is_captured else step
    finally:
        for sequence in sequences:
            engine.pages.release(sequence.pages)


@contextmanager
def swapped_drafts(engine: Engine, communicator: Communicator) -> Iterator[None]:
    """Drafts with graphs of their own get others where those in place talk through another than `communicator`."""
    before = [(each, each.graphs) for each in engine.drafting]
    if communicator is not engine.communicator:
        for each, graphs in before:
            each.graphs = None if graphs is None else graphs.anew()
    try:
        yield
    finally:
        for each, graphs in before:
            each.graphs = graphs


def open_sequence(engine: Engine, index: int, length: int, num_drafts: int) -> TokenSequence:
    """One of `length` tokens, the new one counted, with room for drafts where max_context has it."""
    room = min(num_drafts, engine.limits.max_context - length)
    return TokenSequence(index, [0] * (length - 1), max_tokens=2 + room)


def _same_step(engine: Engine, num_rows: int, run_rows: Callable[[int], object]) -> Callable[[], None]:
    """Every step starts from the same positions."""
    positions = engine.rows.positions.clone()

    def step() -> None:
        engine.rows.positions.copy_(positions)
        run_rows(num_rows)

    return step


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one call, and of what it queued to be computed: copies of layers for the next call go on beside that."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return (time.perf_counter() - start) * 1e3
