"""torch's int4 multiplication on the host: bf16 activations, weights in the order that its kernel for the CPU reads.

weight = (value - 8) * scale + shift, as tinygemm's, with bf16 scales and shifts. The order is that of
aten/src/ATen/native/cpu/int4mm_kernel.cpp (weight_to_int4pack_kernel): blocks of 64 outputs where the CPU has AVX-512,
of 32 where it has AVX2; in a block, for each input in turn, half as many bytes, an output of the first half in the low
bits and one of the second in the high.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from parallel.kernels import dequantize_host
from parallel.kernels.grouping import group_inputs
from parallel.kernels.tinygemm import ShiftedInt4Linear, find_group_size, scales_and_shifts
from parallel.offload.exchange import multiply_on_host
from parallel.quantized import QuantizedWeight, row_blocks

# By what the CPU can do; of the largest, a weight must have a multiple.
OUTPUTS_PER_BLOCK = (64, 32)


class HostInt4Linear(ShiftedInt4Linear):
    """By the operator for the CPU.

    It multiplies where its weight is: on the host, with rows of the card sent there and back, or by the weight
    dequantised on the card.
    """

    # What the operator reads; an order of inputs is the card's.
    ON_HOST = ("packed", "scales_and_shifts")

    def __init__(self, weight: QuantizedWeight) -> None:
        group_size = find_group_size(weight)
        assert group_size is not None, "refusal() comes first"
        grouped = group_inputs(weight, group_size)
        super().__init__(weight.shape, grouped.order, max_rows=0)
        self.group_size, self.block = group_size, outputs_per_block()
        packed = torch.empty(self.num_out, self.num_in // 2, dtype=torch.uint8, device=weight.values.device)
        for rows in row_blocks(*weight.shape, step=max(OUTPUTS_PER_BLOCK)):
            packed[rows] = pack_values(grouped.columns(rows), self.block)
        self.register_buffer("packed", packed)
        self.register_buffer("scales_and_shifts", scales_and_shifts(weight, grouped.groups))

    def forward(self, hidden: Tensor) -> Tensor:
        if self.packed.device.type != "cpu":
            return super().forward(hidden)
        rows = (hidden if self.order is None else hidden[..., self.order]).reshape(-1, self.num_in)
        return multiply_on_host(rows, self.num_out, self.multiply).view(*hidden.shape[:-1], self.num_out)

    def dequantizes(self, num_rows: int) -> bool:
        return self.packed.device.type != "cpu" and super().dequantizes(num_rows)

    def multiply(self, rows: Tensor) -> Tensor:
        return host_int4(rows, self.packed, self.scales_and_shifts, self.group_size)

    def dequantize(self, outputs: slice) -> Tensor:
        if self.packed.device.type == "cuda":
            return dequantize_host.run(self.packed, self.scales_and_shifts, outputs, self.group_size, self.block)
        return self.dequantize_in_blocks(outputs, max(OUTPUTS_PER_BLOCK))

    def unpack(self, rows: slice) -> Tensor:
        return unpack_values(self.packed[rows], self.block)


def refusal(weight: QuantizedWeight, dtype: torch.dtype) -> str | None:
    """Why the operator cannot take this weight, in a few words; None: it can."""
    num_out, num_in = weight.shape
    checks = {
        f"{weight.bits} bits": weight.bits == 4 and not weight.is_float,
        "a codebook": weight.codebook is None,
        f"activations in {str(dtype).removeprefix('torch.')}": dtype == torch.bfloat16,
        f"{num_out} outputs": num_out % max(OUTPUTS_PER_BLOCK) == 0 and num_out > 0,
        f"{num_in} inputs": num_in > 0 and find_group_size(weight) is not None,
    }
    failed = next((reason for reason, passed in checks.items() if not passed), None) or layout_problem()
    if failed is None and weight.values.device.type == "cuda":
        return dequantize_host.problem(outputs_per_block(), weight.values.device.index)
    return failed


def host_int4(rows: Tensor, packed: Tensor, scales_and_shifts: Tensor, group_size: int) -> Tensor:
    """[m, in] bf16 -> [m, out] bf16, all on the host."""
    product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, group_size, scales_and_shifts)
    return product


def pack_values(values: Tensor, block: int) -> Tensor:
    """[out, in] uint8 below 16 -> [out, in / 2] uint8, in blocks of so many outputs."""
    low, high = values.view(-1, 2, block // 2, values.shape[1]).unbind(1)
    return (low | high << 4).transpose(1, 2).reshape(len(values), -1)


def unpack_values(packed: Tensor, block: int) -> Tensor:
    """The inverse of `pack_values`."""
    num_out, half_in = packed.shape
    both = packed.view(num_out // block, 2 * half_in, block // 2).transpose(1, 2)
    return torch.stack([both & 15, both >> 4], dim=1).reshape(num_out, -1)


def outputs_per_block() -> int:
    """Of this CPU. Raises AssertionError where there is a `layout_problem`."""
    block = find_block()
    assert block is not None, "refusal() comes first"
    return block


def layout_problem() -> str | None:
    return None if find_block() else "this CPU has no AVX2, or its layout is another one in this torch"


@cache
def find_block() -> int | None:
    """Which of the orders is the operator's own; asked once, since the layout is torch's own business."""
    values = torch.randint(0, 16, (128, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    expected = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)
    found = (block for block in OUTPUTS_PER_BLOCK if torch.equal(pack_values(values.byte(), block), expected))
    return next(found, None)
