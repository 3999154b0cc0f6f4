"""A pynvml with cards that a test describes. It refuses what the real one refuses.

Names, constants, errors and the number of parameters are the real module's, so that a call of something that does not
exist fails here as it would there.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import sys
import threading
import types
from dataclasses import dataclass, field
from typing import Any

import pynvml as real
import pytest

MIB = 1024**2
COPIED = ("NVML_", "NVMLError", "nvmlClocks")


class Script(list):  # type: ignore[type-arg]
    """Answers to give one after the other; the last one stays."""

    def __call__(self) -> Any:
        return self.pop(0) if len(self) > 1 else self[0]


@dataclass
class FakeCard:
    """Units are NVML's: bytes, milliwatts, millijoules, MHz, KB/s. A Script in place of a number changes by call."""

    name: str = "NVIDIA GeForce RTX 4090"
    uuid: str = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"
    bus_id: str = "00000000:01:00.0"
    total_bytes: int = 24564 * MIB
    used_bytes: Any = 400 * MIB
    bus_bits: int = 384
    max_memory_clock: int = 10501
    max_generation: int = 4
    max_lanes: int = 16
    power_limit: int = 450_000
    capability: tuple[int, int] = (8, 9)
    power: Any = 100_000
    energy: Any = 5_000_000
    energy_step: int = 50_000
    temperature: Any = 50
    sm_clock: Any = 2520
    memory_clock: Any = 10251
    reasons: Any = 0x1
    generation: Any = 4
    lanes: Any = 16
    tx: Any = 1_000
    rx: Any = 2_000
    replays: Any = 7
    # Active NVLink -> bus id at its far end.
    nvlinks: dict[int, str] = field(default_factory=dict)
    # Functions of pynvml that answer "not supported" for this card.
    unsupported: set[str] = field(default_factory=set)


def value(answer: Any) -> Any:
    return answer() if isinstance(answer, Script) else answer


