"""Weights of a model that lie in host memory, taken there as they load: decoder layers, and the embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from parallel.checkpoint.load import EMBEDDING_NAME
from parallel.layers.layout import Layout
from parallel.layers.linear import ShardedLayer
from parallel.layers.merged import LayerMerger
from parallel.offload.disk_layers import DiskLayers
from parallel.offload.embedding import HostEmbedding, move_embedding
from parallel.offload.host_memory import HostBuffer, HostMemory
from parallel.offload.host_trial import HostRates


@dataclass(frozen=True)
class SharedLayers:
    """The layers with the indices `on_host` are computed by the host in passes of up to `max_rows` rows.

    `rates`: what a trial measured, where that decided.
    """

    on_host: tuple[int, ...]
    max_rows: int
    rates: HostRates | None = None


NOTHING_SHARED = SharedLayers((), 0)


@dataclass(frozen=True)
class HostLayer:
    layout: Layout
    buffer: HostBuffer

    @property
    def memory(self) -> Tensor:
        """[num_bytes] uint8 in host memory."""
        return self.buffer.memory


class HostLayers:
    """The layers of one model with the indices `streamed`, once `keep` has had them; all others are on the device, or
    on the `disk`.

    `embedding`: set once `keep_embedding` had a model whose embedding is not its head too.

    Args:
        shared: what of them the host computes itself in passes of few rows (see sharing.py).
        with_kv: keys and values of those in host memory lie there too (see host_kv.py).
    """

    def __init__(
        self,
        streamed: Sequence[int],
        device: torch.device,
        shared: SharedLayers = NOTHING_SHARED,
        disk: DiskLayers | None = None,
        *,
        with_kv: bool = False,
    ) -> None:
        self.streamed, self.device, self.shared = tuple(sorted(streamed)), device, shared
        self.disk, self.with_kv = disk, with_kv
        self.host_memory = HostMemory(len(self.streamed), device)
        self.kept: dict[int, HostLayer] = {}
        self.embedding: HostEmbedding | None = None

    @property
    def num_bytes(self) -> int:
        """Of host memory."""
        return self.streamed_bytes + (0 if self.embedding is None else self.embedding.num_bytes)

    @property
    def streamed_bytes(self) -> int:
        """What a pass copies to the device."""
        return sum(layer.layout.num_bytes for layer in self.kept.values())

    def keep_embedding(self, model: PreTrainedModel) -> None:
        """Takes the embedding off the device, where the head does not read it too."""
        if model.lm_head.weight is not model.model.embed_tokens.weight:
            self.embedding = move_embedding(model.model.embed_tokens, self.device)

    def keep(self, index: int, layer: nn.Module) -> None:
        """Takes the weights of a merged layer off the device, if it is one of the streamed; shapes remain."""
        if self.disk is not None and self.disk.keep(index, layer):
            return
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


class HostLoader:
    """Called with each parameter that has got its values: merges layers that are complete (see LayerMerger), and takes
    to the host what is to lie there."""

    def __init__(self, model: PreTrainedModel, layers: HostLayers) -> None:
        self.model, self.layers = model, layers
        self.merger = LayerMerger(model, layers.keep)
        for index in layers.shared.on_host:
            for module in model.model.layers[index].modules():
                if isinstance(module, ShardedLayer):
                    module.on_host = True

    def __call__(self, name: str) -> None:
        self.merger(name)
        if name == EMBEDDING_NAME:
            self.layers.keep_embedding(self.model)
