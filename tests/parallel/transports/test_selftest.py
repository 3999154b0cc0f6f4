"""The self-test of a transport finds wrong sums and hangs, and says where."""

import threading
import time

import pytest
import torch
from torch import Tensor

from parallel.communicator import Communicator, ElidedAllReduce
from parallel.transports.selftest import DECODE_BYTES, Timing, TransportError, check_transport
from parallel.transports.solo import Solo
from tests.parallel.ranks import CPU
from tools.local_ranks import run_on_ranks


class Corrupting(ElidedAllReduce):
    """Passes everything on, and adds `amount` to one element of each all-reduce of `num_bytes` after the first few."""

    def __init__(self, inner: Communicator, num_bytes: int, index: int, amount: float = 1.0, good: int = 0) -> None:
        super().__init__(inner)
        self.name = inner.name
        self.num_bytes, self.index, self.amount, self.good = num_bytes, index, amount, good

    def all_reduce(self, tensor: Tensor) -> Tensor:
        result = self.inner.all_reduce(tensor)
        if tensor.nbytes == self.num_bytes:
            self.good -= 1
            if self.good < 0:
                result.view(-1)[self.index] += self.amount
        return result


class Hanging(Solo):
    def __init__(self, event: threading.Event) -> None:
        super().__init__(CPU)
        self.event = event

    def all_reduce(self, tensor: Tensor) -> Tensor:
        assert self.event.wait(120), "nobody ended the self-test"
        return tensor


def unexpected(error: TransportError) -> None:
    raise AssertionError(error)


def check(communicator: Communicator) -> Timing:
    return check_transport(communicator, CPU, timeout_sec=100, on_timeout=unexpected)


@pytest.mark.parametrize("world_size", (1, 2, 3))
def test_working_transport_passes_and_is_timed(world_size: int) -> None:
    for result in run_on_ranks(check, world_size):
        assert result.num_bytes == DECODE_BYTES
        assert result.exact
        assert 0 < result.p50_us <= result.p99_us
        assert result.gb_per_sec == pytest.approx(DECODE_BYTES / result.p50_us / 1e3)


def refusal(communicator: Communicator) -> str:
    with pytest.raises(TransportError) as caught:
        check(communicator)
    return str(caught.value)


def refusals(communicator: Communicator, cases: list[tuple[int, int, float, int]]) -> list[str]:
    return [refusal(Corrupting(communicator, *case)) for case in cases]


def test_one_wrong_element_is_found_at_every_size() -> None:
    """First, last and inner elements, wrong by little, by much and by NaN; of each message the self-test sends."""
    cases = [
        (4, 0, 1.0, 0),
        (1024, 0, -1.0, 0),
        (1024, 255, 1e6, 0),
        (DECODE_BYTES, 2047, 1.0, 0),
        (2**20, 2**18 - 1, float("nan"), 0),
    ]
    for rank, messages in enumerate(run_on_ranks(refusals, 2, cases)):
        for message, case in zip(messages, cases, strict=True):
            assert f"all-reduce of {case[0]} bytes through gloo gave wrong sums on rank {rank}." in message
            assert "limits.peer_access=off" in message


def test_sums_that_go_wrong_during_the_timing_are_found() -> None:
    # Once in the check, three times to warm up and twenty times in the timing: the one after that is checked again.
    for message in (texts[0] for texts in run_on_ranks(refusals, 2, [(DECODE_BYTES, 5, 1.0, 24)])):
        assert f"all-reduce of {DECODE_BYTES} bytes through gloo gave wrong sums" in message


def refuse_elided(communicator: Communicator) -> str:
    return refusal(ElidedAllReduce(communicator))


def test_transport_that_adds_nothing_is_found() -> None:
    for rank, message in enumerate(run_on_ranks(refuse_elided, 3)):
        assert f"through gloo without all-reduce gave wrong sums on rank {rank}." in message


def test_transport_that_hangs_is_ended_within_the_limit() -> None:
    event, errors, start = threading.Event(), [], time.monotonic()

    def end(error: TransportError) -> None:
        errors.append((time.monotonic() - start, str(error)))
        event.set()

    check_transport(Hanging(event), CPU, timeout_sec=0.3, on_timeout=end)
    [(seconds, message)] = errors
    assert 0.3 <= seconds < 60
    assert "the self-test of solo did not finish within 0.3 s (timeouts.selftest_sec)" in message


def test_transport_that_answers_ends_the_clock() -> None:
    errors: list[TransportError] = []
    check_transport(Solo(CPU), CPU, timeout_sec=60, on_timeout=errors.append)
    with pytest.raises(TransportError):
        check_transport(Corrupting(Solo(CPU), 4, 0), CPU, timeout_sec=60, on_timeout=errors.append)
    clocks = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    for clock in clocks:
        clock.join(timeout=60)
    assert not any(clock.is_alive() for clock in clocks)
    assert errors == []


def test_seeds_of_the_check_are_rank_zeros() -> None:
    """Ranks whose random numbers differ still agree on the sums that they expect."""
    assert len(run_on_ranks(check_with_own_seed, 2)) == 2


def check_with_own_seed(communicator: Communicator) -> Timing:
    torch.manual_seed(communicator.rank)
    return check(communicator)
