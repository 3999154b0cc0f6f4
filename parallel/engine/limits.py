"""What an engine has room for; without torch, for plans."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from parallel.kernels.limits import PAGE_SIZE

# Rows whose tokens are drawn at a time, over the whole vocabulary in float32.
SAMPLED_ROWS = 64
# Of a step that is captured as graphs; one of other numbers of rows runs the next larger graph, its last rows empty.
GRAPH_SIZES = (1, 2, 4, 8, 16, 32)
# Passes of up to the last of these are captured, for each of these numbers of rows; empty: none is. A pass of other
# numbers runs the next larger graph. Above, a host is fast enough, and copies, which are not captured, carry sums.
GRAPHED_ROWS: tuple[int, ...] = (64, 128, 256, 384, 512, 768, 1024)
# Passes that are captured at a time, of these sizes and of either kind (prefill/graphs.py): each takes memory, and most
# workloads have one to three.
CAPTURED_PASSES = 3
# Tokens that parts of prompts attend to in one call, unless one has more. To gather so many and attend to them takes a
# card about as long as a slow host needs for the four launches that a further call costs.
GATHERED_KEYS = 8192


def graph_sizes(max_rows: int) -> tuple[int, ...]:
    """Of GRAPH_SIZES those up to `max_rows`, and `max_rows` itself."""
    return (*(size for size in GRAPH_SIZES if size < max_rows), max_rows)


def size_for(sizes: Iterable[int], num_rows: int) -> int:
    """The smallest graph of these sizes that takes so many rows."""
    return min(size for size in sizes if size >= num_rows)


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
    `captured_passes`: of prompts, captured as graphs at a time, where steps are; 0: none ever is. `hides_sums`: whether
    long passes of several ranks go in sections, see prefill/section_sizes.py."""

    max_context: int
    batch_size: int
    prefill_chunk: int
    prefill_chunk_while_decoding: int | None = None
    num_ahead: int = 0
    captured_passes: int = CAPTURED_PASSES
    hides_sums: bool = True

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
