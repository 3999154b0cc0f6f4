"""How far a stage has come where every rank walks it by itself: the run waits for the slowest."""

from __future__ import annotations

from dataclasses import dataclass, field

from launcher.amounts import count


@dataclass
class Pace:
    """One rank's way through a stage, from the first that was heard of it. Times are in seconds of any one clock."""

    first_done: int
    first_sec: float
    done: int
    total: int
    now_sec: float

    @property
    def rate(self) -> float | None:
        """Units a second so far; None: too early to say."""
        elapsed = self.now_sec - self.first_sec
        return (self.done - self.first_done) / elapsed if elapsed > 0 and self.done > self.first_done else None

    @property
    def remaining_sec(self) -> float | None:
        return (self.total - self.done) / self.rate if self.rate else None


@dataclass
class Stage:
    """The paces of the ranks that were heard of."""

    paces: dict[int, Pace] = field(default_factory=dict)

    def update(self, rank: int, done: int, total: int, now_sec: float) -> None:
        first = self.paces.get(rank) or Pace(done, now_sec, done, total, now_sec)
        self.paces[rank] = Pace(first.first_done, first.first_sec, done, total, now_sec)

    def slowest(self) -> tuple[int, Pace]:
        """The rank that has done the smallest share, and its pace."""
        return min(self.paces.items(), key=lambda item: item[1].done / max(item[1].total, 1))

    def text(self, unit: str) -> str:
        """Such as `rank 1: 3.00 GB of 20.00 GB, 3.41 GB/s, 0:05 left`; the rate and the rest of it for bytes only."""
        rank, pace = self.slowest()
        done = amount_text(pace.done, unit) if unit == "bytes" else str(pace.done)
        parts = [f"{done} of {amount_text(pace.total, unit)}"]
        if unit == "bytes" and pace.rate is not None and pace.remaining_sec is not None:
            parts.append(f"{pace.rate / 1e9:.2f} GB/s")
            if pace.done < pace.total:
                parts.append(f"{clock_text(pace.remaining_sec)} left")
        return (f"rank {rank}: " if len(self.paces) > 1 else "") + ", ".join(parts)


def amount_text(amount: int, unit: str) -> str:
    """An amount as a person reads it: bytes in MB or GB, others with the name of one or of many of them."""
    if unit != "bytes":
        return count(amount, unit.removesuffix("s"))
    return f"{amount / 1e9:.2f} GB" if amount >= 1e9 else f"{amount / 1e6:.1f} MB"


def clock_text(seconds: float) -> str:
    """Minutes and seconds, the last begun second counted: 0:05, 12:40."""
    whole = int(-(-seconds // 1))
    return f"{whole // 60}:{whole % 60:02}"