class FakeNvml:
    """The state behind the module. `peer_status` and `levels` hold for all pairs."""

    def __init__(self, cards: list[FakeCard], *, read: int = 0, nvlink: int = 0, level: int = 30) -> None:
        self.cards = cards
        self.peer_status = {0: read, 1: read, 2: nvlink}
        self.level = level
        self.num_sessions = 0
        self.num_reads = 0
        # Raised by the next readings of memory, once they are due.
        self.trouble: Exception | None = None
        self.trouble_after = 0
        # Set it to make readings of memory hang until it is set again.
        self.free_to_answer = threading.Event()
        self.free_to_answer.set()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
        monkeypatch.setitem(sys.modules, "pynvml", self.module())
        return self

    def module(self) -> types.ModuleType:
        fake = types.ModuleType("pynvml")
        for name in dir(real):
            if name.startswith(COPIED):
                setattr(fake, name, getattr(real, name))
        for name in dir(self):
            if name.startswith("nvml"):
                setattr(fake, name, self._checked(name))
        return fake

    def _checked(self, name: str) -> Any:
        function = getattr(self, name)
        num_parameters = len(inspect.signature(getattr(real, name)).parameters)
        ours = inspect.signature(function).parameters.values()
        assert len([each for each in ours if each.default is each.empty]) <= num_parameters

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            if name != "nvmlInit" and self.num_sessions == 0:
                raise real.NVMLError(real.NVML_ERROR_UNINITIALIZED)
            if any(isinstance(arg, FakeCard) and name in arg.unsupported for arg in args):
                raise real.NVMLError(real.NVML_ERROR_NOT_SUPPORTED)
            if any(isinstance(arg, tuple) for arg in args):
                raise ctypes.ArgumentError("Don't know how to convert parameter")
            return function(*args)

        return call

    def nvmlInit(self) -> None:
        self.num_sessions += 1

    def nvmlShutdown(self) -> None:
        self.num_sessions -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.159.04"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return 12040

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeCard:
        card = self.cards[index]
        if "nvmlDeviceGetHandleByIndex" in card.unsupported:
            raise real.NVMLError(real.NVML_ERROR_NO_PERMISSION)
        return card

    def nvmlDeviceGetName(self, handle: FakeCard) -> str:
        return handle.name

    def nvmlDeviceGetUUID(self, handle: FakeCard) -> str:
        return handle.uuid

    def nvmlDeviceGetPciInfo(self, handle: FakeCard) -> types.SimpleNamespace:
        # The real one gives ctypes' bytes, and upper case here where it gives lower case for the far end of a link.
        return types.SimpleNamespace(busId=handle.bus_id.upper().encode())

    def nvmlDeviceGetMemoryInfo(self, handle: FakeCard) -> types.SimpleNamespace:
        self.num_reads += 1
        self.free_to_answer.wait(120)
        if self.trouble is not None and self.num_reads > self.trouble_after:
            raise self.trouble
        used = value(handle.used_bytes)
        return types.SimpleNamespace(total=handle.total_bytes, free=handle.total_bytes - used, used=used)

    def nvmlDeviceGetMemoryBusWidth(self, handle: FakeCard) -> int:
        return handle.bus_bits

    def nvmlDeviceGetMaxClockInfo(self, handle: FakeCard, kind: int) -> int:
        return {real.NVML_CLOCK_MEM: handle.max_memory_clock, real.NVML_CLOCK_SM: 3105}[kind]

    def nvmlDeviceGetClockInfo(self, handle: FakeCard, kind: int) -> int:
        clocks = {real.NVML_CLOCK_MEM: handle.memory_clock, real.NVML_CLOCK_SM: handle.sm_clock}
        return int(value(clocks[kind]))

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle: FakeCard) -> int:
        return handle.max_generation

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle: FakeCard) -> int:
        return handle.max_lanes

    def nvmlDeviceGetCurrPcieLinkGeneration(self, handle: FakeCard) -> int:
        return int(value(handle.generation))

    def nvmlDeviceGetCurrPcieLinkWidth(self, handle: FakeCard) -> int:
        return int(value(handle.lanes))

    def nvmlDeviceGetCudaComputeCapability(self, handle: FakeCard) -> list[int]:
        return list(handle.capability)

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: FakeCard) -> int:
        return handle.power_limit

    def nvmlDeviceGetPowerManagementLimit(self, handle: FakeCard) -> int:
        return handle.power_limit + 50_000

    def nvmlDeviceGetPowerUsage(self, handle: FakeCard) -> int:
        return int(value(handle.power))

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: FakeCard) -> int:
        handle.energy += handle.energy_step
        return int(handle.energy)

    def nvmlDeviceGetTemperatureV(self, handle: FakeCard, sensor: int) -> int:
        return int({real.NVML_TEMPERATURE_GPU: value(handle.temperature)}[sensor])

    def nvmlDeviceGetTemperature(self, handle: FakeCard, sensor: int) -> int:
        return int({real.NVML_TEMPERATURE_GPU: value(handle.temperature)}[sensor])

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: FakeCard) -> int:
        return int(value(handle.reasons))

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: FakeCard) -> int:
        return int(value(handle.reasons))

    def nvmlDeviceGetPcieThroughput(self, handle: FakeCard, counter: int) -> int:
        return int(value({real.NVML_PCIE_UTIL_TX_BYTES: handle.tx, real.NVML_PCIE_UTIL_RX_BYTES: handle.rx}[counter]))

    def nvmlDeviceGetPcieReplayCounter(self, handle: FakeCard) -> int:
        return int(value(handle.replays))

    def nvmlDeviceGetTopologyCommonAncestor(self, a: FakeCard, b: FakeCard) -> int:
        return self.level

    def nvmlDeviceGetP2PStatus(self, a: FakeCard, b: FakeCard, capability: int) -> int:
        return self.peer_status[capability]

    def nvmlDeviceGetNvLinkState(self, handle: FakeCard, link: int) -> int:
        if not handle.nvlinks:
            raise real.NVMLError(real.NVML_ERROR_NOT_SUPPORTED)
        if link >= 18:
            raise real.NVMLError(real.NVML_ERROR_INVALID_ARGUMENT)
        return int(link in handle.nvlinks)

    def nvmlDeviceGetNvLinkRemotePciInfo(self, handle: FakeCard, link: int) -> types.SimpleNamespace:
        return types.SimpleNamespace(busId=handle.nvlinks[link].lower().encode())


def two_rtx4090() -> FakeNvml:
    """No NVLink and, with the stock driver, no peer access."""
    first = FakeCard(uuid="GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", bus_id="00000000:01:00.0")
    second = FakeCard(uuid="GPU-89aa0c11-5b7e-4d5e-9f0a-6a1be4a2d3c4", bus_id="00000000:41:00.0")
    not_supported = real.NVML_P2P_STATUS_CHIPSET_NOT_SUPPORTED
    return FakeNvml([first, second], read=not_supported, nvlink=real.NVML_P2P_STATUS_NOT_SUPPORTED, level=50)


def two_h200() -> FakeNvml:
    """18 NVLinks each, which end in switches."""
    cards = [
        FakeCard(
            name="NVIDIA H200",
            uuid=f"GPU-{place}f00ba12-0000-4000-8000-00000000000{place}",
            bus_id=f"00000000:{bus}:00.0",
            total_bytes=143771 * MIB,
            bus_bits=6144,
            max_memory_clock=3201,
            max_generation=5,
            power_limit=700_000,
            capability=(9, 0),
            nvlinks={link: f"00000000:a{link % 4}:00.0" for link in range(18)},
        )
        for place, bus in enumerate(("1b", "c3"))
    ]
    return FakeNvml(cards, level=40)
