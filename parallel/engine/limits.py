"""What an engine has room for; without torch, for plans."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice, pairwise

from parallel.kernels.limits import PAGE_SIZE

# Rows of each section of a pass, one after the other; those that attend at once are together.
Sections = tuple[tuple[int, ...], ...]
# Up to so many rows: how many sections attend at once, and then.
Wanted = tuple[tuple[int, tuple[int, ...]], ...]
# Rows whose tokens are drawn at a time, over the whole vocabulary in float32.
SAMPLED_ROWS = 64
# Of a step that is captured as graphs; one of other numbers of rows runs the next larger graph, its last rows empty.
GRAPH_SIZES = (1, 2, 4, 8, 16, 32)
# Where there are several ranks, a pass of up to so many rows goes in sections (prefill/overlap.py), of which so many
# attend at once, and then; one of more rows in MOST_SECTIONS. More sections hide more of the sums, fewer take less time
# to multiply: on two H200 a 70B in 4 bits took, as graphs, 97.7 ms for 512 rows in one, 75.9, 96.4 and 116 in 2, 3 and
# 4, and 187, 150, 153 and 153 for 1024; 2048, launched, 270 in 3 and 362 in 4 with sums by copies, for which a host
# must be fast. Sections that attend at once spare the host a third of what each costs it, and the sums at either end of
# a layer are short: 2048, 80 layers launched, took 273.7 in 2, 267.2 in 3, 266.0 in 1 + 2 and 261.9 in 2 + 2; 1024,
# launched, 148, 155 in 1 + 2 and 182 in 2 + 2, which is more than that host can queue (as graphs 155, 151 and 147).
# By the rates of these cards, not measured, 4096 take 518 in 2 + 2 and 548 in 2; by those of an RTX 4090, not measured,
# 303, 308 and 318 for 512 in 2, 3 and 4 (409 in one), 586, 584 and 595 for 1024 (806), 1151, 1139 and 1149 for 2048
# (1599). results/LOG.md has more.
SECTIONS: Wanted = ((255, (1,)), (1024, (1, 1)), (4096, (2, 2)))
MOST_SECTIONS = (1, 1, 1, 1)
# Of one of several sections that attend at once, about.
JOINED_ROWS = 512
# Where weights are dequantised, passes from so many rows on go in two halves, which share them
# (prefill/halves.py). A smaller one is over before the host has queued twice as many kernels: Llama-70B in 4 bits on
# two H200 took 315 ms for 2048 rows in halves and 396 whole, but 165 for 512 rows in halves and 123 whole.
MIN_HALVED_ROWS = 1024
# The same where passes are captured as graphs.
GRAPHED_HALVED_ROWS = 257
# Passes of up to the last of these are captured, for each of these numbers of rows; empty: none is. A pass of other
# numbers runs the next larger graph. Above, a host is fast enough, and copies, which are not captured, carry sums.
GRAPHED_ROWS: tuple[int, ...] = (64, 128, 256, 384, 512, 768, 1024)
# Passes that are captured at a time, of these sizes and of either kind (prefill/graphs.py): each takes memory, and most
# workloads have one to three.
CAPTURED_PASSES = 3
# Tokens that parts of prompts attend to in one call, unless one has more. To gather so many and attend to them takes a
# card about as long as a slow host needs for the four launches that a further call costs.
GATHERED_KEYS = 8192
# cuBLAS and wide.cu compute so many rows at a time, wide_wgmma.cu twice as many.
ROWS_PER_TILE = 128


def choose_sections(
    num_rows: int,
    hides_sums: bool,
    dequantizes: Callable[[int], bool],
    min_halved: int | None = None,
    *,
    joins: bool = True,
) -> Sections:
    """Those of a pass; one of all rows where it is left whole.

    Args:
        hides_sums: whether there are sums, and such that are worth hiding.
        dequantizes: whether weights are dequantised for a product with so many rows.
        min_halved: in place of MIN_HALVED_ROWS.
        joins: whether several may attend at once. Where sums take multiprocessors, not copy engines, many short ones
            cost more than they hide.
    """
    wanted = next((sections for most, sections in SECTIONS if num_rows <= most), MOST_SECTIONS)
    if not joins:
        wanted = (1,) * len(wanted)
    if not hides_sums or wanted == (1,):
        return ((num_rows,),)
    # Of the whole pass: what is dequantised is so once for all of its sections.
    if not dequantizes(num_rows):
        return join(cut_by_tiles(num_rows, sum(wanted)), wanted)
    is_halved = num_rows >= (MIN_HALVED_ROWS if min_halved is None else min_halved)
    return join(cut_evenly(num_rows, 2 if is_halved else 1), (1, 1))


def most_at_once(num_rows: int, hides_sums: bool, dequantizes: Callable[[int], bool]) -> int:
    """Most rows that attend at once in a pass of up to so many: those of a smaller pass, which goes in fewer sections,
    may be more. Arguments as of choose_sections."""
    sizes = (num_rows, *(most for most, _ in SECTIONS if most < num_rows))
    return max(sum(each) for size in sizes for each in choose_sections(size, hides_sums, dequantizes))


def join(sizes: Iterable[int], counts: Iterable[int]) -> Sections:
    """So many neighbours together, as far as there are any."""
    left = iter(sizes)
    return tuple(filter(None, (tuple(islice(left, count)) for count in counts)))


def cut_by_tiles(num_rows: int, num_sections: int) -> tuple[int, ...]:
    """As `cut_evenly`, with tiles of twice as many rows where less of these is left empty so: 2048 as 768, 768, 512.

    Not with so few rows in the last section that hardly anything of a sum goes on beside them.
    """
    large = 2 * ROWS_PER_TILE
    even, found = cut_evenly(num_rows, num_sections), cut_evenly(num_rows, num_sections, large)
    tiles, fewer = (sum(math.ceil(rows / large) for rows in each) for each in (even, found))
    return found if len(found) == len(even) and fewer < tiles and found[-1] >= ROWS_PER_TILE else even


def cut_evenly(num_rows: int, num_sections: int, rows_per_tile: int | None = None) -> tuple[int, ...]:
    """Whole tiles, but for the last rows; fewer sections where there are too few tiles."""
    size = rows_per_tile or ROWS_PER_TILE
    num_tiles = math.ceil(num_rows / size)
    count = min(num_sections, num_tiles)
    ends = [min(math.ceil(num_tiles * place / count) * size, num_rows) for place in range(1, count + 1)]
    return tuple(end - start for start, end in pairwise((0, *ends)))


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
    long passes of several ranks go in sections, see choose_sections."""

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
