"""A pass of whole prompts, or their first tokens, that needs nothing of the host: all that they attend to is in it.

So it can be captured as one graph, in which some tokens attend while the sums of others are on their way; between
pieces (pieces.py) all sums are waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from parallel.engine.decoder import Attend, Decoder
from parallel.engine.prefill.order import run_pass
from parallel.engine.prefill.pieces import PassBuffers, Pieces
from parallel.engine.prefill.section_sizes import Sections
from parallel.kernels.pages import PagedKV
from parallel.kernels.ranges_attention import keys_at, ranges_attention, rows_of

# Prompts of one pass; each costs some idle blocks of the attention kernel.
MAX_PROMPTS = 16


class FreshPass:
    """A pass over all rows of the buffers of `pieces`.

    `bounds` [n, 2, MAX_PROMPTS + 1] int32 has, for sections that attend at once, the ranges of prompts in their rows,
    and those of their keys in all rows up to their end.
    """

    def __init__(self, pieces: Pieces, bounds: Tensor) -> None:
        self.pieces, self.bounds = pieces, bounds[: len(pieces.sections)]

    @property
    def buffers(self) -> PassBuffers:
        return self.pieces.buffers

    def put(self, tokens: Tensor, lengths: Sequence[int]) -> None:
        """Takes [3, tokens] of prompts of so many tokens each."""
        self.buffers.put(tokens)
        bounds = prompt_bounds(lengths, self.pieces.sections)
        if self.bounds.is_cuda:
            bounds = bounds.pin_memory()
        self.bounds.copy_(bounds, non_blocking=True)

    def run(self) -> None:
        decoder, tokens, sections = self.pieces.decoder, self.pieces.tokens, self.pieces.sections
        attends = [
            attend_within(decoder, tokens.slots[:end], *bounds)
            for end, bounds in zip(accumulate(map(sum, sections)), self.bounds, strict=True)
        ]
        self.buffers.residual.copy_(run_pass(decoder, tokens, sections, attends, self.pieces.caches))


def attend_within(decoder: Decoder, slots: Tensor, query_bounds: Tensor, key_bounds: Tensor) -> Attend:
    """Attention to tokens of the pass, which are in `slots` by then."""
    rows = rows_of(slots, decoder.num_kv_heads)

    def attend(query: Tensor, cache: PagedKV) -> Tensor:
        keys, values = keys_at(cache, rows, query.dtype)
        return ranges_attention(query, keys, values, query_bounds, key_bounds, decoder.scale)

    return attend


def prompt_bounds(lengths: Sequence[int], sections: Sections) -> Tensor:
    """[n, 2, MAX_PROMPTS + 1] int32, as FreshPass has them, of prompts one after the other."""
    starts = torch.zeros(MAX_PROMPTS + 1, dtype=torch.int32)
    starts[1 : len(lengths) + 1] = torch.tensor(lengths)
    starts = starts.cumsum(0, dtype=torch.int32)
    rows = pairwise(accumulate(map(sum, sections), initial=0))
    return torch.stack([torch.stack([starts.clamp(start, end) - start, starts.clamp(max=end)]) for start, end in rows])
