"""Products of many rows with the packed weights of w4a16 and w8a16 (wide.cu): from 9 or 17 rows on.

A weight is decoded once for up to 64 tokens, and the units of all output tiles are dealt evenly to the multiprocessors.
On sm_90 wide_wgmma.cu takes the place of wide.cu for more than 48 rows, and decodes once for up to 128 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from parallel.footprint import WIDE_WORKSPACE_BYTES
from parallel.kernels.launch import Kernel, load_kernel, load_problem
from parallel.kernels.tensor_map import MAP_BYTES, TENSOR_ALIGNMENT, describe_boxes
from parallel.kernels.tiles import FOLDER, OUTPUTS_PER_TILE, ROWS_PER_TILE, WARP

# 128 inputs of a token.
TOKEN_BYTES = 256
COPIED_BYTES = 16
# Of wide_wgmma.cu: stages begin at multiples of it, and each has two barriers.
WGMMA_STAGE_BYTES = 1024
BARRIER_BYTES = 16
# Inputs of a box of X; what boxes of weights and of scales are counted in.
BOX_INPUTS = 64
PIECE_BYTES = 8
WGMMA_CAPABILITY = (9, 0)
# What a card keeps for itself of a block's shared memory.
RESERVED_SHARED_BYTES = 1024
MAX_TILES = 16384
# Where tiles cut into equal parts keep so many of the blocks busy that fit, no block works on two of them.
ALIGNED_SHARE = 0.9
# The weight, its scales, X, Y, the parts; row tiles, units, rows; then perhaps a codebook. For wide_wgmma.cu, boxes of
# the first three, and the scales.
PARAMETERS = "PPPPPiii"
WGMMA_PARAMETERS = f"{MAP_BYTES}s{MAP_BYTES}s{MAP_BYTES}sPPPiii"


@dataclass(frozen=True)
class Card:
    """Multiprocessors, and the shared memory of each."""

    multiprocessors: int
    shared_bytes: int


@dataclass(frozen=True)
class Layout:
    """How a packed weight is read: what the kernels are told of it, and bytes of 128 inputs of 16 outputs.

    `scale_bytes`: of their scales, 0 where all inputs share one. `weights_side_by_side`: 2 for gates and ups.
    """

    options: tuple[str, ...]
    weight_bytes: int
    scale_bytes: int
    has_codebook: bool = False
    weights_side_by_side: int = 1

    @property
    def unit_bytes(self) -> int:
        """In shared memory: copies to it are of 16 bytes."""
        return self.weight_bytes + -(-self.scale_bytes // COPIED_BYTES) * COPIED_BYTES


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
# The same on sm_90; up to 48 rows warp groups gain nothing.
WGMMA_LAUNCHES: dict[int, Launch] = {
    **{rows: LAUNCHES[rows] for rows in (16, 24, 32, 48)},
    64: Launch(8, 2, 8, 1, 4, 1, wgmma=True),
    128: Launch(16, 2, 8, 1, 4, 1, wgmma=True),
}


def choose_launch(num_rows: int, launches: dict[int, Launch] = LAUNCHES) -> Launch:
    return next((launch for most, launch in launches.items() if num_rows <= most), launches[max(launches)])


def launches_for(layout: Layout, units: int, device_index: int) -> dict[int, Launch]:
    """For weights of `units` times 128 inputs: WGMMA_LAUNCHES where wide_wgmma.cu can be had and can read them."""
    return LAUNCHES if wgmma_problem(layout, units, device_index) else WGMMA_LAUNCHES


@cache
def wgmma_problem(layout: Layout, units: int, device_index: int) -> str | None:
    """Why wide_wgmma.cu cannot be had on this card, or cannot read such weights, in a few words; None: it can."""
    if torch.cuda.get_device_capability(device_index) != WGMMA_CAPABILITY:
        return "not a card of sm_90"
    if units * layout.scale_bytes % TENSOR_ALIGNMENT:
        return f"{units * layout.scale_bytes} bytes of scales in a row"
    return load_problem(compile_kernel, WGMMA_LAUNCHES[max(WGMMA_LAUNCHES)], layout, device_index)


def multiply(
    rows: Tensor, packed: Tensor, scales: Tensor, codebook: Tensor | None, output: Tensor, layout: Layout
) -> None:
    """[m, in] bf16 into `output` [m, out] bf16, for any m."""
    launch = choose_launch(len(rows), launches_for(layout, packed.shape[1], packed.device.index))
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
    card = spared_card(describe_card(packed.device.index))
    tiles, units = packed.shape[:2]
    places = count_places(launch, tiles, len(rows))
    assert places <= MAX_TILES, f"{places} tiles of Y"
    blocks = count_blocks(launch, layout.unit_bytes, places, units, card)
    if workspace is None:
        workspace = rows.new_empty(workspace_floats(launch, places, blocks), dtype=torch.float32)
    operands: list[Tensor | bytes] = [packed, scales, rows]
    if launch.wgmma:
        operands = [*describe_operands(launch, rows, packed, scales, layout), scales]
    arguments = [*operands, output, workspace, tiles, units, len(rows)]
    compile_kernel(launch, layout, packed.device.index)(
        (blocks, 1, 1), launch.threads, *arguments, *([] if codebook is None else [codebook])
    )


def describe_operands(launch: Launch, rows: Tensor, packed: Tensor, scales: Tensor, layout: Layout) -> list[bytes]:
    """Boxes of the weight, its scales and X, for wide_wgmma.cu."""
    tiles = launch.tiles // layout.weights_side_by_side
    weights = describe_boxes(packed, (tiles, layout.weight_bytes // PIECE_BYTES), PIECE_BYTES)
    copied = layout.unit_bytes - layout.weight_bytes
    scale_boxes = describe_boxes(scales, (tiles, copied // PIECE_BYTES), PIECE_BYTES) if copied else weights
    return [weights, scale_boxes, describe_boxes(rows, (launch.tokens, BOX_INPUTS), rows.element_size(), swapped=True)]


# How many multiprocessors products leave to what goes on beside them.
SPARED: ContextVar[int] = ContextVar("SPARED", default=0)


@contextmanager
def sparing(multiprocessors: int) -> Iterator[None]:
    """Products that are started meanwhile leave so many multiprocessors free.

    Their blocks fill a multiprocessor, and get shares of one size: those that wait for a place take twice the time.
    """
    token = SPARED.set(multiprocessors)
    try:
        yield
    finally:
        SPARED.reset(token)


def spared_card(card: Card) -> Card:
    """What is left of it."""
    return replace(card, multiprocessors=max(1, card.multiprocessors - SPARED.get()))


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
