"""Which transport carries which sizes of message between cards: each candidate proves itself, the fastest wins.

`base` (NCCL) must work, for it carries whatever the other cannot. Ranks decide alike: they compare the slowest rank's
times, and one that fails on any rank is left out on all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

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
DTYPES = (torch.float32, torch.bfloat16)

C = TypeVar("C", bound=Communicator)


class Bounded(Communicator, Protocol):
    """A communicator that hands messages above `max_bytes` on to another."""

    max_bytes: int


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


@dataclass(frozen=True)
class Choice:
    communicator: Communicator
    ranges: tuple[Range, ...]


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


def choose(base: Communicator, base_proof: Proof, other: Bounded | None, other_proof: Proof | None) -> Choice:
    """The faster of the two for small messages, `base` for the rest; limits `other` to what it is faster at."""
    limit = 0 if other is None or other_proof is None else faster_up_to(other_proof.times_us, base_proof.times_us)
    if other is None or other_proof is None or limit == 0:
        reason = why_base_alone(base_proof, other_proof)
        return Choice(base, (Range(base_proof.name, None, reason, base_proof.times_us),))
    other.max_bytes = limit
    reason = compare(other_proof, base_proof, DECODE_BYTES if limit >= DECODE_BYTES else limit)
    return Choice(
        other, (Range(other_proof.name, limit, reason, other_proof.times_us), rest(base_proof, other_proof, limit))
    )


def force(other: Bounded, base_proof: Proof, other_proof: Proof, reason: str) -> Choice:
    """`other` for whatever it can carry, since a user asked for it."""
    ranges = (
        Range(other_proof.name, other.max_bytes, reason, other_proof.times_us),
        rest(base_proof, other_proof, other.max_bytes),
    )
    return Choice(other, ranges)


def rest(base: Proof, other: Proof, limit: int) -> Range:
    """The messages above `limit`, at which `other` is slower or which it cannot carry."""
    slower = [size for size in sorted(other.times_us) if size > limit]
    reason = compare(base, other, slower[0]) if slower else f"larger than the slots of {other.name}"
    return Range(base.name, None, reason, base.times_us)


def why_base_alone(base: Proof, other: Proof | None) -> str:
    if other is None:
        return "the only candidate"
    if other.error:
        return f"{other.name} was left out: {other.error}"
    return compare(base, other, min(other.times_us))


def compare(better: Proof, worse: Proof, size: int) -> str:
    return f"{better.times_us[size]:.1f} us for {size} bytes, where {worse.name} takes {worse.times_us[size]:.1f} us"
