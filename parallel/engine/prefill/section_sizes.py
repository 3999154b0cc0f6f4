"""How a pass of prompts is cut, so that the sums of one section go on beside the products of others; without torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import islice, pairwise

# Rows of each section of a pass, one after the other; those that attend at once are together.
Sections = tuple[tuple[int, ...], ...]
# Up to so many rows: how many sections attend at once, and then.
Wanted = tuple[tuple[int, tuple[int, ...]], ...]
# Where there are several ranks, a pass of up to so many rows goes in sections (overlap.py), of which so many attend at
# once, and then; one of more rows in MOST_SECTIONS. More sections hide more of the sums, fewer take less time to
# multiply. Those that attend at once spare the host a third of what each costs it, and the sums at either end of a
# layer are short. A 70B in 4 bits on two H200 took, in ms (results/LOG.md has all), 75.9 for 512 rows in 2, 97.7 whole
# and 96.4 in 3; 150 for 1024 in 2, 153 in 3; 261.9 for 2048 in 2 + 2, 273.7 in 2. 1024 in 2 + 2 are more than that host
# can queue: launched, 182 for 148. By the rates of these cards, not measured, 4096 take 518 in 2 + 2 and 548 in 2; by
# those of an RTX 4090, not measured, 512 to 2048 in 2, 3 and 4 are within 5 % of one another and take 1.35 to 1.4 times
# as long whole.
SECTIONS: Wanted = ((255, (1,)), (1024, (1, 1)), (4096, (2, 2)))
MOST_SECTIONS = (1, 1, 1, 1)
# Of one of several sections that attend at once, about.
JOINED_ROWS = 512
# Where weights are dequantised, passes from so many rows on go in two halves, which share them
# (halves.py). A smaller one is over before the host has queued twice as many kernels: Llama-70B in 4 bits on
# two H200 took 315 ms for 2048 rows in halves and 396 whole, but 165 for 512 rows in halves and 123 whole.
MIN_HALVED_ROWS = 1024
# The same where passes are captured as graphs.
GRAPHED_HALVED_ROWS = 257
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
