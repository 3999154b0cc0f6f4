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


@dataclass
class OffloadConfig:
    # Stream layers that do not fit from host memory, each ahead of its use, in every pass: auto, on or off.
    enabled: OffloadKind = OffloadKind.auto
    # Decoder layers that stay on the card; null: as many as fit.
    resident_layers: int | None = None
    # Of the others, layers of 4 bits that the host computes itself in decode steps: so many at most; null: as many as a
    # trial at the start shows to be fastest.
    host_layers: int | None = None

    def problems(self) -> Iterator[str]:
        if self.host_layers is not None and self.host_layers < 0:
            yield f"offload.host_layers={self.host_layers} must be 0 or above."
        if self.resident_layers is None:
            return
        if self.resident_layers < 0:
            yield f"offload.resident_layers={self.resident_layers} must be 0 or above."
        if self.enabled == OffloadKind.off:
            yield (
                f"offload.resident_layers={self.resident_layers} streams all other layers, but offload.enabled=off. "
                "Leave one of them out."
            )
