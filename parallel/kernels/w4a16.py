"""W4A16 for few rows on our own kernel (w4a16.cu): 4-bit weights in groups of 128, bf16 activations, sm_80 and later.

Compiled at run time by the NVRTC that torch brings; no CUDA toolkit is needed. What it reads is what must be read: half
a byte a weight and 4 bytes a group, 4.25 bits a weight, once for up to 64 rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from parallel.kernels.grouping import GroupedLinear, group_inputs
from parallel.kernels.held import MAX_W4A16_ROWS as MAX_ROWS
from parallel.kernels.held import W4A16_GROUP_SIZE as GROUP_SIZE
from parallel.quantized import QuantizedWeight

OUTPUTS_PER_TILE = 16
ROWS_PER_TILE = 8
# Without asking for more, a block gets this much.
MAX_SHARED_BYTES = 48 * 1024
ZERO_BITS = 0xF


# For up to so many tokens: (at least so many tiles of 16 outputs, row_tiles, warps), the fastest of those tried at the
# shapes of Llama-70B on an H200 (results/w4a16_h200_202611.json). More outputs a block read the activations less often,
# and leave fewer blocks to fill the card. A deeper ring was never faster.
LAUNCHES = {
    4: ((3072, 2, 4), (512, 2, 8), (0, 1, 8)),
    8: ((3072, 2, 4), (1024, 4, 4), (512, 2, 8), (0, 1, 8)),
    16: ((1024, 2, 4), (512, 2, 8), (0, 1, 8)),
    32: ((0, 2, 4),),
    64: ((512, 2, 4), (0, 1, 4)),
}


@dataclass(frozen=True)
class Launch:
    """How the kernel is compiled: tokens and outputs a block takes, its warps, and the stages of each one's ring."""

    token_tiles: int
    row_tiles: int
    warps: int
    depth: int

    def shared_bytes(self) -> int:
        """Shared memory of a block: the rings of its warps, later their sums."""
        ring = self.depth * self.row_tiles * (1024 + 64)
        return self.warps * max(ring, self.row_tiles * self.token_tiles * 512)

    def options(self) -> list[str]:
        return [f"-DNT={self.token_tiles}", f"-DRT={self.row_tiles}", f"-DWARPS={self.warps}", f"-DDEPTH={self.depth}"]


class W4A16Linear(GroupedLinear):
    """[..., in] -> [..., out], bf16. Holds 4 bits a weight and 32 a group: a float32 scale that ends in the zero."""

    packed: Tensor
    scales: Tensor

    def __init__(self, weight: QuantizedWeight) -> None:
        grouped = group_inputs(weight, GROUP_SIZE)
        super().__init__(weight.shape[0], grouped.order, max_rows=MAX_ROWS)
        self.register_buffer("packed", pack_values(grouped.values))
        self.register_buffer("scales", pack_scales(weight, grouped.groups))

    def multiply(self, rows: Tensor) -> Tensor:
        return w4a16(rows, self.packed, self.scales)

    def dequantize(self) -> Tensor:
        return dequantize_w4(self.packed, self.scales)


