"""Inputs of a quantised weight in the order that kernels want, those of a group side by side; linears over them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.quantized import QuantizedWeight


@dataclass(frozen=True)
class GroupedWeight:
    """values [out, in] as in the weight; groups [in / group_size] int64, the group of each block of inputs.

    `order` [in] is the input of the weight that each column is; None where columns are in the weight's own order.
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
    return GroupedWeight(weight.values, weight.groups()[order][::group_size], order)


class GroupedLinear(nn.Module):
    """[..., in] -> [..., out]: up to `max_rows` rows by a kernel, more by F.linear with the weight dequantised.

    `order`: where the inputs are regrouped (act order), the input that each column multiplies.
    """

    order: Tensor | None

    def __init__(self, num_out: int, order: Tensor | None, *, max_rows: int) -> None:
        super().__init__()
        self.num_out = num_out
        self.max_rows = max_rows
        self.register_buffer("order", order)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.order is not None:
            hidden = hidden[..., self.order]
        rows = hidden.reshape(-1, hidden.shape[-1])
        if len(rows) > self.max_rows:
            return F.linear(hidden, self.dequantize())
        return self.multiply(rows).view(*hidden.shape[:-1], self.num_out)

    def multiply(self, rows: Tensor) -> Tensor:
        """[m, in] -> [m, out], columns as they are packed."""
        raise NotImplementedError

    def dequantize(self) -> Tensor:
        """[out, in], columns as they are packed."""
        raise NotImplementedError
