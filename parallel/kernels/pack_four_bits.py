"""Packs values for w4a16 on a card in one launch (pack_four_bits.cu), where plain torch takes some forty a block."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from parallel.footprint import UNIT_INPUTS
from parallel.kernels.launch import Kernel, load_kernel
from parallel.kernels.tiles import FOLDER, OUTPUTS_PER_TILE, WARP

# Of a block, as in the source; each takes half a unit of a tile.
WARPS = 8


def pack(values: Tensor, *, in_pairs: bool) -> Tensor:
    """[out, in] uint8 below 16, contiguous -> [out / 16, in / 128, 2, 32, 4] int32, as w4a16.pack_values gives."""
    tiles, units = values.shape[0] // OUTPUTS_PER_TILE, values.shape[1] // UNIT_INPUTS
    packed = torch.empty(tiles, units, 2, WARP, 4, dtype=torch.int32, device=values.device)
    blocks = count_blocks(tiles, units)
    kernel = compile_kernel(values.device.index, in_pairs=in_pairs)
    kernel((blocks, 1, 1), WARPS * WARP, values.contiguous(), packed, units, 2 * tiles * units)
    return packed


def count_blocks(tiles: int, units: int) -> int:
    return -(-2 * tiles * units // WARPS)


@cache
def compile_kernel(device_index: int, *, in_pairs: bool) -> Kernel:
    options = (f"-DIN_PAIRS={int(in_pairs)}",)
    return load_kernel(FOLDER / "pack_four_bits.cu", "pack_four_bits", options, "PPii", device_index)
