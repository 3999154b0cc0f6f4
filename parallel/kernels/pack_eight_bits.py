"""Packs values for w8a16 on a card in one launch (pack_eight_bits.cu), where float8 takes plain torch some fifteen."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from parallel.footprint import UNIT_INPUTS
from parallel.kernels.launch import Kernel, load_kernel
from parallel.kernels.tiles import FOLDER, OUTPUTS_PER_TILE, WARP

# Of a block, as in the source; each takes a quarter of a unit of a tile.
WARPS = 8


def pack(values: Tensor) -> Tensor:
    """[out, in] uint8 or float8_e4m3fn -> [out / 16, in / 128, 4, 32, 4] int32, as w8a16.pack_values gives."""
    tiles, units = values.shape[0] // OUTPUTS_PER_TILE, values.shape[1] // UNIT_INPUTS
    packed = torch.empty(tiles, units, 4, WARP, 4, dtype=torch.int32, device=values.device)
    kernel = compile_kernel(values.device.index, is_float=values.is_floating_point())
    grid = (count_blocks(tiles, units), 1, 1)
    kernel(grid, WARPS * WARP, values.contiguous(), packed, units, 4 * tiles * units)
    return packed


def count_blocks(tiles: int, units: int) -> int:
    return -(-4 * tiles * units // WARPS)


@cache
def compile_kernel(device_index: int, *, is_float: bool) -> Kernel:
    options = (f"-DE4M3={int(is_float)}",)
    return load_kernel(FOLDER / "pack_eight_bits.cu", "pack_eight_bits", options, "PPii", device_index)
