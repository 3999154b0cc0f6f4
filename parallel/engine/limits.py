"""What an engine has room for; without torch, for plans."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Tokens of a page of the KV cache.
PAGE_SIZE = 64
# Tokens of a sequence that attention tells apart in one pass.
MAX_NODES = 256
# Rows whose tokens are drawn at a time, over the whole vocabulary in float32.
SAMPLED_ROWS = 64
# A pass of so many rows goes in two halves where there are several ranks (parallel/engine/overlap.py). A smaller one is
# over before the host has queued twice as many kernels: Llama-70B in 4 bits on two H200 took 315 ms for 2048 rows in
# halves and 396 whole, but 165 for 512 rows in halves and 123 whole.
MIN_HALVED_ROWS = 1024
# The same where passes are captured as graphs. Up to 256 rows, products need no dequantised weight, which halves share.
GRAPHED_HALVED_ROWS = 257
# Passes of up to the last of these are captured, for each of these numbers of rows; empty: none is. A pass of other
# numbers runs the next larger graph. Above, a host is fast enough, and copies, which cannot be captured, carry sums.
GRAPHED_ROWS: tuple[int, ...] = (64, 128, 256, 384, 512, 768, 1024)
# Tokens that parts of prompts attend to in one call, unless one has more. To gather so many and attend to them takes a
# card about as long as a slow host needs for the four launches that a further call costs.
GATHERED_KEYS = 8192
# cuBLAS computes so many rows at a time.
ROWS_PER_TILE = 128


def choose_cut(num_rows: int, world_size: int, min_rows: int | None = None) -> int | None:
    """Rows of the first half of a pass; None where it is left whole: on one rank, and below `min_rows`."""
    if world_size == 1 or num_rows < (MIN_HALVED_ROWS if min_rows is None else min_rows):
        return None
    num_tiles = math.ceil(num_rows / ROWS_PER_TILE)
    return math.ceil(num_tiles / 2) * ROWS_PER_TILE


def graphed_rows(prefill_chunk: int) -> tuple[int, ...]:
    """Of GRAPHED_ROWS those that passes of prompts need; with the chunk itself where it is among them."""
    if not GRAPHED_ROWS:
        return ()
    largest = min(prefill_chunk, GRAPHED_ROWS[-1])
    return (*(rows for rows in GRAPHED_ROWS if rows < largest), largest)


@dataclass(frozen=True)
class EngineLimits:
    """Tokens of a sequence, sequences at a time, and tokens of prompts in one pass: at all, and where answers wait for
    it (None: as many). `num_ahead`: slots in the cache that a sequence needs beyond its tokens', for trees.
    `captures_passes`: small passes of prompts are captured as graphs, where steps are."""

    max_context: int
    batch_size: int
    prefill_chunk: int
    prefill_chunk_while_decoding: int | None = None
    num_ahead: int = 0
    captures_passes: bool = True

    @property
    def pages_per_sequence(self) -> int:
        return self.pages_of(self.max_context)

    def pages_of(self, num_tokens: int) -> int:
        """Pages of a sequence that puts so many tokens into the cache."""
        return math.ceil((num_tokens + self.num_ahead) / PAGE_SIZE)

    def chunk(self, *, is_decoding: bool) -> int:
        """Tokens of prompts in the next pass, at most."""
        if not is_decoding or self.prefill_chunk_while_decoding is None:
            return self.prefill_chunk
        return min(self.prefill_chunk, self.prefill_chunk_while_decoding)

    @property
    def gathered_keys(self) -> int:
        """Tokens whose keys and values are gathered at a time."""
        return max(self.max_context, min(GATHERED_KEYS, self.batch_size * self.max_context))

    @property
    def num_pages(self) -> int:
        """Enough for every sequence at its longest, and page 0, where rows without a sequence write."""
        return 1 + self.batch_size * self.pages_per_sequence
