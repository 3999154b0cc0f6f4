"""The dense all-reduce's own CUDA source on threads of a CPU: lines, tiles, tags and their renewal, waits.

What it cannot show is what a card and its link do: that accesses come whole, and in which order.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parallel.kernels.launch import read_source
from parallel.transports import dense
from parallel.transports.channel import PAGE_BYTES
from tools.ranks_on_one_card import ordered_sum

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

SOURCE = Path(dense.__file__).parent / "host_memory_dense.cu"
HEADER = Path(__file__).parent / "emulated_ranks.h"
# A part of each instruction, and what does the same here.
INSTRUCTIONS = {
    "globaltimer": "time = nanoseconds()",
    "cvt.rn.bf16x2": "result = rounded(high) << 16 | rounded(low)",
    "cvt.rn.f16x2": "__builtin_trap()",
    "cvt.f32.f16": "__builtin_trap()",
    "st.relaxed.sys.global.u32": "*(volatile u32*)error = peer + 1",
    "st.relaxed.sys.global.b128": "store_line(line, v)",
    "ld.relaxed.sys.global.b128": "load_line(line, low, high)",
}
SLOT_TILES = 3
TILE_UNITS = dense.UNITS * dense.LANES


class Ranks:
    """Calls of all ranks over one region."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.library = compile_source(f"-DWORLD={world_size}")
        self.region = torch.zeros(PAGE_BYTES * (1 + 2 * world_size * SLOT_TILES), dtype=torch.uint8)
        # Epoch and arrivals; the peer that did not answer.
        self.states = torch.zeros(world_size, 2, dtype=torch.int64)

    def run(
        self, sources: list[Tensor], targets: list[Tensor], *, blocks: int, threads: int, only: int | None = None
    ) -> None:
        first, last = (0, self.world_size - 1) if only is None else (only, only)
        sizes = (sources[0].nbytes, SLOT_TILES, first, last, 20_000 if only is None else 200, blocks, threads)
        self.library.run(
            sources[0].element_size(), pointers(sources), pointers(targets), pointer(self.states), pointer(self.region),
            *sizes,
        )  # fmt: skip


@cache
def compile_source(*options: str) -> ctypes.CDLL:
    text = read_source(SOURCE)
    for part, instead in INSTRUCTIONS.items():
        text, count = re.subn(rf'asm( volatile)?\((?:(?!;\n|asm)[\s\S])*?{re.escape(part)}[\s\S]*?\);\n',
                              f"{instead};\n", text)  # fmt: skip
        assert count, part
    # Only the first thread of a block asks for the epoch; a static variable is every thread's own here.
    text = text.replace("epoch = shared_epoch;", "epoch = (u32)block->first(threadIdx.x, shared_epoch);")
    text = text.replace("return shared_failed == 0;", "return block->first(threadIdx.x, shared_failed) == 0;")
    text = text.replace("__syncthreads();", "block->meet();")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.h").write_text(text)
        target = f"{folder}/kernel.so"
        command = ["g++", "-std=c++20", "-w", "-fPIC", "-shared", "-pthread", "-x", "c++", str(HEADER), "-o", target]
        subprocess.run([*command, f'-DKERNEL_FILE="{folder}/kernel.h"', *options], check=True)
        return ctypes.CDLL(target)


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def pointers(tensors: list[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(each.data_ptr() for each in tensors))


def fresh(ranks: Ranks, units: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Messages, and poisoned targets with a unit to spare."""
    count = units * 16 // dtype.itemsize
    sources = [torch.randn(count).to(dtype) for _ in range(ranks.world_size)]
    return sources, [torch.full((count + 16 // dtype.itemsize,), float("nan"), dtype=dtype) for _ in sources]


@pytest.mark.parametrize("world_size", (2, 3))
def test_every_length_is_summed(world_size: int) -> None:
    ranks, tile = Ranks(world_size), TILE_UNITS
    for call, units in enumerate((1, 31, 33, tile - 1, tile, tile + 1, 2 * tile + 40, 3 * tile, 5)):
        sources, targets = fresh(ranks, units, (torch.bfloat16, torch.float32)[call % 2])
        expected = ordered_sum(sources)
        if call % 3 == 2:
            targets = sources
        ranks.run(sources, targets, blocks=1 + call % 2, threads=32 * (1 + call // 2 % 2))
        for target in targets:
            assert torch.equal(target[: len(expected)], expected), units
            assert target[len(expected) :].isnan().all(), units
    assert ranks.states.tolist() == [[9 << 32, 0]] * world_size


@pytest.mark.parametrize("renewed", (True, False))
def test_only_renewal_keeps_old_lines_from_being_taken_for_new_ones(renewed: bool) -> None:
    """A long message in both slots, then short ones or none, then one with the first one's tag and without its peer."""
    ranks = Ranks(2)
    full = SLOT_TILES * TILE_UNITS
    for units in (full, full, *[1] * (2 * SLOT_TILES * dense.LINES * renewed)):
        ranks.run(*fresh(ranks, units, torch.float32), blocks=1, threads=32)
    ranks.states[:, 0] = 2 * dense.NUM_TAGS << 32
    sources, targets = fresh(ranks, full, torch.float32)
    ranks.run(sources, targets, blocks=1, threads=64, only=1)
    # It gave up for want of rank 0, or else it found what it must not take.
    assert ranks.states[1, 1].item() == (1 if renewed else 0)
    assert bool(targets[1].isnan().all()) is renewed
