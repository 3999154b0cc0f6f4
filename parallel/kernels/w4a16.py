"""W4A16 on our own kernels: 4-bit weights or entries of a codebook, bf16 activations, sm_80 on.

What w4a16.cu reads is what must be read: half a byte a weight and 4 bytes a group of 128, 64 or 32, once for up to 16
rows (8 with a codebook). More rows go through wide.py.
"""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import Tensor

from parallel.kernels import wide
from parallel.kernels.grouping import GroupedLinear, group_inputs
from parallel.kernels.held import MAX_OWN_ROWS as MAX_ROWS
from parallel.kernels.held import UNIT_INPUTS, W4A16_GROUP_SIZES
from parallel.kernels.launch import Kernel, load_problem
from parallel.kernels.operators import operator
from parallel.kernels.tiles import (
    DEQUANTIZE_WARPS,
    OUTPUTS_PER_TILE,
    SCALE_BYTES,
    WARP,
    Launch,
    Launches,
    choose_launch,
    compile_kernel,
    empty_weight,
    fits_groups,
    pack_by_blocks,
    tile_refusal,
    tile_scales,
    tiles_of,
    untile_scales,
)
from parallel.quantized import QuantizedWeight

ZERO_BITS = 0xF
# Words of a unit of a tile.
PACKED_SHAPE = (2, 32, 4)

# The fastest of those tried at the shapes of Llama-70B on an H200 (results/w4a16_h200_202611.json). More outputs a
# block read the activations less often, and leave fewer blocks to fill the card. A deeper ring was never faster.
LAUNCHES: Launches = {
    4: ((3072, 2, 4, 2), (512, 2, 8, 2), (0, 1, 8, 2)),
    8: ((3072, 2, 4, 2), (1024, 4, 4, 2), (512, 2, 8, 2), (0, 1, 8, 2)),
    16: ((1024, 2, 4, 2), (512, 2, 8, 2), (0, 1, 8, 2)),
}
CODEBOOK_LAUNCHES: Launches = {8: ((512, 2, 8, 2), (0, 1, 8, 2))}


class W4A16Linear(GroupedLinear):
    """[..., in] -> [..., out], bf16. Holds 4 bits a weight and 32 a group: a float32 scale that ends in the zero.

    A codebook's entries are rounded to bf16 before they are multiplied (an error of up to 2**-8 of each).
    """

    packed: Tensor
    scales: Tensor
    codebook: Tensor | None

    def __init__(self, weight: QuantizedWeight) -> None:
        group_size = find_group_size(weight)
        assert group_size is not None, "refusal() comes first"
        grouped = group_inputs(weight, group_size)
        super().__init__(weight.shape[0], grouped.order, max_rows=MAX_ROWS)
        pack = partial(pack_values, in_pairs=weight.codebook is not None)
        self.register_buffer("packed", pack_by_blocks(grouped, PACKED_SHAPE, pack))
        self.register_buffer("scales", pack_scales(weight, grouped.groups))
        self.register_buffer("codebook", None if weight.codebook is None else pack_codebook(weight.codebook))

    def multiply(self, rows: Tensor) -> Tensor:
        return w4a16(rows, self.packed, self.scales, self.codebook)

    def dequantize(self, outputs: slice) -> Tensor:
        tiles = tiles_of(outputs)
        return dequantize_w4(self.packed[tiles], self.scales[tiles], self.codebook)


