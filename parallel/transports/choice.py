"""Which transport carries which sizes of message between cards: each candidate proves itself, the fastest wins.

Every candidate is timed at sizes of its own, the base at all of them. A message goes the way that was the fastest at
the next larger size, one beyond all sizes the way of the largest.

`base` (NCCL) must work, for it carries whatever the other cannot. Ranks decide alike: they compare the slowest rank's
times, and one that fails on any rank is left out on all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from parallel.communicator import Communicator, TransportError
from parallel.transports.advice import advice, failed_test, reason_of
from parallel.transports.copies import CopiedHostMemory
from parallel.transports.selftest import DECODE_BYTES, EAGER_BYTES, Timing, deadline, sums_exactly, time_all_reduce
from parallel.transports.shared_region import gather_texts
from parallel.units import KIB

# Odd sizes too: the last line of a message is seldom full.
SUM_BYTES = (4, 1000, DECODE_BYTES, 100_000, 256 * KIB, 1024 * KIB)
TIMED_BYTES = (4 * KIB, DECODE_BYTES, 64 * KIB, 128 * KIB, 256 * KIB, 512 * KIB)
# 4 to 128 tokens of a 70B.
TIMED_MIDDLE_BYTES = (64 * KIB, 128 * KIB, 256 * KIB, 512 * KIB, 1024 * KIB, 2048 * KIB)
# 2048 tokens of a 70B, one chunk of prefill.
PREFILL_BYTES = 32 * 1024 * KIB
TIMED_LARGE_BYTES = (512 * KIB, 1024 * KIB, 2048 * KIB, 4 * 1024 * KIB, PREFILL_BYTES)
# None that the self-test captures: copies are not.
TIMED_COPIES_BYTES = (EAGER_BYTES, PREFILL_BYTES)
# Of its time, what a transport's messages are held to cost. Large ones go beside products, from which copies take no
# multiprocessors: on two H200 products of 15 ms took 16.1 beside 30 sums by copies, and 19.7 beside sums in two steps,
# which alone were 7 % slower than copies.
SHARE_OF_TIME = {CopiedHostMemory.name: 0.8}
DTYPES = (torch.float32, torch.bfloat16)

C = TypeVar("C", bound=Communicator)


@dataclass(frozen=True)
class Proof:
    """What the self-test of one candidate found: the slowest rank's microseconds by message bytes, or why it failed."""

    name: str
    times_us: dict[int, float] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class Trial:
    """What a candidate has to do: which of it came out wrong, if any, and how fast it is at so many bytes."""

    find_problem: Callable[[Communicator, torch.device], str]
    measure: Callable[[Communicator, torch.device, int], Timing]


@dataclass(frozen=True)
class Range:
    """One transport and the messages it carries: those above the range before it, up to `up_to_bytes` (None: all).

    `reason`: why this one, and who else was left out; `failed`: of those, who did not pass the self-test, and why.
    """

    name: str
    up_to_bytes: int | None
    reason: str
    times_us: dict[int, float]
    failed: tuple[str, ...] = ()

    def noting(self, found: str) -> Range:
        return replace(self, reason=f"{self.reason}; {found}")

    def noting_failures(self, others: Sequence[Proof]) -> Range:
        """Who of `others` failed, too."""
        failed = tuple(left_out(other) for other in others if other.error)
        return replace(self, reason="; ".join([self.reason, *failed]), failed=self.failed + failed)


