"""Passes of prompts captured as CUDA graphs for some numbers of rows: whole (fresh.py), and piece by piece.

A layer of a pass takes the host 0.6 to 2 ms to queue launch by launch on a machine where a launch takes 13 us, which is
longer than the card needs for its share of some hundred tokens; as a graph and its attention it takes a tenth. To
capture a size takes 0.9 s there, so a size is captured when it comes a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from parallel.engine.decoder import Attend, Decoder
from parallel.engine.graphs import capture
from parallel.engine.limits import MOST_SECTIONS
from parallel.engine.prefill.fresh import MAX_PROMPTS, FreshPass
from parallel.engine.prefill.pieces import PassBuffers, Pieces
from parallel.kernels.pages import PagedKV
from parallel.kernels.ranges_attention import refusal

# What does again what was captured.
Replay = Callable[[], object]
Record = Callable[[Sequence[Callable[[], None]], Any], list[Replay]]
# Whether passes of whole prompts are one graph.
FRESH_GRAPHS = True


def capture_all(calls: Sequence[Callable[[], None]], pool: Any) -> list[Replay]:
    """A graph of each. All have been run, so that kernels are compiled and libraries set up; now they are not."""
    return [capture(call, pool, num_warm_ups=0).replay for call in calls]


class Recorded:
    """Calls that are run as they are the first time, and as what `record` made of them from the second on.

    Ranks make the same passes in the same order, so all of them record the same at the same pass.
    """

    def __init__(self, calls: Sequence[Callable[[], None]], pool: Any, record: Record) -> None:
        self.calls, self.pool, self.record = calls, pool, record
        self.replays: list[Replay] = list(calls)
        self.was_run = self.is_recorded = False

    @contextmanager
    def use(self) -> Iterator[list[Replay]]:
        """What runs them this time: each once, in order. One that is broken off does not count."""
        self.record_used()
        yield self.replays
        self.was_run = True

    def prepare(self) -> None:
        """Records them now, and runs them before where they were not."""
        if not self.was_run:
            with self.use() as calls:
                for call in calls:
                    call()
        self.record_used()

    def record_used(self) -> None:
        """Records them now where they were run."""
        if self.was_run and not self.is_recorded:
            self.replays, self.is_recorded = self.record(self.calls, self.pool), True


@dataclass(frozen=True)
class Pass:
    """Passes of one number of rows; `whole` does what `pieces` and attentions do, for prompts from their start."""

    buffers: PassBuffers
    pieces: Recorded
    fresh: FreshPass
    whole: Recorded | None

    @property
    def recorded(self) -> list[Recorded]:
        return [self.pieces] if self.whole is None else [self.whole, self.pieces]


class PassGraphs:
    """Passes of up to `max_rows` rows, in the memory of the largest. To be made while no sequence is in the cache.

    Args:
        sizes: numbers of rows that are captured; a pass of another runs the next larger.
        pool: of memory that graphs share.
        record: makes what runs calls from now on, without running them.
    """

    def __init__(
        self,
        decoder: Decoder,
        caches: Sequence[PagedKV],
        sizes: Sequence[int],
        pool: Any = None,
        record: Record = capture_all,
    ) -> None:
        self.decoder, self.caches, self.pool, self.record = decoder, caches, pool, record
        self.max_rows = max(sizes)
        self.buffers = PassBuffers.empty(decoder, self.max_rows)
        device = self.buffers.residual.device
        self.bounds = torch.zeros(len(MOST_SECTIONS), 2, MAX_PROMPTS + 1, dtype=torch.int32, device=device)
        why_not = refusal(decoder.head_dim, self.buffers.residual.dtype, device)
        self.takes_fresh = FRESH_GRAPHS and why_not is None
        self.passes = {size: self._open(size) for size in sorted(sizes)}
        # The others fit into its memory, whenever they are recorded.
        self._prepare(self.passes[self.max_rows].recorded[:1])

    def run(self, tokens: Tensor, parts: Sequence[tuple[int, int]], attend: Attend) -> Tensor:
        """[tokens, hidden] of [3, tokens] ids, positions and slots, as of Decoder; overwritten by the next pass.

        `parts`: where each part of a prompt starts and ends in it.
        """
        num_tokens = tokens.shape[1]
        each = self.passes[self.size_for(num_tokens)]
        is_fresh = len(parts) <= MAX_PROMPTS and all(start == 0 for start, _ in parts)
        if each.whole is not None and is_fresh:
            each.fresh.put(tokens, [end for _, end in parts])
            with each.whole.use() as (run,):
                run()
        else:
            each.buffers.put(tokens)
            self._run_pieces(each, num_tokens, attend)
        return each.buffers.residual[:num_tokens]

    def size_for(self, num_tokens: int) -> int:
        """Rows of the graphs that take so many tokens."""
        return min(size for size in self.passes if size >= num_tokens)

    def prepare(self, num_tokens: int) -> None:
        """Records passes of so many tokens now. While no sequence is in the cache."""
        self._prepare(self.passes[self.size_for(num_tokens)].recorded)

    def prepare_all(self) -> None:
        """Records all passes now, as `prepare`."""
        for size in sorted(self.passes, reverse=True):
            self.prepare(size)

    def record_used(self) -> None:
        """Records now what would be when its size comes again."""
        for each in self.passes.values():
            for recorded in each.recorded:
                recorded.record_used()

    def anew(self, num_tokens: int) -> PassGraphs:
        """Of passes of so many tokens alone, with the communicator that layers talk through by now."""
        return PassGraphs(self.decoder, self.caches, (self.size_for(num_tokens),), self.pool, self.record)

    def _open(self, num_rows: int) -> Pass:
        pieces = Pieces(self.decoder, self.caches, self.buffers.first(num_rows))
        calls = [partial(pieces.run, place) for place in range(len(pieces))]
        fresh = FreshPass(pieces, self.bounds)
        whole = Recorded([fresh.run], self.pool, self.record) if self.takes_fresh else None
        return Pass(pieces.buffers, Recorded(calls, self.pool, self.record), fresh, whole)

    @torch.inference_mode()
    def _prepare(self, recorded: Sequence[Recorded]) -> None:
        # The slots of the last pass may be those of other tokens by now; slot 0 is nobody's.
        self.buffers.tokens.zero_()
        self.bounds.zero_()
        for each in recorded:
            each.prepare()

    def _run_pieces(self, each: Pass, num_tokens: int, attend: Attend) -> None:
        queries, attended = each.buffers.queries[:num_tokens], each.buffers.attended[:num_tokens]
        with each.pieces.use() as (first, *others):
            first()
            for run, cache in zip(others, self.caches, strict=True):
                if self.decoder.num_heads:
                    attended.copy_(attend(queries, cache).flatten(1))
                run()
