"""Telemetry against a fake NVML with known values, and against real processes where there are no cards."""

from __future__ import annotations

import csv
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pynvml as real
import pytest

from launcher.config import HardwareConfig, HardwareKind
from launcher.hardware.inventory import Inventory, read_inventory
from launcher.telemetry import sampler
from launcher.telemetry.sampler import Telemetry
from launcher.telemetry.sources import resident_bytes
from launcher.telemetry.usage import IDLE_BIT, THROTTLE_REASONS, CardUsage, Curve, Sample, Tally, throttle_names
from tests.fakes.nvml import MIB, FakeNvml, Script, two_rtx4090

# Holds {num_bytes} of memory that is really there from the moment it prints, until its input ends.
HOLD = "import sys; held = bytearray(b'x') * {num_bytes}; print('held', flush=True); sys.stdin.read()"
# A copy of it that has not become another program yet.
FORK = "import os, sys; held = bytearray(b'x') * {num_bytes}; os.fork() and print('held', flush=True); sys.stdin.read()"
# Runs the program that its arguments begin with as a child.
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"


# Between the end of a test that goes wrong and that of one on a machine that is only busy.
LONG_SEC, SHORT_SEC = 120.0, 60.0


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that a busy machine holds up is waited for."""
    monkeypatch.setattr(sampler, "FIRST_SAMPLE_SEC", LONG_SEC)
    monkeypatch.setattr(sampler, "LAST_SAMPLE_SEC", LONG_SEC)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return two_rtx4090().install(monkeypatch)


@pytest.fixture
def inventory(fake: FakeNvml) -> Inventory:
    inventory = read_inventory(HardwareConfig(), 2)
    fake.num_reads = 0
    return inventory


@pytest.fixture
def no_cards() -> Inventory:
    return read_inventory(HardwareConfig(kind=HardwareKind.cpu), 2)


def wait_until(is_true: Callable[[], bool], limit_sec: float = LONG_SEC) -> None:
    end_sec = time.monotonic() + limit_sec
    while not is_true():
        assert time.monotonic() < end_sec, "did not come true in time"
        time.sleep(0.005)


def sample_cards(fake: FakeNvml, inventory: Inventory, run_dir: Path, num_samples: int = 6) -> Telemetry:
    """Telemetry of both cards that took at least `num_samples` samples of each and has ended."""
    with Telemetry(run_dir, inventory, (0, 1), interval_sec=0.005) as running:
        wait_until(lambda: fake.num_reads >= 2 * num_samples)
    return running


def rows_of(run_dir: Path, index: int) -> list[dict[str, str]]:
    with (run_dir / "telemetry.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["index"] == str(index)]


def test_summary_has_the_values_of_the_cards(fake: FakeNvml, inventory: Inventory, tmp_path: Path) -> None:
    card = fake.cards[0]
    card.used_bytes = Script([500 * MIB, 21000 * MIB, 9000 * MIB])
    card.power = 320_000
    card.temperature = Script([40, 71, 65])
    card.sm_clock = Script([210, 2745, 2520])
    card.memory_clock = Script([405, 10501])
    card.reasons = Script([0x1, 0x4, 0x20, 0x1])
    card.generation, card.lanes = Script([1, 4, 1]), Script([8, 16, 8])
    card.tx, card.rx = Script([0, 12_000_000, 0]), Script([0, 3_000_000])
    card.replays = Script([7, 7, 9, 12])
    first, second = sample_cards(fake, inventory, tmp_path).summary()
    num_rows = len(rows_of(tmp_path, 0))
    assert first == CardUsage(
        index=0,
        name="NVIDIA GeForce RTX 4090",
        source="nvml",
        peak_bytes=21000 * MIB,
        baseline_bytes=500 * MIB,
        power_w=320.0,
        peak_power_w=320.0,
        # The fake's counter goes 50 J on at every reading.
        energy_j=50.0 * (num_rows - 1),
        temperature_c=71,
        sm_clock_mhz=2745,
        memory_clock_mhz=10501,
        throttle_reasons=("software power cap", "software thermal slowdown"),
        pcie_generation=4,
        pcie_lanes=16,
        pcie_tx_peak_bytes_per_sec=12_000_000_000,
        pcie_rx_peak_bytes_per_sec=3_000_000_000,
        pcie_replays=5,
    )
    assert (second.index, second.peak_bytes, second.throttle_reasons, second.pcie_replays) == (1, 400 * MIB, (), 0)


def test_rows_of_the_time_series(fake: FakeNvml, inventory: Inventory, tmp_path: Path) -> None:
    fake.cards[0].reasons = 0x44
    fake.cards[0].power = Script([100_000, 234_567])
    fake.cards[1].unsupported = {"nvmlDeviceGetPcieThroughput", "nvmlDeviceGetPowerUsage"}
    usage = sample_cards(fake, inventory, tmp_path).summary()
    first, second = rows_of(tmp_path, 0), rows_of(tmp_path, 1)
    assert len(first) == len(second) >= 6
    assert {key: text for key, text in first[1].items() if key != "time_sec"} == {
        "index": "0",
        "used_bytes": str(400 * MIB),
        "power_w": "234.6",
        "temperature_c": "50",
        "sm_clock_mhz": "2520",
        "memory_clock_mhz": "10251",
        "throttle": "0x44",
        "pcie_generation": "4",
        "pcie_lanes": "16",
        "pcie_tx_bytes_per_sec": "1000000",
        "pcie_rx_bytes_per_sec": "2000000",
        "pcie_replays": "7",
    }
    assert (second[1]["pcie_tx_bytes_per_sec"], second[1]["power_w"], second[1]["throttle"]) == ("", "", "0x1")
    times = [float(row["time_sec"]) for row in first]
    assert times == sorted(times) and 0 <= times[0] < SHORT_SEC
    assert usage[0].power_w == pytest.approx(sum(float(row["power_w"]) for row in first) / len(first), abs=0.1)


def test_every_sample_is_on_disk_during_the_run(fake: FakeNvml, inventory: Inventory, tmp_path: Path) -> None:
    with Telemetry(tmp_path / "new" / "run", inventory, (1,), interval_sec=30):
        assert len(rows_of(tmp_path / "new" / "run", 1)) == 1
        assert rows_of(tmp_path / "new" / "run", 0) == []


def test_what_cards_do_not_support_is_none(fake: FakeNvml, inventory: Inventory, tmp_path: Path) -> None:
    names = {name for name in dir(real) if name.startswith("nvmlDevice")} - {"nvmlDeviceGetHandleByIndex"}
    fake.cards[0].unsupported = names
    with Telemetry(tmp_path, inventory, (0,), interval_sec=0.005) as running:
        wait_until(lambda: len(rows_of(tmp_path, 0)) > 2)
    assert running.summary() == (CardUsage(0, "NVIDIA GeForce RTX 4090", "nvml"),)
    assert running.energy_between(time.time(), time.time()) is None


def test_a_card_that_cannot_be_opened_any_more_is_skipped(fake: FakeNvml, inventory: Inventory, tmp_path: Path) -> None:
    fake.cards[0].unsupported = {"nvmlDeviceGetHandleByIndex"}
    with Telemetry(tmp_path, inventory, (0, 1), interval_sec=0.005) as running:
        wait_until(lambda: fake.num_reads >= 3)
    first, second = running.summary()
    assert (first.peak_bytes, second.peak_bytes) == (None, 400 * MIB)


@pytest.mark.parametrize(
    ("new", "old", "field", "expected"),
    [
        ("nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature", "temperature_c", 63),
        (
            "nvmlDeviceGetCurrentClocksEventReasons",
            "nvmlDeviceGetCurrentClocksThrottleReasons",
            "throttle_reasons",
            ("hardware slowdown",),
        ),
    ],
)
def test_old_and_new_drivers(
    fake: FakeNvml, inventory: Inventory, tmp_path: Path, new: str, old: str, field: str, expected: object
) -> None:
    for card, missing in zip(fake.cards, (new, old), strict=True):
        card.temperature, card.reasons, card.unsupported = 63, 0x8, {missing}
    usages = sample_cards(fake, inventory, tmp_path).summary()
    assert [getattr(usage, field) for usage in usages] == [expected, expected]


def test_summary_is_in_the_order_of_the_indices(inventory: Inventory, tmp_path: Path) -> None:
    with Telemetry(tmp_path, inventory, (1, 0), interval_sec=30) as running:
        assert [usage.index for usage in running.summary()] == [1, 0]


def test_nvml_is_shut_down_again(fake: FakeNvml, inventory: Inventory, tmp_path: Path) -> None:
    sample_cards(fake, inventory, tmp_path)
    assert fake.num_sessions == 0


def test_energy_from_power_where_a_card_has_no_counter(fake: FakeNvml, inventory: Inventory, tmp_path: Path) -> None:
    for card, power_mw in zip(fake.cards, (100_000, 50_000), strict=True):
        card.power, card.unsupported = power_mw, {"nvmlDeviceGetTotalEnergyConsumption"}
    with Telemetry(tmp_path, inventory, (0, 1), interval_sec=0.005) as running:
        start_sec = time.time()
        wait_until(lambda: fake.num_reads >= 10)
        end_sec = time.time()
        assert running.energy_between(start_sec, end_sec + 60) is None
    assert running.energy_between(start_sec, end_sec) == pytest.approx(150.0 * (end_sec - start_sec))
    for usage, power_w in zip(running.summary(), (100.0, 50.0), strict=True):
        times = [float(row["time_sec"]) for row in rows_of(tmp_path, usage.index)]
        # The file's times are rounded to milliseconds.
        assert usage.energy_j == pytest.approx(power_w * (times[-1] - times[0]), abs=power_w * 0.0015)


def test_energy_is_unknown_where_one_card_tells_nothing(fake: FakeNvml, inventory: Inventory, tmp_path: Path) -> None:
    fake.cards[1].unsupported = {"nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetPowerUsage"}
    with Telemetry(tmp_path, inventory, (0, 1), interval_sec=0.005) as running:
        start_sec = time.time()
        wait_until(lambda: fake.num_reads >= 10)
        end_sec = time.time()
    assert running.energy_between(start_sec, end_sec) is None
    assert [usage.energy_j is None for usage in running.summary()] == [False, True]


def tally_of(*samples: Sample) -> Tally:
    tally = Tally(0, "card", "nvml")
    for sample in samples:
        tally.add(sample)
    return tally


def test_energy_between_follows_the_counter_and_not_the_power() -> None:
    tally = tally_of(
        *(Sample(t, 0, power_w=1.0, energy_j=e) for t, e in ((10.0, 500.0), (11.0, 600.0), (13.0, 1000.0)))
    )
    assert tally.energy_between(10.5, 12.0) == pytest.approx(250.0)
    assert tally.energy_between(10.0, 13.0) == pytest.approx(500.0)
    assert tally.usage().energy_j == pytest.approx(500.0)


def test_energy_between_is_the_area_under_power() -> None:
    tally = tally_of(*(Sample(t, 0, power_w=p) for t, p in ((0.0, 100.0), (1.0, 300.0), (3.0, 300.0), (4.0, 100.0))))
    assert tally.energy_between(0.0, 4.0) == pytest.approx(200.0 + 600.0 + 200.0)
    assert tally.energy_between(0.5, 3.5) == pytest.approx(125.0 + 600.0 + 125.0)
    assert tally.energy_between(0.0, 0.5) == pytest.approx(75.0)
    assert tally.energy_between(1.25, 1.75) == pytest.approx(150.0)
    assert tally.energy_between(2.0, 2.0) == 0.0
    assert (tally.usage().power_w, tally.usage().peak_power_w) == (200.0, 300.0)


@pytest.mark.parametrize(("start_sec", "end_sec"), [(-0.1, 1.0), (0.0, 2.1), (1.5, 0.5)])
def test_energy_outside_the_samples_is_unknown(start_sec: float, end_sec: float) -> None:
    tally = tally_of(Sample(0.0, 0, power_w=1.0), Sample(2.0, 0, power_w=1.0))
    assert tally.energy_between(start_sec, end_sec) is None


def test_one_sample_gives_power_but_no_energy() -> None:
    usage = tally_of(Sample(0.0, 0, power_w=80.0, energy_j=3.0)).usage()
    assert (usage.power_w, usage.energy_j) == (80.0, None)


def test_a_clock_that_is_set_back_does_not_turn_a_curve_around() -> None:
    curve = Curve()
    for time_sec, value in ((1.0, 5.0), (2.0, 7.0), (1.5, 100.0), (3.0, 9.0)):
        curve.add(time_sec, value)
    assert curve.at(2.5) == pytest.approx(8.0) and len(curve) == 3


def test_throttle_reasons_are_those_of_pynvml() -> None:
    names = {
        "ApplicationsClocksSetting": "applications clocks setting",
        "SwPowerCap": "software power cap",
        "HwSlowdown": "hardware slowdown",
        "SyncBoost": "sync boost",
        "SwThermalSlowdown": "software thermal slowdown",
        "HwThermalSlowdown": "hardware thermal slowdown",
        "HwPowerBrakeSlowdown": "hardware power brake",
        "DisplayClockSetting": "display clock setting",
        "BoardLimit": "board limit",
        "Reliability": "reliability",
    }
    assert {getattr(real, f"nvmlClocksThrottleReason{key}"): name for key, name in names.items()} == THROTTLE_REASONS
    assert real.nvmlClocksThrottleReasonGpuIdle == IDLE_BIT
    assert throttle_names(0x1 | 0x4 | 0x8000) == ("software power cap", "reason 0x8000")


def test_a_sampler_that_raises_ends_only_itself(
    fake: FakeNvml, inventory: Inventory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake.trouble, fake.trouble_after = RuntimeError("the bus is gone"), 6
    with Telemetry(tmp_path, inventory, (0, 1), interval_sec=0.005) as running:
        wait_until(lambda: "the bus is gone" in caplog.text)
    assert fake.num_reads == 7 and fake.num_sessions == 0
    assert [usage.peak_bytes for usage in running.summary()] == [400 * MIB, 400 * MIB]
    assert len(rows_of(tmp_path, 0)) == 3


def test_a_sampler_that_raises_at_once_does_not_hold_up_the_run(
    fake: FakeNvml, inventory: Inventory, tmp_path: Path
) -> None:
    (tmp_path / "telemetry.csv").mkdir()
    start_sec = time.monotonic()
    with Telemetry(tmp_path, inventory, (0, 1)) as running:
        pass
    assert time.monotonic() - start_sec < SHORT_SEC
    assert running.summary() == tuple(CardUsage(index, "NVIDIA GeForce RTX 4090", "nvml") for index in (0, 1))


def test_errors_of_the_run_pass_through(fake: FakeNvml, inventory: Inventory, tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="of the run"), Telemetry(tmp_path, inventory, (0,), interval_sec=30):
        raise KeyError("of the run")


def test_exit_does_not_wait_for_the_interval_and_takes_a_last_sample(
    fake: FakeNvml, inventory: Inventory, tmp_path: Path
) -> None:
    with Telemetry(tmp_path, inventory, (0,), interval_sec=LONG_SEC):
        start_sec = time.monotonic()
    assert time.monotonic() - start_sec < SHORT_SEC
    assert len(rows_of(tmp_path, 0)) == 2


def test_a_driver_that_hangs_holds_up_neither_start_nor_end(
    fake: FakeNvml, inventory: Inventory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "FIRST_SAMPLE_SEC", 0.1)
    monkeypatch.setattr(sampler, "LAST_SAMPLE_SEC", 0.1)
    fake.free_to_answer.clear()
    start_sec = time.monotonic()
    with Telemetry(tmp_path, inventory, (0,), interval_sec=0.05) as running:
        assert running.summary()[0].peak_bytes is None
    assert time.monotonic() - start_sec < SHORT_SEC
    fake.free_to_answer.set()
    wait_until(lambda: running.summary()[0].peak_bytes == 400 * MIB)
    assert running.summary()[0].baseline_bytes is None


def test_cards_that_the_inventory_does_not_have_are_refused(inventory: Inventory, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"card_indices=\[0, 2\] but the cards are \[0, 1\]"):
        Telemetry(tmp_path, inventory, (0, 2))


@pytest.fixture
def hold() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts processes that hold memory; they are ended with the test."""
    processes: list[subprocess.Popen[str]] = []

    def start(num_bytes: int, *, in_grandchild: bool = False, program: str = HOLD) -> subprocess.Popen[str]:
        program = program.format(num_bytes=num_bytes)
        command = ["-c", PARENT, PARENT, program] if in_grandchild else ["-c", program]
        process = subprocess.Popen([sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        process.communicate()


def write_pid(run_dir: Path, rank: int, text: object) -> None:
    (run_dir / "ranks").mkdir(exist_ok=True)
    (run_dir / "ranks" / f"{rank}.pid").write_text(str(text))


def test_resident_memory_of_ranks_and_their_children(
    no_cards: Inventory, tmp_path: Path, hold: Callable[..., subprocess.Popen[str]]
) -> None:
    with Telemetry(tmp_path, no_cards, (0, 1), interval_sec=0.01) as running:
        assert running.summary() == tuple(
            CardUsage(rank, f"rank {rank} (cpu)", "resident memory of the rank's process") for rank in (0, 1)
        )
        small = hold(1)
        write_pid(tmp_path, 0, small.pid)
        wait_until(lambda: running.summary()[0].peak_bytes is not None)
        bare_bytes = running.summary()[0].peak_bytes
        write_pid(tmp_path, 0, hold(100_000_000).pid)
        write_pid(tmp_path, 1, hold(100_000_000, in_grandchild=True).pid)
        wait_until(lambda: (running.summary()[0].peak_bytes or 0) - (bare_bytes or 0) > 95_000_000)
        wait_until(lambda: (running.summary()[1].peak_bytes or 0) > 100_000_000)
    first, second = running.summary()
    assert first.peak_bytes is not None and bare_bytes is not None
    assert 95_000_000 < first.peak_bytes - bare_bytes < 120_000_000
    assert (first.baseline_bytes, first.power_w, first.energy_j, first.pcie_replays) == (None, None, None, None)
    assert second.peak_bytes == max(int(row["used_bytes"]) for row in rows_of(tmp_path, 1))
    assert rows_of(tmp_path, 1)[-1]["power_w"] == ""
    assert running.energy_between(time.time(), time.time()) is None


def test_memory_that_a_forked_child_shares_is_counted_once(
    tmp_path: Path, hold: Callable[..., subprocess.Popen[str]]
) -> None:
    write_pid(tmp_path, 0, hold(100_000_000, program=FORK).pid)
    found = resident_bytes(tmp_path / "ranks" / "0.pid")
    assert found is not None and 100_000_000 < found < 140_000_000


def test_pid_files_without_a_process_are_skipped(
    no_cards: Inventory, tmp_path: Path, hold: Callable[..., subprocess.Popen[str]]
) -> None:
    gone = hold(1)
    gone.communicate()
    write_pid(tmp_path, 0, gone.pid)
    write_pid(tmp_path, 1, "")
    write_pid(tmp_path, 2, "12x")
    (tmp_path / "ranks" / "notes.pid").write_text("1")
    # Nobody announced rank 3: it is sampled all the same.
    write_pid(tmp_path, 3, hold(1).pid)
    with Telemetry(tmp_path, no_cards, (0, 1, 2), interval_sec=0.01) as running:
        wait_until(lambda: len(rows_of(tmp_path, 3)) > 2)
    assert [usage.index for usage in running.summary() if usage.peak_bytes is not None] == [3]
    assert [usage.name for usage in running.summary()] == [f"rank {rank} (cpu)" for rank in range(4)]


def test_a_process_that_ended_but_was_not_waited_for_counts_as_gone(
    no_cards: Inventory, tmp_path: Path, hold: Callable[..., subprocess.Popen[str]]
) -> None:
    """Another rank that goes on shows when samples are taken."""
    process = hold(1)
    for rank, pid in enumerate((process.pid, hold(1).pid)):
        write_pid(tmp_path, rank, pid)

    def wait_for_rows(rank: int, num_more: int) -> None:
        num = len(rows_of(tmp_path, rank)) + num_more
        wait_until(lambda: len(rows_of(tmp_path, rank)) >= num)

    with Telemetry(tmp_path, no_cards, (0, 1), interval_sec=0.01):
        wait_for_rows(0, 1)
        process.kill()
        wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE)
        # The sample that was being taken.
        wait_for_rows(1, 1)
        num_rows = len(rows_of(tmp_path, 0))
        wait_for_rows(1, 3)
        assert len(rows_of(tmp_path, 0)) == num_rows
    assert all(int(row["used_bytes"]) > 0 for row in rows_of(tmp_path, 0))
