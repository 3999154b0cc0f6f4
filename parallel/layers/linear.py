"""Column- and row-parallel layers on DeepSpeed's classes, calling our communicator.

DeepSpeed's AutoTP builds its own classes and freezes how each dimension is dealt over the ranks; `adopt` gives those
objects our forward. Ours skips the autograd wrappers (about 7 us of host time a layer, measured on a CPU) and sends
the sum through whichever transport was chosen. Each class also knows which slice of the checkpoint it owns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.module_inject.layers import (
    LinearAllreduce,
    LinearLayer,
    TensorParallel_Layer,
    VocabParallelEmbedding,
    VocabParallelLinear,
)
from torch import Tensor, nn

from parallel.communicator import Communicator
from parallel.footprint import MIN_FUSED_ROWS
from parallel.kernels.blocks import Block, whole
from parallel.kernels.fused import add_rms_norm

Slices = tuple[slice, ...]


class ShardedLayer(TensorParallel_Layer):
    """What all our sharded layers share: the communicator and the range of the split dimension this rank owns.

    `packed`, a module, multiplies by a quantised weight (parallel/kernels); None where `weight` is there instead.
    `on_host`: such a weight is to be packed for the host to multiply by, where it can be.
    `fused_rows`: up to so many rows multiply by it as it is packed, on a card that can.
    """

    communicator: Communicator
    packed: Any
    on_host: bool = False
    fused_rows: int = MIN_FUSED_ROWS

    def local_range(self) -> slice:
        start = sum(self._partition_sizes[: self.tp_index])
        return slice(start, start + self._partition_sizes[self.tp_index])

    def local_slices(self, parameter: str) -> Slices:
        """Slices of the full checkpoint tensor that this rank holds for `parameter` ("weight" or "bias")."""
        return (self.local_range(),)

    def multiply(self, hidden: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., in] -> [..., out], with this rank's weight in whatever form it has."""
        if self.packed is None:
            return F.linear(hidden, self.weight, bias)
        output: Tensor = self.packed(hidden)
        return output if bias is None else output.add_(bias)

    def dequantizes(self, num_rows: int) -> bool:
        """Whether numbers of the weight are made before so many rows are multiplied: not where it is kept as such."""
        return self.packed is not None and self.packed.dequantizes(num_rows)

    def blocks(self, dtype: torch.dtype) -> list[Block]:
        """The weight without its bias, for products of many inputs of `dtype`."""
        if self.packed is None:
            return whole(self.weight)
        blocks: list[Block] = self.packed.blocks(dtype)
        return blocks


class ColumnParallelLinear(ShardedLayer, LinearLayer):
    """[..., in] -> [..., local out]: weight [local out, in], no communication."""

    def forward(self, hidden: Tensor) -> Tensor:
        return self.multiply(hidden, self.bias)


@dataclass(frozen=True)
class Update:
    """What is to be added to the residual, [tokens, out]; `communicator` has still to sum it, where there is one."""

    value: Tensor
    communicator: Communicator | None

    def add_norm(self, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Adds it to `residual` in place; returns the RMS norm of that. Once, and nothing else after it."""
        if self.communicator is not None:
            return self.communicator.all_reduce_add_norm(self.value, residual, weight, eps)
        normed: Tensor = add_rms_norm(self.value, residual, weight, eps)
        return normed

    def total(self) -> Tensor:
        """[tokens, out], summed. Once, and nothing else after it."""
        return self.value if self.communicator is None else self.communicator.all_reduce(self.value)


class RowParallelLinear(ShardedLayer, LinearAllreduce):
    """[..., local in] -> [..., out]: weight [out, local in], summed over the ranks, bias added once."""

    def local_slices(self, parameter: str) -> Slices:
        return (slice(None), self.local_range()) if parameter == "weight" else (slice(None),)

    def forward(self, hidden: Tensor) -> Tensor:
        output = self.communicator.all_reduce(self.multiply(hidden))
        return output if self.bias is None else output.add_(self.bias)

    def update(self, hidden: Tensor) -> Update:
        """What forward gives, summed no sooner than it is used; a bias, which comes after the sum, does not wait."""
        if self.bias is not None:
            return Update(self(hidden), None)
        return Update(self.multiply(hidden), self.communicator)


class VocabularyHead(ShardedLayer, VocabParallelLinear):
    """[..., hidden] -> [..., local vocabulary]: logits of this rank's tokens; sampling puts them together."""

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight, self.bias)


class VocabularyEmbedding(ShardedLayer, VocabParallelEmbedding):
    """Token ids [...] -> [..., hidden]: each rank looks up its own tokens, the sum has them all."""

    def forward(self, ids: Tensor) -> Tensor:
        if self.communicator.world_size == 1:
            return F.embedding(ids, self.weight)
        local = ids - self.vocab_start_index
        foreign = (local < 0) | (local >= self._partition_sizes[self.tp_index])
        output = F.embedding(local.masked_fill(foreign, 0), self.weight).masked_fill(foreign.unsqueeze(-1), 0)
        return self.communicator.all_reduce(output)


OURS = {
    LinearLayer: ColumnParallelLinear,
    LinearAllreduce: RowParallelLinear,
    VocabParallelLinear: VocabularyHead,
    VocabParallelEmbedding: VocabularyEmbedding,
}

# Those whose weights checkpoints quantise.
LINEARS = (ColumnParallelLinear, RowParallelLinear)


def adopt(layer: TensorParallel_Layer, communicator: Communicator, fused_rows: int) -> None:
    """Turns a layer that AutoTP built into ours. The class differs in its forward only, so the object stays.

    Raises:
        ValueError: AutoTP chose a class that has no counterpart here.
    """
    if type(layer) not in OURS:
        names = ", ".join(cls.__name__ for cls in OURS)
        raise ValueError(f"AutoTP made {layer.name} a {type(layer).__name__}; only {names} are supported.")
    layer.__class__ = OURS[type(layer)]
    layer.communicator = communicator
    layer.packed = None
    layer.fused_rows = fused_rows


@contextmanager
def swapped_communicator(model: nn.Module, communicator: Communicator) -> Iterator[None]:
    """Every sharded layer of `model` talks through `communicator` inside the context, and as before after it."""
    layers = [layer for layer in model.modules() if isinstance(layer, ShardedLayer)]
    before = [layer.communicator for layer in layers]
    for layer in layers:
        layer.communicator = communicator
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.communicator = old
