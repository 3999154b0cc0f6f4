"""Inventory of cards and links against a fake NVML, by facts and without cards; host memory within control groups."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import psutil
import pynvml as real
import pytest
from pydantic import TypeAdapter

from launcher.config import ConfigError, HardwareConfig, HardwareKind
from launcher.hardware import host, inventory, nvml
from launcher.hardware.inventory import _READERS, PATHS, Card, Inventory, Link, read_inventory
from launcher.telemetry import sources
from tests.fakes.nvml import MIB, FakeCard, FakeNvml, two_h200, two_rtx4090

FIRST = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"
SECOND = "GPU-89aa0c11-5b7e-4d5e-9f0a-6a1be4a2d3c4"
LOCAL = HardwareConfig()
FACTS = HardwareConfig(
    kind=HardwareKind.facts,
    name="NVIDIA GeForce RTX 4090",
    memory_gib=24.0,
    memory_gb_per_sec=1008.0,
    pcie_generation=4,
    pcie_lanes=16,
    compute_capability=8.9,
)


@pytest.fixture(autouse=True)
def no_visible_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def rtx4090s(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    return two_rtx4090().install(monkeypatch)


@pytest.fixture
def h200s(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    return two_h200().install(monkeypatch)


def test_two_rtx4090(rtx4090s: FakeNvml) -> None:
    inventory = read_inventory(LOCAL, 2)
    assert (inventory.source, inventory.driver, inventory.cuda) == ("nvml", "580.159.04", "12.4")
    assert inventory.cards[1] == Card(
        index=1,
        nvml_index=1,
        name="NVIDIA GeForce RTX 4090",
        uuid=SECOND,
        memory_bytes=24564 * MIB,
        free_bytes=24164 * MIB,
        memory_gb_per_sec=1008.096,
        pcie_generation=4,
        pcie_lanes=16,
        power_limit_w=450.0,
        compute_capability=(8, 9),
    )
    assert inventory.links == (Link(0, 1, "pcie", "across CPUs", 0, peer_access=False),)


def test_nvml_is_shut_down_again(rtx4090s: FakeNvml) -> None:
    read_inventory(LOCAL, 2)
    assert rtx4090s.num_sessions == 0


def test_nvlink_through_a_switch_counts_active_links(h200s: FakeNvml) -> None:
    inventory = read_inventory(LOCAL, 2)
    assert inventory.links == (Link(0, 1, "nvlink", "one NUMA node", 18, peer_access=True),)
    assert [card.compute_capability for card in inventory.cards] == [(9, 0)] * 2
    assert inventory.cards[0].memory_gb_per_sec == pytest.approx(6144 / 8 * 2 * 3.201)


def test_nvlink_through_a_bridge_counts_links_to_the_peer(h200s: FakeNvml) -> None:
    a, b = h200s.cards
    a.nvlinks = {0: b.bus_id, 1: b.bus_id, 2: b.bus_id, 3: "00000000:99:00.0"}
    b.nvlinks = {0: a.bus_id, 1: a.bus_id, 2: a.bus_id}
    assert read_inventory(LOCAL, 2).links[0].num_nvlinks == 3


def test_direct_nvlinks_count_where_the_driver_does_not_answer_for_peers(h200s: FakeNvml) -> None:
    a, b = h200s.cards
    a.nvlinks = {0: b.bus_id, 1: b.bus_id, 2: "00000000:99:00.0"}
    b.nvlinks = {0: a.bus_id, 1: a.bus_id, 2: "00000000:99:00.0"}
    a.unsupported.add("nvmlDeviceGetP2PStatus")
    assert read_inventory(LOCAL, 2).links == (Link(0, 1, "nvlink", "one NUMA node", 2, peer_access=None),)


def test_active_nvlinks_that_peers_cannot_use_are_pcie(h200s: FakeNvml) -> None:
    h200s.peer_status[real.NVML_P2P_CAPS_INDEX_NVLINK] = real.NVML_P2P_STATUS_DISABLED_BY_REGKEY
    link = read_inventory(LOCAL, 2).links[0]
    assert (link.kind, link.num_nvlinks, link.peer_access) == ("pcie", 0, True)


@pytest.mark.parametrize(
    ("level", "path"), [(0, "same board"), (10, "one switch"), (30, "host bridge"), (77, "unknown")]
)
def test_path(rtx4090s: FakeNvml, level: int, path: str) -> None:
    rtx4090s.level = level
    assert read_inventory(LOCAL, 2).links[0].path == path


def test_links_of_every_pair(rtx4090s: FakeNvml) -> None:
    rtx4090s.cards.append(FakeCard(uuid="GPU-c", bus_id="00000000:61:00.0"))
    rtx4090s.cards.append(FakeCard(uuid="GPU-d", bus_id="00000000:81:00.0"))
    links = read_inventory(LOCAL, 4).links
    assert [(link.first, link.second) for link in links] == list(combinations(range(4), 2))


@pytest.mark.parametrize(
    ("visible", "nvml_indices"),
    [
        (None, [0, 1]),
        ("0,1", [0, 1]),
        ("1,0", [1, 0]),
        ("1", [1]),
        (" 1 , 0", [1, 0]),
        ("", []),
        ("-1", []),
        ("1,-1,0", [1]),
        ("0,2,1", [0]),
        ("1,none,0", [1]),
        ("0,0", []),
        (SECOND, [1]),
        (f"{SECOND},{FIRST}", [1, 0]),
        ("GPU-8932f9", [0]),
        ("GPU-89aa,GPU-8932f9", [1, 0]),
        ("GPU-89", []),
        ("GPU-89aa,GPU-ffff,GPU-8932f9", [1]),
        ("GPU-89aa,GPU-89aa0c", []),
        ("GPU-89aa,0", [1]),
        ("0,GPU-89aa", [0]),
    ],
)
def test_visible_devices(
    rtx4090s: FakeNvml, monkeypatch: pytest.MonkeyPatch, visible: str | None, nvml_indices: list[int]
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    inventory = read_inventory(LOCAL, 2)
    assert [card.nvml_index for card in inventory.cards] == nvml_indices
    assert [card.index for card in inventory.cards] == list(range(len(nvml_indices)))
    assert inventory.source == ("nvml" if nvml_indices else "none")


def test_cuda_order_is_bus_order_and_leaves_out_cards_that_cannot_be_opened(rtx4090s: FakeNvml) -> None:
    rtx4090s.cards.insert(0, FakeCard(uuid="GPU-late", bus_id="00000000:C1:00.0"))
    rtx4090s.cards.insert(0, FakeCard(uuid="GPU-closed", unsupported={"nvmlDeviceGetHandleByIndex"}))
    cards = read_inventory(LOCAL, 2).cards
    assert [card.uuid for card in cards] == [FIRST, SECOND, "GPU-late"]
    assert [card.nvml_index for card in cards] == [2, 3, 1]


def test_what_a_card_does_not_support_is_none(rtx4090s: FakeNvml) -> None:
    rtx4090s.cards[0].unsupported = {name for name in dir(real) if name.startswith("nvmlDevice")} - {
        "nvmlDeviceGetHandleByIndex",
        "nvmlDeviceGetPciInfo",
    }
    inventory = read_inventory(LOCAL, 2)
    assert inventory.cards[0] == Card(0, 0, "unknown card", "", 0, None, None, None, None, None)
    assert inventory.links == (Link(0, 1, "pcie", "unknown", 0, peer_access=None),)
    assert inventory.cards[1].memory_bytes == 24564 * MIB


def test_power_limit_that_is_set_where_the_enforced_one_is_not_told(rtx4090s: FakeNvml) -> None:
    rtx4090s.cards[0].unsupported = {"nvmlDeviceGetEnforcedPowerLimit"}
    assert [card.power_limit_w for card in read_inventory(LOCAL, 2).cards] == [500.0, 450.0]


def test_absent_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert_no_cards(read_inventory(LOCAL, 2))


@pytest.mark.parametrize(
    ("error", "is_said"), [(real.NVML_ERROR_LIBRARY_NOT_FOUND, False), (real.NVML_ERROR_LIB_RM_VERSION_MISMATCH, True)]
)
def test_absent_library_is_quiet_and_a_broken_driver_is_not(
    rtx4090s: FakeNvml, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: int, is_said: bool
) -> None:
    def refuse() -> None:
        raise real.NVMLError(error)

    monkeypatch.setattr(sys.modules["pynvml"], "nvmlInit", refuse)
    assert_no_cards(read_inventory(LOCAL, 2))
    assert ("version mismatch" in caplog.text, bool(caplog.records)) == (is_said, is_said)


def test_library_without_devices(rtx4090s: FakeNvml) -> None:
    rtx4090s.cards.clear()
    inventory = read_inventory(LOCAL, 2)
    assert (inventory.source, inventory.cards, inventory.driver) == ("none", (), "580.159.04")


def test_cpu_has_no_cards_even_where_there_are_some(rtx4090s: FakeNvml) -> None:
    assert_no_cards(read_inventory(HardwareConfig(kind=HardwareKind.cpu), 2))


def assert_no_cards(inventory: Inventory) -> None:
    assert (inventory.source, inventory.cards, inventory.links) == ("none", (), ())
    assert (inventory.driver, inventory.cuda) == (None, None)
    assert inventory.host_memory_bytes >= inventory.host_free_bytes > 0


def test_facts() -> None:
    inventory = read_inventory(FACTS, 3)
    name = "NVIDIA GeForce RTX 4090"
    assert inventory.source == "facts"
    assert inventory.cards == tuple(
        Card(index, -1, name, "", 24 * 1024**3, None, 1008.0, 4, 16, None, (8, 9)) for index in range(3)
    )
    assert inventory.links == tuple(
        Link(a, b, "pcie", "unknown", 0, peer_access=False) for a, b in ((0, 1), (0, 2), (1, 2))
    )


def test_facts_with_nvlink_and_unknown_figures() -> None:
    facts = HardwareConfig(kind=HardwareKind.facts, memory_gib=1.5, nvlink=True, peer_access=True)
    inventory = read_inventory(facts, 2)
    assert inventory.links == (Link(0, 1, "nvlink", "unknown", 0, peer_access=True),)
    card = inventory.cards[0]
    assert (card.memory_bytes, card.memory_gb_per_sec, card.pcie_generation) == (1536 * MIB, None, None)
    assert card.compute_capability is None


@pytest.mark.parametrize(("written", "pair"), [(8.6, (8, 6)), (9.0, (9, 0)), (12.0, (12, 0)), (12.1, (12, 1))])
def test_compute_capability_is_read_as_nvidia_writes_it(written: float, pair: tuple[int, int]) -> None:
    assert read_inventory(replace(FACTS, compute_capability=written), 1).cards[0].compute_capability == pair


def test_facts_without_memory_name_the_knob() -> None:
    with pytest.raises(ConfigError, match=r"hardware\.memory_gib=0\.0 must be above 0"):
        read_inventory(HardwareConfig(kind=HardwareKind.facts), 2)


@pytest.mark.parametrize("config", [LOCAL, FACTS, HardwareConfig(kind=HardwareKind.cpu)])
def test_round_trip_as_json(rtx4090s: FakeNvml, config: HardwareConfig) -> None:
    rtx4090s.cards[0].unsupported = {"nvmlDeviceGetMemoryBusWidth"}
    inventory, adapter = read_inventory(config, 2), TypeAdapter(Inventory)
    assert adapter.validate_json(adapter.dump_json(inventory)) == inventory


def test_every_kind_has_a_reader() -> None:
    assert set(_READERS) == set(HardwareKind)


def test_constants_are_those_of_pynvml() -> None:
    assert (nvml.CLOCK_SM, nvml.CLOCK_MEMORY) == (real.NVML_CLOCK_SM, real.NVML_CLOCK_MEM)
    assert (nvml.PCIE_TX, nvml.PCIE_RX) == (real.NVML_PCIE_UTIL_TX_BYTES, real.NVML_PCIE_UTIL_RX_BYTES)
    assert (nvml.P2P_NVLINK, nvml.P2P_STATUS_OK) == (real.NVML_P2P_CAPS_INDEX_NVLINK, real.NVML_P2P_STATUS_OK)
    assert nvml.P2P_READ in (real.NVML_P2P_CAPS_INDEX_READ, real.NVML_P2P_CAPS_INDEX_READ[0])
    assert (nvml.TEMPERATURE_GPU, nvml.MAX_NVLINKS) == (real.NVML_TEMPERATURE_GPU, real.NVML_NVLINK_MAX_LINKS)
    levels = ("INTERNAL", "SINGLE", "MULTIPLE", "HOSTBRIDGE", "NODE", "SYSTEM")
    assert list(PATHS) == [getattr(real, f"NVML_TOPOLOGY_{level}") for level in levels]


def test_every_question_exists_in_pynvml() -> None:
    text = "".join(Path(str(module.__file__)).read_text() for module in (nvml, inventory, sources))
    names = set(re.findall(r'"(nvml[A-Z]\w+)"', text))
    assert len(names) > 20
    assert [name for name in names if not hasattr(real, name)] == []


@pytest.fixture
def cgroups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A step in a job in a machine, with no limits yet."""
    step = tmp_path / "cgroup" / "job" / "step"
    step.mkdir(parents=True)
    (tmp_path / "own").write_text("4:memory:/elsewhere\n0::/job/step\n")
    monkeypatch.setattr(host, "CGROUP_ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(host, "CGROUP_OF_PROCESS", tmp_path / "own")
    return tmp_path / "cgroup"


def write_limit(folder: Path, limit: str, used: int, cache: int) -> None:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used - cache}\nfile {cache}\ninactive_file {cache}\n")


def test_host_memory_is_the_machines_where_no_group_limits_it(cgroups: Path) -> None:
    write_limit(cgroups / "job" / "step", "max", 100, 0)
    assert host.read_memory()[0] == psutil.virtual_memory().total


@pytest.mark.parametrize("folder", [".", "job", "job/step"])
def test_host_memory_is_what_a_group_grants(cgroups: Path, folder: str) -> None:
    write_limit(cgroups / folder, str(64 * MIB), used=40 * MIB, cache=30 * MIB)
    assert host.read_memory() == (64 * MIB, 54 * MIB)


def test_host_memory_of_a_full_group_is_zero_and_not_less(cgroups: Path) -> None:
    write_limit(cgroups, str(64 * MIB), used=65 * MIB, cache=0)
    assert host.read_memory() == (64 * MIB, 0)


def test_a_group_above_the_machine_does_not_count(cgroups: Path) -> None:
    write_limit(cgroups, str(2**60), used=MIB, cache=0)
    assert host.read_memory()[0] == psutil.virtual_memory().total


def test_cores_are_those_this_process_may_use() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert host.num_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
