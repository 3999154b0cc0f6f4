"""Does a transport work, and how fast is it? Asked before any weight is loaded, with a limit on the time it may take.

A transport that hangs cannot be interrupted from Python, so the limit ends the process; the message says what to try.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from parallel.communicator import Communicator, TransportError
from parallel.cuda_graph import record_graph
from parallel.timing import p99
from parallel.transports.advice import HANGS

# One token of a 70B (hidden 8192, bf16), the message of every decode step.
DECODE_BYTES = 16 * 1024
CALLS_PER_GRAPH = 16
# Messages of this size are those of prefill, which is not captured; smaller ones may be a decode step's.
EAGER_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class Timing:
    """All-reduce times of one message size; bandwidth is message bytes over the median time."""

    num_bytes: int
    p50_us: float
    p99_us: float
    gb_per_sec: float
    exact: bool


def timing_of(num_bytes: int, times: Sequence[float], *, exact: bool) -> Timing:
    """Of calls that took so many seconds each."""
    p50 = statistics.median(times)
    return Timing(num_bytes, p50 * 1e6, p99(times) * 1e6, num_bytes / p50 / 1e9, exact)


def check_transport(
    communicator: Communicator,
    device: torch.device,
    *,
    timeout_sec: float,
    on_timeout: Callable[[TransportError], None],
) -> Timing:
    """Sums of small integers at several sizes, which every order of addition gives exactly; times of DECODE_BYTES.

    Args:
        on_timeout: called from another thread when the test takes longer than `timeout_sec`; it must end the process.

    Raises:
        TransportError: a sum was wrong.
    """
    with deadline(communicator.name, timeout_sec, on_timeout):
        for num_bytes in (4, 1024, DECODE_BYTES, 1024 * 1024):
            if not sums_exactly(communicator, device, num_bytes):
                raise wrong_sums(communicator, num_bytes)
        decode = time_all_reduce(communicator, device, DECODE_BYTES, repeats=20)
        if not decode.exact:
            raise wrong_sums(communicator, DECODE_BYTES)
        return decode


def wrong_sums(communicator: Communicator, num_bytes: int) -> TransportError:
    return TransportError(
        f"all-reduce of {num_bytes} bytes through {communicator.name} gave wrong sums on rank {communicator.rank}. "
        "Broken peer access does this: try limits.peer_access=off, and task=probe."
    )


def sums_exactly(
    communicator: Communicator, device: torch.device, num_bytes: int, dtype: torch.dtype = torch.float32
) -> bool:
    """Whether every element of a sum over the ranks is right, on fresh values."""
    count = max(1, num_bytes // dtype.itemsize)
    index = torch.arange(count, device=device, dtype=torch.float32)
    # Sums over four ranks stay below what the type holds exactly: 256 in bfloat16.
    modulus = 251 if dtype == torch.float32 else 61
    seed = agreed_number(communicator, device, 1, 64)
    values = [(index * (rank + 1) + seed).remainder(modulus) for rank in range(communicator.world_size)]
    expected = torch.stack(values).sum(dim=0)
    return torch.equal(communicator.all_reduce(values[communicator.rank].to(dtype)).float(), expected)


def agreed_number(communicator: Communicator, device: torch.device, least: int, end: int) -> int:
    """Rank 0's choice, from `least` up to `end`: a rank must know the others' values to know what their sum is."""
    return int(communicator.all_gather(torch.randint(least, end, (1,)).float().to(device))[0, 0])


def time_all_reduce(communicator: Communicator, device: torch.device, num_bytes: int, *, repeats: int) -> Timing:
    """Times all-reduces of `num_bytes` from a common start, and checks the sums once.

    On a card, calls are captured and replayed as a graph, as a decode step runs them: single calls would time how fast
    the host launches them (55 us against 13 us for 16 KiB over NCCL, measured on two H200). Those of prefill are timed
    as single calls, as it makes them.
    """
    message = torch.zeros(max(1, num_bytes // 4), device=device)
    call = partial(communicator.all_reduce, message)
    times = time_calls(communicator, call, device, captured=num_bytes < EAGER_BYTES, repeats=repeats)
    return timing_of(num_bytes, times, exact=sums_exactly(communicator, device, num_bytes))


def time_calls(
    communicator: Communicator, call: Callable[[], object], device: torch.device, *, captured: bool, repeats: int
) -> list[float]:
    """Seconds of `call`, which every rank makes, from a common start; `captured`: in a graph, where there are some."""
    for _ in range(3):
        call()
    communicator.barrier()
    measure = graph_timer(call) if captured and communicator.capturable else call_timer(call, device)
    times = [measure() for _ in range(repeats)]
    communicator.barrier()
    return times


def call_timer(call: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """Seconds of one call, until its result is there."""

    def measure() -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    return measure


def graph_timer(call: Callable[[], object]) -> Callable[[], float]:
    """Seconds of one call, as the mean of those in a replayed graph, by the card's own clock."""

    def calls() -> None:
        for _ in range(CALLS_PER_GRAPH):
            call()

    graph = record_graph(calls)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def measure() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / CALLS_PER_GRAPH

    # The first replay uploads the graph.
    measure()
    return measure


class Deadline:
    """A limit on time, from its creation until `cancel`."""

    def __init__(self, timeout_sec: float, error: TransportError, on_timeout: Callable[[TransportError], None]) -> None:
        self.end, self.on_timeout = time.monotonic() + timeout_sec, on_timeout
        self.start(timeout_sec, error)

    def start(self, timeout_sec: float, error: TransportError) -> None:
        self.timer = threading.Timer(timeout_sec, self.on_timeout, args=(error,))
        self.timer.daemon = True
        self.timer.start()

    def blame(self, error: TransportError) -> None:
        """Ends in `error` where peers do not come to this rank: they may wait for it for ever. In half of the time that
        is left, so that theirs, which say only that they waited, come later."""
        self.cancel()
        self.start(max(0.0, self.end - time.monotonic()) / 2, error)

    def cancel(self) -> None:
        self.timer.cancel()


@contextmanager
def deadline(
    name: str,
    timeout_sec: float,
    on_timeout: Callable[[TransportError], None],
    setting: str = "timeouts.selftest_sec",
) -> Iterator[Deadline]:
    """Calls `on_timeout` from another thread if the body takes longer than `timeout_sec`, which `setting` sets."""
    error = TransportError(f"the self-test of {name} did not finish within {timeout_sec:g} s ({setting}). {HANGS}")
    found = Deadline(timeout_sec, error, on_timeout)
    try:
        yield found
    finally:
        found.cancel()
