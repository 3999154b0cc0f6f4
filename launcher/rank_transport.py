"""How a rank gets its transport: opened, made to prove itself, and between cards chosen among those that work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from launcher.config import TransportKind
from launcher.job import Job
from parallel.communicator import Communicator, TransportError, open_communicator
from parallel.selftest import DECODE_BYTES, check_transport
from parallel.transport_choice import (
    TIMED_BYTES,
    TIMED_LARGE_BYTES,
    Proof,
    Range,
    force_ranges,
    plan_ranges,
    prove,
)
from parallel.transports.host_memory import HostMemory, wrap_host_memory
from parallel.transports.two_step import TwoStepHostMemory, wrap_two_step

OnTimeout = Callable[[TransportError], None]
CPU = torch.device("cpu")
SMALL, LARGE = HostMemory.name, TwoStepHostMemory.name
C = TypeVar("C", bound=Communicator)


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
    communicator = open_kind(job, "gloo", device)
    test = check_transport(communicator, device, timeout_sec=job.run.timeouts.selftest_sec, on_timeout=on_timeout)
    reason = f"the one for {communicator.world_size} ranks on this device"
    return Choice(communicator, (Range("gloo", None, reason, {DECODE_BYTES: test.decode.p50_us}),))


def open_kind(job: Job, kind: str, device: torch.device) -> Communicator:
    return open_communicator(kind, device, timeout_sec=job.run.timeouts.collective_sec)


def choose_between_cards(job: Job, device: torch.device, on_timeout: OnTimeout) -> Choice:
    """NCCL, and host memory for the messages at which it is faster; engine.transport narrows the choice."""
    wanted, tester = job.run.engine.transport, Tester(job, device, on_timeout, open_kind(job, "gloo", CPU))
    base, base_proof = tester.prove("nccl", lambda: open_kind(job, "nccl", device), (*TIMED_BYTES, *TIMED_LARGE_BYTES))
    if base is None:
        raise failure(base_proof)
    if wanted == TransportKind.nccl:
        return Choice(base, (Range("nccl", None, "engine.transport=nccl was asked for", base_proof.times_us),))
    inner = base
    large, large_proof = tester.prove(LARGE, lambda: open_two_step(job, inner, device), TIMED_LARGE_BYTES)
    small, small_proof = tester.prove(SMALL, lambda: open_slots(job, inner, device), TIMED_BYTES)
    if wanted == TransportKind.auto:
        ranges = plan_ranges(base_proof, small_proof, large_proof)
    elif small is None:
        raise failure(small_proof)
    else:
        ranges = force_ranges(base_proof, small_proof, large_proof, "engine.transport=host_memory was asked for")
    # Messages of tens of MiB were sent; the model is to find the card's memory as planned.
    torch.cuda.empty_cache()
    return Choice(compose(base, small, large, ranges, job.run.timeouts.collective_sec), ranges)


def compose(
    base: Communicator,
    small: HostMemory | None,
    large: TwoStepHostMemory | None,
    ranges: Sequence[Range],
    timeout_sec: float,
) -> Communicator:
    """One communicator that hands each message to the transport of its range; what has no range is closed."""
    limits, chosen = {each.name: each.up_to_bytes for each in ranges}, base
    for each in (small, large):
        if each is not None:
            each.channel.timeout_sec = timeout_sec
            if each.name not in limits:
                each.channel.close()
    if large is not None and LARGE in limits:
        large.min_bytes, large.inner = (ranges[-2].up_to_bytes or 0) + 1, base
        chosen = large
    limit = limits.get(SMALL)
    if small is not None and limit:
        small.max_bytes, small.inner = limit, chosen
        chosen = small
    return chosen


@dataclass(frozen=True)
class Tester:
    """Proves candidates of one job; ranks agree through `control`, on the CPU."""

    job: Job
    device: torch.device
    on_timeout: OnTimeout
    control: Communicator

    def prove(self, name: str, opener: Callable[[], C], sizes: Sequence[int]) -> tuple[C | None, Proof]:
        return prove(
            name,
            opener,
            sizes,
            control=self.control,
            device=self.device,
            timeout_sec=self.job.run.timeouts.selftest_sec,
            on_timeout=self.on_timeout,
        )


def open_two_step(job: Job, inner: Communicator, device: torch.device) -> TwoStepHostMemory:
    """Bounded as `open_slots`."""
    return wrap_two_step(inner, device, timeout_sec=job.run.timeouts.selftest_sec / 4)


def open_slots(job: Job, inner: Communicator, device: torch.device) -> HostMemory:
    """Bounded below the limit of the self-test, so that a peer that does not answer costs this candidate alone."""
    return wrap_host_memory(inner, device, timeout_sec=job.run.timeouts.selftest_sec / 4)


def failure(proof: Proof) -> TransportError:
    return TransportError(
        f"the self-test of {proof.name} failed on {proof.error}. Broken peer access does this: try "
        "limits.peer_access=off, another engine.transport, and task=probe."
    )