def refusal(weight: QuantizedWeight, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot take this weight, in a few words; None: it can."""
    num_out, num_in = weight.shape
    checks = {
        "not on a card of sm_80 or later": has_tensor_cores(weight.values.device),
        f"{weight.bits} bits": weight.bits == 4,
        "a codebook": weight.codebook is None,
        f"activations in {str(dtype).removeprefix('torch.')}": dtype == torch.bfloat16,
        f"{num_out} outputs": num_out % OUTPUTS_PER_TILE == 0 and num_out > 0,
        f"{num_in} inputs": num_in % GROUP_SIZE == 0 and num_in > 0,
    }
    failed = [reason for reason, passed in checks.items() if not passed]
    if not failed and not fits_groups(weight):
        failed = [f"groups of other than {GROUP_SIZE}"]
    return failed[0] if failed else compile_problem(weight.values.device.index)


def has_tensor_cores(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def fits_groups(weight: QuantizedWeight) -> bool:
    """Whether each 128 inputs share a scale, once they are sorted by group."""
    blocks = weight.groups().sort().values.view(-1, GROUP_SIZE)
    return bool((blocks[:, 0] == blocks[:, -1]).all())


def pack_values(values: Tensor) -> Tensor:
    """[out, in] uint8 below 16 -> [out / 16, in / 128, 2, 32, 4] int32 in the order of w4a16.cu.

    Nibble j of word i of half h, in lane (g, c), is row g + 8 * (j & 1) and
    input 64 * h + 32 * (i >> 1) + 8 * c + 4 * (i & 1) + 2 * (j >> 1 & 1) + (j >> 2).
    """
    # tile, high row, g, group, h, i >> 1, c, i & 1, second pair, odd
    parts = values.view(-1, 2, 8, values.shape[1] // GROUP_SIZE, 2, 2, 4, 2, 2, 2).to(torch.int32)
    # -> tile, group, h, g, c, i >> 1, i & 1, odd, second pair, high row
    nibbles = parts.permute(0, 3, 4, 2, 6, 5, 7, 9, 8, 1).flatten(-3)
    words = nibbles[..., 0].clone()
    for j in range(1, 8):
        words |= nibbles[..., j] << (4 * j)
    return words.flatten(5, 6).flatten(3, 4).contiguous()


def unpack_values(packed: Tensor) -> Tensor:
    """The inverse of `pack_values`, as int32."""
    tiles, groups = packed.shape[:2]
    shifts = torch.arange(0, 32, 4, device=packed.device, dtype=torch.int32)
    nibbles = (packed.unsqueeze(-1) >> shifts) & 15
    parts = nibbles.view(tiles, groups, 2, 8, 4, 2, 2, 2, 2, 2)
    return parts.permute(0, 9, 3, 1, 2, 5, 4, 6, 8, 7).reshape(tiles * OUTPUTS_PER_TILE, groups * GROUP_SIZE)


def unpack_weight(packed: Tensor, scales: Tensor) -> Tensor:
    """[out, in] float32, columns as they are packed: what the kernels compute with, by plain torch."""
    per_output = scales.transpose(1, 2).reshape(-1, scales.shape[1]).contiguous()
    zeros = per_output.view(torch.int32) & ZERO_BITS
    values = unpack_values(packed).unflatten(1, (-1, GROUP_SIZE)) - zeros.unsqueeze(-1)
    return (values * per_output.unsqueeze(-1)).flatten(1)


def pack_scales(weight: QuantizedWeight, groups: Tensor) -> Tensor:
    """[out / 16, groups, 16] float32 for these groups, the last 4 bits of each replaced by the zero."""
    # A single scale stands for whatever group.
    groups = groups.clamp(max=weight.scales.shape[1] - 1)
    scales = weight.scales[:, groups].float().contiguous()
    zeros = 8 if weight.zeros is None else weight.zeros[:, groups].to(torch.int32)
    joined = (scales.view(torch.int32) & ~ZERO_BITS) | zeros
    return joined.view(torch.float32).view(-1, OUTPUTS_PER_TILE, len(groups)).transpose(1, 2).contiguous()


@torch.library.custom_op("launch70b::w4a16", mutates_args=())
def w4a16(rows: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """[m, in] bf16 -> [m, out] bf16, m from 1 to 64, by the packed weight."""
    output = rows.new_empty(len(rows), packed.shape[0] * OUTPUTS_PER_TILE)
    run_kernel(choose_launch(len(rows), len(packed)), rows.contiguous(), packed, scales, output)
    return output


@w4a16.register_fake
def _(rows: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    return rows.new_empty(len(rows), packed.shape[0] * OUTPUTS_PER_TILE)


def choose_launch(num_rows: int, num_tiles: int) -> Launch:
    """The launch for `num_rows` tokens and a weight of `num_tiles` times 16 outputs, from `LAUNCHES`."""
    most_rows = next(most for most in LAUNCHES if num_rows <= most)
    row_tiles, warps = next((rows, warps) for least, rows, warps in LAUNCHES[most_rows] if num_tiles >= least)
    while num_tiles % row_tiles:
        row_tiles //= 2
    return Launch(max(1, most_rows // ROWS_PER_TILE), row_tiles, warps, depth=2)


def run_kernel(launch: Launch, rows: Tensor, packed: Tensor, scales: Tensor, output: Tensor) -> None:
    tiles, groups = packed.shape[:2]
    compile_kernel("w4a16", launch, packed.device.index)(
        grid=(tiles // launch.row_tiles, 1, 1),
        block=(launch.warps * 32, 1, 1),
        args=[packed, scales, rows, output, tiles * OUTPUTS_PER_TILE, groups * GROUP_SIZE, len(rows)],
    )


@torch.library.custom_op("launch70b::dequantize_w4", mutates_args=())
def dequantize_w4(packed: Tensor, scales: Tensor) -> Tensor:
    """The weight as [out, in] bf16, columns as they are packed."""
    tiles, groups = packed.shape[:2]
    weight = torch.empty(tiles * OUTPUTS_PER_TILE, groups * GROUP_SIZE, dtype=torch.bfloat16, device=packed.device)
    compile_kernel("dequantize_w4", Launch(1, 1, 8, 2), packed.device.index)(
        grid=(tiles, -(-groups // 8), 1), block=(256, 1, 1), args=[packed, scales, weight, groups]
    )
    return weight


@dequantize_w4.register_fake
def _(packed: Tensor, scales: Tensor) -> Tensor:
    tiles, groups = packed.shape[:2]
    return torch.empty(tiles * OUTPUTS_PER_TILE, groups * GROUP_SIZE, dtype=torch.bfloat16, device=packed.device)


@cache
def compile_problem(device_index: int) -> str | None:
    """Why the kernel cannot be compiled on this card; None: it can."""
    try:
        compile_kernel("w4a16", choose_launch(1, 512), device_index)
    except Exception as error:  # NVRTC missing or of another version, or a driver that refuses the code.
        return f"it cannot be compiled: {str(error).splitlines()[0]}"
    return None


@cache
def compile_kernel(name: str, launch: Launch, device_index: int) -> Callable[..., None]:
    """A kernel of w4a16.cu, compiled for the card of this process."""
    source = (Path(__file__).parent / "w4a16.cu").read_text(encoding="utf-8")
    kernel: Callable[..., None] = torch.cuda._compile_kernel(source, name, nvcc_options=launch.options())
    return kernel
