"""The cards of a run, the links between them and the host around them: read by NVML or described in conf/hardware."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from launcher.config import ConfigError, HardwareConfig, HardwareKind
from launcher.hardware import host, nvml
from parallel.units import GIB

# NVML's nvmlGpuTopologyLevel_t: the nearest thing that two cards' PCIe paths share.
PATHS = {
    0: "same board",
    10: "one switch",
    20: "several switches",
    30: "host bridge",
    40: "one NUMA node",
    50: "across CPUs",
}
UNKNOWN_PATH = "unknown"


@dataclass(frozen=True)
class Card:
    """One card; None is what the driver does not tell."""

    # CUDA's index, after CUDA_VISIBLE_DEVICES.
    index: int
    # -1 where the card is a description (source "facts").
    nvml_index: int
    name: str
    uuid: str
    # 0 where the driver does not tell.
    memory_bytes: int
    free_bytes: int | None
    # Bus width x highest memory clock for NVML (see `_memory_gb_per_sec`), the published figure for facts.
    memory_gb_per_sec: float | None
    # The best that card and slot can do together. An idle card runs its link slower: see telemetry.
    pcie_generation: int | None
    pcie_lanes: int | None
    power_limit_w: float | None
    # Major and minor.
    compute_capability: tuple[int, int] | None = None


@dataclass(frozen=True)
class Link:
    """How two cards (CUDA indices, first < second) reach each other."""

    first: int
    second: int
    # "nvlink" | "pcie"
    kind: str
    # One of PATHS, or "unknown".
    path: str
    # Active NVLinks between the two or, through a switch, from each of them; 0 also where facts do not tell.
    num_nvlinks: int
    # Whether one card can read the other's memory; None where the driver does not tell.
    peer_access: bool | None


@dataclass(frozen=True)
class Inventory:
    """The machine of a run: its cards in CUDA's order, every pair of them as a link, and the host."""

    # "nvml" | "facts" | "none"
    source: str
    cards: tuple[Card, ...]
    links: tuple[Link, ...]
    driver: str | None
    # The newest CUDA that the driver supports.
    cuda: str | None
    host_memory_bytes: int
    host_free_bytes: int
    host_cores: int
    # What reads of the model's files get, where that was measured.
    disk_gb_per_sec: float | None = None


@dataclass(frozen=True)
class _Device:
    nvml_index: int
    handle: Any
    uuid: str
    bus_id: str


def read_inventory(hardware: HardwareConfig, num_cards: int) -> Inventory:
    """Cards, links and host for `hardware.kind`: local (every card that CUDA sees), facts (`num_cards` alike) or cpu.

    CUDA_VISIBLE_DEVICES is honoured; CUDA_DEVICE_ORDER is taken to be PCI_BUS_ID.

    Raises:
        ConfigError: facts without a memory size.
    """
    return _READERS[hardware.kind](hardware, num_cards)


def _read_local(hardware: HardwareConfig, num_cards: int) -> Inventory:
    with nvml.session() as answers:
        devices = _visible_devices() if answers else []
        cards = [_read_card(index, device) for index, device in enumerate(devices)]
        driver, cuda = nvml.ask("nvmlSystemGetDriverVersion"), _cuda_version()
        return _inventory("nvml" if cards else "none", cards, _read_links(devices), driver, cuda)


def _describe(hardware: HardwareConfig, num_cards: int) -> Inventory:
    if hardware.memory_gib <= 0:
        raise ConfigError(
            f"hardware.memory_gib={hardware.memory_gib} must be above 0: hardware={hardware.name} describes cards by "
            "facts. Set it, or use hardware=local."
        )
    cards = [_card_from_facts(hardware, index) for index in range(num_cards)]
    kind = "nvlink" if hardware.nvlink else "pcie"
    pairs = combinations(range(num_cards), 2)
    links = [Link(first, second, kind, UNKNOWN_PATH, 0, hardware.peer_access) for first, second in pairs]
    return _inventory("facts", cards, links)


def _without_cards(hardware: HardwareConfig, num_cards: int) -> Inventory:
    return _inventory("none", [], [])


_READERS = {
    HardwareKind.local: _read_local,
    HardwareKind.facts: _describe,
    HardwareKind.cpu: _without_cards,
}


def _inventory(
    source: str, cards: Sequence[Card], links: Sequence[Link], driver: str | None = None, cuda: str | None = None
) -> Inventory:
    total_bytes, free_bytes = host.read_memory()
    return Inventory(source, tuple(cards), tuple(links), driver, cuda, total_bytes, free_bytes, host.num_cores())


def _card_from_facts(hardware: HardwareConfig, index: int) -> Card:
    # The config writes an unknown number as 0.
    return Card(
        index=index,
        nvml_index=-1,
        name=hardware.name,
        uuid="",
        memory_bytes=round(hardware.memory_gib * GIB),
        free_bytes=None,
        memory_gb_per_sec=hardware.memory_gb_per_sec or None,
        pcie_generation=hardware.pcie_generation or None,
        pcie_lanes=hardware.pcie_lanes or None,
        power_limit_w=None,
        compute_capability=_as_pair(hardware.compute_capability) if hardware.compute_capability else None,
    )


def _as_pair(compute_capability: float) -> tuple[int, int]:
    """8.9 as (8, 9), and 12.0 as (12, 0)."""
    major, minor = f"{compute_capability:.1f}".split(".")
    return int(major), int(minor)


