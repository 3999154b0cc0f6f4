"""Products of many rows with the packed weights of w4a16 and w8a16 (wide.cu): from 17 rows on, without dequantising.

A weight is decoded once for up to 64 tokens, and the units of all output tiles are dealt evenly to the multiprocessors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from parallel.kernels.held import WIDE_WORKSPACE_BYTES
from parallel.kernels.launch import Kernel, load_kernel, load_problem
from parallel.kernels.tensor_map import MAP_BYTES, describe_boxes
from parallel.kernels.tiles import FOLDER, OUTPUTS_PER_TILE, ROWS_PER_TILE, WARP

# 128 inputs of a token.
TOKEN_BYTES = 256
# Of wide_wgmma.cu: stages begin at multiples of it, and each has two barriers.
WGMMA_STAGE_BYTES = 1024
BARRIER_BYTES = 16
# Inputs of a box of X; what boxes of weights and of scales are counted in.
BOX_INPUTS = 64
PIECE_BYTES = 8
# What a card keeps for itself of a block's shared memory.
RESERVED_SHARED_BYTES = 1024
MAX_TILES = 16384
# Where tiles cut into equal parts keep so many of the blocks busy that fit, no block works on two of them.
ALIGNED_SHARE = 0.9
# The weight, its scales, X, Y, the parts; row tiles, units, rows; then perhaps a codebook. For wide_wgmma.cu, boxes of the
# first three come first.
PARAMETERS = "PPPPPiii"
WGMMA_PARAMETERS = f"{MAP_BYTES}s{MAP_BYTES}s{MAP_BYTES}sPPPiii"


@dataclass(frozen=True)
class Card:
    """Multiprocessors, and the shared memory of each."""

    multiprocessors: int
    shared_bytes: int


@dataclass(frozen=True)
class Layout:
    """How a packed weight is read: what wide.cu is told of it, and the bytes of 128 inputs of 16 outputs."""

    options: tuple[str, ...]
    unit_bytes: int
    has_codebook: bool = False
    # 2 for gates and ups.
    weights_side_by_side: int = 1


@dataclass(frozen=True)
class Launch:
    """Tiles of 8 tokens and of 16 outputs that a warp takes, warps along both; stages and blocks at most.

    `wgmma`: by wide_wgmma.cu, for which `out_warps` is a multiple of 4 and `token_warps` is 1.
    """

    token_tiles: int
    row_tiles: int
    out_warps: int
    token_warps: int
    stages: int
    blocks: int
    wgmma: bool = False

    @property
    def tokens(self) -> int:
        return ROWS_PER_TILE * self.token_tiles * self.token_warps

    @property
    def tiles(self) -> int:
        """Times 16 outputs."""
        return self.row_tiles * self.out_warps

    @property
    def threads(self) -> int:
        return WARP * self.out_warps * self.token_warps

    @property
    def part_bytes(self) -> int:
        return self.tiles * OUTPUTS_PER_TILE * self.tokens * 4

    def stage_bytes(self, unit_bytes: int) -> int:
        size = self.tiles * unit_bytes + self.tokens * TOKEN_BYTES
        return -(-size // WGMMA_STAGE_BYTES) * WGMMA_STAGE_BYTES if self.wgmma else size

    @property
    def min_stages(self) -> int:
        """One is read, one is filled; by wide_wgmma.cu, products with another may still be under way."""
        return 2 + self.wgmma

    def shared_bytes(self, stages: int, unit_bytes: int) -> int:
        """Of a block: the ring, and its barriers."""
        return stages * (self.stage_bytes(unit_bytes) + BARRIER_BYTES * self.wgmma)

    def options(self, stages: int) -> tuple[str, ...]:
        values = {"NT": self.token_tiles, "RT": self.row_tiles, "OUT_WARPS": self.out_warps,
                  "TOKEN_WARPS": self.token_warps, "STAGES": stages, "BLOCKS": self.blocks}  # fmt: skip
        if self.wgmma:
            del values["TOKEN_WARPS"]
        return tuple(f"-D{name}={value}" for name, value in values.items())


# For up to so many rows; more are cut into tiles of the last. The fastest of those tried, over the shapes of Llama-70B
# at TP2 on an H200 (results/LOG.md).
LAUNCHES: dict[int, Launch] = {
    16: Launch(2, 2, 4, 1, 4, 4),
    24: Launch(3, 2, 4, 1, 4, 3),
    32: Launch(4, 2, 4, 1, 4, 3),
    48: Launch(6, 2, 4, 1, 4, 2),
    64: Launch(8, 2, 4, 1, 4, 2),
    96: Launch(6, 2, 2, 2, 4, 2),
    128: Launch(8, 2, 4, 2, 4, 1),
    192: Launch(6, 2, 2, 2, 4, 2),
    256: Launch(8, 2, 4, 2, 4, 1),
}
# The same on sm_90.
WGMMA_LAUNCHES: dict[int, Launch] = {
    32: Launch(4, 2, 4, 1, 4, 2, wgmma=True),
    64: Launch(8, 1, 8, 1, 4, 1, wgmma=True),
    128: Launch(16, 2, 8, 1, 4, 1, wgmma=True),
}


def choose_launch(num_rows: int) -> Launch:
    return next((launch for most, launch in LAUNCHES.items() if num_rows <= most), LAUNCHES[max(LAUNCHES)])


def multiply(
    rows: Tensor, packed: Tensor, scales: Tensor, codebook: Tensor | None, output: Tensor, layout: Layout
) -> None:
    """[m, in] bf16 into `output` [m, out] bf16, for any m."""
    launch = choose_launch(len(rows))
    step = most_rows(launch, len(packed))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        run_kernel(launch, rows[part], packed, scales, codebook, output[part], layout)


def most_rows(launch: Launch, tiles: int) -> int:
    """Of one launch, which counts arrivals at each tile of Y: 4096 where there are 65536 outputs."""
    return MAX_TILES // -(-tiles // launch.tiles) * launch.tokens


def run_kernel(
    launch: Launch,
    rows: Tensor,
    packed: Tensor,
    scales: Tensor,
    codebook: Tensor | None,
    output: Tensor,
    layout: Layout,
    workspace: Tensor | None = None,
) -> None:
    """The kernel, with parts of sums in `workspace` (float32) or in one of its own. Launches follow one another."""
    card = describe_card(packed.device.index)
    tiles, units = packed.shape[:2]
    places = count_places(launch, tiles, len(rows))
    assert places <= MAX_TILES, f"{places} tiles of Y"
    blocks = count_blocks(launch, layout.unit_bytes, places, units, card)
    if workspace is None:
        workspace = rows.new_empty(workspace_floats(launch, places, blocks), dtype=torch.float32)
    first = describe_operands(launch, rows, packed, scales, layout) if launch.wgmma else [packed, scales, rows]
    if launch.wgmma:
        first.append(scales)
    arguments: list[Tensor | int | bytes] = [*first, output, workspace, tiles, units, len(rows)]
    compile_kernel(launch, layout, packed.device.index)(
        (blocks, 1, 1), launch.threads, *arguments, *([] if codebook is None else [codebook])
    )


def describe_operands(launch: Launch, rows: Tensor, packed: Tensor, scales: Tensor, layout: Layout) -> list[Any]:
    """Boxes of the weight, its scales and X, for wide_wgmma.cu."""
    tiles = launch.tiles // layout.weights_side_by_side
    weight_bytes = packed[0, 0].nbytes
    weights = describe_boxes(packed, (tiles, weight_bytes // PIECE_BYTES), PIECE_BYTES)
    scale_bytes = layout.unit_bytes - weight_bytes
    scale_boxes = describe_boxes(scales, (tiles, scale_bytes // PIECE_BYTES), PIECE_BYTES) if scale_bytes else weights
    return [weights, scale_boxes, describe_boxes(rows, (launch.tokens, BOX_INPUTS), rows.element_size(), swapped=True)]


def count_places(launch: Launch, tiles: int, num_rows: int) -> int:
    """Tiles of Y."""
    return -(-tiles // launch.tiles) * -(-num_rows // launch.tokens)


def count_blocks(launch: Launch, unit_bytes: int, places: int, units: int, card: Card) -> int:
    """As many as work at a time, in which an equal number share each tile where that leaves few idle."""
    resident = fit(launch, unit_bytes, card)[1] * card.multiprocessors
    most = min(resident, places * units, WIDE_WORKSPACE_BYTES // (2 * launch.part_bytes))
    aligned = places * min(most // places, units)
    return aligned if aligned >= ALIGNED_SHARE * most else most


def workspace_floats(launch: Launch, places: int, blocks: int) -> int:
    """A block leaves at most two parts; none where each takes whole tiles."""
    return 0 if places % blocks == 0 else 2 * blocks * launch.part_bytes // 4


def fit(launch: Launch, unit_bytes: int, card: Card) -> tuple[int, int]:
    """Stages of a ring, and blocks that share a multiprocessor: as many as its shared memory holds."""
    for blocks in range(launch.blocks, 0, -1):
        each = card.shared_bytes // blocks - RESERVED_SHARED_BYTES
        stages = min(launch.stages, each // launch.shared_bytes(1, unit_bytes))
        if stages >= launch.min_stages:
            return stages, blocks
    raise AssertionError(f"{launch} does not fit into {card}")


@cache
def describe_card(device_index: int) -> Card:
    card = torch.cuda.get_device_properties(device_index)
    return Card(card.multi_processor_count, card.shared_memory_per_multiprocessor)


@cache
def compile_kernel(launch: Launch, layout: Layout, device_index: int) -> Kernel:
    stages, _ = fit(launch, layout.unit_bytes, describe_card(device_index))
    options = (*launch.options(stages), *layout.options)
    file, parameters = ("wide_wgmma.cu", WGMMA_PARAMETERS) if launch.wgmma else ("wide.cu", PARAMETERS)
    parameters += "P" * layout.has_codebook
    shared_bytes = launch.shared_bytes(stages, layout.unit_bytes)
    return load_kernel(FOLDER / file, "wide", options, parameters, device_index, shared_bytes)


def problem(layout: Layout, device_index: int) -> str | None:
    """Why the kernel cannot be compiled on this card; None: it can."""
    return load_problem(compile_kernel, LAUNCHES[max(LAUNCHES)], layout, device_index)
