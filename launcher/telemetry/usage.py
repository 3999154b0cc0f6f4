"""Telemetry's data: one sample, what a card's samples add up to, and energy over an interval. Pure, no thread."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

# Bits of nvmlDeviceGetCurrentClocksEventReasons (nvml.h). Bit 0x1, an idle card, is no reason to report.
IDLE_BIT = 0x1
THROTTLE_REASONS = {
    0x2: "applications clocks setting",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clock setting",
    0x200: "board limit",
    0x400: "reliability",
}


@dataclass(frozen=True)
class Sample:
    """One card at one moment; None is what was not measured."""

    # time.time()
    time_sec: float
    index: int
    used_bytes: int | None = None
    power_w: float | None = None
    temperature_c: int | None = None
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    # Bits, see THROTTLE_REASONS.
    throttle: int | None = None
    pcie_generation: int | None = None
    pcie_lanes: int | None = None
    pcie_tx_bytes_per_sec: int | None = None
    pcie_rx_bytes_per_sec: int | None = None
    # Counters: only differences mean something.
    pcie_replays: int | None = None
    energy_j: float | None = None


@dataclass(frozen=True)
class CardUsage:
    """One card over the run, or one rank where there is no NVML; None is what was not measured.

    Peaks are the highest samples: what comes and goes between two samples is not seen.
    """

    index: int
    name: str
    # "nvml" | "resident memory of the rank's process"
    source: str
    # NVML: of the whole card, other programs and the driver's own reserve included.
    peak_bytes: int | None = None
    # Used before the run started: other programs and the driver.
    baseline_bytes: int | None = None
    # Mean over the samples. From Ampere on (GA100 aside) the driver's own value is a mean over the last second.
    power_w: float | None = None
    peak_power_w: float | None = None
    # The card's energy counter, or the integral of power where it has none.
    energy_j: float | None = None
    temperature_c: int | None = None
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    throttle_reasons: tuple[str, ...] = ()
    # The best link seen, which is the one under load: an idle card slows its link down.
    pcie_generation: int | None = None
    pcie_lanes: int | None = None
    pcie_tx_peak_bytes_per_sec: int | None = None
    pcie_rx_peak_bytes_per_sec: int | None = None
    # Packets sent again during the run: a riser, a slot or a cable that loses bits.
    pcie_replays: int | None = None

    @property
    def own_peak_bytes(self) -> int | None:
        """This run's: without what others held before it."""
        return None if self.peak_bytes is None else self.peak_bytes - (self.baseline_bytes or 0)


# Field of CardUsage -> the field of Sample whose highest value it is.
PEAKS = {
    "peak_bytes": "used_bytes",
    "peak_power_w": "power_w",
    "temperature_c": "temperature_c",
    "sm_clock_mhz": "sm_clock_mhz",
    "memory_clock_mhz": "memory_clock_mhz",
    "pcie_generation": "pcie_generation",
    "pcie_lanes": "pcie_lanes",
    "pcie_tx_peak_bytes_per_sec": "pcie_tx_bytes_per_sec",
    "pcie_rx_peak_bytes_per_sec": "pcie_rx_bytes_per_sec",
}


class Curve:
    """Values over time, straight lines between them. 16 bytes a point: days of samples stay small."""

    def __init__(self) -> None:
        self._times = array("d")
        self._values = array("d")

    def __len__(self) -> int:
        return len(self._times)

    def add(self, time_sec: float, value: float) -> None:
        """Append a point; one that is not later than the last is left out (the clock was set back)."""
        if not self._times or time_sec > self._times[-1]:
            self._times.append(time_sec)
            self._values.append(value)

    def span(self) -> tuple[float, float] | None:
        return (self._times[0], self._times[-1]) if self._times else None

    def mean(self) -> float | None:
        """Mean of the points, however far apart."""
        return sum(self._values) / len(self._values) if self._values else None

    def covers(self, start_sec: float, end_sec: float) -> bool:
        return len(self) > 1 and self._times[0] <= start_sec <= end_sec <= self._times[-1]

    def at(self, time_sec: float) -> float:
        """The value at a time that the points cover."""
        right = max(bisect_left(self._times, time_sec), 1)
        t0, t1, v0, v1 = *self._times[right - 1 : right + 1], *self._values[right - 1 : right + 1]
        return v0 + (v1 - v0) * (time_sec - t0) / (t1 - t0)

    def integral(self, start_sec: float, end_sec: float) -> float:
        """Area under the lines (trapezoids) between two times that the points cover."""
        inner = range(bisect_left(self._times, start_sec), bisect_left(self._times, end_sec))
        times = [start_sec, *(self._times[i] for i in inner), end_sec]
        values = [self.at(start_sec), *(self._values[i] for i in inner), self.at(end_sec)]
        steps = zip(times, times[1:], values, values[1:], strict=False)
        return sum((t1 - t0) * (v0 + v1) / 2 for t0, t1, v0, v1 in steps)


class Tally:
    """What the samples of one card add up to."""

    def __init__(self, index: int, name: str, source: str) -> None:
        self._identity = (index, name, source)
        self._peaks: dict[str, Any] = {}
        self._baseline_bytes: int | None = None
        self._replays: list[int] = []
        self._throttle = 0
        self._power = Curve()
        self._energy = Curve()

    def set_baseline(self, sample: Sample) -> None:
        """Take the memory that `sample` shows in use as not this run's."""
        self._baseline_bytes = sample.used_bytes

    def add(self, sample: Sample) -> None:
        for peak, value_name in PEAKS.items():
            value = getattr(sample, value_name)
            if value is not None:
                self._peaks[peak] = max(value, self._peaks.get(peak, value))
        self._throttle |= sample.throttle or 0
        if sample.pcie_replays is not None:
            # Only the first and the last are needed.
            self._replays[1:] = [sample.pcie_replays]
        if sample.power_w is not None:
            self._power.add(sample.time_sec, sample.power_w)
        if sample.energy_j is not None:
            self._energy.add(sample.time_sec, sample.energy_j)

    def energy_between(self, start_sec: float, end_sec: float) -> float | None:
        """Joules between two times in time.time() seconds; None unless samples cover both."""
        if self._energy.covers(start_sec, end_sec):
            return self._energy.at(end_sec) - self._energy.at(start_sec)
        return self._power.integral(start_sec, end_sec) if self._power.covers(start_sec, end_sec) else None

    def usage(self) -> CardUsage:
        span = self._energy.span() or self._power.span()
        return CardUsage(
            *self._identity,
            **self._peaks,
            baseline_bytes=self._baseline_bytes,
            power_w=self._power.mean(),
            energy_j=None if span is None else self.energy_between(*span),
            throttle_reasons=throttle_names(self._throttle),
            pcie_replays=self._replays[-1] - self._replays[0] if self._replays else None,
        )


def throttle_names(bits: int) -> tuple[str, ...]:
    """Readable names of the reasons that hold a card's clocks down, lowest bit first; idling is left out."""
    places = (1 << place for place in range(bits.bit_length()))
    return tuple(THROTTLE_REASONS.get(bit, f"reason {bit:#x}") for bit in places if bits & bit and bit != IDLE_BIT)
