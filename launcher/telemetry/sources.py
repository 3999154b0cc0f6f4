"""Where samples come from: NVML for cards, the operating system for ranks without cards."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import psutil

from launcher.hardware import nvml
from launcher.hardware.inventory import Card
from launcher.telemetry.usage import Sample

NVML = "nvml"
RESIDENT = "resident memory of the rank's process"


class Source(Protocol):
    """Opened and read on one thread; `read` may raise, and then no more is read."""

    name: str

    def names(self) -> dict[int, str]:
        """Index -> name of what is known to be sampled before anything was read."""

    def open(self) -> None: ...

    def read(self) -> Iterable[Sample]:
        """One sample of each card or rank that can be read now."""

    def close(self) -> None: ...


class NvmlSource:
    """Cards through NVML."""

    name = NVML

    def __init__(self, cards: Sequence[Card]) -> None:
        self._cards = cards
        self._handles: list[tuple[Card, Any]] = []
        self._session = nvml.session()

    def names(self) -> dict[int, str]:
        return {card.index: card.name for card in self._cards}

    def open(self) -> None:
        self._session.__enter__()
        handles = ((card, nvml.ask("nvmlDeviceGetHandleByIndex", card.nvml_index)) for card in self._cards)
        self._handles = [(card, handle) for card, handle in handles if handle is not None]

    def read(self) -> Iterator[Sample]:
        for card, handle in self._handles:
            yield read_card(card.index, handle)

    def close(self) -> None:
        self._session.__exit__(None, None, None)


def read_card(index: int, handle: Any) -> Sample:
    """Everything about one card now. Blocks for about 40 ms: NVML counts PCIe bytes over 20 ms for each direction.

    That is why samples are taken on a thread of the parent, which has nothing to do with the ranks' hot path.
    """
    time_sec = time.time()
    energy_mj = nvml.ask("nvmlDeviceGetTotalEnergyConsumption", handle)
    power_mw = nvml.ask("nvmlDeviceGetPowerUsage", handle)
    memory = nvml.ask("nvmlDeviceGetMemoryInfo", handle)
    return Sample(
        time_sec=time_sec,
        index=index,
        used_bytes=None if memory is None else int(memory.used),
        power_w=None if power_mw is None else power_mw / 1000,
        temperature_c=_ask_temperature(handle),
        sm_clock_mhz=nvml.ask("nvmlDeviceGetClockInfo", handle, nvml.CLOCK_SM),
        memory_clock_mhz=nvml.ask("nvmlDeviceGetClockInfo", handle, nvml.CLOCK_MEMORY),
        throttle=_ask_throttle(handle),
        pcie_generation=nvml.ask("nvmlDeviceGetCurrPcieLinkGeneration", handle),
        pcie_lanes=nvml.ask("nvmlDeviceGetCurrPcieLinkWidth", handle),
        pcie_tx_bytes_per_sec=_ask_pcie_bytes_per_sec(handle, nvml.PCIE_TX),
        pcie_rx_bytes_per_sec=_ask_pcie_bytes_per_sec(handle, nvml.PCIE_RX),
        pcie_replays=nvml.ask("nvmlDeviceGetPcieReplayCounter", handle),
        energy_j=None if energy_mj is None else energy_mj / 1000,
    )


def _ask_temperature(handle: Any) -> int | None:
    # The first is new; the second, which older drivers know, is to go with CUDA 14.
    names = ("nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature")
    answer: int | None = nvml.ask_first(names, handle, nvml.TEMPERATURE_GPU)
    return answer


def _ask_throttle(handle: Any) -> int | None:
    # Drivers before 535 know only the second name.
    names = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
    answer: int | None = nvml.ask_first(names, handle)
    return answer


def _ask_pcie_bytes_per_sec(handle: Any, direction: int) -> int | None:
    """Traffic in bytes a second (NVML gives KB/s), seen from the card: tx is what it sends."""
    kilobytes_per_sec = nvml.ask("nvmlDeviceGetPcieThroughput", handle, direction)
    return None if kilobytes_per_sec is None else int(kilobytes_per_sec) * 1000


class ResidentSource:
    """Ranks without cards: the resident memory of each rank's process and its children.

    A rank is known by `folder`/{rank}.pid, which appears a little after the start. Pages that ranks share are counted
    once for each; those that a child shares, once: between its fork and its exec that is all it has.
    """

    name = RESIDENT

    def __init__(self, folder: Path, ranks: Sequence[int]) -> None:
        self._folder = folder
        self._ranks = ranks

    def names(self) -> dict[int, str]:
        return {rank: rank_name(rank) for rank in self._ranks}

    def open(self) -> None:
        pass

    def read(self) -> Iterator[Sample]:
        ranks = {int(path.stem) for path in self._folder.glob("*.pid") if path.stem.isdecimal()}
        for rank in sorted(ranks):
            time_sec, used_bytes = time.time(), resident_bytes(self._folder / f"{rank}.pid")
            if used_bytes is not None:
                yield Sample(time_sec, rank, used_bytes)

    def close(self) -> None:
        pass


def rank_name(rank: int) -> str:
    return f"rank {rank} (cpu)"


def resident_bytes(pid_file: Path) -> int | None:
    """Resident memory of a process and its children; None where the file is unfinished or the process is gone."""
    try:
        process = psutil.Process(int(pid_file.read_text()))
        children = process.children(recursive=True)
    except (OSError, ValueError, psutil.Error):
        return None
    # A process that has ended but was not waited for yet counts 0.
    return _bytes_of(process, "rss") + sum(_bytes_of(child, "uss") for child in children) or None


def _bytes_of(process: psutil.Process, kind: str) -> int:
    """`kind`: rss, all that is resident, or uss, what no other process has."""
    try:
        memory = process.memory_info() if kind == "rss" else process.memory_full_info()
        return int(getattr(memory, kind))
    except psutil.Error:
        return 0
