"""Products of many rows with the packed weights of w4a16 and w8a16 (wide.cu): from 9 or 17 rows on.

A weight is decoded once for up to 64 tokens, and the units of all output tiles are dealt evenly to the multiprocessors.
On sm_90 warp_groups.py takes the place of wide.cu for more than 48 rows, and decodes once for up to 256 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from parallel.footprint import WIDE_WORKSPACE_BYTES
from parallel.kernels import warp_groups
from parallel.kernels.launch import Kernel, load_kernel, load_problem
from parallel.kernels.multiprocessors import RESERVED_SHARED_BYTES, Card, count_sharing, describe_card, spared_card
from parallel.kernels.packed_layout import Layout
from parallel.kernels.tiles import FOLDER, OUTPUTS_PER_TILE, ROWS_PER_TILE, WARP
from parallel.kernels.warp_groups import GroupLaunch

# One is read, one is filled.
MIN_STAGES = 2
# 128 inputs of a token.
TOKEN_BYTES = 256
MAX_TILES = 16384
# The weight, its scales, X, Y, the parts; row tiles, units, rows; then perhaps a codebook.
PARAMETERS = "PPPPPiii"


@dataclass(frozen=True)
class Launch:
    """Tiles of 8 tokens and of 16 outputs that a warp takes, warps along both; stages and blocks at most."""

    token_tiles: int
    row_tiles: int
    out_warps: int
    token_warps: int
    stages: int
    blocks: int

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
        return self.tiles * unit_bytes + self.tokens * TOKEN_BYTES

    def options(self, stages: int) -> tuple[str, ...]:
        values = {"NT": self.token_tiles, "RT": self.row_tiles, "OUT_WARPS": self.out_warps,
                  "TOKEN_WARPS": self.token_warps, "STAGES": stages, "BLOCKS": self.blocks}  # fmt: skip
        return tuple(f"-D{name}={value}" for name, value in values.items())


AnyLaunch = Launch | GroupLaunch
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
# On sm_90, in place of those for more than 48 rows: below, warp groups gain nothing. Tiles of 128 outputs by 256 tokens
# took an H200 49.8 ms for 512 rows, of 256 by 128 61.9, cuBLAS with plain weights 48.1. With fewer tokens a tile has
# more outputs, so that products need hardly more copies from L2: that is counted, not measured.
GROUP_LAUNCHES: dict[int, GroupLaunch] = {
    64: GroupLaunch(8, 12, 4),
    128: GroupLaunch(16, 12, 4),
    256: GroupLaunch(32, 8, 3),
}
SM90_LAUNCHES: dict[int, AnyLaunch] = {
    **{most: launch for most, launch in LAUNCHES.items() if most < min(GROUP_LAUNCHES)},
    **GROUP_LAUNCHES,
}


def choose_launch(num_rows: int, launches: Mapping[int, AnyLaunch] = LAUNCHES) -> AnyLaunch:
    return next((launch for most, launch in launches.items() if num_rows <= most), launches[max(launches)])


def launches_for(layout: Layout, units: int, device_index: int) -> Mapping[int, AnyLaunch]:
    """For weights of `units` times 128 inputs: with warp groups where they can be had and can read them."""
    largest = GROUP_LAUNCHES[max(GROUP_LAUNCHES)]
    return LAUNCHES if warp_groups.problem(largest, layout, units, device_index) else SM90_LAUNCHES


def multiply(
    rows: Tensor, packed: Tensor, scales: Tensor, codebook: Tensor | None, output: Tensor, layout: Layout
) -> None:
    """[m, in] bf16 into `output` [m, out] bf16, for any m."""
    num_rows, (tiles, units) = rows.shape[0], packed.shape[:2]
    launch = choose_launch(num_rows, launches_for(layout, units, packed.device.index))
    step = most_rows(launch, tiles)
    for start in range(0, num_rows, step):
        part = slice(start, start + step)
        run_kernel(launch, rows[part], packed, scales, codebook, output[part], layout)


def most_rows(launch: AnyLaunch, tiles: int) -> int:
    """Of one launch, which counts arrivals at each tile of Y: 4096 where there are 65536 outputs."""
    return MAX_TILES // -(-tiles // launch.tiles) * launch.tokens


def run_kernel(
    launch: AnyLaunch,
    rows: Tensor,
    packed: Tensor,
    scales: Tensor,
    codebook: Tensor | None,
    output: Tensor,
    layout: Layout,
    workspace: Tensor | None = None,
) -> None:
    """The kernel, with parts of sums in `workspace` (float32) or in one of its own. Launches follow one another."""
    if isinstance(launch, GroupLaunch):
        warp_groups.run_kernel(launch, rows, packed, scales, codebook, output, layout, workspace)
        return
    card = spared_card(packed.device.index)
    tiles, units = packed.shape[:2]
    places = count_places(launch, tiles, len(rows))
    assert places <= MAX_TILES, f"{places} tiles of Y"
    blocks = count_blocks(launch, layout.unit_bytes, places, units, card)
    if workspace is None:
        workspace = rows.new_empty(workspace_floats(launch, places, blocks), dtype=torch.float32)
    compile_kernel(launch, layout, packed.device.index)(
        (blocks, 1, 1), launch.threads, packed, scales, rows, output, workspace, tiles, units, len(rows),
        *([] if codebook is None else [codebook]),
    )  # fmt: skip


def count_places(launch: AnyLaunch, tiles: int, num_rows: int) -> int:
    """Tiles of Y."""
    return -(-tiles // launch.tiles) * -(-num_rows // launch.tokens)


def count_blocks(launch: Launch, unit_bytes: int, places: int, units: int, card: Card) -> int:
    """As many as work at a time, or nearly."""
    resident = fit(launch, unit_bytes, card)[1] * card.multiprocessors
    return count_sharing(places, units, min(resident, WIDE_WORKSPACE_BYTES // (2 * launch.part_bytes)))


def workspace_floats(launch: Launch, places: int, blocks: int) -> int:
    """A block leaves at most two parts; none where each takes whole tiles."""
    return 0 if places % blocks == 0 else 2 * blocks * launch.part_bytes // 4


def fit(launch: Launch, unit_bytes: int, card: Card) -> tuple[int, int]:
    """Stages of a ring, and blocks that share a multiprocessor: as many as its shared memory holds."""
    for blocks in range(launch.blocks, 0, -1):
        each = card.shared_bytes // blocks - RESERVED_SHARED_BYTES
        stages = min(launch.stages, each // launch.stage_bytes(unit_bytes))
        if stages >= MIN_STAGES:
            return stages, blocks
    raise AssertionError(f"{launch} does not fit into {card}")


@cache
def compile_kernel(launch: Launch, layout: Layout, device_index: int) -> Kernel:
    stages, _ = fit(launch, layout.unit_bytes, describe_card(device_index))
    options = (*launch.options(stages), *layout.options)
    parameters, shared_bytes = PARAMETERS + "P" * layout.has_codebook, stages * launch.stage_bytes(layout.unit_bytes)
    return load_kernel(FOLDER / "wide.cu", "wide", options, parameters, device_index, shared_bytes)


def problem(layout: Layout, device_index: int) -> str | None:
    """Why the kernel cannot be compiled on this card; None: it can."""
    return load_problem(compile_kernel, LAUNCHES[max(LAUNCHES)], layout, device_index)
