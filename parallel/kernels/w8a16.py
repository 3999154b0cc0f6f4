"""W8A16 on our own kernels: int8 or float8 (e4m3) weights, bf16 activations, sm_80 and later.

What w8a16.cu reads is what must be read: a byte a weight and 4 a scale of 128 inputs, or of all, once for up to 8
rows. More rows go through wide.py; for so many that it is faster, the weight is dequantised.
Both decode exactly; the cards' own float8 arithmetic is not used, so that sm_80 and sm_86 run the same code.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from parallel.footprint import MIN_FUSED_ROWS, UNIT_INPUTS, W8A16_GROUP_SIZE
from parallel.kernels import dequantize_packed, pack_eight_bits, wide
from parallel.kernels.grouping import GroupedLinear, group_inputs
from parallel.kernels.launch import Kernel, load_problem
from parallel.kernels.operators import operator
from parallel.kernels.packed_layout import Layout
from parallel.kernels.tiles import (
    OUTPUTS_PER_TILE,
    SCALE_BYTES,
    WARP,
    Launch,
    Launches,
    choose_launch,
    compile_kernel,
    empty_output,
    empty_weight,
    fits_groups,
    pack_by_blocks,
    tile_refusal,
    tile_scales,
    tiles_of,
    untile_scales,
)
from parallel.quantized import QuantizedWeight

ZERO_BITS = 0xFF
# Words of a unit of a tile.
PACKED_SHAPE = (4, 32, 4)
MIDDLE = 128

# The fastest of those tried at the shapes of Llama-70B at TP2 on an H200 (results/LOG.md).
LAUNCHES: Launches = {8: ((1024, 2, 2, 2), (400, 1, 4, 4), (0, 1, 8, 2))}
# For gates and ups, of which a block takes two tiles: where it took one above, in as much shared memory.
SWIGLU_LAUNCHES: Launches = {8: ((1024, 2, 2, 2), (0, 2, 4, 2))}


class W8A16Linear(GroupedLinear):
    """[..., in] -> [..., out], bf16. Holds 8 bits a weight and a float32 scale for 128 inputs, or for all of an output.

    Scales of integers are rounded to 16 bits of their fraction, which is nothing for those that come in 16 bits.
    """

    packed: Tensor
    scales: Tensor

    def __init__(self, weight: QuantizedWeight, max_rows: int = MIN_FUSED_ROWS) -> None:
        grouped = group_inputs(weight, W8A16_GROUP_SIZE)
        super().__init__(weight.shape, grouped.order, max_rows=max_rows)
        self.is_float = weight.is_float
        pack = pack_eight_bits.pack if weight.values.device.type == "cuda" else pack_values
        self.register_buffer("packed", pack_by_blocks(grouped, PACKED_SHAPE, pack))
        self.register_buffer("scales", pack_scales(weight, grouped.groups))

    def multiply(self, rows: Tensor) -> Tensor:
        return w8a16(rows, self.packed, self.scales, self.is_float)

    def swiglu(self, hidden: Tensor) -> Tensor:
        """[m, in] -> [m, out / 2], m up to `max_rows`: gates are the first half of the outputs, ups the second."""
        return w8a16(self.ordered(hidden), self.packed, self.scales, self.is_float, swiglu=True)

    def dequantize(self, outputs: slice) -> Tensor:
        tiles = tiles_of(outputs)
        return dequantize_w8(self.packed[tiles], self.scales[tiles], self.is_float)


def refusal(weight: QuantizedWeight, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot take this weight, in a few words; None: it can."""
    why_not = tile_refusal(weight, dtype, bits=8) or values_refusal(weight)
    if why_not is not None:
        return why_not
    launch, device_index = choose_launch(LAUNCHES, num_rows=1, num_tiles=512), weight.values.device.index
    layout = wide_layout(is_grouped=False, is_float=weight.is_float)
    return load_problem(multiply_kernel, launch, layout, device_index) or wide.problem(layout, device_index)


def values_refusal(weight: QuantizedWeight) -> str | None:
    if weight.codebook is not None:
        return "a codebook of 8 bits"
    if weight.values.dtype not in (torch.uint8, torch.float8_e4m3fn):
        return f"values in {str(weight.values.dtype).removeprefix('torch.')}"
    if weight.scales.shape[1] > 1 and not fits_groups(weight, W8A16_GROUP_SIZE):
        return f"groups of other than {W8A16_GROUP_SIZE}"
    return None


