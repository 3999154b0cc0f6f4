"""What the own kernels of packed weights (w4a16, w8a16) share: units, launches, blocks of rows, and compilation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from parallel.footprint import UNIT_INPUTS
from parallel.kernels.grouping import GroupedWeight
from parallel.kernels.launch import Kernel, has_tensor_cores, load_kernel
from parallel.quantized import QuantizedWeight, row_blocks

FOLDER = Path(__file__).parent
WARP = 32
OUTPUTS_PER_TILE = 16
ROWS_PER_TILE = 8
# Without asking for more, a block gets this much.
MAX_SHARED_BYTES = 48 * 1024
SCALE_BYTES = 4
# For up to so many tokens: (at least so many tiles of 16 outputs, row_tiles, warps, depth). More go through wide.py.
Launches = dict[int, tuple[tuple[int, int, int, int], ...]]


@dataclass(frozen=True)
class Launch:
    """How a kernel is compiled: tokens and outputs a block takes, its warps, and the stages of each one's ring."""

    token_tiles: int
    row_tiles: int
    warps: int
    depth: int

    def shared_bytes(self, unit_bytes: int) -> int:
        """Shared memory of a block: the rings of its warps, later their sums. A unit is 128 inputs of 16 outputs."""
        ring = self.depth * self.row_tiles * unit_bytes
        return self.warps * max(ring, self.row_tiles * self.token_tiles * 512)

    def options(self) -> tuple[str, ...]:
        return (f"-DNT={self.token_tiles}", f"-DRT={self.row_tiles}", f"-DWARPS={self.warps}", f"-DDEPTH={self.depth}")


def choose_launch(launches: Launches, num_rows: int, num_tiles: int) -> Launch:
    """The launch for `num_rows` tokens and a weight of `num_tiles` times 16 outputs."""
    most_rows = next(most for most in launches if num_rows <= most)
    row_tiles, warps, depth = next(launch for least, *launch in launches[most_rows] if num_tiles >= least)
    while num_tiles % row_tiles:
        row_tiles //= 2
    return Launch(max(1, most_rows // ROWS_PER_TILE), row_tiles, warps, depth)


def in_pairs(launches: Launches) -> Launches:
    """Those for gates and ups, of which a block takes two tiles or more: for few tiles, the last that does."""
    pairs = {rows: [each for each in listed if each[1] > 1] for rows, listed in launches.items()}
    return {rows: (*listed[:-1], (0, *listed[-1][1:])) for rows, listed in pairs.items()}


def tile_refusal(weight: QuantizedWeight, dtype: torch.dtype, bits: int) -> str | None:
    """Why no own kernel of `bits` takes this weight, in a few words, whatever its groups; None: one may."""
    num_out, num_in = weight.shape
    checks = {
        "not on a card of sm_80 or later": has_tensor_cores(weight.values.device),
        f"{weight.bits} bits": weight.bits == bits,
        f"activations in {str(dtype).removeprefix('torch.')}": dtype == torch.bfloat16,
        f"{num_out} outputs": num_out % OUTPUTS_PER_TILE == 0 and num_out > 0,
        f"{num_in} inputs": num_in % UNIT_INPUTS == 0 and num_in > 0,
    }
    return next((reason for reason, passed in checks.items() if not passed), None)


def fits_groups(weight: QuantizedWeight, group_size: int) -> bool:
    """Whether each `group_size` inputs, which they are a multiple of, share a scale, once they are sorted by group."""
    if weight.group_of is None:
        # Told without the card, which would be waited for.
        num_in, own = weight.shape[1], weight.group_size
        return all(first // own == (first + group_size - 1) // own for first in range(0, num_in, group_size))
    blocks = weight.group_of.sort().values.view(-1, group_size)
    return bool((blocks[:, 0] == blocks[:, -1]).all())


def pack_by_blocks(weight: GroupedWeight, words: tuple[int, int, int], pack: Callable[[Tensor], Tensor]) -> Tensor:
    """[out / 16, in / 128, *words] int32: `pack` of [rows, in], a block of rows at a time.

    What packing takes is a few bytes for each weight of a block, small beside the whole.
    """
    num_out, num_in = weight.values.shape
    shape = (num_out // OUTPUTS_PER_TILE, num_in // UNIT_INPUTS, *words)
    packed = torch.empty(shape, dtype=torch.int32, device=weight.values.device)
    for rows in row_blocks(num_out, num_in, step=OUTPUTS_PER_TILE):
        packed[rows.start // OUTPUTS_PER_TILE : rows.stop // OUTPUTS_PER_TILE] = pack(weight.columns(rows))
    return packed


def tiles_of(outputs: slice) -> slice:
    """The tiles that hold these outputs, which begin and end with a tile."""
    return slice(outputs.start // OUTPUTS_PER_TILE, outputs.stop // OUTPUTS_PER_TILE)


def tile_scales(per_output: Tensor) -> Tensor:
    """[out, groups] -> [out / 16, groups, 16], as the kernels read them."""
    return per_output.unflatten(0, (-1, OUTPUTS_PER_TILE)).transpose(1, 2).contiguous()


def untile_scales(tiled: Tensor) -> Tensor:
    """The inverse of `tile_scales`."""
    return tiled.transpose(1, 2).flatten(0, 1).contiguous()


def empty_output(rows: Tensor, packed: Tensor, *, swiglu: bool) -> Tensor:
    """Room for the product of rows [m, in]: [m, out], or [m, out / 2]."""
    return rows.new_empty(len(rows), packed.shape[0] * OUTPUTS_PER_TILE // (1 + swiglu))


def empty_weight(packed: Tensor) -> Tensor:
    """Room for a dequantised weight: [out, in] bf16."""
    tiles, units = packed.shape[:2]
    return packed.new_empty(tiles * OUTPUTS_PER_TILE, units * UNIT_INPUTS, dtype=torch.bfloat16)


@cache
def compile_kernel(file: str, name: str, options: tuple[str, ...], device_index: int, parameters: str) -> Kernel:
    """A kernel of `file` in this folder, compiled for the card of this process; `parameters` as in launch.Kernel."""
    return load_kernel(FOLDER / file, name, options, parameters, device_index)
