"""Copies streamed layers to the device ahead of their use, in the order in which passes go through them.

Passes of prompts and steps alike take the layers in turn, and the first follows the last: weights do not change, so
what the next pass begins with is copied while this one ends. Two buffers take turns. A copy begins as soon as the layer
before it in the same buffer has computed, which for all but large chunks of prompts is long before the copy in the
other buffer ends: the copy engine goes from one copy to the next.

Passes are queued by the host, launch by launch, and not captured in a graph. A step takes as long as its copies,
hundreds of milliseconds for a 70B of which half is streamed; to queue it takes some ten, layer by layer meanwhile. What
lies between two passes has the time that two layers take to come: the draft model's part of it is captured
(parallel/engine/speculation/draft_graphs.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from parallel.offload.copies import CopyQueue, open_copy_queue
from parallel.offload.host_layers import HostLayer, HostLayers
from parallel.offload.spread import NUM_STAGED


class Streamer:
    """All passes over a model go `through` its layers here, one after the other."""

    def __init__(self, layers: HostLayers) -> None:
        assert set(layers.kept) == set(layers.streamed), "all streamed layers are in place"
        # Whose embedding is read while this lives.
        self.host_layers, self.device = layers, layers.device
        self.layers: list[HostLayer] = [layers.kept[index] for index in layers.streamed]
        # Of each streamed layer, where it stands among them.
        self.places = {index: place for place, index in enumerate(layers.streamed)}
        self.disk = layers.disk
        largest = max((layer.layout.num_bytes for layer in self.layers), default=0)
        self.buffers = torch.empty(NUM_STAGED, largest, dtype=torch.uint8, device=self.device)
        self.views = [[layer.layout.views(buffer) for buffer in self.buffers] for layer in self.layers]
        self.copies: CopyQueue = open_copy_queue(self.device, NUM_STAGED)
        # By index, the tensors of layers that the host computes; see sharing.py.
        self.on_host: dict[int, list[Tensor]] = {}
        # (place, buffer) of what has been queued to be copied and not been used, in order.
        self.ahead: deque[tuple[int, int]] = deque()

    def pass_bytes(self, num_rows: int) -> int:
        """What a pass of so many rows copies."""
        return self.host_layers.streamed_bytes

    def through(self, layers: Iterable[nn.Module], num_rows: int) -> Iterator[nn.Module]:
        """The layers of the model in turn, each with its weights on the device until the next is asked for.

        Args:
            num_rows: of the pass; here all are streamed alike.
        """
        for index, layer in enumerate(layers):
            release = self.bring(index, num_rows)
            yield layer
            release()

    def bring(self, index: int, num_rows: int) -> Callable[[], None]:
        """Puts the weights of a layer in place; what to call once all that uses them is queued."""
        place = self.places.get(index)
        if self.disk is not None and index in self.disk.places:
            self.disk.acquire(index)
            return self.disk.release
        if place is None:
            return stays
        self.acquire(place)
        return self.release

    def acquire(self, place: int) -> None:
        """What is queued from here on finds the layer's weights in place."""
        if not self.ahead or self.ahead[0][0] != place:
            self.restart(place)
        buffer = self.ahead[0][1]
        self.copies.wait_copied(buffer)
        self.layers[place].layout.bind(self.views[place][buffer])

    def release(self) -> None:
        """What has been queued was the last to use the layer acquired: its buffer is for the layer after the next."""
        place, buffer = self.ahead.popleft()
        self.copies.mark_used(buffer)
        self.fetch(self.following(place, NUM_STAGED), buffer)

    def restart(self, place: int) -> None:
        """Begins at a layer that is not the next: at the first pass, and after one that failed."""
        self.ahead.clear()
        for buffer in range(NUM_STAGED):
            self.copies.mark_used(buffer)
            self.fetch(self.following(place, buffer), buffer)

    def following(self, place: int, number: int) -> int:
        """The place that passes come to so many streamed layers after this one."""
        return (place + number) % len(self.layers)

    def fetch(self, place: int, buffer: int) -> None:
        self.copies.copy([(self.layers[place].memory, self.staged(place, buffer))], buffer)
        self.ahead.append((place, buffer))

    def staged(self, place: int, buffer: int) -> Tensor:
        return self.buffers[buffer][: self.layers[place].layout.num_bytes]


def stays() -> None:
    """After a layer whose weights are where they were."""