def prove(
    name: str,
    open_candidate: Callable[[], C],
    sizes: Sequence[int],
    *,
    control: Communicator,
    device: torch.device,
    timeout_sec: float,
    on_timeout: Callable[[TransportError], None],
    trial: Trial | None = None,
    close: Callable[[C], None] | None = None,
) -> tuple[C | None, Proof]:
    """Opens a candidate, checks its sums and times `sizes` bytes; all ranks get the same proof.

    Args:
        control: a transport on the CPU by which ranks agree, whatever becomes of the candidate.
        on_timeout: as for `check_transport`.
        trial: what is asked of it; None: all-reduces.
        close: what to do with one that failed.
    """
    trial = trial or Trial(find_wrong_sums, time_one)
    communicator: C | None = None
    times: dict[int, float] = {}
    problem = ""
    with deadline(name, timeout_sec, on_timeout) as limit:
        try:
            communicator = open_candidate()
            problem = trial.find_problem(communicator, device)
            timings = [trial.measure(communicator, device, size) for size in sizes]
            communicator.barrier()
            times = {timing.num_bytes: timing.p50_us for timing in timings}
            late = [str(timing.num_bytes) for timing in timings if not timing.exact]
            problem = problem or (f"gave wrong sums of {late[0]} bytes after many calls" if late else "")
        except Exception as error:  # Whatever it is, the candidate is out; the others may work.
            problem = problem or reason_of(error)
            limit.blame(TransportError(failed_test(name, f"rank {control.rank}: {problem}")))
        proof = agree(name, times, problem, sizes, control)
        if proof.error and communicator is not None and close is not None:
            close(communicator)
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
    repeats = 20 if num_bytes <= 2048 * KIB else 3
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


def plan_ranges(base: Proof, others: Sequence[Proof]) -> tuple[Range, ...]:
    """Who carries what: at each size that was timed, whoever was the fastest; `base` where nobody was faster. The last
    range also says who failed."""
    sizes = all_sizes(base, *others)
    winners = [fastest((base, *others), size) or base for size in sizes]
    ranges = merge_ranges(sizes, winners, lambda winner, mine: why(winner, (base, *others), mine))
    return (*ranges[:-1], ranges[-1].noting_failures(others))


def force_ranges(base: Proof, others: Sequence[Proof], reason: str) -> tuple[Range, ...]:
    """As `plan_ranges`, of `others` alone, since a user asked for them; `base` where none of them was timed."""
    sizes = all_sizes(base, *others)
    winners = [fastest(others, size) or base for size in sizes]
    ranges = merge_ranges(
        sizes, winners, lambda winner, mine: "what the others do not carry" if winner is base else reason
    )
    return (*ranges[:-1], ranges[-1].noting_failures(others))


def all_sizes(*proofs: Proof) -> list[int]:
    return sorted({size for proof in proofs for size in proof.times_us})


def fastest(proofs: Sequence[Proof], size: int) -> Proof | None:
    """Of those that were timed at `size`, as SHARE_OF_TIME counts; of equal ones the first."""
    timed = [proof for proof in proofs if size in proof.times_us]
    return min(timed, key=lambda proof: proof.times_us[size] * SHARE_OF_TIME.get(proof.name, 1.0), default=None)


def merge_ranges(
    sizes: Sequence[int], winners: Sequence[Proof], reason: Callable[[Proof, Sequence[int]], str]
) -> list[Range]:
    """One range for neighbours with the same winner; the last one has no end."""
    runs: list[tuple[Proof, list[int]]] = []
    for size, winner in zip(sizes, winners, strict=True):
        if not runs or runs[-1][0] is not winner:
            runs.append((winner, []))
        runs[-1][1].append(size)
    ranges = [Range(winner.name, mine[-1], reason(winner, mine), winner.times_us) for winner, mine in runs]
    return [*ranges[:-1], replace(ranges[-1], up_to_bytes=None)]


def left_out(failed: Proof) -> str:
    """Why it carries nothing, and what to do about it where that is known."""
    return " ".join(filter(None, [f"{failed.name} was left out: {failed.error}", in_brackets(advice(failed.error))]))


def in_brackets(text: str) -> str:
    return f"({text.removesuffix('.')})" if text else ""


def why(winner: Proof, proofs: Sequence[Proof], sizes: Sequence[int]) -> str:
    """Its time beside the next best's, at the size of a decode step or else the largest of `sizes`."""
    size = DECODE_BYTES if DECODE_BYTES in sizes else sizes[-1]
    rival = fastest([proof for proof in proofs if proof is not winner], size)
    if rival is None:
        return f"the only one for {size} bytes"
    hinders = winner.times_us[size] > rival.times_us[size]
    return compare(winner, rival, size) + (", and hinders products beside it" if hinders else "")


def compare(better: Proof, worse: Proof, size: int) -> str:
    return f"{better.times_us[size]:.1f} us for {size} bytes, where {worse.name} takes {worse.times_us[size]:.1f} us"
