"""Column-parallel linears that read the same input, as one: q, k and v, and gate and up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from parallel.kernels.blocks import Block, side_by_side, whole, with_bias
from parallel.kernels.fused import silu_mul
from parallel.kernels.merge import merge
from parallel.kernels.w4a16 import W4A16Linear
from parallel.kernels.w8a16 import W8A16Linear
from parallel.layers.layout import gather_layer
from parallel.layers.linear import ColumnParallelLinear

# Of more tokens two launches are as fast as one, or faster: 106 us for 64 where one takes 114, 65.5 for 32 where one
# takes 64.2 (gate and up of Llama-70B in 4 bits at TP2 on an H200).
MAX_SWIGLU_ROWS = 32


class MergedLinear(nn.Module):
    """[..., in] -> [..., sum of local outs]: the outputs of `layers`, side by side, in one launch."""

    multiply: Any
    bias: Tensor | None

    def __init__(self, weight: Tensor | nn.Module, bias: Tensor | None) -> None:
        """`weight`: [sum of outs, in], or what multiplies by a quantised one."""
        super().__init__()
        self.multiply = weight if isinstance(weight, nn.Module) else PlainWeight(weight)
        self.register_buffer("bias", bias)

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.multiply(hidden)
        return output if self.bias is None else output.add_(self.bias)

    def dequantizes(self, num_rows: int) -> bool:
        """Whether numbers of the weight are made before so many rows are multiplied: not where it is kept as such."""
        found: bool = self.multiply.dequantizes(num_rows)
        return found

    def blocks(self, dtype: torch.dtype) -> list[Block]:
        """For products of many inputs of `dtype`."""
        return with_bias(self.multiply.blocks(dtype), self.bias)


class PlainWeight(nn.Module):
    """[..., in] -> [..., out] by a weight of numbers."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight)

    def dequantizes(self, num_rows: int) -> bool:
        return False

    def blocks(self, dtype: torch.dtype) -> list[Block]:
        return whole(self.weight)


class SideBySide(nn.Module):
    """The same of linears whose weights cannot be one: each on its own."""

    layers: Any

    def __init__(self, layers: Sequence[ColumnParallelLinear]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.cat([layer(hidden) for layer in self.layers], dim=-1)

    def dequantizes(self, num_rows: int) -> bool:
        """Whether any of them does."""
        return any(layer.dequantizes(num_rows) for layer in self.layers)

    def blocks(self, dtype: torch.dtype) -> list[Block]:
        """For products of many inputs of `dtype`."""
        return side_by_side(with_bias(layer.blocks(dtype), layer.bias) for layer in self.layers)


def swiglu(gate_up: nn.Module, hidden: Tensor) -> Tensor:
    """[tokens, in] -> [tokens, half of outs]: silu of the first half of the outputs, rounded, times the second.

    In one launch for few tokens and packed weights.
    """
    if isinstance(gate_up, MergedLinear) and gate_up.bias is None and len(hidden) <= MAX_SWIGLU_ROWS:
        packed = gate_up.multiply
        if isinstance(packed, W4A16Linear | W8A16Linear):
            return packed.swiglu(hidden)
    activated: Tensor = silu_mul(gate_up(hidden))
    return activated


def merge_linears(layers: Sequence[ColumnParallelLinear]) -> nn.Module:
    """One module in place of `layers`, whose weights it takes over: they must not be used again."""
    weight = merge_weights(layers)
    if weight is None:
        return SideBySide(layers)
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    for layer in layers:
        layer.weight = layer.bias = layer.packed = None
    return MergedLinear(weight, bias)


def merge_weights(layers: Sequence[ColumnParallelLinear]) -> Tensor | nn.Module | None:
    """None where they are stored in different ways."""
    packed = [layer.packed for layer in layers if layer.packed is not None]
    if not packed:
        return torch.cat([layer.weight for layer in layers])
    return merge(packed) if len(packed) == len(layers) else None


class LayerMerger:
    """Merges each decoder layer of a model as soon as its weights are in place.

    What the layer's parts held is then free while the next layer loads, whose parts are of the same sizes. Merged at
    the end of the load instead, they leave holes between the weights (4 of 44 GiB, 70B in 4 bits on an H200). On a card
    the tensors of the layer then move into one piece of memory: each by itself leaves holes too small to be given back
    (1.2 of 19.6 GiB, one rank of two).

    Args:
        on_merged: called with the index and the module of each layer that is done.
    """

    def __init__(
        self, model: PreTrainedModel, on_merged: Callable[[int, nn.Module], None] = lambda index, layer: None
    ) -> None:
        self.layers = dict(model.model.layers.named_children())
        self.on_merged = on_merged

    def __call__(self, name: str) -> None:
        """`name`: of a parameter of the model that has got its values."""
        index = name.removeprefix("model.layers.").partition(".")[0]
        layer = self.layers.get(index)
        if layer is not None and not any(parameter.is_meta for parameter in layer.parameters()):
            merge_layer(layer)
            if next(layer.parameters()).device.type == "cuda":
                gather_layer(layer)
            self.on_merged(int(index), layer)
            del self.layers[index]


def merge_layer(layer: Any) -> None:
    """Merges the projections of a decoder layer, in place."""
    attention, mlp = layer.self_attn, layer.mlp
    sizes = local_sizes(layer)
    attention.qkv = merge_linears([attention.q_proj, attention.k_proj, attention.v_proj])
    attention.local_sizes = sizes
    mlp.gate_up = merge_linears([mlp.gate_proj, mlp.up_proj])
    for parent, names in ((attention, ("q_proj", "k_proj", "v_proj")), (mlp, ("gate_proj", "up_proj"))):
        for name in names:
            delattr(parent, name)


def linears_of(layer: Any) -> tuple[Any, ...]:
    """Of a merged decoder layer, all."""
    attention, mlp = layer.self_attn, layer.mlp
    return attention.qkv, attention.o_proj, mlp.gate_up, mlp.down_proj


def is_merged(layer: Any) -> bool:
    return hasattr(layer.self_attn, "qkv")


def local_sizes(layer: Any) -> tuple[int, int]:
    """Outputs of the query and the key projection on this rank."""
    attention = layer.self_attn
    if is_merged(layer):
        sizes: tuple[int, int] = attention.local_sizes
        return sizes
    query, key = attention.q_proj, attention.k_proj
    return query._partition_sizes[query.tp_index], key._partition_sizes[key.tp_index]
