"""All-reduce by copies: threads are ranks, and a driver does at once, in host memory, what a card would queue."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import re
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.communicator import TransportError
from parallel.transports import channel, copy_streams
from parallel.transports.copies import CopiedHostMemory, CopyChannel
from parallel.transports.copy_layout import CopyLayout
from parallel.transports.shared_region import SharedRegion, create_memory
from tests.parallel.transports.sums import ordered_sum
from tests.parallel.transports.test_host_memory import Counting

CPU = torch.device("cpu")
LAYOUTS = {
    2: CopyLayout(2, piece_bytes=4096, num_lanes=3),
    3: CopyLayout(3, piece_bytes=4096, num_lanes=2),
    4: CopyLayout(4, piece_bytes=4096, num_lanes=3),
}
DTYPES = {"reduce_bfloat16": torch.bfloat16, "reduce_float16": torch.float16, "reduce_float32": torch.float32}
SIZES = (16, 48, 1040, 4096, 4112, 12_304, 40_960)


class Driver:
    """What copy_streams.py calls of the driver; arguments come as values, whatever type of C they had."""

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.kernels: dict[int, Kernel] = {}
        self.events = itertools.count(1)
        self.refused = ""
        self.calls: list[str] = []
        self.waited: list[tuple[int | None, int]] = []

    def function(self, name: str) -> Any:
        def call(*args: Any) -> int:
            self.calls.append(name)
            getattr(self, name)(*(arg.value if isinstance(arg, ctypes._SimpleCData) else arg for arg in args))
            return int(name == self.refused)

        call.__name__ = name
        return call

    def call(self, name: str, *args: Any) -> None:
        code = self.function(name)(*args)
        if code:
            refuse(name, code)

    def cuMemAlloc_v2(self, address: Any, num_bytes: int) -> None:
        buffer = ctypes.create_string_buffer(b"\xff" * num_bytes, num_bytes)
        address._obj.value = ctypes.addressof(buffer)
        self.memory[address._obj.value] = buffer

    def cuMemFree_v2(self, address: int) -> None:
        del self.memory[address]

    def cuEventCreate(self, event: Any, flags: int) -> None:
        event._obj.value = next(self.events)
        self.memory[event._obj.value] = None

    def cuEventDestroy_v2(self, event: int) -> None:
        del self.memory[event]

    def cuEventRecord(self, event: int, stream: int | None) -> None:
        assert event in self.memory

    def cuStreamWaitEvent(self, stream: int | None, event: int, flags: int) -> None:
        assert event in self.memory and flags == 0
        self.waited.append((stream, event))

    def cuMemcpyDtoHAsync_v2(self, target: int, source: int, num_bytes: int, stream: int | None) -> None:
        ctypes.memmove(target, source, num_bytes)

    cuMemcpyHtoDAsync_v2 = cuMemcpyDtoHAsync_v2

    def cuStreamBatchMemOp_v2(self, stream: int | None, count: int, parts: Any, flags: int) -> None:
        assert flags == 0 and len(parts) == 48 * count
        for at in range(0, len(parts), 48):
            kind, address, value = struct.unpack_from("@i4xQI", parts, at)
            word = ctypes.c_uint32.from_address(address)
            if kind == copy_streams.WRITE:
                word.value = value
                continue
            assert kind == copy_streams.WAIT
            while ctypes.c_int32(word.value - value).value < 0:
                time.sleep(1e-5)

    def cuLaunchKernel(self, function: int, *args: Any) -> None:
        blocks, *rest, _, pointers, extra = args
        assert rest == [1, 1, copy_streams.THREADS, 1, 1, 0] and extra is None
        types = [ctypes.c_uint64] * 5 + [ctypes.c_int32] * 3
        values = [each.from_address(at).value for each, at in zip(types, pointers, strict=True)]
        assert blocks == max(1, -(-values[5] // copy_streams.THREADS))
        self.kernels[function](*values)


class Stream:
    cuda_stream = 0

    def __init__(self, *_: object) -> None: ...

    def synchronize(self) -> None: ...


class Kernel:
    """host_memory_copies.cu, for one type."""

    world_size = 0

    def __init__(self, name: str, function: int) -> None:
        self.dtype, self.function = DTYPES[name], function

    def __call__(
        self, own: int, out: int, peers: int, count: int, progress: int, units: int, stride: int, rank: int
    ) -> None:
        counter = ctypes.c_uint32.from_address(count)
        counter.value += 1
        ctypes.c_uint32.from_address(progress).value = counter.value
        if not units:
            return
        values = [self.at(peers + 16 * stride * place, units).clone() for place in range(self.world_size - 1)]
        values.insert(rank, self.at(own, units))
        self.at(out, units).copy_(ordered_sum(values))

    def at(self, address: int, units: int) -> Tensor:
        return torch.frombuffer((ctypes.c_char * (16 * units)).from_address(address), dtype=self.dtype)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    monkeypatch.setattr(copy_streams, "driver_call", driver.call)
    monkeypatch.setattr(copy_streams, "driver_function", driver.function)
    monkeypatch.setattr(copy_streams, "raise_for", refuse)

    def load(path: Path, name: str, *_: object) -> Kernel:
        kernel = Kernel(name, 1000 + len(driver.kernels))
        return driver.kernels.setdefault(kernel.function, kernel)

    monkeypatch.setattr(channel, "load_kernel", load)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(CopyChannel, "current_stream", lambda self: 7)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return driver


def refuse(name: str, code: int) -> None:
    raise TransportError(f"{name} {code}")


def open_region(layout: CopyLayout) -> SharedRegion:
    descriptor = create_memory(layout.num_bytes)
    region = SharedRegion(descriptor, layout.num_bytes)
    os.close(descriptor)
    return region


@contextlib.contextmanager
def opened(world_size: int, timeout_sec: float = 100) -> Iterator[list[CopyChannel]]:
    """A channel a rank."""
    layout = LAYOUTS[world_size]
    region = open_region(layout)
    region.device_address = region.address
    region.unregister = lambda: None  # type: ignore[method-assign]
    channels = [CopyChannel(region, layout, rank, CPU, timeout_sec=timeout_sec) for rank in range(world_size)]
    for each in channels:
        for kernel in each.kernels.values():
            kernel.world_size = world_size  # type: ignore[attr-defined]
    try:
        yield channels
    finally:
        for each in channels:
            each.close()


def on_ranks(channels: list[CopyChannel], call: Any) -> None:
    with ThreadPoolExecutor(len(channels)) as pool:
        list(pool.map(call, channels))


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_sums_in_rank_order_of_every_type_and_size(driver: Driver, world_size: int) -> None:
    """In place and not; afterwards nothing is left, in flags or of memory and events."""
    with opened(world_size) as channels:
        for dtype in DTYPES.values():
            for num_bytes in SIZES:
                sources = [torch.randn(num_bytes // dtype.itemsize).to(dtype) for _ in channels]
                targets = [torch.full_like(source, float("nan")) for source in sources]
                in_place = [source.clone() for source in sources]
                on_ranks(channels, lambda each, s=sources, t=targets: each.all_reduce(s[each.rank], t[each.rank]))
                on_ranks(channels, lambda each, b=in_place: each.all_reduce(b[each.rank], b[each.rank]))
                expected = ordered_sum(sources)
                assert all(torch.equal(found, expected) for found in (*targets, *in_place)), (dtype, num_bytes)
        for each in channels:
            each.check()
            assert not any(word.value for meeting in each.watch.meetings for words in meeting for word in words)
            assert all(word.value for word in each.watch.progress)
        assert driver.memory
    assert not driver.memory


@pytest.mark.parametrize(("num_bytes", "calls"), [(4096, 9), (8192, 17), (12288, 25), (24576, 40)])
def test_a_call_asks_little_of_the_driver(driver: Driver, num_bytes: int, calls: int) -> None:
    """Five calls for each piece, two before and two after those of each lane but that they begin at one event."""
    with opened(2) as channels:
        tensors = [torch.ones(num_bytes // 4) for _ in channels]
        for _ in range(2):
            driver.calls.clear()
            on_ranks(channels, lambda each: each.all_reduce(tensors[each.rank], tensors[each.rank]))
            assert len(driver.calls) == calls * len(channels)


def test_sums_that_were_started_are_waited_for_each_and_all_by_a_join(driver: Driver) -> None:
    with opened(2) as channels:
        ranks = [copied(each) for each in channels]
        tensors = [[torch.ones(count) for count in (4, 2000, 8)] for _ in ranks]
        joins: list[list[Callable[[], None]]] = [[], []]
        for place in range(3):
            on_ranks(
                ranks, lambda each, at=place: joins[each.rank].append(each.start_all_reduce(tensors[each.rank][at]))
            )  # type: ignore[arg-type]
        assert all((one == 2).all() for mine in tensors for one in mine)
        # The pieces had lanes 0, 1 and 2, 0: lane 0 the second time with its second event.
        (first, second), (middle, *_), (last, *_) = channels[0].streams.events[0][:2], *channels[0].streams.events[1:]
        assert waits_of(driver, joins[0][0]) == [first]
        assert waits_of(driver, joins[0][1]) == [middle, last]
        # One wait for each lane: what ended last there.
        assert waits_of(driver, ranks[0].join) == [second, middle, last]
        assert waits_of(driver, ranks[0].join) == []


def test_a_graph_waits_for_no_sums_of_before(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver refuses events of other streams in a capture; afterwards nothing is left to wait for."""
    with opened(2) as channels:
        ranks = [copied(each) for each in channels]
        tensors = [torch.ones(4) for _ in ranks]
        on_ranks(ranks, lambda each: each.start_all_reduce(tensors[each.rank])())  # type: ignore[arg-type]
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert waits_of(driver, ranks[0].join) == []
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        assert waits_of(driver, ranks[0].join) == []


