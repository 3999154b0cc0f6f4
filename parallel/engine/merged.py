"""Column-parallel linears that read the same input, as one: q, k and v, and gate and up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.kernels.merge import merge
from parallel.linear import ColumnParallelLinear


class MergedLinear(nn.Module):
    """[..., in] -> [..., sum of local outs]: the outputs of `layers`, side by side, in one launch."""

    bias: Tensor | None

    def __init__(self, weight: nn.Parameter | None, packed: nn.Module | None, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.packed = weight, packed
        self.register_buffer("bias", bias)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.packed is None:
            return F.linear(hidden, self.weight, self.bias)
        output: Tensor = self.packed(hidden)
        return output if self.bias is None else output.add_(self.bias)


class SideBySide(nn.Module):
    """The same of linears whose weights cannot be one: each on its own."""

    def __init__(self, layers: Sequence[ColumnParallelLinear]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.cat([layer(hidden) for layer in self.layers], dim=-1)


def merge_linears(layers: Sequence[ColumnParallelLinear]) -> nn.Module:
    """One module in place of `layers`, whose weights it takes over: they must not be used again."""
    packed = merge([layer.packed for layer in layers]) if all(layer.packed is not None for layer in layers) else None
    if packed is None and any(layer.packed is not None for layer in layers):
        return SideBySide(layers)
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    weight = None
    if packed is None:
        weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
    for layer in layers:
        layer.weight = layer.bias = layer.packed = None
    return MergedLinear(weight, packed, bias)
