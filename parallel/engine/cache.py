"""The KV cache: storage for a planned number of tokens, taken once, handed to attention as views of what is filled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class PlannedLayer(DynamicLayer):
    """One layer's keys and values, [batch, local KV heads, max_context, head_dim], of which `length` are filled."""

    def __init__(self, max_context: int) -> None:
        super().__init__()
        self.max_context = max_context
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes the storage when the first keys show batch size, local heads, dtype and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads, _, head_dim = key_states.shape
        self.keys = key_states.new_empty(batch, heads, self.max_context, head_dim)
        self.values = value_states.new_empty(batch, heads, self.max_context, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends [batch, heads, new, head_dim] and returns views of all that is filled."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        assert end <= self.max_context, f"{end=} tokens exceed {self.max_context=}"
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self, *args: Any) -> int:
        return self.length

    def reset(self) -> None:
        self.length = 0


class KVCache(Cache):
    """`num_layers` planned layers; `rewind` forgets the newest tokens without touching memory."""

    def __init__(self, num_layers: int, max_context: int) -> None:
        super().__init__(layers=[PlannedLayer(max_context) for _ in range(num_layers)])

    def rewind(self, length: int) -> None:
        for layer in self.layers:
            layer.length = length

    def num_bytes(self) -> int:
        """Bytes of storage taken so far on this rank."""
        tensors = [t for layer in self.layers for t in (layer.keys, layer.values) if isinstance(t, torch.Tensor)]
        return sum(t.nbytes for t in tensors)