def pack_values(values: Tensor) -> Tensor:
    """[out, in] uint8 or float8_e4m3fn -> [out / 16, in / 128, 4, 32, 4] int32 in the order of w8a16.cu.

    Word 2 * i + p of lane (g, c) in quarter s: input 32 * s + 8 * c + 4 * i + 2 * p in its low half, the next in its
    high half; rows g and g + 8 of each.
    """
    # tile, high row, g, unit, s, c, i, p, odd
    parts = values.view(torch.uint8).view(-1, 2, 8, values.shape[1] // UNIT_INPUTS, 4, 4, 2, 2, 2)
    # -> tile, unit, s, g, c, i, p, odd, high row
    halves = parts.permute(0, 3, 4, 2, 5, 6, 7, 8, 1)
    halves = interleave(halves) if values.is_floating_point() else halves.contiguous()
    return halves.flatten(-2).view(torch.int32).view(*halves.shape[:3], 32, 4)


def unpack_values(packed: Tensor, *, is_float: bool) -> Tensor:
    """The inverse of `pack_values`."""
    tiles, units = packed.shape[:2]
    halves = packed.view(torch.uint8).view(tiles, units, 4, 8, 4, 2, 2, 2, 2)
    halves = separate(halves) if is_float else halves
    values = halves.permute(0, 8, 3, 1, 2, 4, 5, 6, 7).reshape(tiles * OUTPUTS_PER_TILE, units * UNIT_INPUTS)
    return values.view(torch.float8_e4m3fn) if is_float else values


def interleave(halves: Tensor) -> Tensor:
    """[..., 2] bytes -> the first in the bits where bf16 has them, the second in the rest."""
    first, second = halves.unbind(-1)
    low = (first & 0x0F) << 4 | second & 0x0F
    high = first & 0x80 | second & 0x70 | (second & 0x80) >> 4 | (first & 0x70) >> 4
    return torch.stack([low, high], dim=-1)


def separate(halves: Tensor) -> Tensor:
    """The inverse of `interleave`."""
    low, high = halves.unbind(-1)
    first = high & 0x80 | (high & 0x07) << 4 | low >> 4
    second = (high & 0x08) << 4 | high & 0x70 | low & 0x0F
    return torch.stack([first, second], dim=-1)


def pack_scales(weight: QuantizedWeight, groups: Tensor) -> Tensor:
    """[out / 16, groups or 1, 16] float32; of integers, the last 8 bits of each are the zero."""
    groups = groups if weight.scales.shape[1] > 1 else groups.new_zeros(1)
    scales = weight.scales[:, groups].float().contiguous()
    if weight.is_float:
        return tile_scales(scales)
    zeros = MIDDLE if weight.zeros is None else weight.zeros[:, groups].to(torch.int32)
    rounded = (scales.view(torch.int32) + (ZERO_BITS + 1) // 2) & ~ZERO_BITS
    return tile_scales((rounded | zeros).view(torch.float32))


def unpack_weight(packed: Tensor, scales: Tensor, *, is_float: bool) -> Tensor:
    """[out, in] float32, columns as they are packed: what the kernels compute with, by plain torch."""
    per_output = untile_scales(scales)
    values = unpack_values(packed, is_float=is_float).float().unflatten(1, (per_output.shape[1], -1))
    if is_float:
        return (values * per_output.unsqueeze(-1)).flatten(1)
    bits = per_output.view(torch.int32)
    exact, zeros = (bits & ~ZERO_BITS).view(torch.float32), bits & ZERO_BITS
    return ((values - zeros.unsqueeze(-1)) * exact.unsqueeze(-1)).flatten(1)


@operator(lambda rows, packed, scales, is_float, swiglu=False: empty_output(rows, packed, swiglu=swiglu))
def w8a16(rows: Tensor, packed: Tensor, scales: Tensor, is_float: bool, swiglu: bool = False) -> Tensor:
    """[m, in] bf16 -> [m, out] bf16, m from 1 on, by the packed weight; with `swiglu` [m, out / 2]."""
    rows, output = rows.contiguous(), empty_output(rows, packed, swiglu=swiglu)
    layout = wide_layout(is_grouped=is_grouped(scales), is_float=is_float, swiglu=swiglu)
    launches = launches_for(swiglu=swiglu)
    if len(rows) > max(launches):
        wide.multiply(rows, packed, scales, None, output, layout)
    else:
        run_kernel(choose_launch(launches, len(rows), len(packed)), rows, packed, scales, output, layout)
    return output


def run_kernel(launch: Launch, rows: Tensor, packed: Tensor, scales: Tensor, output: Tensor, layout: Layout) -> None:
    tiles, units = packed.shape[:2]
    kernel = multiply_kernel(launch, layout, packed.device.index)
    sizes = tiles * OUTPUTS_PER_TILE, units * UNIT_INPUTS, len(rows)
    kernel((tiles // launch.row_tiles, 1, 1), launch.warps * WARP, packed, scales, rows, output, *sizes)


@operator(lambda packed, scales, is_float: empty_weight(packed))
def dequantize_w8(packed: Tensor, scales: Tensor, is_float: bool) -> Tensor:
    """The weight as [out, in] bf16, columns as they are packed."""
    layout = wide_layout(is_grouped=is_grouped(scales), is_float=is_float)
    return dequantize_packed.run(packed, scales, None, layout)


def launches_for(*, swiglu: bool = False) -> Launches:
    return SWIGLU_LAUNCHES if swiglu else LAUNCHES


@cache
def multiply_kernel(launch: Launch, layout: Layout, device_index: int) -> Kernel:
    return compile_kernel("w8a16.cu", "w8a16", (*launch.options(), *layout.options), device_index, "PPPPiii")


@cache
def wide_layout(*, is_grouped: bool, is_float: bool, swiglu: bool = False) -> Layout:
    defined = {"BITS": 8, "GROUPED": int(is_grouped), "E4M3": int(is_float), "SWIGLU": int(swiglu)}
    options = tuple(f"-D{name}={value}" for name, value in defined.items())
    scale_bytes = OUTPUTS_PER_TILE * SCALE_BYTES * int(is_grouped)
    return Layout(options, OUTPUTS_PER_TILE * UNIT_INPUTS, scale_bytes, weights_side_by_side=1 + swiglu)


def is_grouped(scales: Tensor) -> bool:
    return scales.shape[1] > 1
