"""The streams of a card that carry out a plan of copies: copy engines, flags that need no kernel, events, sums.

A host may need longer to queue an all-reduce than its card for carrying it out. So all calls of the driver for messages
of a length are prepared once, with their arguments as C has them; afterwards only addresses are written into those.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import cycle
from typing import Any

import torch

from parallel.kernels.launch import Kernel, offsets
from parallel.transports.copy_layout import CopyLayout
from parallel.transports.copy_plan import Add, Begin, End, Meet, ToCard, ToHost, plan_all_reduce
from parallel.transports.region_layout import UNIT_BYTES
from parallel.transports.shared_region import SharedRegion, driver_call, driver_function, raise_for

# cuda.h, CUstreamBatchMemOpParams: operation, address, value, flags. A wait ends when the word is at least the value; a
# write is seen after all that its stream wrote before.
MEMORY_OPERATION = struct.Struct("@i4xQI4xI20x")
WAIT, WRITE = 1, 2
# CU_EVENT_DISABLE_TIMING
EVENT_FLAGS = 2
# Of a sum: own, out, what came from the peers, count, progress; units, units from one peer to the next, rank.
PARAMETERS = "PPPPPiii"
# As in host_memory_copies.cu. As many blocks as an H200 can hold at once.
THREADS = 32
MAX_BLOCKS = 4096
# Ahead of what else wants multiprocessors: sums are short, and a card waits for them.
HIGH_PRIORITY = -1
# Of a lane: so many calls may be under way before one that is waited for stands for a later one too.
NUM_EVENTS = 16
# Lengths of messages that are prepared, for each lane that they may begin with.
NUM_PROGRAMS = 96

Address = ctypes.c_uint64
Handle = ctypes.c_void_p


@dataclass
class Program:
    """All that is asked of the driver for messages of one length, and what differs from call to call."""

    calls: list[tuple[Callable[..., int], tuple[Any, ...]]] = field(default_factory=list)
    # Where an address goes, and how far it lies from the start of the message or of the result.
    sources: list[tuple[Any, int]] = field(default_factory=list)
    targets: list[tuple[Any, int]] = field(default_factory=list)
    # The event of each lane's end, and the lane.
    ends: list[tuple[ctypes.c_void_p, int]] = field(default_factory=list)


class CardStreams:
    """Carries out the operations of one rank on its card; what they say of order is all that is kept."""

    def __init__(self, region: SharedRegion, layout: CopyLayout, rank: int, device: torch.device, count: int) -> None:
        """`count`: the address on the card of 4 bytes that are 0."""
        self.region, self.layout, self.rank, self.count = region, layout, rank, count
        lanes = range(layout.num_lanes)
        self.streams = [torch.cuda.Stream(device, HIGH_PRIORITY) for _ in lanes]
        # Before there is anything to give back.
        self._try_flags()
        self.started = create_event()
        self.events = [[create_event() for _ in range(NUM_EVENTS)] for _ in lanes]
        self.next_event = [cycle(each) for each in self.events]
        # Not torch's: the plan counts it among the buffers of the communicator.
        self.staging = allocate(layout.staging_bytes)
        self.caller = Handle()
        self.wait_event = driver_function("cuStreamWaitEvent")
        self.steps: dict[type, Callable[[Program, Any, Handle, Kernel], None]] = {
            Begin: self._begin,
            ToHost: self._to_host,
            ToCard: self._to_card,
            Meet: self._meet,
            Add: self._add,
            End: self._end,
        }
        self.program = lru_cache(maxsize=NUM_PROGRAMS)(self._prepare)

    def start(
        self, num_bytes: int, first_lane: int, kernel: Kernel, source: int, target: int, stream: int
    ) -> dict[int, int]:
        """Queues a call whose message is there when `stream` comes to it; the events of its end, by lane."""
        program: Program = self.program(num_bytes, first_lane, kernel)
        self.caller.value = stream
        for place, offset in program.sources:
            place.value = source + offset
        for place, offset in program.targets:
            place.value = target + offset
        ends = {}
        for event, lane in program.ends:
            event.value = ends[lane] = next(self.next_event[lane])
        for function, arguments in program.calls:
            code = function(*arguments)
            if code:
                raise_for(function.__name__, code)
        return ends

    def wait(self, events: Iterable[int], stream: int) -> None:
        """What `stream` is given from now on comes after `events`."""
        for event in events:
            code = self.wait_event(Handle(stream), Handle(event), 0)
            if code:
                raise_for("cuStreamWaitEvent", code)

    def free(self) -> None:
        driver_call("cuMemFree_v2", Address(self.staging))
        for event in (self.started, *(event for lane in self.events for event in lane)):
            driver_call("cuEventDestroy_v2", Handle(event))

    def _prepare(self, num_bytes: int, first_lane: int, kernel: Kernel) -> Program:
        program = Program()
        self._call(program, "cuEventRecord", Handle(self.started), self.caller)
        for each in plan_all_reduce(self.layout, self.rank, num_bytes, first_lane):
            self.steps[type(each)](program, each, Handle(self.streams[each.lane].cuda_stream), kernel)
        return program

    def _call(self, program: Program, name: str, *arguments: Any) -> None:
        program.calls.append((driver_function(name), arguments))

    def _begin(self, program: Program, each: Begin, stream: Handle, kernel: Kernel) -> None:
        self._call(program, "cuStreamWaitEvent", stream, Handle(self.started), 0)

    def _end(self, program: Program, each: End, stream: Handle, kernel: Kernel) -> None:
        event = Handle()
        program.ends.append((event, each.lane))
        self._call(program, "cuEventRecord", event, stream)

    def _to_host(self, program: Program, each: ToHost, stream: Handle, kernel: Kernel) -> None:
        source, target = Address(), Handle(self.region.address + each.place)
        (program.targets if each.is_sum else program.sources).append((source, each.start))
        self._call(program, "cuMemcpyDtoHAsync_v2", target, source, ctypes.c_size_t(each.num_bytes), stream)

    def _to_card(self, program: Program, each: ToCard, stream: Handle, kernel: Kernel) -> None:
        source, target = Handle(self.region.address + each.place), Address(self.staging + each.at)
        if each.is_sum:
            program.targets.append((target, each.at))
        self._call(program, "cuMemcpyHtoDAsync_v2", target, source, ctypes.c_size_t(each.num_bytes), stream)

    def _meet(self, program: Program, each: Meet, stream: Handle, kernel: Kernel) -> None:
        def word(writer: int, reader: int) -> int:
            return self.region.device_address + self.layout.flag(each.lane, each.meeting, writer, reader)

        peers = [peer for peer in range(self.layout.world_size) if peer != self.rank]
        ours, theirs = [word(self.rank, peer) for peer in peers], [word(peer, self.rank) for peer in peers]
        # All waits before a word is put back: who still waits for a peer has put back no one's.
        parts = [(WRITE, at, 1) for at in ours] + [(WAIT, at, 1) for at in theirs] + [(WRITE, at, 0) for at in theirs]
        self._call(program, "cuStreamBatchMemOp_v2", stream, len(parts), memory_operations(parts), 0)

    def _add(self, program: Program, each: Add, stream: Handle, kernel: Kernel) -> None:
        units, stride = each.num_bytes // UNIT_BYTES, self.layout.stride_bytes // UNIT_BYTES
        blocks = max(1, min(MAX_BLOCKS, -(-units // THREADS)))
        progress = self.region.device_address + self.layout.progress(self.rank)
        values = 0, 0, self.staging + each.at, self.count, progress, units, stride, self.rank
        memory = ctypes.create_string_buffer(struct.pack(f"@{PARAMETERS}", *values))
        places = offsets(PARAMETERS)
        pointers = (Handle * len(places))(*(ctypes.addressof(memory) + place for place in places))
        # Of a kept address nothing else says that its memory is in use: `own` and `out` refer to it.
        own, out = (Address.from_buffer(memory, place) for place in places[:2])
        program.sources.append((own, each.start))
        program.targets.append((out, each.start))
        grid = blocks, 1, 1, THREADS, 1, 1, 0
        self._call(program, "cuLaunchKernel", Handle(kernel.function), *grid, stream, pointers, None)

    def _try_flags(self) -> None:
        """Raises TransportError where the driver or the card cannot write and await flags in a stream."""
        word = self.region.device_address + self.layout.progress(self.rank)
        parts = memory_operations([(WRITE, word, 0), (WAIT, word, 0)])
        driver_call("cuStreamBatchMemOp_v2", Handle(self.streams[0].cuda_stream), 2, parts, 0)
        self.streams[0].synchronize()


def memory_operations(parts: Sequence[tuple[int, int, int]]) -> ctypes.Array[ctypes.c_char]:
    """Operation, address and value of each, in order, as the driver takes them."""
    packed = b"".join(MEMORY_OPERATION.pack(kind, address, value, 0) for kind, address, value in parts)
    return ctypes.create_string_buffer(packed, len(packed))


def allocate(num_bytes: int) -> int:
    """The address of memory on the current card."""
    address = Address()
    driver_call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(num_bytes))
    return address.value


def create_event() -> int:
    event = Handle()
    driver_call("cuEventCreate", ctypes.byref(event), EVENT_FLAGS)
    assert event.value
    return event.value
