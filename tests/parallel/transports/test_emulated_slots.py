"""The CUDA source that carries small messages, on threads of a CPU: lines, slots, ends of messages, epochs and waits.

What it cannot show is what a card and its link do: that accesses of 8 bytes come whole.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parallel.transports import host_memory
from parallel.transports.host_memory import SlotLayout
from parallel.transports.region_layout import ERROR_STRIDE
from parallel.units import KIB
from tests.parallel.transports.emulated_ranks import compile_source, pointer, pointers
from tests.parallel.transports.sums import ordered_sum

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

SOURCE = Path(host_memory.__file__).parent / "host_memory.cu"
# Grids of a block and of two, which have a line for each thread, or several.
GRIDS = ((1, 32), (2, 32), (1, 64))
SPARE = 16


class Ranks:
    """Calls of all ranks over one region."""

    def __init__(self, world_size: int) -> None:
        self.world_size, self.layout = world_size, SlotLayout(world_size, 2 * KIB)
        self.library = compile_source(SOURCE, f"-DWORLD={world_size}", "-DBYTES")
        self.region = torch.zeros(self.layout.num_bytes, dtype=torch.uint8)
        # Epoch and arrivals; the peer that did not answer.
        self.states = torch.zeros(world_size, 2, dtype=torch.int64)
        self.num_calls = 0

    def run(self, sources: list[Tensor], targets: list[Tensor], *, only: int | None = None) -> None:
        first, last = (0, self.world_size - 1) if only is None else (only, only)
        sizes = (sources[0].nbytes, self.layout.slot_lines, first, last, 100_000 if only is None else 200)
        self.library.run(
            sources[0].element_size(), pointers(sources), pointers(targets), pointer(self.states), pointer(self.region),
            *sizes, *GRIDS[self.num_calls % len(GRIDS)],
        )  # fmt: skip
        self.num_calls += 1


def poisoned(ranks: Ranks, count: int, dtype: torch.dtype) -> list[Tensor]:
    fill = 165 if dtype == torch.uint8 else float("nan")
    return [torch.full((count + SPARE,), fill, dtype=dtype) for _ in range(ranks.world_size)]


@pytest.mark.parametrize("world_size", (2, 3, 4))
def test_every_length_is_summed(world_size: int) -> None:
    """Each by another grid, each third time in place; what follows a message stays as it was."""
    ranks = Ranks(world_size)
    counts = (1, 2, 3, 5, 63, 64, 65, 300, 512, 7)
    for call, count in enumerate(counts):
        dtype = (torch.bfloat16, torch.float32)[call % 2]
        sources = [torch.randn(count).to(dtype) for _ in range(world_size)]
        targets, expected = poisoned(ranks, count, dtype), ordered_sum(sources)
        if call % 3 == 2:
            for target, source in zip(targets, sources, strict=True):
                target[:count] = source
        ranks.run([target[:count] for target in targets] if call % 3 == 2 else sources, targets)
        for target in targets:
            assert torch.equal(target[:count], expected), count
            assert target[count:].isnan().all(), count
    assert ranks.states.tolist() == [[len(counts) << 32, 0]] * world_size


@pytest.mark.parametrize("world_size", (2, 3))
def test_bytes_are_gathered_in_rank_order(world_size: int) -> None:
    ranks = Ranks(world_size)
    for num_bytes in (1, 7, 8, 9, 100, 2 * KIB):
        sources = [torch.randint(0, 256, (num_bytes,), dtype=torch.uint8) for _ in range(world_size)]
        targets = poisoned(ranks, world_size * num_bytes, torch.uint8)
        ranks.run(sources, targets)
        for target in targets:
            assert torch.equal(target[:-SPARE], torch.cat(sources)), num_bytes
            assert (target[-SPARE:] == 165).all(), num_bytes


def test_no_epoch_is_that_of_lines_never_written() -> None:
    """Sums are right across the end of the count, where zero is left out."""
    ranks = Ranks(2)
    ranks.states[:, 0] = -3 << 32
    for _ in range(5):
        sources = [torch.randn(400) for _ in range(2)]
        targets = poisoned(ranks, 400, torch.float32)
        ranks.run(sources, targets)
        assert all(torch.equal(target[:400], ordered_sum(sources)) for target in targets)
    # 0xfffffffe, 0xffffffff, 2, 3 and 4.
    assert ranks.states[:, 0].tolist() == [4 << 32] * 2


def test_who_is_a_call_ahead_overwrites_nothing() -> None:
    """Rank 1 has written two calls, of which rank 0 has read neither: it finds both."""
    ranks = Ranks(2)
    calls = [[torch.randn(100) for _ in range(2)] for _ in range(2)]
    for sources in calls:
        ranks.run(sources, poisoned(ranks, 100, torch.float32), only=1)
        # It has waited in vain, and is to go on.
        ranks.states[1, 1] = 0
    for sources in calls:
        targets = poisoned(ranks, 100, torch.float32)
        ranks.run(sources, targets, only=0)
        assert torch.equal(targets[0][:100], ordered_sum(sources))


def test_a_rank_that_does_not_answer_is_told_and_no_call_waits_again() -> None:
    """Of three, rank 0 alone is there; what older calls left in the slots is not taken for an answer."""
    ranks = Ranks(3)
    for _ in range(2):
        ranks.run([torch.randn(100) for _ in range(3)], poisoned(ranks, 100, torch.float32))
    sources = [torch.randn(100) for _ in range(3)]
    for _ in range(2):
        targets = poisoned(ranks, 100, torch.float32)
        ranks.run(sources, targets, only=0)
        assert targets[0].isnan().all()
    # The peer, plus one, beside its epoch and in its error word.
    assert ranks.states[:, 1].tolist() == [2, 0, 0]
    words = ranks.region.view(torch.int32)[:: ERROR_STRIDE // 4]
    assert words[:3].tolist() == [2, 0, 0]
