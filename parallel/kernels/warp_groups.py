"""Products of many rows with packed weights by warp groups of sm_90 (wide_wgmma.cu)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from parallel.footprint import WIDE_WORKSPACE_BYTES
from parallel.kernels.launch import Kernel, load_kernel, load_problem
from parallel.kernels.multiprocessors import RESERVED_SHARED_BYTES, Card, count_sharing, describe_card, spared_card
from parallel.kernels.packed_layout import Layout, copied_bytes
from parallel.kernels.tensor_map import MAP_BYTES, TENSOR_ALIGNMENT, describe_boxes
from parallel.kernels.tiles import FOLDER, OUTPUTS_PER_TILE, ROWS_PER_TILE, SCALE_BYTES, WARP

CAPABILITY = (9, 0)
# A warp group that copies.
COPIERS = 128
# Boxes begin at multiples of it. A stage has two barriers.
BOX_ALIGNMENT = 128
BARRIER_BYTES = 16
# Inputs of a box of X; what boxes of weights and of scales are counted in.
BOX_INPUTS = 64
PIECE_BYTES = 8
# Boxes of the weight, its scales and X; the scales, Y, the parts; row tiles, units, rows, waves, and blocks that share
# what is left; then perhaps a codebook.
PARAMETERS = f"{MAP_BYTES}s{MAP_BYTES}s{MAP_BYTES}sPPPiiiii"


@dataclass(frozen=True)
class GroupLaunch:
    """Tiles of 8 tokens, warps of 16 outputs each (a multiple of 4), and units of 128 inputs in shared memory."""

    token_tiles: int
    out_warps: int
    stages: int

    @property
    def tokens(self) -> int:
        return ROWS_PER_TILE * self.token_tiles

    @property
    def tiles(self) -> int:
        """Times 16 outputs."""
        return self.out_warps

    @property
    def threads(self) -> int:
        return WARP * self.out_warps + COPIERS

    @property
    def part_bytes(self) -> int:
        return self.tiles * OUTPUTS_PER_TILE * self.tokens * 4

    @property
    def token_stage_bytes(self) -> int:
        """Half the inputs of a unit, in bf16, and barriers."""
        return self.tokens * BOX_INPUTS * 2 + BARRIER_BYTES

    def weight_stage_bytes(self, layout: Layout) -> int:
        size = self.tiles * (layout.weight_bytes + scale_bytes(layout))
        return -(-size // BOX_ALIGNMENT) * BOX_ALIGNMENT + BARRIER_BYTES

    def fit(self, layout: Layout, card: Card) -> tuple[int, int]:
        """Stages of tokens, two to a unit, as many as fit beside those of weights; and these."""
        left = card.shared_bytes - RESERVED_SHARED_BYTES - self.stages * self.weight_stage_bytes(layout)
        token_stages = min(2 * self.stages, left // self.token_stage_bytes)
        # A unit's two, and one that is filled meanwhile.
        assert token_stages > 2, f"{self} does not fit into {card}"
        return token_stages, self.stages

    def shared_bytes(self, layout: Layout, card: Card) -> int:
        token_stages, weight_stages = self.fit(layout, card)
        return token_stages * self.token_stage_bytes + weight_stages * self.weight_stage_bytes(layout)

    def options(self, layout: Layout, card: Card) -> tuple[str, ...]:
        token_stages, weight_stages = self.fit(layout, card)
        values = {"NT": self.token_tiles, "OUT_WARPS": self.out_warps,
                  "TOKEN_STAGES": token_stages, "WEIGHT_STAGES": weight_stages}  # fmt: skip
        return (*(f"-D{name}={value}" for name, value in values.items()), *layout.options)


@dataclass(frozen=True)
class Waves:
    """How tiles of Y go to `blocks`: so many to each, whole; `sharing` of them share what is left, in units."""

    blocks: int
    count: int
    sharing: int
    # Tiles that are left.
    rest: int

    @property
    def has_parts(self) -> bool:
        return self.rest % self.sharing > 0


def plan_waves(places: int, units: int, most: int) -> Waves:
    """`places` tiles of Y of `units` times 128 inputs, for at most so many blocks."""
    count, rest = divmod(places, most)
    # So few would be cut into many parts, whose sums take longer than more of them do.
    if count and 0 < rest < most // 2:
        count, rest = count - 1, rest + most
    sharing = count_sharing(rest, units, most) if rest else 1
    return Waves(most if count else sharing, count, sharing, rest)


# Passes come in few sizes; to plan one anew takes the host as long as to queue it.
@lru_cache(maxsize=4096)
def plan_product(launch: GroupLaunch, tiles: int, units: int, num_rows: int, multiprocessors: int) -> tuple[Waves, int]:
    """Of so many rows with `tiles` times 16 outputs; also the numbers of float32 that parts of sums take."""
    places = -(-tiles // launch.tiles) * -(-num_rows // launch.tokens)
    most = min(multiprocessors, WIDE_WORKSPACE_BYTES // (2 * launch.part_bytes))
    waves = plan_waves(places, units, most)
    return waves, 2 * waves.sharing * waves.has_parts * launch.part_bytes // 4


def run_kernel(
    launch: GroupLaunch,
    rows: Tensor,
    packed: Tensor,
    scales: Tensor,
    codebook: Tensor | None,
    output: Tensor,
    layout: Layout,
    workspace: Tensor | None = None,
) -> None:
    """As wide.run_kernel."""
    device_index, num_rows, (tiles, units) = packed.device.index, rows.shape[0], packed.shape[:2]
    waves, num_floats = plan_product(launch, tiles, units, num_rows, spared_card(device_index).multiprocessors)
    if workspace is None:
        workspace = rows.new_empty(num_floats, dtype=torch.float32)
    boxes = describe_operands(launch, rows, packed, scales, layout)
    sizes = tiles, units, num_rows, waves.count, waves.sharing
    compile_kernel(launch, layout, device_index)(
        (waves.blocks, 1, 1), launch.threads, *boxes, scales, output, workspace, *sizes,
        *([] if codebook is None else [codebook]),
    )  # fmt: skip


def describe_operands(launch: GroupLaunch, rows: Tensor, packed: Tensor, scales: Tensor, layout: Layout) -> list[bytes]:
    """Boxes of the weight, its scales and X."""
    return [
        describe_boxes(packed, (launch.tiles, layout.weight_bytes // PIECE_BYTES), PIECE_BYTES),
        describe_boxes(scales, (launch.tiles, scale_bytes(layout) // PIECE_BYTES), PIECE_BYTES),
        describe_boxes(rows, (launch.tokens, BOX_INPUTS), rows.element_size(), swapped=True),
    ]


def scale_bytes(layout: Layout) -> int:
    """Copied with 128 inputs of 16 outputs, those that all inputs share too."""
    return copied_bytes(layout.scale_bytes or OUTPUTS_PER_TILE * SCALE_BYTES)


@cache
def compile_kernel(launch: GroupLaunch, layout: Layout, device_index: int) -> Kernel:
    card, parameters = describe_card(device_index), PARAMETERS + "P" * layout.has_codebook
    options, shared_bytes = launch.options(layout, card), launch.shared_bytes(layout, card)
    return load_kernel(FOLDER / "wide_wgmma.cu", "wide", options, parameters, device_index, shared_bytes)


@cache
def problem(launch: GroupLaunch, layout: Layout, units: int, device_index: int) -> str | None:
    """Why the kernel cannot be had on this card, or cannot read such weights, in a few words; None: it can."""
    if torch.cuda.get_device_capability(device_index) != CAPABILITY:
        return "not a card of sm_90"
    if layout.weights_side_by_side > 1:
        return "gates and ups in one weight"
    if units * layout.scale_bytes % TENSOR_ALIGNMENT:
        return f"{units * layout.scale_bytes} bytes of scales in a row"
    return load_problem(compile_kernel, launch, layout, device_index)
