"""Whether a model may be larger than its cards, the rest of it in host memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum


class OffloadKind(str, Enum):
    """`auto`: where the weights do not fit the one card of a run. `on`: where a run does not fit, on all its cards."""

    auto = "auto"
    on = "on"
    off = "off"


class KVPlace(str, Enum):
    """Where keys and values of layers in host memory lie: on the card all the time, or with their layers; `auto`: where
    a step copies less."""

    card = "card"
    host = "host"
    auto = "auto"


@dataclass
class OffloadConfig:
    """Where layers lie that do not fit the cards, who computes them, and where their keys and values are."""

    # Stream layers that do not fit from host memory, each ahead of its use, in every pass: auto, on or off.
    enabled: OffloadKind = OffloadKind.auto
    # Decoder layers that stay on the card; null: as many as fit.
    resident_layers: int | None = None
    # Of the others, layers of 4 bits that the host computes itself in decode steps: so many at most; null: as many as a
    # trial at the start shows to be fastest, so that answers may differ from one start to the next.
    host_layers: int | None = 0
    # Where keys and values of layers in host memory lie: card, or host, from where they come for their attention in
    # every pass. That leaves room on the card for several times as many tokens, or more layers, and brings all that a
    # pass attends to; auto: where a step of the workload copies less by the plan.
    kv: KVPlace = KVPlace.card
    # Where layers are read from in every pass that host memory does not hold either: `checkpoint`, the model's own
    # files, or a folder with a copy of them on a faster disk. Nothing is written. Null: such a run is refused.
    disk: str | None = None
    # Of the layers that are not on the card, so many are read from there; null: as few as host memory requires.
    disk_layers: int | None = None

    def problems(self) -> Iterator[str]:
        if self.host_layers is not None and self.host_layers < 0:
            yield f"offload.host_layers={self.host_layers} must be 0 or above."
        yield from self._kv_problems()
        yield from self._disk_problems()
        if self.resident_layers is None:
            return
        if self.resident_layers < 0:
            yield f"offload.resident_layers={self.resident_layers} must be 0 or above."
        if self.enabled == OffloadKind.off:
            yield (
                f"offload.resident_layers={self.resident_layers} streams all other layers, but offload.enabled=off. "
                "Leave one of them out."
            )

    def _kv_problems(self) -> Iterator[str]:
        if self.kv != KVPlace.host:
            return
        if self.enabled == OffloadKind.off:
            yield "offload.kv=host is for layers in host memory, but offload.enabled=off. Leave one of them out."
        if self.disk is not None:
            yield (
                f"offload.kv=host takes more host memory, but offload.disk={self.disk} is for hosts with too little "
                "even for layers. Leave one of them out."
            )

    def _disk_problems(self) -> Iterator[str]:
        if self.disk is not None and not self.disk.strip():
            yield "offload.disk is empty. Set it to checkpoint, or to a folder with a copy of the model's files."
        if self.disk is not None and self.enabled == OffloadKind.off:
            yield (
                f"offload.disk={self.disk} is for layers that are not on the card, but offload.enabled=off. "
                "Leave one of them out."
            )
        if self.disk_layers is None:
            return
        if self.disk_layers < 0:
            yield f"offload.disk_layers={self.disk_layers} must be 0 or above."
        if self.disk is None:
            yield f"offload.disk_layers={self.disk_layers} needs offload.disk=checkpoint, or the folder of a copy."
