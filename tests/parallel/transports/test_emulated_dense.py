"""The dense all-reduce's own CUDA source on threads of a CPU: lines, tiles, tags and their renewal, waits.

What it cannot show is what a card and its link do: that accesses come whole, and in which order.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parallel.transports import dense
from parallel.transports.dense import EXACT, INT8, LineFormat
from parallel.transports.region_layout import PAGE_BYTES
from parallel.transports.rounded import round_to_int8
from tests.parallel.transports.emulated_ranks import compile_source, pointer, pointers
from tests.parallel.transports.sums import ordered_sum

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

FOLDER = Path(dense.__file__).parent
SLOT_TILES = 3
TILE_UNITS = EXACT.units * dense.LANES


class Ranks:
    """Calls of all ranks over one region."""

    def __init__(self, world_size: int, lines: LineFormat = EXACT) -> None:
        self.world_size = world_size
        types = () if torch.float32 in lines.dtypes else ("-DONLY_16_BITS",)
        self.library = compile_source(FOLDER / lines.source, f"-DWORLD={world_size}", *types)
        self.region = torch.zeros(PAGE_BYTES * (1 + 2 * world_size * SLOT_TILES), dtype=torch.uint8)
        # Epoch and arrivals; the peer that did not answer.
        self.states = torch.zeros(world_size, 2, dtype=torch.int64)

    def run(
        self, sources: list[Tensor], targets: list[Tensor], *, blocks: int, threads: int, only: int | None = None
    ) -> None:
        first, last = (0, self.world_size - 1) if only is None else (only, only)
        sizes = (sources[0].nbytes, SLOT_TILES, first, last, 100_000 if only is None else 200, blocks, threads)
        self.library.run(
            sources[0].element_size(), pointers(sources), pointers(targets), pointer(self.states), pointer(self.region),
            *sizes,
        )  # fmt: skip


def fresh(ranks: Ranks, units: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Messages, and poisoned targets with a unit to spare."""
    count = units * 16 // dtype.itemsize
    sources = [torch.randn(count).to(dtype) for _ in range(ranks.world_size)]
    return sources, [torch.full((count + 16 // dtype.itemsize,), float("nan"), dtype=dtype) for _ in sources]


def assert_sums(ranks: Ranks, call: int, sources: list[Tensor], targets: list[Tensor], expected: Tensor) -> None:
    """What a call leaves, by a grid of its own, and each third time in place; what follows it stays poisoned."""
    if call % 3 == 2:
        targets = sources
    ranks.run(sources, targets, blocks=1 + call % 2, threads=32 * (1 + call // 2 % 2))
    for target in targets:
        assert torch.equal(target[: len(expected)], expected), len(expected)
        assert target[len(expected) :].isnan().all(), len(expected)


@pytest.mark.parametrize("world_size", (2, 3))
def test_every_length_is_summed(world_size: int) -> None:
    ranks, tile = Ranks(world_size), TILE_UNITS
    for call, units in enumerate((1, 31, 33, tile - 1, tile, tile + 1, 2 * tile + 40, 3 * tile, 5)):
        sources, targets = fresh(ranks, units, (torch.bfloat16, torch.float32)[call % 2])
        assert_sums(ranks, call, sources, targets, ordered_sum(sources))
    assert ranks.states.tolist() == [[9 << 32, 0]] * world_size


@pytest.mark.parametrize("renewed", (True, False))
def test_only_renewal_keeps_old_lines_from_being_taken_for_new_ones(renewed: bool) -> None:
    """A long message in both slots, then short ones or none, then one with the first one's tag and without its peer."""
    ranks = Ranks(2)
    full = SLOT_TILES * TILE_UNITS
    for units in (full, full, *[1] * (2 * SLOT_TILES * EXACT.lines * renewed)):
        ranks.run(*fresh(ranks, units, torch.float32), blocks=1, threads=32)
    ranks.states[:, 0] = 2 * dense.NUM_TAGS << 32
    sources, targets = fresh(ranks, full, torch.float32)
    ranks.run(sources, targets, blocks=1, threads=64, only=1)
    # It gave up for want of rank 0, or else it found what it must not take.
    assert ranks.states[1, 1].item() == (1 if renewed else 0)
    assert bool(targets[1].isnan().all()) is renewed


@pytest.mark.parametrize("world_size", (2, 3))
def test_rounded_numbers_are_summed_as_plain_torch_does(world_size: int) -> None:
    ranks, tile = Ranks(world_size, INT8), INT8.units * dense.LANES
    for call, units in enumerate((1, 5, 33, tile - 1, tile + 1, 2 * tile + 40, 3 * tile)):
        sources, targets = fresh(ranks, units, torch.bfloat16)
        # Groups of all sizes, also of zeros alone, and too small to have a scale.
        for source in sources:
            source *= torch.logspace(-40, 30, len(source)).bfloat16()
            source[len(source) // 3 : len(source) // 2] = 0
        assert_sums(ranks, call, sources, targets, sum_rounded(sources))


def sum_rounded(sources: list[Tensor]) -> Tensor:
    """In float32, in rank order, rounded once."""
    total = torch.zeros(len(sources[0]))
    for source in sources:
        total += round_to_int8(source)
    return total.bfloat16()


@pytest.mark.parametrize("special", (float("inf"), float("-inf"), float("nan")))
def test_what_is_not_finite_makes_nan_of_its_group_alone(special: float) -> None:
    ranks = Ranks(2, INT8)
    sources, targets = fresh(ranks, 2 * dense.LANES * 3, torch.bfloat16)
    sources[1][5] = special
    expected = sum_rounded(sources)
    ranks.run(sources, targets, blocks=1, threads=32)
    assert expected.isnan().sum() == 12
    for target in targets:
        torch.testing.assert_close(target[: len(expected)], expected, rtol=0, atol=0, equal_nan=True)
