"""Inputs of a quantised weight in the order that kernels want, those of a group side by side; linears over them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from parallel.footprint import DEQUANTIZED_AT_A_TIME
from parallel.kernels.blocks import Block
from parallel.quantized import QuantizedWeight

# Outputs of a block are a multiple of it, which the tiles of every kernel divide.
OUTPUTS_PER_BLOCK = 128


@dataclass(frozen=True)
class GroupedWeight:
    """values [out, in] as in the weight; groups [in / group_size] int64, the group of each block of inputs.

    `order` [in] int32 is the input of the weight that each column is; None where columns are in the weight's own order.
    """

    values: Tensor
    groups: Tensor
    order: Tensor | None

    def columns(self, rows: slice = slice(None)) -> Tensor:
        """[rows, in]: values of some outputs, in this order."""
        return self.values[rows] if self.order is None else self.values[rows][:, self.order]


def group_inputs(weight: QuantizedWeight, group_size: int) -> GroupedWeight:
    """Sorts inputs by group (act order scatters them); each `group_size` of them must then share one."""
    order = None if weight.group_of is None else weight.group_of.argsort(stable=True)
    if order is None or torch.equal(order, torch.arange(len(order), device=order.device)):
        return GroupedWeight(weight.values, weight.groups()[::group_size], None)
    return GroupedWeight(weight.values, weight.groups()[order][::group_size], order.int())


class GroupedLinear(nn.Module):
    """[..., in] -> [..., out]: up to `max_rows` rows by a kernel, more by plain products with the weight dequantised.

    A large weight is dequantised some outputs at a time, so that it takes little memory beside the packed one.
    `order`: where the inputs are regrouped (act order), the input that each column multiplies.
    """

    order: Tensor | None

    def __init__(self, shape: tuple[int, int], order: Tensor | None, *, max_rows: int) -> None:
        """`shape` of the weight: outputs, inputs."""
        super().__init__()
        self.num_out, self.num_in = shape
        self.max_rows = max_rows
        self.register_buffer("order", order)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.ordered(hidden)
        rows = hidden.reshape(-1, hidden.shape[-1])
        if self.dequantizes(len(rows)):
            return self.multiply_dequantized(rows).view(*hidden.shape[:-1], self.num_out)
        return self.multiply(rows).view(*hidden.shape[:-1], self.num_out)

    def dequantizes(self, num_rows: int) -> bool:
        """Whether so many rows are multiplied by the weight as numbers that are made first, not as it is packed."""
        return num_rows > self.max_rows

    def ordered(self, hidden: Tensor) -> Tensor:
        """Columns as they are packed."""
        return hidden if self.order is None else hidden[..., self.order]

    def multiply_dequantized(self, rows: Tensor) -> Tensor:
        """[m, in] -> [m, out]"""
        output = rows.new_empty(len(rows), self.num_out)
        for outputs in output_blocks(self.num_out, self.num_in):
            torch.mm(rows, self.dequantize(outputs).t(), out=output[:, outputs])
        return output

    def blocks(self, dtype: torch.dtype) -> list[Block]:
        """For products of many inputs, `dtype` their own."""
        return [
            Block(outputs, partial(self.dequantize, outputs), self.order)
            for outputs in output_blocks(self.num_out, self.num_in)
        ]

    def multiply(self, rows: Tensor) -> Tensor:
        """[m, in] -> [m, out], columns as they are packed."""
        raise NotImplementedError

    def dequantize(self, outputs: slice) -> Tensor:
        """[outputs, in], columns as they are packed; outputs in whole tiles of the packed weight."""
        raise NotImplementedError


def output_blocks(num_out: int, num_in: int) -> list[slice]:
    """Blocks of outputs, as equal as tiles allow, of at most DEQUANTIZED_AT_A_TIME weights."""
    tiles = -(-num_out // OUTPUTS_PER_BLOCK)
    most = max(1, DEQUANTIZED_AT_A_TIME // max(1, num_in * OUTPUTS_PER_BLOCK))
    count = max(1, -(-tiles // most))
    size = max(1, -(-tiles // count)) * OUTPUTS_PER_BLOCK
    return [slice(start, min(start + size, num_out)) for start in range(0, num_out, size)]
