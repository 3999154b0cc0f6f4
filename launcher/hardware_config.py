"""Which cards a run is for, and what of them it may use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum


class HardwareKind(str, Enum):
    """Where facts about cards come from: this machine, a file under conf/hardware, or no cards at all."""

    local = "local"
    facts = "facts"
    cpu = "cpu"


class PeerAccess(str, Enum):
    auto = "auto"
    off = "off"


@dataclass
class HardwareConfig:
    kind: HardwareKind = HardwareKind.local
    name: str = "local"
    memory_gib: float = 0.0
    memory_gb_per_sec: float = 0.0
    pcie_generation: int = 0
    pcie_lanes: int = 0
    nvlink: bool = False
    peer_access: bool = False
    # Dense products with float32 sums.
    bf16_tflops: float = 0.0
    power_limit_w: float = 0.0
    # What reads of checkpoints get; 0: measured on the model's files where that is asked for.
    disk_gb_per_sec: float = 0.0


@dataclass
class LimitsConfig:
    # Treat each card as if it had this much memory.
    card_memory_gib: float | None = None
    # Take no more host memory than this for all ranks beside their cards.
    host_memory_gib: float | None = None
    # `off`: behave as if cards could not reach each other's memory (RTX 4090s cannot).
    peer_access: PeerAccess = PeerAccess.auto

    def problems(self) -> Iterator[str]:
        if self.card_memory_gib is not None and self.card_memory_gib <= 0:
            yield f"limits.card_memory_gib={self.card_memory_gib} must be above 0."
        if self.host_memory_gib is not None and self.host_memory_gib <= 0:
            yield f"limits.host_memory_gib={self.host_memory_gib} must be above 0."
