"""Passes of prompts captured as CUDA graphs for some numbers of rows: whole (fresh.py), and piece by piece.

A layer of a pass takes the host 0.6 to 2 ms to queue launch by launch on a machine where a launch takes 13 us, which is
longer than the card needs for its share of some hundred tokens; as a graph and its attention it takes a tenth. To
capture a size takes 0.9 s there, so a size is captured when it comes a second time, while there are places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from parallel.engine.decoder import Attend, Decoder
from parallel.engine.limits import CAPTURED_PASSES, size_for
from parallel.engine.prefill.fresh import MAX_PROMPTS, FreshPass
from parallel.engine.prefill.pieces import PassBuffers, Pieces
from parallel.engine.prefill.recorded import Places, Record, Recorded, capture_all
from parallel.engine.prefill.section_sizes import MOST_SECTIONS
from parallel.kernels.pages import PagedKV
from parallel.kernels.ranges_attention import refusal

# Whether passes of whole prompts are one graph.
FRESH_GRAPHS = True


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
        places: for passes that are recorded, shared with others; None: CAPTURED_PASSES of its own.
    """

    def __init__(
        self,
        decoder: Decoder,
        caches: Sequence[PagedKV],
        sizes: Sequence[int],
        pool: Any = None,
        record: Record = capture_all,
        places: Places | None = None,
    ) -> None:
        self.decoder, self.caches, self.pool, self.record = decoder, caches, pool, record
        self.places = places or Places(CAPTURED_PASSES)
        self.max_rows = max(sizes)
        self.buffers = PassBuffers.empty(decoder, self.max_rows)
        device = self.buffers.residual.device
        self.bounds = torch.zeros(len(MOST_SECTIONS), 2, MAX_PROMPTS + 1, dtype=torch.int32, device=device)
        why_not = refusal(decoder.head_dim, self.buffers.residual.dtype, device)
        self.takes_fresh = FRESH_GRAPHS and why_not is None
        self.passes = {size: self._open(size) for size in sorted(sizes)}
        # The others fit into its memory, whenever they are recorded, and whether or not it is still.
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
        return size_for(self.passes, num_tokens)

    def prepare(self, num_tokens: int, num_prompts: int = 1) -> None:
        """Records passes of so many tokens of prompts from their start now. While no sequence is in the cache."""
        recorded = self.passes[self.size_for(num_tokens)].recorded
        self._prepare(recorded[:1] if num_prompts <= MAX_PROMPTS else recorded[-1:])

    def record_used(self) -> None:
        """Records now what would be when its size comes again; of more than there are places, what was run last."""
        self.places.record_latest()

    def anew(self, num_tokens: int) -> PassGraphs:
        """Of passes of so many tokens alone, with the communicator that layers talk through by now."""
        sizes = (self.size_for(num_tokens),)
        return PassGraphs(self.decoder, self.caches, sizes, self.pool, self.record, self.places)

    def forget(self) -> None:
        """Gives its places back."""
        for each in self.passes.values():
            for recorded in each.recorded:
                recorded.forget()

    def _open(self, num_rows: int) -> Pass:
        pieces = Pieces(self.decoder, self.caches, self.buffers.first(num_rows))
        calls = [partial(pieces.run, place) for place in range(len(pieces))]
        fresh = FreshPass(pieces, self.bounds)
        recording = (self.pool, self.record, self.places)
        whole = Recorded([fresh.run], *recording) if self.takes_fresh else None
        return Pass(pieces.buffers, Recorded(calls, *recording), fresh, whole)

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
