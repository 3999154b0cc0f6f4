"""Launches of our own linear kernels that are worth a try for a format of linear_formats.py, tuned or checked."""

from __future__ import annotations

from itertools import product

import torch

from parallel.footprint import MAX_NARROW_ROWS, UNIT_INPUTS
from parallel.kernels import w4a16, warp_groups, wide
from parallel.kernels.tiles import MAX_SHARED_BYTES, OUTPUTS_PER_TILE, ROWS_PER_TILE, Launch
from parallel.kernels.warp_groups import GroupLaunch
from tools.bench.linear_formats import FORMATS, AnyLaunch, Expected, OwnFormat, check_launch, rounded_codebook

# Of both kernels, and of every tile of the second, none of them full.
CHECKED_ROWS = (1, 3, 8, 9, 16, 23, 31, 47, 64, 95, 100, 129, 256)
# Tokens of a tile of the kernel for many rows, in eights; tiles of more do not fit beside their weights.
TOKEN_TILES = (2, 3, 4, 6, 8, 12, 16)
MAX_TILE_TOKENS = 128
# What a thread takes, by its tiles of 16 outputs and 8 tokens (NVRTC 13, sm_80 to sm_90), none of it in memory.
REGISTERS = ((4, 128), (8, 168), (12, 208), (16, 255))
REGISTERS_OF_MULTIPROCESSOR = 65536
# Rows up to which warp groups are not tried; their tiles of 8 tokens, and warps that registers are enough for.
MAX_NARROW_GROUPS = 32
GROUP_TILES = ((8, 8), (8, 12), (16, 8), (16, 12), (32, 8))
# An RTX 4090 gives a block so much.
WIDE_SHARED_BYTES = 99 * 1024


def launches(own: OwnFormat, num_rows: int, num_in: int) -> list[AnyLaunch]:
    """Configurations worth a try for this many rows of so many inputs."""
    narrow = narrow_launches(own, num_rows) if num_rows <= max(w4a16.LAUNCHES) else []
    many = wide_launches(own, num_rows) if num_rows > MAX_NARROW_ROWS else []
    return [*narrow, *many, *(group_launches(own, num_rows, num_in) if num_rows > MAX_NARROW_GROUPS else [])]


def narrow_launches(own: OwnFormat, num_rows: int) -> list[Launch]:
    tiles = next(tiles for tiles in (1, 2) if num_rows <= tiles * ROWS_PER_TILE)
    every = [Launch(tiles, *option) for option in product((1, 2, 4), (2, 4, 8, 16), (2, 4, 8))]
    return [each for each in every if each.shared_bytes(own.wide_layout().unit_bytes) <= MAX_SHARED_BYTES]


def wide_launches(own: OwnFormat, num_rows: int) -> list[wide.Launch]:
    """Tiles of as few tokens as hold the rows, of 128 to 256 threads, with rings of 2 stages and of 4."""
    most = -(-num_rows // -(-num_rows // MAX_TILE_TOKENS))
    token_tiles = next(tiles for tiles in TOKEN_TILES if most <= tiles * ROWS_PER_TILE)
    found = []
    for row_tiles, out_warps, token_warps, stages in product((2, 4), (2, 4, 8), (1, 2, 4), (2, 4)):
        in_warp, threads = token_tiles // token_warps, 32 * out_warps * token_warps
        registers = next((most for size, most in REGISTERS if row_tiles * in_warp <= size), None)
        if token_tiles % token_warps or in_warp < 2 or not 128 <= threads <= 256 or registers is None:
            continue
        blocks = REGISTERS_OF_MULTIPROCESSOR // (registers * threads)
        found.append(wide.Launch(in_warp, row_tiles, out_warps, token_warps, stages, blocks))
    return [each for each in found if 2 * each.stage_bytes(own.wide_layout().unit_bytes) <= WIDE_SHARED_BYTES]


def group_launches(own: OwnFormat, num_rows: int, num_in: int) -> list[GroupLaunch]:
    """Of warp groups, where they can be had: tiles of which the rows fill more than half, with 3 units ahead and 4."""
    largest = wide.GROUP_LAUNCHES[max(wide.GROUP_LAUNCHES)]
    if warp_groups.problem(largest, own.wide_layout(), num_in // UNIT_INPUTS, torch.cuda.current_device()):
        return []
    return [
        GroupLaunch(*tile, stages)
        for tile, stages in product(GROUP_TILES, (3, 4))
        if tile[0] * ROWS_PER_TILE < 2 * num_rows
    ]


def check_format(name: str, shape: tuple[int, int]) -> None:
    """Every launch of a format against float64 on fresh values, the output filled with NaN beforehand.

    Raises:
        AssertionError: an output is off by more than its own rounding to bf16.
    """
    own = FORMATS[name]
    weight = rounded_codebook(own.random_weight(*shape))
    exact = weight.dequantize(torch.float64)
    packed = own.pack(weight)
    dequantized = own.dequantize(packed)
    assert torch.equal(dequantized, own.unpack(packed).bfloat16()), f"{name} {shape}: dequantised to other numbers"
    # Half a unit in the last place of bf16, and the lost bits of a scale.
    assert ((dequantized.double() - exact).abs() <= exact.abs() * (2**-8 + 2**-16)).all(), f"{name} {shape}"
    for num_rows in CHECKED_ROWS:
        rows = torch.randn(num_rows, shape[1], device="cuda", dtype=torch.bfloat16)
        expected = Expected.of(own, rows, weight, packed)
        for launch in launches(own, num_rows, shape[1]):
            if not isinstance(launch, Launch) or shape[0] // OUTPUTS_PER_TILE % launch.row_tiles == 0:
                check_launch(name, launch, rows, packed, expected)
