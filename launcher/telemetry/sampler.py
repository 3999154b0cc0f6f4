"""What the cards did over a run: a sampling thread, a time series on disk and a summary for each card.

Telemetry serves the run and never ends it: trouble in the thread stops the sampling, and the summary holds what was
measured until then.
"""

from __future__ import annotations

import csv
import logging
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from launcher.hardware.inventory import Inventory
from launcher.telemetry.sources import NVML, NvmlSource, ResidentSource, Source, rank_name
from launcher.telemetry.usage import CardUsage, Sample, Tally

_LOG = logging.getLogger(__name__)

COLUMNS = (
    "time_sec",
    "index",
    "used_bytes",
    "power_w",
    "temperature_c",
    "sm_clock_mhz",
    "memory_clock_mhz",
    "throttle",
    "pcie_generation",
    "pcie_lanes",
    "pcie_tx_bytes_per_sec",
    "pcie_rx_bytes_per_sec",
    "pcie_replays",
)
FORMATS = {"throttle": "#x", "power_w": ".1f"}

# The first sample, before the run, tells what others use. The driver may need seconds to wake idle cards for it, but
# a run does not wait longer than this.
FIRST_SAMPLE_SEC = 10.0
# A sample takes about 40 ms a card. A driver that does not answer within this is left to the daemon thread.
LAST_SAMPLE_SEC = 2.0


class Telemetry:
    """Samples cards, or ranks where there are none, from `with` to its end; writes `run_dir`/telemetry.csv.

    The first sample is taken before `with` goes on, so that it shows the cards before the run, and the last one at its
    end; `interval_sec` passes from the end of one to the start of the next.

    With NVML cards (`inventory.source` is "nvml") the cards with the CUDA indices `card_indices` are sampled. Otherwise
    `card_indices` are ranks, and so is the resident memory of the processes named in `run_dir`/ranks/{rank}.pid.
    """

    def __init__(
        self, run_dir: Path, inventory: Inventory, card_indices: Sequence[int], *, interval_sec: float = 0.2
    ) -> None:
        assert interval_sec > 0, f"interval_sec={interval_sec}"
        self._path = run_dir / "telemetry.csv"
        self._source = _choose_source(run_dir, inventory, card_indices)
        self._interval_sec = interval_sec
        self._tallies = {index: Tally(index, name, self._source.name) for index, name in self._source.names().items()}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._first_sample = threading.Event()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)

    def __enter__(self) -> Telemetry:
        self._thread.start()
        self._first_sample.wait(FIRST_SAMPLE_SEC)
        # A first sample that comes later shows the run already: no baseline then.
        self._first_sample.set()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(self._interval_sec + LAST_SAMPLE_SEC)

    def summary(self) -> tuple[CardUsage, ...]:
        """What was measured so far, in the order of `card_indices`; callable during the run and after it.

        Ranks that have a pid file but are not among `card_indices` follow in order.
        """
        announced = list(self._source.names())
        with self._lock:
            others = sorted(set(self._tallies) - set(announced))
            return tuple(self._tallies[index].usage() for index in (*announced, *others))

    def energy_between(self, start_sec: float, end_sec: float) -> float | None:
        """Joules of all cards between two times in time.time() seconds.

        Interpolated between samples of the cards' energy counters, or trapezoids under samples of power. None where a
        card tells neither, or where the samples do not cover the interval (so far).
        """
        with self._lock:
            joules = [tally.energy_between(start_sec, end_sec) for tally in self._tallies.values()]
        known = [value for value in joules if value is not None]
        return sum(known) if known and len(known) == len(joules) else None

    def _run(self) -> None:
        try:
            self._sample_until_stopped()
        except Exception as error:
            _LOG.warning("Telemetry stopped, the run goes on: %s: %s", type(error).__name__, error)
        finally:
            # Also after trouble: `with` must not wait for a sample that will not come.
            self._first_sample.set()

    def _sample_until_stopped(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("w", newline="") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(COLUMNS)
            start_sec = time.time()
            self._source.open()
            try:
                while True:
                    self._keep(rows, start_sec, self._source.read())
                    file.flush()
                    self._first_sample.set()
                    if self._stop.is_set():
                        break
                    self._stop.wait(self._interval_sec)
            finally:
                self._source.close()

    def _keep(self, rows: Any, start_sec: float, samples: Iterable[Sample]) -> None:
        for sample in samples:
            with self._lock:
                tally = self._tally(sample.index)
                if not self._first_sample.is_set() and self._source.name == NVML:
                    tally.set_baseline(sample)
                tally.add(sample)
            rows.writerow([_cell(sample, column, start_sec) for column in COLUMNS])

    def _tally(self, index: int) -> Tally:
        """The card's tally; a rank that nobody announced gets one when its pid file appears."""
        if index not in self._tallies:
            self._tallies[index] = Tally(index, rank_name(index), self._source.name)
        return self._tallies[index]


def _choose_source(run_dir: Path, inventory: Inventory, card_indices: Sequence[int]) -> Source:
    if inventory.source != NVML:
        return ResidentSource(run_dir / "ranks", card_indices)
    cards = {card.index: card for card in inventory.cards}
    assert set(card_indices) <= set(cards), f"card_indices={list(card_indices)} but the cards are {sorted(cards)}"
    return NvmlSource([cards[index] for index in card_indices])


def _cell(sample: Sample, column: str, start_sec: float) -> str:
    """One field as text; empty where it was not measured."""
    if column == "time_sec":
        return f"{sample.time_sec - start_sec:.3f}"
    value = getattr(sample, column)
    return "" if value is None else format(value, FORMATS.get(column, ""))
