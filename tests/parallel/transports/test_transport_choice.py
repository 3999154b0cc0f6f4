"""The choice of a transport: wrong ones are left out with a reason, slower ones are not taken, ranks decide alike."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch import Tensor

from parallel.communicator import Communicator, ElidedAllReduce, TransportError
from parallel.transports.choice import Proof, Range, agree, faster_up_to, force_ranges, plan_ranges, prove
from parallel.transports.selftest import DECODE_BYTES
from parallel.transports.solo import Solo
from tests.parallel.ranks import CPU
from tools.local_ranks import run_on_ranks

SIZES = (1024, DECODE_BYTES)
SMALL_SIZES = (4096, DECODE_BYTES, 65536, 262144, 524288)
MIDDLE_SIZES = (65536, 262144, 524288, 2**20)
LARGE_SIZES = (2**20, 2**22, 2**25)
NCCL = Proof(
    "nccl",
    {4096: 24.0, DECODE_BYTES: 24.7, 65536: 28.3, 262144: 46.7, 524288: 50.0, 2**20: 63.0, 2**22: 180.0, 2**25: 1183.0},
)
FAILED_SMALL = Proof("host_memory", error="rank 1: gave wrong sums of 4 bytes of float32")
FAILED_LARGE = Proof("two_step", error="rank 0: no memory")


def proof(name: str, sizes: tuple[int, ...], times: tuple[float, ...]) -> Proof:
    return Proof(name, dict(zip(sizes, times, strict=True)))


def small(*times: float) -> Proof:
    return proof("host_memory", SMALL_SIZES, times)


def middle(*times: float) -> Proof:
    return proof("dense", MIDDLE_SIZES, times)


def large(*times: float) -> Proof:
    return proof("two_step", LARGE_SIZES, times)


SLOW_SMALL, SLOW_LARGE = small(99, 99, 99, 99, 99), large(9999, 9999, 9999)


def ends(ranges: tuple[Range, ...]) -> list[tuple[str, int | None]]:
    return [(each.name, each.up_to_bytes) for each in ranges]


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ((3.0, 4.3, 7.6, 20.5, 41.0), [("host_memory", 524288), ("nccl", None)]),
        ((3.0, 4.3, 7.6, 20.5, 50.0), [("host_memory", 262144), ("nccl", None)]),
        ((23.9, 99.0, 99.0, 99.0, 99.0), [("host_memory", 4096), ("nccl", None)]),
        # Each size for itself.
        (
            (3.0, 4.3, 90.0, 20.5, 99.0),
            [("host_memory", DECODE_BYTES), ("nccl", 65536), ("host_memory", 262144), ("nccl", None)],
        ),
        ((24.0, 24.7, 28.3, 46.7, 50.0), [("nccl", None)]),
    ],
)
def test_at_each_size_the_fastest_carries(times: tuple[float, ...], expected: list[tuple[str, int | None]]) -> None:
    assert ends(plan_ranges(NCCL, [SLOW_LARGE, small(*times)])) == expected


def test_candidates_of_different_sizes_share_the_range() -> None:
    """Whatever their order; the times of a size that one was not timed at do not stand in its way."""
    candidates = [large(45.0, 150.0, 700.0), middle(9.0, 13.0, 18.0, 28.0), small(3.0, 4.3, 8.7, 21.4, 38.0)]
    expected = [("host_memory", 65536), ("dense", 2**20), ("two_step", None)]
    assert ends(plan_ranges(NCCL, candidates)) == expected
    assert ends(plan_ranges(NCCL, candidates[::-1])) == expected
    assert ends(force_ranges(NCCL, candidates, "")) == expected
    ranges = plan_ranges(NCCL, [FAILED_LARGE, *candidates[1:]])
    assert ends(ranges) == [("host_memory", 65536), ("dense", 2**20), ("nccl", None)]


def test_each_range_has_its_time_beside_the_next_best_as_its_reason() -> None:
    ranges = plan_ranges(NCCL, [large(70.0, 150.0, 700.0), small(3.0, 4.3, 7.6, 60.0, 80.0), FAILED_SMALL])
    assert ends(ranges) == [("host_memory", 65536), ("nccl", 2**20), ("two_step", None)]
    assert [each.reason for each in ranges] == [
        "4.3 us for 16384 bytes, where nccl takes 24.7 us",
        "63.0 us for 1048576 bytes, where two_step takes 70.0 us",
        "700.0 us for 33554432 bytes, where nccl takes 1183.0 us; "
        "host_memory was left out: rank 1: gave wrong sums of 4 bytes of float32",
    ]
    assert ranges[0].times_us[DECODE_BYTES] == 4.3


def test_those_that_failed_are_left_out_with_their_reasons() -> None:
    [only] = plan_ranges(NCCL, [FAILED_SMALL, FAILED_LARGE])
    assert (only.name, only.up_to_bytes) == ("nccl", None)
    assert only.reason == (
        "the only one for 16384 bytes; "
        "host_memory was left out: rank 1: gave wrong sums of 4 bytes of float32; "
        "two_step was left out: rank 0: no memory"
    )
    assert only.failed == tuple(only.reason.split("; ")[1:])


def test_those_that_were_asked_for_carry_all_they_can_however_slow() -> None:
    ranges = force_ranges(NCCL, [SLOW_LARGE, SLOW_SMALL], "it was asked for")
    assert ends(ranges) == [("host_memory", 524288), ("two_step", None)]
    assert [each.reason for each in ranges] == ["it was asked for"] * 2
    assert ends(force_ranges(NCCL, [FAILED_LARGE, SLOW_SMALL], "")) == [("host_memory", 524288), ("nccl", None)]


@pytest.mark.parametrize(
    ("times", "limit"), [((3.0, 4.3, 7.6, 90.0, 41.0), 65536), ((24.0, 1, 1, 1, 1), 0), ((1, 1, 1, 1, 1), 524288)]
)
def test_gathers_go_the_way_that_is_faster_up_to_where_it_stops_being_faster(
    times: tuple[float, ...], limit: int
) -> None:
    assert faster_up_to(small(*times).times_us, NCCL.times_us) == limit
    assert faster_up_to({}, NCCL.times_us) == 0


# --- Proofs on ranks ------------------------------------------------------------------------------------------------


class WrongOnOneRank(ElidedAllReduce):
    """Adds one to the last element of every bfloat16 sum, on rank 1 alone."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        result = self.inner.all_reduce(tensor)
        if self.rank == 1 and tensor.dtype == torch.bfloat16:
            result.view(-1)[-1] += 1
        return result