def copied(channel: CopyChannel) -> CopiedHostMemory:
    found = CopiedHostMemory(Counting(), channel)
    found.rank = channel.rank
    return found


def waits_of(driver: Driver, join: Callable[[], None]) -> list[int]:
    """Events that the caller's stream waits for."""
    before = len(driver.waited)
    join()
    assert {stream for stream, _ in driver.waited[before:]} <= {7}
    return [event for _, event in driver.waited[before:]]


def test_what_the_driver_refuses_is_an_error(driver: Driver) -> None:
    with opened(2) as channels:
        driver.refused = "cuEventRecord"
        with pytest.raises(TransportError, match="cuEventRecord 1"):
            channels[0].all_reduce(torch.ones(4), torch.ones(4))


@pytest.mark.parametrize("refused", ["", "cuStreamBatchMemOp_v2"])
def test_nothing_is_left_where_not_all_ranks_can(driver: Driver, monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    """This rank, or the other one."""
    driver.refused, problems, threads = refused, [], threading.active_count()
    region = open_region(LAYOUTS[2])

    def tell(communicator: Counting, device: torch.device, problem: str) -> None:
        problems.append(problem)
        raise TransportError("one of them cannot.")

    monkeypatch.setattr(channel, "share_region", lambda *_: region)
    monkeypatch.setattr(region, "register", lambda: setattr(region, "device_address", region.address))
    monkeypatch.setattr(region, "unregister", lambda: setattr(region, "device_address", 0))
    monkeypatch.setattr(channel, "raise_everywhere", tell)
    with pytest.raises(TransportError, match="one of them cannot"):
        channel.open_channel(CopyChannel, Counting(), CPU, LAYOUTS[2], timeout_sec=9)
    assert problems == [f"{refused} 1" if refused else ""]
    assert (driver.memory, region.device_address, threading.active_count()) == ({}, 0, threads)


def test_a_missing_rank_is_an_error_on_all_and_nobody_waits_for_ever(driver: Driver) -> None:
    with opened(3, timeout_sec=0.2) as channels:
        buffers = [torch.ones(12_000) for _ in channels]
        on_ranks(channels[1:], lambda each: each.all_reduce(buffers[each.rank], buffers[each.rank]))
        for each in channels:
            with pytest.raises(
                TransportError, match=r"rank 0 did not answer rank [12] through host memory within 0.2 s"
            ):
                each.check()


def test_the_limit_can_be_changed_and_ends_with_the_channel(driver: Driver) -> None:
    with opened(2) as channels:
        channels[0].timeout_sec = 7.0
        assert (channels[0].watch.timeout_sec, channels[0].timeout_sec, channels[1].timeout_sec) == (7.0, 7.0, 100)
    assert not any(each.watch.thread.is_alive() for each in channels)


def test_the_kernel_has_the_threads_that_it_is_given() -> None:
    text = (Path(copy_streams.__file__).parent / "host_memory_copies.cu").read_text(encoding="utf-8")
    assert re.findall(r"^#define THREADS (\d+)$", text, re.MULTILINE) == [str(copy_streams.THREADS)]


def test_whole_units_of_known_types_are_copied_and_nothing_that_is_captured(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = Counting()
    with opened(2) as channels:
        ranks = [CopiedHostMemory(inner, each) for each in channels]
        assert all(each.capturable == inner.capturable for each in ranks)
        base = [torch.arange(24.0).view(4, 6) for _ in ranks]
        on_ranks(ranks, lambda each: each.all_reduce(base[each.channel.rank].T))  # type: ignore[arg-type]
        assert all(torch.equal(each, 2 * torch.arange(24.0).view(4, 6)) for each in base)
        assert inner.calls == 0
        for tensor in (torch.ones(5), torch.ones(4, dtype=torch.float64), torch.ones(4, dtype=torch.int32)):
            ranks[0].all_reduce(tensor)
        assert inner.calls == 3
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        ranks[0].all_reduce(torch.ones(1024))
        assert not ranks[0].can_start(torch.ones(1024))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        assert ranks[0].can_start(torch.ones(1024)) and not ranks[0].can_start(torch.ones(4, 6).T)
        ranks[0].min_bytes = 8192
        ranks[0].all_reduce(torch.ones(1024))
        assert inner.calls == 5
