"""A pass of whole prompts, or their first tokens, that needs nothing of the host: all that they attend to is in it.

So it can be captured as one graph, in which half of the tokens attend while the sums of the others are on their way;
between pieces (pieces.py) all sums are waited for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from parallel.engine.decoder import Attend, Decoder
from parallel.engine.overlap import run_in_halves
from parallel.engine.pages import PagedKV
from parallel.engine.pieces import PassBuffers, Pieces
from parallel.kernels.ranges_attention import keys_at, ranges_attention, rows_of

# Prompts of one pass; each costs some idle blocks of the attention kernel.
MAX_PROMPTS = 16


class FreshPass:
    """A pass over all rows of the buffers of `pieces`.

    `bounds` [3, MAX_PROMPTS + 1] int32 has the ranges of prompts in the first half (or in all rows), those in the
    second, and those of the keys of the latter.
    """

    def __init__(self, pieces: Pieces, bounds: Tensor) -> None:
        self.pieces, self.bounds = pieces, bounds

    @property
    def buffers(self) -> PassBuffers:
        return self.pieces.buffers

    def put(self, tokens: Tensor, lengths: Sequence[int]) -> None:
        """Takes [3, tokens] of prompts of so many tokens each."""
        self.buffers.put(tokens)
        num_rows = len(self.buffers.residual)
        bounds = prompt_bounds(lengths, self.pieces.cut or num_rows)
        if self.bounds.is_cuda:
            bounds = bounds.pin_memory()
        self.bounds.copy_(bounds, non_blocking=True)

    def run(self) -> None:
        decoder, tokens, cut = self.pieces.decoder, self.pieces.tokens, self.pieces.cut
        first, second, keys = self.bounds
        if cut is None:
            states = decoder(tokens, attend_within(decoder, tokens.slots, first, first), self.pieces.caches)
        else:
            attends = [
                attend_within(decoder, tokens.slots[:cut], first, first),
                attend_within(decoder, tokens.slots, second, keys),
            ]
            states = run_in_halves(decoder, tokens, cut, attends, self.pieces.caches)
        self.buffers.residual.copy_(states)


def attend_within(decoder: Decoder, slots: Tensor, query_bounds: Tensor, key_bounds: Tensor) -> Attend:
    """Attention to tokens of the pass, which are in `slots` by then."""
    rows = rows_of(slots, decoder.num_kv_heads)

    def attend(query: Tensor, cache: PagedKV) -> Tensor:
        keys, values = keys_at(cache, rows, query.dtype)
        return ranges_attention(query, keys, values, query_bounds, key_bounds, decoder.scale)

    return attend


def prompt_bounds(lengths: Sequence[int], cut: int) -> Tensor:
    """[3, MAX_PROMPTS + 1] int32, as FreshPass has them, of prompts one after the other, cut after `cut` rows."""
    starts = torch.zeros(MAX_PROMPTS + 1, dtype=torch.int32)
    starts[1 : len(lengths) + 1] = torch.tensor(lengths)
    starts = starts.cumsum(0, dtype=torch.int32)
    return torch.stack([starts.clamp(max=cut), starts.clamp(min=cut) - cut, starts])
