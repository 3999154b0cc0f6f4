"""The choice of a transport: wrong ones are left out with a reason, slower ones are not taken, ranks decide alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parallel.communicator import Communicator, ElidedAllReduce, TransportError
from parallel.selftest import DECODE_BYTES
from parallel.transport_choice import Proof, Range, faster_from, faster_up_to, force_ranges, plan_ranges, prove
from tests.parallel.ranks import CPU, run_on_ranks

SIZES = (1024, DECODE_BYTES)
LARGE_SIZES = (2**20, 2**22, 2**25)
NCCL = Proof(
    "nccl",
    {4096: 24.0, DECODE_BYTES: 24.7, 65536: 28.3, 262144: 46.7, 524288: 50.0, 2**20: 63.0, 2**22: 180.0, 2**25: 1183.0},
)
FAILED_SMALL = Proof("host_memory", error="rank 1: gave wrong sums of 4 bytes of float32")
FAILED_LARGE = Proof("two_step", error="rank 0: no memory")


def small(*times: float) -> Proof:
    return Proof("host_memory", dict(zip(NCCL.times_us, times, strict=False)))


def large(*times: float) -> Proof:
    return Proof("two_step", dict(zip(LARGE_SIZES, times, strict=True)))


SLOW_SMALL, SLOW_LARGE = small(99, 99, 99, 99, 99), large(9999, 9999, 9999)


def ends(ranges: tuple[Range, ...]) -> list[tuple[str, int | None]]:
    return [(each.name, each.up_to_bytes) for each in ranges]


@pytest.mark.parametrize(
    ("times", "limit"),
    [
        ((3.0, 4.3, 7.6, 20.5, 41.0), 524288),
        ((3.0, 4.3, 7.6, 20.5, 50.0), 262144),
        ((3.0, 4.3, 7.6, 90.0, 41.0), 65536),
        ((23.9, 99.0, 1.0, 1.0, 1.0), 4096),
    ],
)
def test_small_messages_go_the_faster_way_up_to_where_it_stops_being_faster(
    times: tuple[float, ...], limit: int
) -> None:
    assert ends(plan_ranges(NCCL, small(*times), SLOW_LARGE)) == [("host_memory", limit), ("nccl", None)]


@pytest.mark.parametrize(
    ("times", "start"),
    [
        ((60.0, 150.0, 700.0), 2**20),
        ((63.0, 150.0, 700.0), 2**22),
        ((60.0, 180.0, 700.0), 2**25),
    ],
)
def test_large_messages_go_the_faster_way_from_where_it_stays_faster(times: tuple[float, ...], start: int) -> None:
    assert ends(plan_ranges(NCCL, SLOW_SMALL, large(*times))) == [("nccl", start - 1), ("two_step", None)]


def test_each_has_its_range_and_its_two_times_for_a_reason() -> None:
    ranges = plan_ranges(NCCL, small(3.0, 4.3, 7.6, 60.0, 80.0), large(70.0, 150.0, 700.0))
    assert ends(ranges) == [("host_memory", 65536), ("nccl", 2**22 - 1), ("two_step", None)]
    assert [each.reason for each in ranges] == [
        "4.3 us for 16384 bytes, where nccl takes 24.7 us",
        "46.7 us for 262144 bytes, where host_memory takes 60.0 us; "
        "63.0 us for 1048576 bytes, where two_step takes 70.0 us",
        "700.0 us for 33554432 bytes, where nccl takes 1183.0 us",
    ]
    assert ranges[0].times_us[DECODE_BYTES] == 4.3


def test_what_nobody_else_was_timed_at_is_left_to_the_base() -> None:
    middle = plan_ranges(NCCL, small(1, 1, 1, 1, 1), large(1, 1, 1))[1]
    assert (middle.name, middle.up_to_bytes, middle.reason) == (
        "nccl",
        2**20 - 1,
        "between what the others are timed at",
    )


@pytest.mark.parametrize("first", (24.0, 30.0))
def test_slower_ones_are_not_chosen(first: float) -> None:
    [only] = plan_ranges(NCCL, small(first, 1.0, 1.0, 1.0, 1.0), large(1.0, 1.0, 1183.0))
    assert (only.name, only.up_to_bytes) == ("nccl", None)
    assert only.reason.startswith(f"24.0 us for 4096 bytes, where host_memory takes {first:.1f} us; 1183.0 us for")


def test_those_that_failed_are_left_out_with_their_reasons() -> None:
    [only] = plan_ranges(NCCL, FAILED_SMALL, FAILED_LARGE)
    assert (only.name, only.up_to_bytes) == ("nccl", None)
    assert only.reason == (
        "host_memory was left out: rank 1: gave wrong sums of 4 bytes of float32; "
        "two_step was left out: rank 0: no memory"
    )


def test_those_that_were_asked_for_carry_all_they_can_however_slow() -> None:
    ranges = force_ranges(NCCL, SLOW_SMALL, SLOW_LARGE, "it was asked for")
    assert ends(ranges) == [("host_memory", 524288), ("nccl", 2**20 - 1), ("two_step", None)]
    assert [ranges[0].reason, ranges[2].reason] == ["it was asked for"] * 2
    assert ends(force_ranges(NCCL, SLOW_SMALL, FAILED_LARGE, "")) == [("host_memory", 524288), ("nccl", None)]


def test_nothing_is_faster_than_itself() -> None:
    assert faster_up_to(NCCL.times_us, NCCL.times_us) == faster_from(NCCL.times_us, NCCL.times_us) == 0


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


def proof_of(communicator: Communicator, opener: str) -> tuple[bool, Proof]:
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
        "it", openers[opener], SIZES, control=communicator, device=CPU, timeout_sec=60, on_timeout=unexpected
    )
    communicator.barrier()
    return opened is not None, proof


def test_a_working_transport_has_the_same_proof_on_every_rank() -> None:
    results = run_on_ranks(proof_of, 3, "works")
    assert {opened for opened, _ in results} == {True}
    first, *others = (proof for _, proof in results)
    assert list(first.times_us) == list(SIZES)
    assert all(time > 0 for time in first.times_us.values())
    assert all(other == first for other in others)


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
    assert run_on_ranks(proof_of, 2, opener) == [(False, Proof("it", error=error))] * 2
