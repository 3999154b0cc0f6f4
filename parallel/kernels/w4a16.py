"""W4A16 on our own kernels: 4-bit weights or entries of a codebook, bf16 activations, sm_80 on.

What w4a16.cu reads is what must be read: half a byte a weight and 2 to 4 bytes a group of 128, 64 or 32, once for up to
16 rows (8 with a codebook). More rows go through wide.py; for so many that it is faster, the weight is dequantised.
"""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import Tensor

from parallel.footprint import MIN_FUSED_ROWS, UNIT_INPUTS, W4A16_GROUP_SIZES
from parallel.kernels import dequantize_packed, pack_four_bits, wide
from parallel.kernels.grouping import GroupedLinear, group_inputs
from parallel.kernels.launch import Kernel, load_problem
from parallel.kernels.operators import operator
from parallel.kernels.packed_layout import Layout
from parallel.kernels.tiles import (
    OUTPUTS_PER_TILE,
    WARP,
    Launch,
    Launches,
    choose_launch,
    compile_kernel,
    empty_output,
    empty_weight,
    fits_groups,
    in_pairs,
    pack_by_blocks,
    tile_refusal,
    tile_scales,
    tiles_of,
    untile_scales,
)
from parallel.quantized import QuantizedWeight

ZERO_BITS = 0xF
MIDDLE = 8
# Scales that are kept as they come; all others become float32.
SHORT = (torch.bfloat16, torch.float16)
# Words of a unit of a tile.
PACKED_SHAPE = (2, 32, 4)

# The fastest of those tried at the shapes of Llama-70B on an H200 (results/w4a16_h200_202611.json). More outputs a
# block read the activations less often, and leave fewer blocks to fill the card. A deeper ring was never faster. With
# scales of 16 bits, 1792 tiles (gate and up at TP2) took 40.0 us at one row by (2, 8, 2), 36.9 at eight by (4, 4, 2).
LAUNCHES: Launches = {
    8: ((3072, 2, 4, 2), (1024, 4, 4, 2), (512, 2, 8, 2), (0, 1, 8, 2)),
    16: ((1024, 2, 4, 2), (512, 2, 8, 2), (0, 1, 8, 2)),
}
CODEBOOK_LAUNCHES: Launches = {8: ((512, 2, 8, 2), (0, 1, 8, 2))}


class W4A16Linear(GroupedLinear):
    """[..., in] -> [..., out], bf16. Holds 4 bits a weight, and for a group its scale and zero.

    Scales of 16 bits stay what they are, beside zeros of 4 bits unless these are all in the middle; others are float32
    and end in the zero. A codebook's scales are float32, and its entries are rounded to bf16 before they are multiplied
    (an error of up to 2**-8 of each).
    """

    packed: Tensor
    scales: Tensor
    codebook: Tensor | None

    def __init__(self, weight: QuantizedWeight, max_rows: int = MIN_FUSED_ROWS) -> None:
        group_size = find_group_size(weight)
        assert group_size is not None, "refusal() comes first"
        grouped = group_inputs(weight, group_size)
        super().__init__(weight.shape, grouped.order, max_rows=max_rows)
        own = weight.values.device.type == "cuda"
        pack = partial(pack_four_bits.pack if own else pack_values, in_pairs=weight.codebook is not None)
        self.register_buffer("packed", pack_by_blocks(grouped, PACKED_SHAPE, pack))
        self.register_buffer("scales", pack_scales(weight, grouped.groups))
        self.register_buffer("codebook", None if weight.codebook is None else pack_codebook(weight.codebook))

    def multiply(self, rows: Tensor) -> Tensor:
        return w4a16(rows, self.packed, self.scales, self.codebook)

    def swiglu(self, hidden: Tensor) -> Tensor:
        """[m, in] -> [m, out / 2], m up to `max_rows`: gates are the first half of the outputs, ups the second."""
        return w4a16(self.ordered(hidden), self.packed, self.scales, self.codebook, swiglu=True)

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
    layout = find_layout(W4A16_GROUP_SIZES[0], OUTPUTS_PER_TILE, torch.bfloat16, has_codebook=False)
    return load_problem(multiply_kernel, launch, layout, device_index) or wide.problem(layout, device_index)


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
    per_output, zeros = unpack_scales(scales)
    values = unpack_values(packed, in_pairs=codebook is not None).unflatten(1, (per_output.shape[1], -1))
    if codebook is not None:
        return (unpack_codebook(codebook)[values] * per_output.unsqueeze(-1)).flatten(1)
    return ((values - zeros.unsqueeze(-1)) * per_output.unsqueeze(-1)).flatten(1)


def pack_scales(weight: QuantizedWeight, groups: Tensor) -> Tensor:
    """[out / 16, groups, n] for these groups, in the order of w4a16.cu; dtype and n say which of its forms it is.

    n is 16, with zeros beside scales of 16 bits 20: the last 4 are bits of the zeros of a group, no numbers.
    """
    # A single scale stands for whatever group.
    groups = groups.clamp(max=weight.scales.shape[1] - 1)
    scales = weight.scales[:, groups]
    if weight.codebook is not None:
        return tile_scales(scales.float())
    zeros = None if weight.zeros is None else weight.zeros[:, groups]
    if scales.dtype not in SHORT:
        bits = scales.float().contiguous().view(torch.int32) & ~ZERO_BITS
        return tile_scales((bits | (MIDDLE if zeros is None else zeros.to(torch.int32))).view(torch.float32))
    tiled = tile_scales(scales)
    return tiled if zeros is None else torch.cat([tiled, pack_zeros(zeros, scales.dtype)], dim=-1)


