"""Which transport carries which sizes of message between cards: each candidate proves itself, the fastest wins.

`base` (NCCL) must work, for it carries whatever the other cannot. Ranks decide alike: they compare the slowest rank's
times, and one that fails on any rank is left out on all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from parallel.communicator import Communicator, TransportError
from parallel.selftest import DECODE_BYTES, Timing, deadline, sums_exactly, time_all_reduce
from parallel.transports.shared_region import gather_texts

KIB = 1024
# Odd sizes too: the last line of a message is seldom full.
SUM_BYTES = (4, 1000, DECODE_BYTES, 256 * KIB, 1024 * KIB)
TIMED_BYTES = (4 * KIB, DECODE_BYTES, 64 * KIB, 128 * KIB, 256 * KIB, 512 * KIB)
# 2048 tokens of a 70B, one chunk of prefill.
PREFILL_BYTES = 32 * 1024 * KIB
TIMED_LARGE_BYTES = (1024 * KIB, 4 * 1024 * KIB, PREFILL_BYTES)
DTYPES = (torch.float32, torch.bfloat16)

C = TypeVar("C", bound=Communicator)


@dataclass(frozen=True)
class Proof:
    """What the self-test of one candidate found: the slowest rank's microseconds by message bytes, or why it failed."""

    name: str
    times_us: dict[int, float] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class Range:
    """One transport and the messages it carries: those above the range before it, up to `up_to_bytes` (None: all)."""

    name: str
    up_to_bytes: int | None
    reason: str
    times_us: dict[int, float]


def prove(
    name: str,
    open_candidate: Callable[[], C],
    sizes: Sequence[int],
    *,
    control: Communicator,
    device: torch.device,
    timeout_sec: float,
    on_timeout: Callable[[TransportError], None],
) -> tuple[C | None, Proof]:
    """Opens a candidate, checks its sums and times `sizes` bytes; all ranks get the same proof.

    Args:
        control: a transport on the CPU by which ranks agree, whatever becomes of the candidate.
        on_timeout: as for `check_transport`.
    """
    communicator: C | None = None
    times: dict[int, float] = {}
    problem = ""
    with deadline(name, timeout_sec, on_timeout):
        try:
            communicator = open_candidate()
            problem = find_wrong_sums(communicator, device)
            timings = [time_one(communicator, device, size) for size in sizes]
            communicator.barrier()
            times = {timing.num_bytes: timing.p50_us for timing in timings}
            late = [str(timing.num_bytes) for timing in timings if not timing.exact]
            problem = problem or (f"gave wrong sums of {late[0]} bytes after many calls" if late else "")
        except Exception as error:  # Whatever it is, the candidate is out; the others may work.
            problem = problem or str(error) or repr(error)
        proof = agree(name, times, problem, sizes, control)
    return (communicator if not proof.error else None), proof


def find_wrong_sums(communicator: Communicator, device: torch.device) -> str:
    """Which message came out wrong, if any. Goes through all of them, so that ranks stay in step."""
    wrong = [
        f"{num_bytes} bytes of {str(dtype).removeprefix('torch.')}"
        for num_bytes in SUM_BYTES
        for dtype in DTYPES
        if not sums_exactly(communicator, device, num_bytes, dtype)
    ]
    return f"gave wrong sums of {wrong[0]}" if wrong else ""


def time_one(communicator: Communicator, device: torch.device, num_bytes: int) -> Timing:
    repeats = 20 if num_bytes <= 1024 * KIB else 3
    return time_all_reduce(communicator, device, num_bytes, repeats=repeats)


def agree(name: str, times: dict[int, float], problem: str, sizes: Sequence[int], control: Communicator) -> Proof:
    """The proof of all ranks: the first problem that one has, or the slowest rank's times."""
    cpu = torch.device("cpu")
    for rank, text in enumerate(gather_texts(control, cpu, problem)):
        if text:
            return Proof(name, error=f"rank {rank}: {text}")
    ours = torch.tensor([times[size] for size in sizes], dtype=torch.float64)
    slowest = control.all_gather(ours).amax(dim=0)
    return Proof(name, dict(zip(sizes, slowest.tolist(), strict=True)))


def faster_up_to(times: dict[int, float], base: dict[int, float]) -> int:
    """The largest size up to which every measured time is below `base`'s; 0 where the smallest is not."""
    limit = 0
    for size in sorted(times):
        if times[size] >= base[size]:
            break
        limit = size
    return limit


def faster_from(times: dict[int, float], base: dict[int, float]) -> int:
    """The smallest size from which on every measured time is below `base`'s; 0 where the largest is not."""
    limit = 0
    for size in sorted(times, reverse=True):
        if times[size] >= base[size]:
            break
        limit = size
    return limit


def plan_ranges(base: Proof, small: Proof, large: Proof) -> tuple[Range, ...]:
    """Who carries what: `small` and `large` the sizes up to and from which they are faster than `base`, it the rest.

    A candidate that failed has no sizes; the range of `base` says why.
    """
    limit, start = faster_up_to(small.times_us, base.times_us), faster_from(large.times_us, base.times_us)
    reasons = [why_not(base, small), why_not(base, large)]
    ranges = middle(base, limit, start, "; ".join(filter(None, reasons)) or "between what the others are timed at")
    if limit:
        size = DECODE_BYTES if limit >= DECODE_BYTES in small.times_us else limit
        ranges.insert(0, Range(small.name, limit, compare(small, base, size), small.times_us))
    if start:
        ranges.append(Range(large.name, None, compare(large, base, max(large.times_us)), large.times_us))
    return tuple(ranges)


def force_ranges(base: Proof, small: Proof, large: Proof, reason: str) -> tuple[Range, ...]:
    """`small` and `large` for all that they were timed at, since a user asked for them; `large` only if it works."""
    limit, start = max(small.times_us), min(large.times_us, default=0)
    ranges = middle(base, limit, start, why_not(base, large) or "what the others do not carry")
    ranges.insert(0, Range(small.name, limit, reason, small.times_us))
    return (*ranges, Range(large.name, None, reason, large.times_us)) if start else tuple(ranges)


def middle(base: Proof, limit: int, start: int, reason: str) -> list[Range]:
    """What is left to `base` above `limit` and below `start` (0: no end)."""
    return [Range(base.name, start - 1 if start else None, reason, base.times_us)] if start != limit + 1 else []


def why_not(base: Proof, other: Proof) -> str:
    """Why `other` does not carry all that it was timed at; "" where it does."""
    if other.error:
        return f"{other.name} was left out: {other.error}"
    slower = [size for size in sorted(other.times_us) if other.times_us[size] >= base.times_us[size]]
    return compare(base, other, slower[0]) if slower else ""


def compare(better: Proof, worse: Proof, size: int) -> str:
    return f"{better.times_us[size]:.1f} us for {size} bytes, where {worse.name} takes {worse.times_us[size]:.1f} us"
