"""Which cards a run is for, and what of them it may use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

# GB/s of one lane of PCIe and direction, by its generation.
LANE_GB_PER_SEC = {3: 0.985, 4: 1.969, 5: 3.938}
# More than any machine has: what is above was not meant, and infinity is no number of bytes.
MAX_GIB = 2**20
# So far and no further from any card's: beyond, times leave what a float holds.
LEAST_FACT, MOST_FACT = 1e-3, 1e9


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
    """This machine's cards (local), none (cpu), or such as are published (facts), whose numbers follow, of one card."""

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
    # As NVIDIA writes it, such as 8.9.
    compute_capability: float = 0.0
    # What reads of checkpoints get; 0: measured on the model's files where that is asked for.
    disk_gb_per_sec: float = 0.0

    def problems(self) -> Iterator[str]:
        for name in (
            "memory_gib",
            "memory_gb_per_sec",
            "pcie_lanes",
            "bf16_tflops",
            "power_limit_w",
            "compute_capability",
            "disk_gb_per_sec",
        ):
            value = getattr(self, name)
            if value != 0 and not LEAST_FACT <= value <= MOST_FACT:
                known = f"must be from {LEAST_FACT:g} to {MOST_FACT:,.0f}"
                yield f"hardware.{name}={value} {known}, or 0 where it is not known."
        if self.pcie_generation not in (0, *LANE_GB_PER_SEC):
            known = ", ".join(map(str, LANE_GB_PER_SEC))
            yield f"hardware.pcie_generation={self.pcie_generation} must be one of {known}, or 0 where it is not known."


@dataclass
class LimitsConfig:
    """What a run may use of the hardware it has."""

    # Treat each card as if it had this much memory.
    card_memory_gib: float | None = None
    # Take no more host memory than this for all ranks beside their cards.
    host_memory_gib: float | None = None
    # `off`: behave as if cards could not reach each other's memory (RTX 4090s cannot).
    peer_access: PeerAccess = PeerAccess.auto

    def problems(self) -> Iterator[str]:
        for name in ("card_memory_gib", "host_memory_gib"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= MAX_GIB:
                yield f"limits.{name}={value} must be above 0 and at most {MAX_GIB:,}, or null for no limit."
