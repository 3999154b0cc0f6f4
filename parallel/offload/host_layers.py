"""Decoder layers of a model whose weights lie in host memory, taken there one by one as they load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from parallel.offload.host_memory import HostBuffer, HostMemory
from parallel.offload.layout import Layout


@dataclass(frozen=True)
class HostLayer:
    layout: Layout
    buffer: HostBuffer

    @property
    def memory(self) -> Tensor:
        """[num_bytes] uint8 in host memory."""
        return self.buffer.memory


class HostLayers:
    """The layers of one model with the indices `streamed`, once `keep` has had them."""

    def __init__(self, streamed: Sequence[int], device: torch.device) -> None:
        self.streamed, self.device = tuple(sorted(streamed)), device
        self.host_memory = HostMemory(len(self.streamed), device)
        self.kept: dict[int, HostLayer] = {}

    @property
    def num_bytes(self) -> int:
        """Of host memory, which a pass copies to the device."""
        return sum(layer.layout.num_bytes for layer in self.kept.values())

    def keep(self, index: int, layer: nn.Module) -> None:
        """Takes the weights of a merged layer off the device, if it is one of the streamed; shapes remain."""
        if index not in self.streamed:
            return
        layout = Layout.of(layer)
        buffer = self.host_memory.take(layout.num_bytes)
        for view, tensor in zip(layout.views(buffer.memory), layout.tensors(), strict=True):
            view.copy_(tensor, non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        layout.unbind()
        self.kept[index] = HostLayer(layout, buffer)