def refusal(weight: QuantizedWeight, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot take this weight, in a few words; None: it can."""
    why_not = tile_refusal(weight, dtype, bits=4)
    if why_not is not None:
        return why_not
    if find_group_size(weight) is None:
        return f"groups of other than {', '.join(map(str, W4A16_GROUP_SIZES))}"
    launch, device_index = choose_launch(LAUNCHES, num_rows=1, num_tiles=512), weight.values.device.index
    few = load_problem(multiply_kernel, launch, W4A16_GROUP_SIZES[0], False, device_index)
    return few or wide.problem(wide_layout(W4A16_GROUP_SIZES[0], has_codebook=False), device_index)


def find_group_size(weight: QuantizedWeight) -> int | None:
    """The largest number of inputs that share a scale, of those the kernel knows."""
    return next((size for size in W4A16_GROUP_SIZES if fits_groups(weight, size)), None)


def pack_values(values: Tensor, *, in_pairs: bool = False) -> Tensor:
    """[out, in] uint8 below 16 -> [out / 16, in / 128, 2, 32, 4] int32 in the order of w4a16.cu.

    Nibble j of word i of half h, in lane (g, c), is row g + 8 * (j & 1) and
    input 64 * h + 32 * (i >> 1) + 8 * c + 4 * (i & 1) + 2 * (j >> 1 & 1) + (j >> 2).
    With `in_pairs`, for codebooks: row g + 8 * (j >> 1 & 1), and the input ends in 2 * (j >> 2) + (j & 1).
    """
    # tile, high row, g, unit, h, i >> 1, c, i & 1, second pair, odd
    parts = values.view(-1, 2, 8, values.shape[1] // UNIT_INPUTS, 2, 2, 4, 2, 2, 2).to(torch.int32)
    # -> tile, unit, h, g, c, i >> 1, i & 1, and what the nibbles run over
    nibbles = parts.permute(0, 3, 4, 2, 6, 5, 7, *((8, 1, 9) if in_pairs else (9, 8, 1))).flatten(-3)
    words = nibbles[..., 0].clone()
    for j in range(1, 8):
        words |= nibbles[..., j] << (4 * j)
    return words.flatten(5, 6).flatten(3, 4).contiguous()


def unpack_values(packed: Tensor, *, in_pairs: bool = False) -> Tensor:
    """The inverse of `pack_values`, as int32."""
    tiles, units = packed.shape[:2]
    shifts = torch.arange(0, 32, 4, device=packed.device, dtype=torch.int32)
    nibbles = (packed.unsqueeze(-1) >> shifts) & 15
    parts = nibbles.view(tiles, units, 2, 8, 4, 2, 2, 2, 2, 2)
    high_row, second_pair, odd = (8, 7, 9) if in_pairs else (9, 8, 7)
    ordered = parts.permute(0, high_row, 3, 1, 2, 5, 4, 6, second_pair, odd)
    return ordered.reshape(tiles * OUTPUTS_PER_TILE, units * UNIT_INPUTS)


def unpack_weight(packed: Tensor, scales: Tensor, codebook: Tensor | None = None) -> Tensor:
    """[out, in] float32, columns as they are packed: what the kernels compute with, by plain torch."""
    per_output = untile_scales(scales)
    values = unpack_values(packed, in_pairs=codebook is not None).unflatten(1, (per_output.shape[1], -1))
    if codebook is not None:
        return (unpack_codebook(codebook)[values] * per_output.unsqueeze(-1)).flatten(1)
    zeros = per_output.view(torch.int32) & ZERO_BITS
    return ((values - zeros.unsqueeze(-1)) * per_output.unsqueeze(-1)).flatten(1)


def pack_scales(weight: QuantizedWeight, groups: Tensor) -> Tensor:
    """[out / 16, groups, 16] float32 for these groups; without a codebook, the last 4 bits of each are the zero."""
    # A single scale stands for whatever group.
    groups = groups.clamp(max=weight.scales.shape[1] - 1)
    scales = weight.scales[:, groups].float().contiguous()
    if weight.codebook is not None:
        return tile_scales(scales)
    zeros = 8 if weight.zeros is None else weight.zeros[:, groups].to(torch.int32)
    return tile_scales(((scales.view(torch.int32) & ~ZERO_BITS) | zeros).view(torch.float32))


def pack_codebook(codebook: Tensor) -> Tensor:
    """[16] -> [8] int32: the low bytes of its entries in bf16, then their high bytes."""
    return codebook.bfloat16().contiguous().view(torch.uint8).view(16, 2).t().contiguous().view(torch.int32).flatten()


def unpack_codebook(packed: Tensor) -> Tensor:
    """[8] int32 -> [16] float32."""
    return packed.view(torch.uint8).view(2, 16).t().contiguous().view(torch.bfloat16).flatten().float()


@operator(lambda rows, packed, scales, codebook=None: rows.new_empty(len(rows), packed.shape[0] * OUTPUTS_PER_TILE))
def w4a16(rows: Tensor, packed: Tensor, scales: Tensor, codebook: Tensor | None = None) -> Tensor:
    """[m, in] bf16 -> [m, out] bf16, m from 1 to 256, by the packed weight."""
    rows, output = rows.contiguous(), rows.new_empty(len(rows), packed.shape[0] * OUTPUTS_PER_TILE)
    launches = launches_for(has_codebook=codebook is not None)
    if len(rows) > max(launches):
        layout = wide_layout(group_size(packed, scales), has_codebook=codebook is not None)
        wide.multiply(rows, packed, scales, codebook, output, layout)
    else:
        run_kernel(choose_launch(launches, len(rows), len(packed)), rows, packed, scales, codebook, output)
    return output


def run_kernel(
    launch: Launch, rows: Tensor, packed: Tensor, scales: Tensor, codebook: Tensor | None, output: Tensor
) -> None:
    tiles, units = packed.shape[:2]
    kernel = multiply_kernel(launch, group_size(packed, scales), codebook is not None, packed.device.index)
    sizes = tiles * OUTPUTS_PER_TILE, units * UNIT_INPUTS, len(rows)
    grid = (tiles // launch.row_tiles, 1, 1)
    kernel(grid, launch.warps * WARP, packed, scales, rows, output, *sizes, *entries(codebook))


@operator(lambda packed, scales, codebook=None: empty_weight(packed))
def dequantize_w4(packed: Tensor, scales: Tensor, codebook: Tensor | None = None) -> Tensor:
    """The weight as [out, in] bf16, columns as they are packed."""
    tiles, units = packed.shape[:2]
    weight = empty_weight(packed)
    kernel = dequantize_kernel(group_size(packed, scales), codebook is not None, packed.device.index)
    grid = (tiles, -(-units // DEQUANTIZE_WARPS), 1)
    kernel(grid, DEQUANTIZE_WARPS * WARP, packed, scales, weight, units, *entries(codebook))
    return weight


def entries(codebook: Tensor | None) -> tuple[Tensor, ...]:
    """The last parameter, which kernels have only with a codebook."""
    return () if codebook is None else (codebook,)


@cache
def launches_for(*, has_codebook: bool) -> Launches:
    return CODEBOOK_LAUNCHES if has_codebook else LAUNCHES


@cache
def multiply_kernel(launch: Launch, group_size: int, has_codebook: bool, device_index: int) -> Kernel:
    options = kernel_options(launch, group_size, has_codebook=has_codebook)
    return compile_kernel("w4a16.cu", "w4a16", options, device_index, "PPPPiii" + "P" * has_codebook)


@cache
def dequantize_kernel(group_size: int, has_codebook: bool, device_index: int) -> Kernel:
    options = kernel_options(Launch(1, 1, DEQUANTIZE_WARPS, 2), group_size, has_codebook=has_codebook)
    return compile_kernel("w4a16.cu", "dequantize_w4", options, device_index, "PPPi" + "P" * has_codebook)


def kernel_options(launch: Launch, group_size: int, *, has_codebook: bool) -> tuple[str, ...]:
    return (*launch.options(), *format_options(group_size, has_codebook=has_codebook))


def format_options(group_size: int, *, has_codebook: bool) -> tuple[str, ...]:
    return (f"-DGROUP={group_size}", f"-DCODEBOOK={int(has_codebook)}")


@cache
def wide_layout(group_size: int, *, has_codebook: bool) -> wide.Layout:
    options = format_options(group_size, has_codebook=has_codebook)
    return wide.Layout(("-DBITS=4", *options), unit_bytes(group_size), has_codebook)


def group_size(packed: Tensor, scales: Tensor) -> int:
    return packed.shape[1] * UNIT_INPUTS // scales.shape[1]


def unit_bytes(group_size: int) -> int:
    """Bytes of 128 inputs of 16 outputs, with their scales."""
    return OUTPUTS_PER_TILE * (UNIT_INPUTS // 2 + UNIT_INPUTS // group_size * SCALE_BYTES)
