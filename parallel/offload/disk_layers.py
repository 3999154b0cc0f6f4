"""Layers that lie in neither memory: every pass reads them from the checkpoint's files and packs them on the device.

A checkpoint has its own layout, and a packed copy of it on the disk would be a second checkpoint. So a layer goes the
way of the load again each time it is used: this rank's slices are read, decoded, packed and merged by the same code,
which gives the same bits, and let go after its turn.

The host waits for the bytes, and queues their copies, the packing and then the layer, in order with all else that the
card does. Meanwhile threads read the next layer, for all of which there is room: the disk rests only where the card is
the slower of the two.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from parallel.checkpoint.headers import Checkpoint
from parallel.checkpoint.load import Step, plain_steps, quantized_steps
from parallel.checkpoint.match import Matches, match_tensors
from parallel.formats.scheme import Scheme
from parallel.layers.layout import Layout
from parallel.layers.merged import merge_layer
from parallel.offload.disk_reads import DiskReads, Stamps
from parallel.shard import ShardedModel


@dataclass(frozen=True)
class LayerSource:
    """How to make one layer of `model` from its files; `module` has its shapes, and no weights."""

    model: ShardedModel
    matches: Matches
    quantize: Scheme | None
    name: str
    module: nn.Module

    def begin(self) -> tuple[nn.Module, list[Step]]:
        """A layer without weights, and the steps that give it some, in the order of the file."""
        module = bare_copy(self.module)
        part = replace(self.model, module=cast(PreTrainedModel, at_name(self.name, module)))
        steps = [*plain_steps(part, self.matches, self.quantize), *quantized_steps(part, self.matches)]
        return module, sorted(steps, key=lambda step: step.position)


class DiskLayers:
    """The layers of one model with `indices`, once `open` had it before its load and `keep` has had each of them."""

    reads: DiskReads

    def __init__(self, indices: Sequence[int], device: torch.device) -> None:
        self.indices, self.device = tuple(sorted(indices)), device
        self.places = {index: place for place, index in enumerate(self.indices)}
        self.sources: list[LayerSource] = []
        self.layouts: dict[int, Layout] = {}
        # Where the reads stand; None: nowhere, as before the first pass and after one that failed.
        self.next_place: int | None = None
        self.held: Layout | None = None

    def open(self, model: ShardedModel, checkpoint: Checkpoint, quantize: Scheme | None) -> None:
        """Before anything of `model` has been loaded.

        Raises:
            CheckpointError: the checkpoint is not that of the model.
            RuntimeError: the buffers cannot be pinned.
        """
        stamps = Stamps({entry.file for entry in checkpoint.tensors.values()})
        matches = match_tensors(model, checkpoint)
        for index in self.indices:
            name = f"model.layers.{index}"
            module = bare_copy(model.module.get_submodule(name))
            self.sources.append(LayerSource(model, matches_of(matches, name), quantize, name, module))
        wanted = [[read for step in source.begin()[1] for read in step.reads.values()] for source in self.sources]
        self.reads = DiskReads(wanted, self.device, stamps)

    @property
    def bytes_per_pass(self) -> int:
        """Read from the disk, as stored."""
        return sum(self.reads.layer_bytes)

    @property
    def ring_bytes(self) -> int:
        """Of host memory."""
        return self.reads.ring_bytes

    @property
    def packed_bytes(self) -> int:
        """What these layers would take on the device."""
        return sum(layout.num_bytes for layout in self.layouts.values())

    def keep(self, index: int, layer: nn.Module) -> bool:
        """Lets the weights of a merged layer go, if it is one of these; shapes remain. Whether it was."""
        if index not in self.places:
            return False
        self.layouts[index] = Layout.of(layer)
        self.layouts[index].unbind()
        return True

    def acquire(self, index: int) -> None:
        """What is queued from here on finds the layer's weights in place.

        Raises:
            CheckpointError: a file is gone, has changed, or cannot be read.
        """
        self.release()
        place = self.places[index]
        if self.next_place != place:
            self.reads.start(place)
        self.next_place = None
        module = self.make(self.sources[place])
        self.held = self.layouts[index]
        self.held.bind(Layout.of(module).tensors())
        self.next_place = (place + 1) % len(self.indices)

    def release(self) -> None:
        """What has been queued was the last to use the layer acquired."""
        if self.held is not None:
            self.held.unbind()
            self.held = None

    def make(self, source: LayerSource) -> nn.Module:
        """The layer, merged, from the bytes that come next. Its values were checked when it was loaded."""
        module, steps = source.begin()
        for step in steps:
            step.place({name: self.reads.take(wanted) for name, wanted in step.reads.items()})
        merge_layer(module)
        return module


def matches_of(matches: Matches, layer: str) -> Matches:
    """Those of one layer."""
    plain = {name: entry for name, entry in matches.plain.items() if name.startswith(f"{layer}.")}
    return Matches(plain, {name: part for name, part in matches.quantized.items() if name.startswith(f"{layer}.")}, [])


def bare_copy(module: nn.Module) -> nn.Module:
    """Modules of their own around the same tensors."""
    twin = copy.copy(module)
    twin._parameters, twin._buffers = dict(module._parameters), dict(module._buffers)
    twin._modules = {name: None if each is None else bare_copy(each) for name, each in module._modules.items()}
    return twin


def at_name(name: str, module: nn.Module) -> nn.Module:
    """A module in which `module` has that dotted name."""
    for part in reversed(name.split(".")):
        parent = nn.Module()
        parent.add_module(part, module)
        module = parent
    return module
