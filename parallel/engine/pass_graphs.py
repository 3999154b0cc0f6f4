"""Passes of prompts captured as CUDA graphs for some numbers of rows: whole (fresh_pass.py), and piece by piece.

A layer of a pass takes the host 0.6 to 2 ms to queue launch by launch on a machine where a launch takes 13 us, which is
longer than the card needs for its share of some hundred tokens; as a graph and its attention it takes a tenth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from parallel.engine.decoder import Attend, Decoder
from parallel.engine.fresh_pass import MAX_PROMPTS, FreshPass
from parallel.engine.graphs import capture
from parallel.engine.limits import MOST_SECTIONS
from parallel.engine.pages import PagedKV
from parallel.engine.pieces import PassBuffers, Pieces
from parallel.kernels.ranges_attention import refusal

# What does again what was captured.
Replay = Callable[[], object]
Record = Callable[[Sequence[Callable[[], None]], Any], list[Replay]]
# Whether passes of whole prompts are one graph.
FRESH_GRAPHS = True


def capture_all(calls: Sequence[Callable[[], None]], pool: Any) -> list[Replay]:
    """A graph of each; all are run once before, so that kernels are compiled and libraries set up."""
    for call in calls:
        call()
    return [capture(call, pool, num_warm_ups=0).replay for call in calls]


@dataclass(frozen=True)
class Captured:
    """Passes of one number of rows; `whole` does what `pieces` and attentions do, for prompts from their start."""

    buffers: PassBuffers
    pieces: list[Replay]
    fresh: FreshPass
    whole: Replay | None


class PassGraphs:
    """Passes of up to `max_rows` rows, in the memory of the largest. To be made while no sequence is in the cache.

    Args:
        sizes: numbers of rows that are captured; a pass of another runs the next larger.
        pool: of memory that graphs share.
        record: makes what runs captured calls from now on.
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
        self.bounds = torch.zeros(MOST_SECTIONS, 2, MAX_PROMPTS + 1, dtype=torch.int32, device=device)
        why_not = refusal(decoder.num_heads, decoder.head_dim, self.buffers.residual.dtype, device)
        self.takes_fresh = FRESH_GRAPHS and (device.type == "cpu" or why_not is None)
        # The largest first: the others fit into its memory.
        with torch.inference_mode():
            self.passes = {size: self._capture(size) for size in sorted(sizes, reverse=True)}

    def run(self, tokens: Tensor, parts: Sequence[tuple[int, int]], attend: Attend) -> Tensor:
        """[tokens, hidden] of [3, tokens] ids, positions and slots, as of Decoder; overwritten by the next pass.

        `parts`: where each part of a prompt starts and ends in it.
        """
        num_tokens = tokens.shape[1]
        captured = self.passes[self.size_for(num_tokens)]
        is_fresh = len(parts) <= MAX_PROMPTS and all(start == 0 for start, _ in parts)
        if captured.whole is not None and is_fresh:
            captured.fresh.put(tokens, [end for _, end in parts])
            captured.whole()
        else:
            captured.buffers.put(tokens)
            self._run_pieces(captured, num_tokens, attend)
        return captured.buffers.residual[:num_tokens]

    def size_for(self, num_tokens: int) -> int:
        """Rows of the graphs that take so many tokens."""
        return min(size for size in self.passes if size >= num_tokens)

    def anew(self, num_tokens: int) -> PassGraphs:
        """Of passes of so many tokens alone, with the communicator that layers talk through by now."""
        return PassGraphs(self.decoder, self.caches, (self.size_for(num_tokens),), self.pool, self.record)

    def _capture(self, num_rows: int) -> Captured:
        pieces = Pieces(self.decoder, self.caches, self.buffers.first(num_rows))
        replays = self.record([partial(pieces.run, place) for place in range(len(pieces))], self.pool)
        fresh = FreshPass(pieces, self.bounds)
        whole = self.record([fresh.run], self.pool)[0] if self.takes_fresh else None
        return Captured(pieces.buffers, replays, fresh, whole)

    def _run_pieces(self, captured: Captured, num_tokens: int, attend: Attend) -> None:
        queries, attended = captured.buffers.queries[:num_tokens], captured.buffers.attended[:num_tokens]
        first, *others = captured.pieces
        first()
        for replay, cache in zip(others, self.caches, strict=True):
            if self.decoder.num_heads:
                attended.copy_(attend(queries, cache).flatten(1))
            replay()
