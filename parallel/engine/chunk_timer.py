"""A pass of prompts timed by itself, with its all-reduces or without, or apart from the host."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from parallel.communicator import Communicator
from parallel.engine.engine import Engine
from parallel.engine.limits import EngineLimits
from parallel.engine.sequence import Part, TokenSequence
from parallel.engine.step_timer import milliseconds
from parallel.kernels.pages import pages_for
from parallel.layers.linear import swapped_communicator

# Of a card's clock in a millisecond, at most.
CYCLES_PER_MS = 3_000_000
# Of passes one behind the other, until cards have long been held by their power.
SUSTAINED_MS = 1000.0


@dataclass(frozen=True)
class PassTimes:
    """Milliseconds of a pass: in all, until the host has queued it, and on a card that need not wait for the host."""

    whole: float
    queued: float
    card: float


def time_apart(run: Callable[[], object], communicator: Communicator, device: torch.device) -> PassTimes:
    """One pass as it is, then one that the card starts once the host has queued it, or as much as a queue takes. On a
    CPU, which queues nothing, all is the card's. To be called on all ranks."""
    communicator.barrier()
    start = time.perf_counter()
    run()
    queued = (time.perf_counter() - start) * 1e3
    if device.type != "cuda":
        return PassTimes(queued, 0.0, queued)
    torch.cuda.synchronize(device)
    whole = (time.perf_counter() - start) * 1e3
    return PassTimes(whole, queued, card_milliseconds(run, queued, communicator, device))


def card_milliseconds(
    run: Callable[[], object], ahead_ms: float, communicator: Communicator, device: torch.device
) -> float:
    """Of what `run` queues, by the card's clock, while the host is `ahead_ms` ahead; all ranks begin together."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(round(ahead_ms * CYCLES_PER_MS))
    communicator.all_reduce(torch.zeros(64, device=device))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def sustained_milliseconds(
    run: Callable[[], object], one_ms: float, communicator: Communicator, device: torch.device
) -> float:
    """A pass of about `one_ms` among others one behind the other, which go on for SUSTAINED_MS: the mean of the second
    half. To be called on all ranks. On a CPU `one_ms`."""
    if device.type != "cuda":
        return one_ms
    # As many on every rank.
    mean_ms = float(communicator.all_reduce(torch.full((64,), one_ms, device=device))[0]) / communicator.world_size
    half = max(1, round(SUSTAINED_MS / 2 / mean_ms))
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    communicator.barrier()
    for _ in range(half):
        run()
    begin.record()
    for _ in range(half):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / half


def chunk_lengths(limits: EngineLimits, num_prompt_tokens: int) -> list[int]:
    """Tokens of the prompts of that length, the last one cut, that a pass reads."""
    num_tokens = min(limits.prefill_chunk, limits.batch_size * num_prompt_tokens)
    return [min(num_prompt_tokens, num_tokens - start) for start in range(0, num_tokens, num_prompt_tokens)]


def time_chunks(engine: Engine, lengths: Sequence[int], num_passes: int, communicator: Communicator) -> list[float]:
    """Milliseconds of each of `num_passes` passes; see `prepared_chunk`."""
    with prepared_chunk(engine, lengths, communicator) as run:
        return [milliseconds(run, engine.device) for _ in range(1 + num_passes)][1:]


def random_tokens(engine: Engine, num: int) -> list[int]:
    """Equal tokens would make equal rows, whose products draw less power and so run faster."""
    return random.Random(num).choices(range(engine.model.config.vocab_size), k=num)


@contextmanager
def prepared_chunk(engine: Engine, lengths: Sequence[int], communicator: Communicator) -> Iterator[Callable[[], None]]:
    """A pass through all layers of prompts of so many tokens each: each call queues the same one again.

    Layers talk through `communicator`. The engine must have no sequences open.
    """
    sequences = [
        TokenSequence(index, random_tokens(engine, length), max_tokens=1) for index, length in enumerate(lengths)
    ]
    try:
        for sequence in sequences:
            sequence.pages = engine.pages.allocate(pages_for(len(sequence.prompt)))
        parts = [Part(sequence, 0, len(sequence.prompt)) for sequence in sequences]
        with swapped_communicator(engine.models, communicator), swapped_graphs(engine, communicator, lengths):

            def run() -> None:
                engine.hidden_states(parts)

            yield run
    finally:
        for sequence in sequences:
            engine.pages.release(sequence.pages)


@contextmanager
def swapped_graphs(engine: Engine, communicator: Communicator, lengths: Sequence[int]) -> Iterator[None]:
    """Passes of prompts of so many tokens are captured, so that no timed one is; anew where others than those of
    `communicator` would be replayed."""
    before, graphs, num_tokens = engine.target, engine.target.graphs, sum(lengths)
    try:
        if graphs is not None and num_tokens <= graphs.max_rows:
            if communicator is not engine.communicator:
                graphs = graphs.anew(num_tokens)
                engine.target = replace(before, graphs=graphs)
            graphs.prepare(num_tokens, len(lengths))
        yield
    finally:
        engine.target = before
        if graphs is not None and graphs is not before.graphs:
            graphs.forget()
