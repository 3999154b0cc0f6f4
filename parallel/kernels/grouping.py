"""Inputs of a quantised weight in the order that kernels want: those of a group side by side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.quantized import QuantizedWeight


@dataclass(frozen=True)
class GroupedWeight:
    """values [out, in] uint8; groups [in / group_size] int64, the group of each block of inputs.

    `order` [in] is the input of the weight that each column is; None where columns are in the weight's own order.
    """

    values: Tensor
    groups: Tensor
    order: Tensor | None


def group_inputs(weight: QuantizedWeight, group_size: int) -> GroupedWeight:
    """Sorts inputs by group (act order scatters them); each `group_size` of them must then share one."""
    order = None if weight.group_of is None else weight.group_of.argsort(stable=True)
    if order is None or torch.equal(order, torch.arange(len(order), device=order.device)):
        return GroupedWeight(weight.values, weight.groups()[::group_size], None)
    return GroupedWeight(weight.values[:, order], weight.groups()[order][::group_size], order)