def pack_zeros(zeros: Tensor, dtype: torch.dtype) -> Tensor:
    """[out, groups] uint8 -> [out / 16, groups, 4] of 16 bits: a byte has the zeros of outputs g and, above, g + 8."""
    low, high = tile_scales(zeros).unflatten(-1, (2, 8)).unbind(-2)
    return (low | high << 4).contiguous().view(dtype)


def unpack_scales(tiled: Tensor) -> tuple[Tensor, Tensor]:
    """Scales [out, groups] float32, and zeros as int32: what the kernels make of what `pack_scales` gives."""
    scales = untile_scales(tiled[..., :OUTPUTS_PER_TILE]).float()
    if tiled.shape[-1] > OUTPUTS_PER_TILE:
        both = tiled[..., OUTPUTS_PER_TILE:].contiguous().view(torch.uint8)
        return scales, untile_scales(torch.cat([both & ZERO_BITS, both >> 4], -1)).int()
    if tiled.dtype in SHORT:
        return scales, torch.full_like(scales, MIDDLE, dtype=torch.int32)
    return scales, scales.view(torch.int32) & ZERO_BITS


def pack_codebook(codebook: Tensor) -> Tensor:
    """[16] -> [8] int32: the low bytes of its entries in bf16, then their high bytes."""
    return codebook.bfloat16().contiguous().view(torch.uint8).view(16, 2).t().contiguous().view(torch.int32).flatten()


def unpack_codebook(packed: Tensor) -> Tensor:
    """[8] int32 -> [16] float32."""
    return packed.view(torch.uint8).view(2, 16).t().contiguous().view(torch.bfloat16).flatten().float()


@operator(lambda rows, packed, scales, codebook=None, swiglu=False: empty_output(rows, packed, swiglu=swiglu))
def w4a16(rows: Tensor, packed: Tensor, scales: Tensor, codebook: Tensor | None = None, swiglu: bool = False) -> Tensor:
    """[m, in] bf16 -> [m, out] bf16, m from 1 on, by the packed weight; with `swiglu` [m, out / 2]."""
    rows, output = rows.contiguous(), empty_output(rows, packed, swiglu=swiglu)
    launches = launches_for(has_codebook=codebook is not None, swiglu=swiglu)
    if len(rows) > max(launches):
        wide.multiply(rows, packed, scales, codebook, output, layout_of(packed, scales, codebook, swiglu=swiglu))
    else:
        launch = choose_launch(launches, len(rows), len(packed))
        run_kernel(launch, rows, packed, scales, codebook, output, swiglu=swiglu)
    return output


def run_kernel(
    launch: Launch,
    rows: Tensor,
    packed: Tensor,
    scales: Tensor,
    codebook: Tensor | None,
    output: Tensor,
    *,
    swiglu: bool = False,
) -> None:
    tiles, units = packed.shape[:2]
    kernel = multiply_kernel(launch, layout_of(packed, scales, codebook, swiglu=swiglu), packed.device.index)
    sizes = tiles * OUTPUTS_PER_TILE, units * UNIT_INPUTS, len(rows)
    grid = (tiles // launch.row_tiles, 1, 1)
    kernel(grid, launch.warps * WARP, packed, scales, rows, output, *sizes, *([] if codebook is None else [codebook]))


@operator(lambda packed, scales, codebook=None: empty_weight(packed))
def dequantize_w4(packed: Tensor, scales: Tensor, codebook: Tensor | None = None) -> Tensor:
    """The weight as [out, in] bf16, columns as they are packed."""
    return dequantize_packed.run(packed, scales, codebook, layout_of(packed, scales, codebook))


@cache
def launches_for(*, has_codebook: bool, swiglu: bool = False) -> Launches:
    launches = CODEBOOK_LAUNCHES if has_codebook else LAUNCHES
    return in_pairs(launches) if swiglu else launches


@cache
def multiply_kernel(launch: Launch, layout: Layout, device_index: int) -> Kernel:
    options = (*launch.options(), *layout.options)
    return compile_kernel("w4a16.cu", "w4a16", options, device_index, "PPPPiii" + "P" * layout.has_codebook)


def layout_of(packed: Tensor, scales: Tensor, codebook: Tensor | None, *, swiglu: bool = False) -> Layout:
    group_size = packed.shape[1] * UNIT_INPUTS // scales.shape[1]
    return find_layout(group_size, scales.shape[2], scales.dtype, has_codebook=codebook is not None, swiglu=swiglu)


@cache
def find_layout(group_size: int, width: int, dtype: torch.dtype, *, has_codebook: bool, swiglu: bool = False) -> Layout:
    """Of 16 outputs, the scales of a group are `width` numbers of `dtype`, zeros included."""
    group_bytes = width * dtype.itemsize
    defined = {
        "BITS": 4,
        "GROUP": group_size,
        "CODEBOOK": int(has_codebook),
        "SCALE_BITS": group_bytes * 8 // OUTPUTS_PER_TILE,
        "HALF": int(dtype == torch.float16),
        "SWIGLU": int(swiglu),
    }
    weight_bytes, scale_bytes = OUTPUTS_PER_TILE * UNIT_INPUTS // 2, UNIT_INPUTS // group_size * group_bytes
    options = tuple(f"-D{name}={value}" for name, value in defined.items())
    return Layout(options, weight_bytes, scale_bytes, has_codebook, 1 + swiglu)
