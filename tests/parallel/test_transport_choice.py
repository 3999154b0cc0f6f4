"""The choice of a transport: wrong ones are left out with a reason, slower ones are not taken, ranks decide alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parallel.communicator import Communicator, ElidedAllReduce, TransportError
from parallel.selftest import DECODE_BYTES
from parallel.transport_choice import Choice, Proof, choose, faster_up_to, force, prove
from parallel.transports.solo import Solo
from tests.parallel.ranks import CPU, run_on_ranks

SIZES = (1024, DECODE_BYTES)
NCCL = Proof("nccl", {4096: 24.0, DECODE_BYTES: 24.7, 65536: 28.3, 262144: 46.7, 524288: 50.0})


class Limited(Solo):
    name = "host_memory"
    max_bytes = 524288


def measured(*times: float) -> Proof:
    return Proof("host_memory", dict(zip(NCCL.times_us, times, strict=True)))


def chosen(proof: Proof | None) -> tuple[Choice, Solo, Limited]:
    base, other = Solo(CPU), Limited(CPU)
    return choose(base, NCCL, None if proof is None or proof.error else other, proof), base, other


@pytest.mark.parametrize(
    ("times", "limit"),
    [
        ((3.0, 4.3, 7.6, 20.5, 41.0), 524288),
        ((3.0, 4.3, 7.6, 20.5, 50.0), 262144),
        ((3.0, 4.3, 7.6, 90.0, 41.0), 65536),
        ((23.9, 99.0, 1.0, 1.0, 1.0), 4096),
    ],
)
def test_the_faster_one_carries_messages_up_to_where_it_stops_being_faster(
    times: tuple[float, ...], limit: int
) -> None:
    choice, _, other = chosen(measured(*times))
    assert choice.communicator is other
    assert other.max_bytes == limit
    small, large = choice.ranges
    assert (small.name, small.up_to_bytes, large.name, large.up_to_bytes) == ("host_memory", limit, "nccl", None)


def test_reasons_are_the_two_times() -> None:
    small, large = chosen(measured(3.0, 4.3, 7.6, 60.0, 80.0))[0].ranges
    assert small.reason == "4.3 us for 16384 bytes, where nccl takes 24.7 us"
    assert large.reason == "46.7 us for 262144 bytes, where host_memory takes 60.0 us"
    assert small.times_us[DECODE_BYTES] == 4.3


def test_what_is_faster_everywhere_leaves_the_rest_for_its_size() -> None:
    _, large = chosen(measured(1, 1, 1, 1, 1))[0].ranges
    assert large.reason == "larger than the slots of host_memory"


@pytest.mark.parametrize("first", (24.0, 30.0))
def test_a_slower_one_is_not_chosen(first: float) -> None:
    choice, base, _ = chosen(measured(first, 1.0, 1.0, 1.0, 1.0))
    assert choice.communicator is base
    [only] = choice.ranges
    assert (only.name, only.up_to_bytes) == ("nccl", None)
    assert only.reason == f"24.0 us for 4096 bytes, where host_memory takes {first:.1f} us"


def test_one_that_failed_is_left_out_with_its_reason() -> None:
    choice, base, _ = chosen(Proof("host_memory", error="rank 1: gave wrong sums of 4 bytes of float32"))
    assert choice.communicator is base
    [only] = choice.ranges
    assert only.reason == "host_memory was left out: rank 1: gave wrong sums of 4 bytes of float32"


def test_one_that_was_asked_for_carries_all_it_can_however_slow() -> None:
    other = Limited(CPU)
    choice = force(other, NCCL, measured(99, 99, 99, 99, 99), "it was asked for")
    assert choice.communicator is other
    assert [(each.name, each.up_to_bytes) for each in choice.ranges] == [("host_memory", 524288), ("nccl", None)]
    assert choice.ranges[0].reason == "it was asked for"


def test_nothing_is_faster_than_itself() -> None:
    assert faster_up_to(NCCL.times_us, NCCL.times_us) == 0


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
