"""torch's own int4 multiplication on cards: activations in bf16, weights packed for tensor cores of sm_80 and later.

It computes weight = (value - 8) * scale + shift with bf16 scales and shifts, so that shift = (8 - zero) * scale. The
layout is that of aten/src/ATen/native/cuda/int4mm.cu (matrix_to_m16n8k16_Bint4_layout).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from parallel.footprint import MAX_TINYGEMM_ROWS
from parallel.kernels.dequantize import pack_pairs
from parallel.kernels.grouping import GroupedLinear, group_inputs
from parallel.quantized import QuantizedWeight, by_blocks

GROUP_SIZES = (256, 128, 64, 32)
# Tiles of 16 inputs that lie together; most first: fewer, longer reads.
INNER_TILES = (8, 4, 2)
OUTPUTS_PER_TILE = 8


class ShiftedInt4Linear(GroupedLinear):
    """[..., in] -> [..., out], bf16, as torch's int4 operators have it: weight = (value - 8) * scale + shift.

    Holds 4 bits a weight and 32 a group: `scales_and_shifts` [groups, out, 2] bf16.
    """

    packed: Tensor
    scales_and_shifts: Tensor
    group_size: int

    def unpack(self, rows: slice) -> Tensor:
        """[rows, in] uint8 below 16, of whole tiles of outputs."""
        raise NotImplementedError

    def dequantize_in_blocks(self, outputs: slice, multiple: int) -> Tensor:
        """[outputs, in] bf16, columns as they are packed, in plain torch; blocks are multiples of so many outputs."""
        shape = (outputs.stop - outputs.start, self.num_in)

        def some(rows: slice) -> Tensor:
            return self.dequantize_rows(slice(outputs.start + rows.start, outputs.start + rows.stop))

        return by_blocks(shape, torch.bfloat16, self.packed.device, some, multiple)

    def dequantize_rows(self, rows: slice) -> Tensor:
        values = self.unpack(rows)
        # [groups, rows, 2] -> scales and shifts of [rows, groups, 1].
        scales, shifts = self.scales_and_shifts[:, rows].permute(2, 1, 0).unsqueeze(-1)
        centred = values.view(len(values), -1, self.group_size).to(torch.bfloat16).sub_(8)
        # Rounded once, as in the operators.
        return torch.addcmul(shifts, centred, scales).flatten(1)


class TinygemmLinear(ShiftedInt4Linear):
    """By the operator for cards."""

    def __init__(self, weight: QuantizedWeight) -> None:
        group_size = find_group_size(weight)
        assert group_size is not None, "refusal() comes first"
        grouped = group_inputs(weight, group_size)
        super().__init__(weight.shape, grouped.order, max_rows=MAX_TINYGEMM_ROWS)
        self.group_size = group_size
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack(
            pack_pairs(grouped.columns()), inner_tiles(weight.shape[1])
        ))  # fmt: skip
        self.register_buffer("scales_and_shifts", scales_and_shifts(weight, grouped.groups))

    def multiply(self, rows: Tensor) -> Tensor:
        product: Tensor = torch.ops.aten._weight_int4pack_mm(rows, self.packed, self.group_size, self.scales_and_shifts)
        return product

    def dequantize(self, outputs: slice) -> Tensor:
        return self.dequantize_in_blocks(outputs, OUTPUTS_PER_TILE)

    def unpack(self, rows: slice) -> Tensor:
        return unpack_tiles(self.packed[rows.start // OUTPUTS_PER_TILE : rows.stop // OUTPUTS_PER_TILE])


def refusal(weight: QuantizedWeight, dtype: torch.dtype) -> str | None:
    """Why tinygemm cannot take this weight, in a few words; None: it can."""
    num_out, num_in = weight.shape
    checks = {
        "not on a card": weight.values.device.type == "cuda",
        f"{weight.bits} bits": weight.bits == 4,
        "a codebook": weight.codebook is None,
        f"activations in {str(dtype).removeprefix('torch.')}": dtype == torch.bfloat16,
        f"{num_out} outputs": num_out % OUTPUTS_PER_TILE == 0 and num_out > 0,
        f"{num_in} inputs": num_in % (16 * min(INNER_TILES)) == 0 and num_in > 0,
    }
    failed = [reason for reason, passed in checks.items() if not passed]
    if not failed and find_group_size(weight) is None:
        failed = ["irregular groups"]
    return failed[0] if failed else layout_problem(weight.values.device)


@cache
def layout_problem(device: torch.device) -> str | None:
    """Whether `unpack_tiles` takes apart what the operator multiplies by; asked once of each card.

    The layout is torch's own business and may change. Rows of the identity make the operator show its weights, which
    scales of powers of two and no shifts leave exact.
    """
    generator = torch.Generator(device).manual_seed(0)
    for tiles in INNER_TILES:
        num_in = 16 * tiles * 3
        values = torch.randint(0, 16, (64, num_in), generator=generator, device=device, dtype=torch.uint8)
        weight = QuantizedWeight(values, 4, torch.full((64, 1), 0.25, device=device), None, num_in)
        layer = TinygemmLinear(weight)
        identity = torch.eye(num_in, dtype=torch.bfloat16, device=device)
        if not torch.equal(layer.multiply(identity).t(), layer.dequantize(slice(0, len(values)))):
            return "its layout is another one in this torch"
    return None


def find_group_size(weight: QuantizedWeight) -> int | None:
    """The largest group size it knows into which the groups can be cut, once inputs are sorted by group."""
    groups = weight.groups().sort().values
    for size in GROUP_SIZES:
        if len(groups) % size == 0:
            blocks = groups.view(-1, size)
            if bool((blocks[:, 0] == blocks[:, -1]).all()):
                return size
    return None


def inner_tiles(num_in: int) -> int:
    return next(tiles for tiles in INNER_TILES if num_in % (16 * tiles) == 0)


def scales_and_shifts(weight: QuantizedWeight, groups: Tensor) -> Tensor:
    """[len(groups), out, 2] bf16, for the groups in this order."""
    # A single scale stands for whatever group.
    groups = groups.clamp(max=weight.scales.shape[1] - 1)
    scales = weight.scales.float()
    shifts = torch.zeros_like(scales) if weight.zeros is None else (8 - weight.zeros.float()) * scales
    both = torch.stack([scales, shifts], dim=-1)[:, groups]
    return both.transpose(0, 1).to(torch.bfloat16).contiguous()


def unpack_tiles(packed: Tensor) -> Tensor:
    """[tiles, super tiles, 32, words] int32, as the kernel reads it -> [tiles * 8, in] uint8.

    A lane of 32 = 4 * output + pair has, for every two tiles of 16 inputs, one word: bytes (odd input of the pair,
    second tile), and in the two halves of a byte inputs that are 8 apart.
    """
    num_tiles, num_super, lanes, num_words = packed.shape
    pairs = packed.contiguous().view(torch.uint8).view(num_tiles, num_super, lanes // 4, 4, num_words, 2, 2)
    values = torch.stack([pairs & 15, pairs >> 4], dim=-1)
    # tile, super, output, pair, word, odd, second, half -> tile, output, super, word, second, half, pair, odd
    return values.permute(0, 2, 1, 4, 6, 7, 3, 5).reshape(num_tiles * OUTPUTS_PER_TILE, -1)
