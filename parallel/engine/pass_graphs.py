"""Passes of prompts captured as CUDA graphs, piece by piece (pieces.py), for some numbers of rows.

A layer of a pass takes the host 0.6 to 2 ms to queue launch by launch on a machine where a launch takes 13 us, which is
longer than the card needs for its share of some hundred tokens; as a graph and its attention it takes a tenth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from parallel.engine.decoder import Attend, Decoder
from parallel.engine.graphs import capture
from parallel.engine.pages import PagedKV
from parallel.engine.pieces import PassBuffers, Pieces

# What runs a piece, later and often.
Replay = Callable[[], object]


def capture_pieces(pieces: Pieces, pool: Any) -> list[Replay]:
    """A graph of each piece, which is run once before: kernels are compiled and libraries set themselves up."""
    for place in range(len(pieces)):
        pieces.run(place)
    return [capture(partial(pieces.run, place), pool, num_warm_ups=0).replay for place in range(len(pieces))]


class PassGraphs:
    """Passes of up to `max_rows` rows, in the memory of the largest. To be made while no sequence is in the cache.

    Args:
        sizes: numbers of rows that are captured; a pass of another runs the next larger.
        pool: of memory that graphs share.
        record: makes what runs the pieces from now on.
    """

    def __init__(
        self,
        decoder: Decoder,
        caches: Sequence[PagedKV],
        sizes: Sequence[int],
        pool: Any = None,
        record: Callable[[Pieces, Any], list[Replay]] = capture_pieces,
    ) -> None:
        self.decoder, self.caches, self.pool, self.record = decoder, caches, pool, record
        self.max_rows = max(sizes)
        buffers = PassBuffers.empty(decoder, self.max_rows)
        # The largest first: the others fit into its memory.
        passes = {size: Pieces(decoder, caches, buffers.first(size)) for size in sorted(sizes, reverse=True)}
        with torch.inference_mode():
            self.replays = {size: (pieces.buffers, record(pieces, pool)) for size, pieces in passes.items()}

    def run(self, tokens: Tensor, attend: Attend) -> Tensor:
        """[tokens, hidden] of [3, tokens] ids, positions and slots, as of Decoder; overwritten by the next pass."""
        num_tokens = tokens.shape[1]
        buffers, (first, *others) = self.replays[self.size_for(num_tokens)]
        buffers.put(tokens)
        queries, attended = buffers.queries[:num_tokens], buffers.attended[:num_tokens]
        first()
        for replay, cache in zip(others, self.caches, strict=True):
            if self.decoder.num_heads:
                attended.copy_(attend(queries, cache).flatten(1))
            replay()
        return buffers.residual[:num_tokens]

    def size_for(self, num_tokens: int) -> int:
        """Rows of the graphs that take so many tokens."""
        return min(size for size in self.replays if size >= num_tokens)

    def anew(self, num_tokens: int) -> PassGraphs:
        """Of passes of so many tokens alone, with the communicator that layers talk through by now."""
        return PassGraphs(self.decoder, self.caches, (self.size_for(num_tokens),), self.pool, self.record)
