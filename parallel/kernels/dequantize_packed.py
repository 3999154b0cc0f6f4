"""The packed weights of w4a16 and w8a16 in bf16 (dequantize_packed.cu), for products of more rows than they take."""

from __future__ import annotations

from functools import cache

from torch import Tensor

from parallel.kernels.launch import Kernel, load_kernel
from parallel.kernels.packed_layout import Layout
from parallel.kernels.tiles import FOLDER, WARP, empty_weight

# Of a block, and of 128 inputs of 16 outputs that a warp takes, as in the source.
WARPS = 8
UNITS = 2
# The weight, its scales, the result; row tiles, units; then perhaps a codebook.
PARAMETERS = "PPPii"


def run(packed: Tensor, scales: Tensor, codebook: Tensor | None, layout: Layout) -> Tensor:
    """[out, in] bf16, columns as they are packed."""
    tiles, units = packed.shape[:2]
    weight = empty_weight(packed)
    entries = [] if codebook is None else [codebook]
    kernel = compile_kernel(layout, packed.device.index)
    kernel((count_blocks(tiles, units), 1, 1), WARPS * WARP, packed, scales, weight, tiles, units, *entries)
    return weight


def count_blocks(tiles: int, units: int) -> int:
    return -(-tiles * units // (WARPS * UNITS))


@cache
def compile_kernel(layout: Layout, device_index: int) -> Kernel:
    parameters = PARAMETERS + "P" * layout.has_codebook
    return load_kernel(FOLDER / "dequantize_packed.cu", "dequantize_weight", layout.options, parameters, device_index)