def _visible_devices() -> list[_Device]:
    """The cards that CUDA sees, in CUDA's order."""
    found = [_find_device(index) for index in range(nvml.ask("nvmlDeviceGetCount") or 0)]
    # NVML also counts cards that this process may not open; CUDA does not.
    devices = sorted((device for device in found if device is not None), key=lambda device: device.bus_id)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [devices[place] for place in nvml.visible_positions(visible, [device.uuid for device in devices])]


def _find_device(nvml_index: int) -> _Device | None:
    handle = nvml.ask("nvmlDeviceGetHandleByIndex", nvml_index)
    if handle is None:
        return None
    uuid = nvml.ask("nvmlDeviceGetUUID", handle) or ""
    return _Device(nvml_index, handle, uuid, _bus_id(nvml.ask("nvmlDeviceGetPciInfo", handle)))


def _bus_id(pci: Any) -> str:
    """Domain, bus, device and function as NVML writes them (00000000:3b:00.0): text order is bus order."""
    if pci is None:
        return ""
    bus_id = pci.busId
    return (bus_id.decode() if isinstance(bus_id, bytes) else str(bus_id)).lower()


def _read_card(index: int, device: _Device) -> Card:
    handle = device.handle
    memory = nvml.ask("nvmlDeviceGetMemoryInfo", handle)
    limit_mw = nvml.ask_first(("nvmlDeviceGetEnforcedPowerLimit", "nvmlDeviceGetPowerManagementLimit"), handle)
    return Card(
        index=index,
        nvml_index=device.nvml_index,
        name=nvml.ask("nvmlDeviceGetName", handle) or "unknown card",
        uuid=device.uuid,
        memory_bytes=0 if memory is None else int(memory.total),
        free_bytes=None if memory is None else int(memory.free),
        memory_gb_per_sec=_memory_gb_per_sec(handle),
        pcie_generation=nvml.ask("nvmlDeviceGetMaxPcieLinkGeneration", handle),
        pcie_lanes=nvml.ask("nvmlDeviceGetMaxPcieLinkWidth", handle),
        power_limit_w=None if limit_mw is None else limit_mw / 1000,
        compute_capability=_compute_capability(handle),
    )


def _memory_gb_per_sec(handle: Any) -> float | None:
    """Peak of the memory bus in GB/s: bits x MHz x 2 transfers a clock / 8 bits a byte.

    The formula of NVIDIA's "How to Query Device Properties" (developer blog, 2012), with memoryClockRate and
    memoryBusWidth. NVML scales the clock of GDDR6X so that two transfers a clock holds for it too: 384 bit at 10501 MHz
    are the RTX 4090's published 1008 GB/s.
    """
    bits = nvml.ask("nvmlDeviceGetMemoryBusWidth", handle)
    clock_mhz = nvml.ask("nvmlDeviceGetMaxClockInfo", handle, nvml.CLOCK_MEMORY)
    return bits * clock_mhz * 2 / 8 / 1000 if bits and clock_mhz else None


def _compute_capability(handle: Any) -> tuple[int, int] | None:
    answer = nvml.ask("nvmlDeviceGetCudaComputeCapability", handle)
    return None if answer is None else (int(answer[0]), int(answer[1]))


def _cuda_version() -> str | None:
    version = nvml.ask_first(("nvmlSystemGetCudaDriverVersion_v2", "nvmlSystemGetCudaDriverVersion"))
    return None if version is None else f"{version // 1000}.{version % 1000 // 10}"


def _read_links(devices: Sequence[_Device]) -> list[Link]:
    remotes = [_nvlink_remotes(device.handle) for device in devices]
    pairs = combinations(range(len(devices)), 2)
    return [_read_link(devices, remotes, first, second) for first, second in pairs]


def _nvlink_remotes(handle: Any) -> list[str]:
    """Bus ids at the far ends of the card's active NVLinks: another card, or a switch."""
    active = [link for link in range(nvml.MAX_NVLINKS) if nvml.ask("nvmlDeviceGetNvLinkState", handle, link)]
    # pynvml's function asks NVML's version 2, which writes bus ids in the long form.
    return [_bus_id(nvml.ask("nvmlDeviceGetNvLinkRemotePciInfo", handle, link)) for link in active]


def _read_link(devices: Sequence[_Device], remotes: Sequence[list[str]], first: int, second: int) -> Link:
    a, b = devices[first], devices[second]
    level = nvml.ask("nvmlDeviceGetTopologyCommonAncestor", a.handle, b.handle)
    num_nvlinks = _num_nvlinks(
        remotes[first].count(b.bus_id),
        min(len(remotes[first]), len(remotes[second])),
        _peer_status(a, b, nvml.P2P_NVLINK),
    )
    return Link(
        first=first,
        second=second,
        kind="nvlink" if num_nvlinks else "pcie",
        path=PATHS.get(level, UNKNOWN_PATH),
        num_nvlinks=num_nvlinks,
        peer_access=_peer_status(a, b, nvml.P2P_READ),
    )


def _num_nvlinks(num_direct: int, num_active: int, usable: bool | None) -> int:
    """NVLinks that join two cards: `num_direct` lead from one to the other, `num_active` from each to anywhere.

    Through a switch no link leads to the peer itself, so that the driver's word (`usable`) decides and every active
    link counts. Without that word only direct links are sure.
    """
    if usable is None:
        return num_direct
    return (num_direct or num_active) if usable else 0


def _peer_status(a: _Device, b: _Device, capability: int) -> bool | None:
    status = nvml.ask("nvmlDeviceGetP2PStatus", a.handle, b.handle, capability)
    return None if status is None else status == nvml.P2P_STATUS_OK
