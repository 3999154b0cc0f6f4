"""The multiplication that works everywhere: dequantise, then F.linear. What the others are measured against.

Weights stay packed in memory; each call makes the dequantised weight anew and drops it.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.kernels.blocks import Block
from parallel.quantized import QuantizedWeight, by_blocks


class DequantizeLinear(nn.Module):
    """[..., in] -> [..., out] in the dtype of its input. Holds two 4-bit values a byte, or one value of 8 bits."""

    values: Tensor
    scales: Tensor
    zeros: Tensor | None
    group_of: Tensor | None
    codebook: Tensor | None

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        self.bits, self.group_size, self.num_in = weight.bits, weight.group_size, weight.shape[1]
        self.register_buffer("values", pack_pairs(weight.values) if weight.bits == 4 else weight.values)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("zeros", weight.zeros)
        self.register_buffer("group_of", weight.group_of)
        self.register_buffer("codebook", weight.codebook)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.dequantize(hidden.dtype))

    def dequantizes(self, num_rows: int) -> bool:
        """Whatever their number."""
        return True

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[out, in]"""
        shape = (len(self.values), self.num_in)
        return by_blocks(shape, dtype, self.values.device, lambda rows: self.weight(rows).whole(dtype))

    def blocks(self, dtype: torch.dtype) -> list[Block]:
        """For products of many inputs of `dtype`."""
        return [Block(slice(0, len(self.values)), partial(self.dequantize, dtype))]

    def weight(self, rows: slice) -> QuantizedWeight:
        """Some of the outputs, unpacked."""
        values = self.values[rows]
        values = unpack_pairs(values)[:, : self.num_in] if self.bits == 4 else values
        zeros = None if self.zeros is None else self.zeros[rows]
        return QuantizedWeight(
            values, self.bits, self.scales[rows], zeros, self.group_size, self.group_of, self.codebook
        )


def refusal(weight: QuantizedWeight, dtype: torch.dtype) -> str | None:
    """It takes everything."""
    return None


def pack_pairs(values: Tensor) -> Tensor:
    """[rows, n] uint8 below 16 -> [rows, ceil(n / 2)] uint8, the even one of a pair in the high half."""
    padded = F.pad(values, (0, values.shape[1] % 2))
    return (padded[:, ::2] << 4) | padded[:, 1::2]


def unpack_pairs(pairs: Tensor) -> Tensor:
    """The inverse; an odd row has one value too many."""
    return torch.stack([pairs >> 4, pairs & 15], dim=-1).flatten(-2)
