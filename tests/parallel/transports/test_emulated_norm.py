"""The CUDA source of all-reduce and norm in one on threads of a CPU: lines, rows, blocks that meet, waits.

What it cannot show is what a card and its link do: that accesses come whole, and in which order.
"""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest
import torch

from parallel.transports import host_memory_norm
from parallel.transports.host_memory_norm import MAX_WARPS, NormLayout, row_threads
from parallel.transports.region_layout import PAGE_BYTES
from tests.parallel.transports.emulated_ranks import compile_source, pointer, pointers
from tests.parallel.transports.sums import ordered_sum

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

SOURCE = Path(host_memory_norm.__file__).parent / "host_memory_norm.cu"
EPS = 1e-5
MAX_ROWS = 6


class Ranks:
    """Calls of all ranks over one region."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.library = compile_source(SOURCE, f"-DWORLD={world_size}", "-DNORM")
        self.layout = NormLayout(world_size, 8 * PAGE_BYTES)
        self.region = torch.zeros(self.layout.num_bytes, dtype=torch.uint8)
        self.states = torch.zeros(world_size, 2, dtype=torch.int64)
        self.sums = [torch.zeros(MAX_ROWS * MAX_WARPS, dtype=torch.int64) for _ in range(world_size)]

    def run(self, case: Case, *, row_blocks: int, only: int | None = None) -> None:
        first, last = (0, self.world_size - 1) if only is None else (only, only)
        rows, hidden_size = case.updates[0].shape
        assert self.layout.takes(rows, hidden_size) and rows <= MAX_ROWS
        self.library.run(
            *(pointers(case.updates), pointers(case.residuals), pointer(case.weight), pointers(case.outputs)),
            *(pointer(self.states), pointers(self.sums), pointer(self.region)),
            *(rows, hidden_size // 8, self.layout.slot_lines, row_blocks, ctypes.c_float(EPS), first, last),
            *(100_000 if only is None else 200, row_threads(hidden_size) // row_blocks),
        )


class Case:
    """Fresh inputs of each rank, whose residuals differ so that none can stand for another's; poisoned outputs."""

    def __init__(self, world_size: int, rows: int, hidden_size: int) -> None:
        draw = lambda: torch.randn(rows, hidden_size).bfloat16()  # noqa: E731
        self.updates, self.before = [[draw() for _ in range(world_size)] for _ in range(2)]
        self.weight = torch.randn(hidden_size).bfloat16()
        # With a row to spare, which stays.
        self.residuals = [torch.cat([each, torch.full_like(each[:1], 7)]) for each in self.before]
        self.outputs = [torch.full_like(each, float("nan")) for each in self.residuals]

    def check(self) -> None:
        update = ordered_sum(self.updates)
        for before, residual, output in zip(self.before, self.residuals, self.outputs, strict=True):
            after = (before.float() + update.float()).bfloat16()
            assert torch.equal(residual[:-1], after)
            assert (residual[-1] == 7).all() and output[-1].isnan().all()
            exact = after.double()
            normed = exact / (exact.square().mean(dim=1, keepdim=True) + EPS).sqrt() * self.weight.double()
            # Two roundings to bfloat16.
            torch.testing.assert_close(output[:-1].double(), normed, rtol=2**-7, atol=0)


@pytest.mark.parametrize("world_size", (2, 3))
def test_rows_of_every_length_are_added_and_normed(world_size: int) -> None:
    """Whole warps and parts of them, rows shorter than their threads, with blocks that meet and without."""
    ranks = Ranks(world_size)
    cases = [(1, 1024, 1), (1, 1024, 2), (2, 8, 1), (3, 264, 1), (1, 1032, 3), (2, 520, 2), (5, 248, 1), (6, 520, 2)]
    for rows, hidden_size, row_blocks in cases:
        case = Case(world_size, rows, hidden_size)
        ranks.run(case, row_blocks=row_blocks)
        case.check()
    assert ranks.states.tolist() == [[len(cases) << 32, 0]] * world_size


def test_blocks_and_warps_do_not_change_a_bit() -> None:
    ranks, found = Ranks(2), []
    torch.manual_seed(seed := int(torch.randint(2**31, ())))
    for row_blocks in (1, 2, 4):
        torch.manual_seed(seed)
        case = Case(2, 1, 2048)
        ranks.run(case, row_blocks=row_blocks)
        found.append(torch.stack(case.outputs).view(torch.int16))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_epochs_wrap_and_skip_zero() -> None:
    ranks = Ranks(2)
    ranks.states[:, 0] = -2 << 32
    for _ in range(3):
        case = Case(2, 1, 512)
        ranks.run(case, row_blocks=1)
        case.check()
    assert ranks.states[:, 0].tolist() == [3 << 32] * 2


@pytest.mark.parametrize(("rows", "row_blocks"), [(1, 1), (1, 2), (5, 2)])
def test_a_peer_that_stays_away_is_named_and_nothing_is_written(rows: int, row_blocks: int) -> None:
    ranks = Ranks(2)
    case = Case(2, rows, 1024)
    ranks.run(case, row_blocks=row_blocks, only=1)
    assert ranks.states[1, 1].item() == 1
    assert int(ranks.region[64:68].view(torch.int32)) == 1
    assert case.outputs[1].isnan().all()
    assert torch.equal(case.residuals[1][:-1], case.before[1])
