"""Streaming shared with the host: in passes of few rows it computes the linears of some layers from where they lie.

The card keeps norms and attention of these layers; rows go to the host and back around each linear, and while the host
computes, the copy engine brings the next streamed layer. Larger passes stream these layers as all others: the host
would take longer. What the host multiplies by then is dequantised on the card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from parallel.kernels.host_int4 import HostInt4Linear
from parallel.layers.layout import Slot
from parallel.offload.host_layers import HostLayer, HostLayers
from parallel.offload.streamer import Streamer, stays


class SharingStreamer(Streamer):
    """`on_host`: by index, the tensors of the layers that the host computes: those of linears there, others not."""

    def __init__(self, layers: HostLayers) -> None:
        super().__init__(layers)
        self.max_rows = layers.shared.max_rows
        kept = {index: layers.kept[index] for index in layers.shared.on_host}
        self.on_host = {index: host_tensors(layer, self.device) for index, layer in kept.items() if is_on_host(layer)}
        self.all_places = list(range(len(self.layers)))
        self.other_places = [place for index, place in self.places.items() if index not in self.on_host]
        # Places of what the pass streams, in turn.
        self.order = self.all_places

    def pass_bytes(self, num_rows: int) -> int:
        if num_rows > self.max_rows:
            return super().pass_bytes(num_rows)
        return sum(self.layers[place].layout.num_bytes for place in self.other_places)

    def through(self, layers: Iterable[nn.Module], num_rows: int) -> Iterator[nn.Module]:
        """As Streamer's; in passes of up to `max_rows` the layers of the host have the weights there instead."""
        self.order = self.other_places if num_rows <= self.max_rows else self.all_places
        yield from super().through(layers, num_rows)

    def bring(self, index: int, num_rows: int) -> Callable[[], None]:
        if num_rows > self.max_rows or index not in self.on_host:
            return super().bring(index, num_rows)
        self.layers[self.places[index]].layout.bind(self.on_host[index])
        return stays

    def following(self, place: int, number: int) -> int:
        return self.order[(self.order.index(place) + number) % len(self.order)]


def open_streamer(layers: HostLayers) -> Streamer:
    return SharingStreamer(layers) if layers.shared.on_host else Streamer(layers)


def is_on_host(layer: HostLayer) -> bool:
    """Whether all of its matrices are packed for the host: one that is not would be multiplied by on the card."""
    return all(is_for_host(slot) or len(slot.shape) == 1 for slot in layer.layout.slots)


def is_for_host(slot: Slot) -> bool:
    return isinstance(slot.owner, HostInt4Linear) and slot.name in HostInt4Linear.ON_HOST


def host_tensors(layer: HostLayer, device: torch.device) -> list[Tensor]:
    """All tensors of a layer in the order of its layout: of linears where they lie, else a copy on the device."""
    views = layer.layout.views(layer.memory)
    pairs = zip(layer.layout.slots, views, strict=True)
    return [view if is_for_host(slot) else view.to(device) for slot, view in pairs]