class WrongInTheEnd(ElidedAllReduce):
    """Right until it has been called 30 times: ten sums that are checked, then the timing."""

    def __init__(self, inner: Communicator) -> None:
        super().__init__(inner)
        self.left = 30

    def all_reduce(self, tensor: Tensor) -> Tensor:
        self.left -= 1
        return self.inner.all_reduce(tensor).add_(self.left < 0)


def unexpected(error: TransportError) -> None:
    raise AssertionError(error)


def proof_of(communicator: Communicator, opener: str) -> tuple[bool, bool, Proof]:
    """Whether it was opened and kept; whether it was closed; its proof."""
    closed: list[Communicator] = []

    def refuse() -> Communicator:
        raise TransportError("rank 0 cannot create shared memory.")

    openers = {
        "works": lambda: communicator,
        "wrong": lambda: WrongOnOneRank(communicator),
        "late": lambda: WrongInTheEnd(communicator),
        "elided": lambda: ElidedAllReduce(communicator),
        "refused": refuse,
    }
    opened, proof = prove(
        "it",
        openers[opener],
        SIZES,
        control=communicator,
        device=CPU,
        timeout_sec=60,
        on_timeout=unexpected,
        close=closed.append,
    )
    communicator.barrier()
    return opened is not None, bool(closed), proof


def test_a_working_transport_has_the_same_proof_on_every_rank() -> None:
    results = run_on_ranks(proof_of, 3, "works")
    assert {each[:2] for each in results} == {(True, False)}
    first, *others = (proof for *_, proof in results)
    assert list(first.times_us) == list(SIZES)
    assert all(time > 0 for time in first.times_us.values())
    assert all(other == first for other in others)


def agreed(communicator: Communicator) -> Proof:
    """Of two sizes, at each of which another rank is the slower one."""
    times = ({4: 1.0, 8: 9.0}, {4: 5.0, 8: 2.0})[communicator.rank]
    return agree("it", times, "", (4, 8), communicator)


def test_times_are_those_of_the_slowest_rank() -> None:
    assert run_on_ranks(agreed, 2) == [Proof("it", {4: 5.0, 8: 9.0})] * 2


@pytest.mark.parametrize(
    ("opener", "error"),
    [
        ("wrong", "rank 1: gave wrong sums of 4 bytes of bfloat16"),
        ("elided", "rank 0: gave wrong sums of 4 bytes of float32"),
        ("late", f"rank 0: gave wrong sums of {SIZES[0]} bytes after many calls"),
        ("refused", "rank 0: rank 0 cannot create shared memory."),
    ],
)
def test_one_that_fails_on_any_rank_is_left_out_on_all(opener: str, error: str) -> None:
    """Also what a rank has of it that found nothing wrong is given back."""
    has_some = opener != "refused"
    assert run_on_ranks(proof_of, 2, opener) == [(False, has_some, Proof("it", error=error))] * 2


class NobodyAnswers(Solo):
    """Ranks agree through it on a problem; the others hang, until `event`."""

    def __init__(self, event: threading.Event) -> None:
        super().__init__(CPU)
        self.event = event

    def all_gather(self, tensor: Tensor) -> Tensor:
        assert self.event.wait(60), "nobody ended the self-test"
        return super().all_gather(tensor)


def test_a_rank_that_fails_says_why_before_those_that_wait_for_it_say_that_they_did() -> None:
    event, errors, start = threading.Event(), list[tuple[float, str]](), time.monotonic()

    def end(error: TransportError) -> None:
        errors.append((time.monotonic() - start, str(error)))
        event.set()

    def refuse() -> Communicator:
        raise RuntimeError(
            "NCCL error in: NCCLUtils.cpp:77\nLast error:\nfailed to extend /dev/shm/nccl-a to 9637892 bytes"
        )

    control = NobodyAnswers(event)
    prove("nccl", refuse, SIZES, control=control, device=CPU, timeout_sec=4, on_timeout=end)
    [(seconds, message)] = errors
    assert 1 < seconds < 3.5
    assert message.startswith("the self-test of nccl failed on rank 0: NCCL: failed to extend /dev/shm/nccl-a to")
    assert "--shm-size 1g" in message
