"""How a rank gets its transport: opened, made to prove itself, and between cards chosen among those that work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from launcher.config import TransportKind
from launcher.job import Job
from parallel.communicator import Communicator, TransportError, open_communicator
from parallel.transports import host_memory_norm
from parallel.transports.advice import failed_test
from parallel.transports.by_size import BySize
from parallel.transports.channel import Channel
from parallel.transports.choice import (
    PREFILL_BYTES,
    TIMED_BYTES,
    TIMED_COPIES_BYTES,
    TIMED_LARGE_BYTES,
    TIMED_MIDDLE_BYTES,
    Proof,
    Range,
    Trial,
    compare,
    faster_up_to,
    fastest,
    force_ranges,
    plan_ranges,
    prove,
)
from parallel.transports.copies import CopiedHostMemory, wrap_copies
from parallel.transports.dense import EXACT, INT8, wrap_dense, wrap_int8
from parallel.transports.host_memory import HostMemory, wrap_host_memory
from parallel.transports.host_memory_norm import wrap_norm
from parallel.transports.norm_trial import NORM_BYTES, find_wrong_norms, time_norm
from parallel.transports.rounded import Rounded, find_wrong_rounded_sums, time_rounded
from parallel.transports.selftest import DECODE_BYTES, check_transport
from parallel.transports.two_step import TwoStepHostMemory, wrap_two_step

OnTimeout = Callable[[TransportError], None]
CPU = torch.device("cpu")
C = TypeVar("C", bound=Communicator)


class HostTransport(Communicator, Protocol):
    """One over host memory; `inner` carries what it cannot."""

    inner: Communicator

    @property
    def channel(self) -> Channel[Any]: ...


class Wrap(Protocol):
    def __call__(self, inner: Communicator, device: torch.device, *, timeout_sec: float) -> HostTransport: ...


@dataclass(frozen=True)
class Candidate:
    """One that competes with NCCL, at which sizes, and how it is tried; trial None: exact sums."""

    wrap: Wrap
    sizes: tuple[int, ...]
    trial: Trial | None = None


CANDIDATES = {
    CopiedHostMemory.name: Candidate(wrap_copies, TIMED_COPIES_BYTES),
    TwoStepHostMemory.name: Candidate(wrap_two_step, TIMED_LARGE_BYTES),
    EXACT.name: Candidate(wrap_dense, (DECODE_BYTES, *TIMED_MIDDLE_BYTES)),
    HostMemory.name: Candidate(wrap_host_memory, TIMED_BYTES),
}
# With engine.all_reduce_bits=8.
ROUNDING = {INT8.name: Candidate(wrap_int8, TIMED_MIDDLE_BYTES, Trial(find_wrong_rounded_sums, time_rounded))}
ALL_TIMED_BYTES = tuple(sorted({size for each in CANDIDATES.values() for size in each.sizes}))


@dataclass(frozen=True)
class Choice:
    """A transport that has proved itself, and which part of it carries which sizes, smallest first."""

    communicator: Communicator
    ranges: tuple[Range, ...]


def open_transport(job: Job, device: torch.device, on_timeout: OnTimeout) -> Choice:
    """The transport of this rank, tested.

    Args:
        on_timeout: ends the process from another thread; a transport that hangs cannot be interrupted.

    Raises:
        TransportError: none works, or the one that was asked for does not.
    """
    openers: dict[str, Callable[[Job, torch.device, OnTimeout], Choice]] = {
        "solo": open_solo,
        "gloo": open_gloo,
        "nccl": choose_between_cards,
    }
    return openers[job.placement.transport](job, device, on_timeout)


def open_solo(job: Job, device: torch.device, on_timeout: OnTimeout) -> Choice:
    return Choice(open_kind(job, "solo", device), (Range("solo", None, "one rank has no links", {}),))


def open_gloo(job: Job, device: torch.device, on_timeout: OnTimeout) -> Choice:
    gloo = open_kind(job, "gloo", device)
    decode = check_transport(gloo, device, timeout_sec=job.run.timeouts.selftest_sec, on_timeout=on_timeout)
    communicator = Rounded(gloo) if job.run.engine.all_reduce_bits == 8 else gloo
    reason = f"the one for {communicator.world_size} ranks on this device"
    return Choice(communicator, (Range(communicator.name, None, reason, {DECODE_BYTES: decode.p50_us}),))


def open_kind(job: Job, kind: str, device: torch.device) -> Communicator:
    return open_communicator(kind, device, timeout_sec=job.run.timeouts.collective_sec)


def choose_between_cards(job: Job, device: torch.device, on_timeout: OnTimeout) -> Choice:
    """NCCL, and host memory for the messages at which it is faster; engine.transport narrows the choice."""
    wanted, tester = job.run.engine.transport, Tester(job, device, on_timeout, open_kind(job, "gloo", CPU))
    base, base_proof = tester.prove("nccl", partial(open_kind, job, "nccl", device), ALL_TIMED_BYTES)
    if base is None:
        raise failure(base_proof)
    if wanted == TransportKind.nccl:
        return Choice(base, (Range("nccl", None, "engine.transport=nccl was asked for", base_proof.times_us),))
    opened, proofs = tester.prove_candidates(base)
    ranges, gather_limit = choose_ranges(wanted, base_proof, proofs)
    composed = compose(base, opened, ranges, gather_limit, carrier_in_graphs(base_proof, proofs), device)
    communicator, first = join_norm(composed, ranges[0], tester)
    # Messages of tens of MiB were sent; the model is to find the card's memory as planned.
    torch.cuda.empty_cache()
    for each in opened.values():
        each.channel.timeout_sec = job.run.timeouts.collective_sec
    return Choice(communicator, (first, *ranges[1:]))


def choose_ranges(wanted: TransportKind, base: Proof, proofs: dict[str, Proof]) -> tuple[tuple[Range, ...], int]:
    """Who carries which sizes, and up to how many bytes HostMemory also carries all-gathers.

    Raises:
        TransportError: host memory was asked for and does not work.
    """
    small, others = proofs[HostMemory.name], list(proofs.values())
    if wanted == TransportKind.auto:
        return plan_ranges(base, others), faster_up_to(small.times_us, base.times_us)
    if small.error:
        raise failure(small)
    return force_ranges(base, others, "engine.transport=host_memory was asked for"), max(small.times_us)


def carrier_in_graphs(base: Proof, proofs: dict[str, Proof]) -> str:
    """Who carries large messages in a graph, which has no copies."""
    others = [proof for name, proof in proofs.items() if name != CopiedHostMemory.name]
    return (fastest([base, *others], PREFILL_BYTES) or base).name


def compose(
    base: Communicator,
    opened: dict[str, HostTransport],
    ranges: Sequence[Range],
    gather_limit: int,
    captured: str,
    device: torch.device,
) -> Communicator:
    """One communicator that hands each message to the transport of its range; what has no use is closed.

    Args:
        gather_limit: up to so many bytes HostMemory also carries all-gathers, and what the others cannot.
        captured: who carries in a graph what copies carry otherwise.
    """
    used = {each.name for each in ranges} | ({HostMemory.name} if gather_limit else set())
    used |= {captured} if CopiedHostMemory.name in used else set()
    for name in opened.keys() - used:
        opened[name].channel.close()
    small = opened.get(HostMemory.name) if gather_limit else None
    if isinstance(small, HostMemory):
        small.max_bytes = max(gather_limit, *(each.up_to_bytes or 0 for each in ranges if each.name == small.name), 0)
    rest = small or base
    for name in opened.keys() & used - {HostMemory.name}:
        opened[name].inner = rest
    if CopiedHostMemory.name in used and captured in opened:
        opened[CopiedHostMemory.name].inner = opened[captured]
    if used == {base.name}:
        return base
    by_name: dict[str, Communicator] = {base.name: base, **opened}
    return BySize(base, [(each.up_to_bytes or 0, by_name[each.name]) for each in ranges], rest, device)


@dataclass(frozen=True)
class Tester:
    """Proves candidates of one job; ranks agree through `control`, on the CPU."""

    job: Job
    device: torch.device
    on_timeout: OnTimeout
    control: Communicator

    @property
    def wait_sec(self) -> float:
        """Below the limit of the self-test, so that a peer that does not answer costs one candidate alone."""
        return self.job.run.timeouts.selftest_sec / 4

    def prove(
        self,
        name: str,
        opener: Callable[[], C],
        sizes: Sequence[int],
        trial: Trial | None = None,
        close: Callable[[C], None] | None = None,
    ) -> tuple[C | None, Proof]:
        return prove(
            name,
            opener,
            sizes,
            control=self.control,
            device=self.device,
            timeout_sec=self.job.run.timeouts.selftest_sec,
            on_timeout=self.on_timeout,
            trial=trial,
            close=close,
        )

    def prove_candidates(self, base: Communicator) -> tuple[dict[str, HostTransport], dict[str, Proof]]:
        """Those of `CANDIDATES` that work, and the proofs of all."""
        opened, proofs = {}, {}
        wanted = CANDIDATES | (ROUNDING if self.job.run.engine.all_reduce_bits == 8 else {})
        for name, candidate in wanted.items():
            opener = partial(candidate.wrap, base, self.device, timeout_sec=self.wait_sec)
            communicator, proofs[name] = self.prove(name, opener, candidate.sizes, candidate.trial, close)
            if communicator is not None:
                opened[name] = communicator
        return opened, proofs


def join_norm(inner: Communicator, first: Range, tester: Tester) -> tuple[Communicator, Range]:
    """`inner`, which has the sums that a norm follows in one kernel with it, up to where that is faster; and `first`,
    the range of the smallest messages, which says so, or why not."""
    if not host_memory_norm.ENABLED:
        return inner, first
    name, trial = host_memory_norm.NAME, Trial(find_wrong_norms, time_norm)
    opener = partial(wrap_norm, inner, tester.device, timeout_sec=tester.wait_sec)
    joined, proof = tester.prove(name, opener, NORM_BYTES, trial, close)
    if joined is None:
        return inner, first.noting_failures([proof])
    _, apart = tester.prove("a kernel each", lambda: inner, NORM_BYTES, trial)
    if apart.error:
        raise failure(apart)
    joined.max_bytes = faster_up_to(proof.times_us, apart.times_us)
    if joined.max_bytes == 0:
        joined.channel.close()
        return inner, first.noting(f"{name} was left out: {compare(proof, apart, NORM_BYTES[0])}")
    joined.channel.timeout_sec = tester.job.run.timeouts.collective_sec
    return joined, first.noting(f"{name} up to {joined.max_bytes} bytes: {compare(proof, apart, NORM_BYTES[0])}")


def close(communicator: HostTransport) -> None:
    """Frees what a candidate that failed has, of its card too; the watch of copies would go on as long as the rank."""
    communicator.channel.close()


def failure(proof: Proof) -> TransportError:
    return TransportError(failed_test(proof.name, proof.error))
