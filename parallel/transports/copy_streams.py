"""The streams of a card that carry out a plan of copies: copy engines, flags that need no kernel, events, sums."""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from parallel.kernels.launch import Kernel
from parallel.transports.copy_layout import COUNTS, LANES, UNIT_BYTES, CopyLayout
from parallel.transports.copy_plan import (
    ADD,
    CALLER,
    RECEIVE,
    SEND,
    Add,
    Await,
    Operation,
    Raise,
    Record,
    ToCard,
    ToHost,
    Wait,
)
from parallel.transports.shared_region import SharedRegion, driver, driver_call

# A stream waits while the flag, less the value, is negative as a signed number.
WAIT_GREATER_OR_EQUAL = 0
# With the default the flag is seen after all that its stream wrote before.
WRITE_DEFAULT = 0
# As in host_memory_copies.cu. As many blocks as an H200 can hold at once.
THREADS = 32
MAX_BLOCKS = 4096
# Ahead of what else wants multiprocessors: sums are short, and a card waits for them.
HIGH_PRIORITY = -1


@dataclass(frozen=True)
class Call:
    """Addresses of message and result on the card, what adds them up, and the counts of flags before it."""

    source: int
    target: int
    kernel: Kernel
    counts: tuple[int, ...]


class CardStreams:
    """Carries out the operations of one rank on its card; what they say of order is all that is kept."""

    def __init__(self, region: SharedRegion, layout: CopyLayout, rank: int, device: torch.device) -> None:
        self.region, self.layout, self.rank, self.device = region, layout, rank, device
        self.streams = {name: torch.cuda.Stream(device, HIGH_PRIORITY) for name in (ADD, *SEND, *RECEIVE)}
        self.events: dict[str, torch.cuda.Event] = defaultdict(torch.cuda.Event)
        # Not torch's: the plan counts it among the buffers of the communicator.
        self.staging = allocate(layout.staging_bytes)
        self.flags = [
            [region.device_address + layout.flag(rank, lane) for rank in range(layout.world_size)] for lane in LANES
        ]
        self.steps: Mapping[type, Callable[[Any, torch.cuda.Stream, Call], None]] = {
            Record: self._record,
            Wait: self._wait,
            ToHost: self._to_host,
            ToCard: self._to_card,
            Raise: self._raise,
            Await: self._await,
            Add: self._add,
        }
        self._try_flags()

    def run(self, operations: Sequence[Operation], call: Call) -> None:
        """Queues them. The caller's stream is the current one."""
        streams = {**self.streams, CALLER: torch.cuda.current_stream(self.device)}
        for each in operations:
            self.steps[type(each)](each, streams[each.stream], call)

    def free(self) -> None:
        driver_call("cuMemFree_v2", self.staging)

    def _record(self, each: Record, stream: torch.cuda.Stream, call: Call) -> None:
        self.events[each.event].record(stream)

    def _wait(self, each: Wait, stream: torch.cuda.Stream, call: Call) -> None:
        stream.wait_event(self.events[each.event])

    def _to_host(self, each: ToHost, stream: torch.cuda.Stream, call: Call) -> None:
        source = (call.target if each.is_sum else call.source) + each.start
        target = self.region.address + each.place
        driver_call("cuMemcpyDtoHAsync_v2", target, source, each.num_bytes, stream.cuda_stream)

    def _to_card(self, each: ToCard, stream: torch.cuda.Stream, call: Call) -> None:
        target = (call.target if each.is_sum else self.staging) + each.at
        source = self.region.address + each.place
        driver_call("cuMemcpyHtoDAsync_v2", target, source, each.num_bytes, stream.cuda_stream)

    def _raise(self, each: Raise, stream: torch.cuda.Stream, call: Call) -> None:
        value = (call.counts[each.lane] + each.count) % COUNTS
        flag = self.flags[each.lane][self.rank]
        driver_call("cuStreamWriteValue32_v2", stream.cuda_stream, flag, value, WRITE_DEFAULT)

    def _await(self, each: Await, stream: torch.cuda.Stream, call: Call) -> None:
        value = (call.counts[each.lane] + each.count) % COUNTS
        for flag in self.flags[each.lane]:
            driver_call("cuStreamWaitValue32_v2", stream.cuda_stream, flag, value, WAIT_GREATER_OR_EQUAL)

    def _add(self, each: Add, stream: torch.cuda.Stream, call: Call) -> None:
        units = each.num_bytes // UNIT_BYTES
        blocks = min(MAX_BLOCKS, -(-units // THREADS))
        own, out, peers = call.source + each.start, call.target + each.start, self.staging + each.at
        stride = self.layout.stride_bytes // UNIT_BYTES
        with torch.cuda.stream(stream):
            call.kernel((blocks, 1, 1), THREADS, own, out, peers, units, stride, self.rank)

    def _try_flags(self) -> None:
        """Raises TransportError where the driver or the card cannot write and await flags in a stream."""
        stream = self.streams[ADD]
        for lane in LANES:
            flag = self.flags[lane][self.rank]
            driver_call("cuStreamWriteValue32_v2", stream.cuda_stream, flag, 0, WRITE_DEFAULT)
            driver_call("cuStreamWaitValue32_v2", stream.cuda_stream, flag, 0, WAIT_GREATER_OR_EQUAL)
        stream.synchronize()


def allocate(num_bytes: int) -> int:
    """The address of memory on the current card."""
    declare_types()
    address = ctypes.c_uint64()
    driver_call("cuMemAlloc_v2", ctypes.byref(address), num_bytes)
    return address.value


@cache
def declare_types() -> None:
    """Of the driver's functions above, so that plain numbers are passed whole."""
    pointer, address, size, word = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_uint32
    types: dict[str, list[Any]] = {
        "cuMemAlloc_v2": [ctypes.POINTER(address), size],
        "cuMemFree_v2": [address],
        "cuMemcpyDtoHAsync_v2": [pointer, address, size, pointer],
        "cuMemcpyHtoDAsync_v2": [address, pointer, size, pointer],
        "cuStreamWriteValue32_v2": [pointer, address, word, word],
        "cuStreamWaitValue32_v2": [pointer, address, word, word],
    }
    for name, each in types.items():
        getattr(driver(), name).argtypes = each
