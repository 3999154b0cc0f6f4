"""Host memory without a card: its layouts, who carries what, and its protocol run by processes instead of kernels."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from parallel.communicator import Communicator, ElidedAllReduce, TransportError
from parallel.kernels.launch import read_source
from parallel.transports import dense, two_step
from parallel.transports.by_size import BySize
from parallel.transports.channel import is_aligned
from parallel.transports.dense import EXACT, INT8, DenseHostMemory, DenseLayout, LineFormat
from parallel.transports.host_memory import (
    DATA_BYTES,
    LAUNCHES,
    LINE_BYTES,
    MAX_BYTES,
    HostMemory,
    SlotLayout,
    choose_launch,
)
from parallel.transports.region_layout import ERROR_STRIDE, MAX_RANKS, PAGE_BYTES, UNIT_BYTES
from parallel.transports.shared_region import SharedRegion, share_region
from parallel.transports.solo import Solo
from parallel.transports.two_step import CHUNK_BYTES, FLAG_BYTES, MAX_CHUNKS, THREADS, TwoStepHostMemory, TwoStepLayout
from parallel.units import KIB
from tests.parallel.ranks import CPU
from tests.parallel.transports.sums import ordered_sum
from tools.local_ranks import run_on_ranks

SMALL = 2 * KIB


@pytest.mark.parametrize("world_size", (2, 3, 4))
def test_slots_are_whole_pages_and_do_not_overlap(world_size: int) -> None:
    layout = SlotLayout(world_size, 6 * KIB)
    starts = [layout.slot(rank, epoch) for rank in range(world_size) for epoch in (0, 1)]
    assert all(start % PAGE_BYTES == 0 for start in starts)
    ends = [start + layout.slot_lines * LINE_BYTES for start in starts]
    errors = [rank * ERROR_STRIDE + 4 for rank in range(world_size)]
    # In this order, without a gap: error words, then each rank's two slots.
    assert max(errors) <= starts[0] == PAGE_BYTES
    assert ends == [*starts[1:], layout.num_bytes]
    assert [layout.own(rank) for rank in range(world_size)] == list(zip(starts[::2], ends[1::2], strict=True))
    assert layout.slot_lines * DATA_BYTES == 6 * KIB
    assert [layout.slot(1, epoch) for epoch in (2, 3)] == [layout.slot(1, epoch) for epoch in (0, 1)]


@pytest.mark.parametrize(("world_size", "max_bytes"), [(1, SMALL), (5, SMALL), (2, 1000), (2, 0)])
def test_layouts_that_cannot_work_are_refused(world_size: int, max_bytes: int) -> None:
    with pytest.raises(AssertionError):
        SlotLayout(world_size, max_bytes)


@pytest.mark.parametrize("num_bytes", (1, 8, 9, 2048, 2049, 16 * KIB, 16 * KIB + 1, 64 * KIB, 256 * KIB, MAX_BYTES))
def test_every_block_has_a_line_to_carry(num_bytes: int) -> None:
    blocks, threads = choose_launch(num_bytes)
    lines = -(-num_bytes // 8)
    assert 1 <= blocks <= 64 and threads in (256, 512)
    assert (blocks - 1) * threads < lines


def test_measured_launches_are_kept() -> None:
    assert [choose_launch(size * KIB) for size in (16, 64, 256)] == [(8, 256), (16, 256), (32, 512)]
    assert LAUNCHES[-1][0] == MAX_BYTES


@pytest.mark.parametrize("world_size", (2, 3, 4))
def test_parts_fit_their_slots_and_flags(world_size: int) -> None:
    layout = TwoStepLayout(world_size)
    part = -(-layout.slot_units // world_size)
    assert part <= layout.slot_units // 2
    assert -(-part * UNIT_BYTES // CHUNK_BYTES) <= MAX_CHUNKS
    areas = [layout.own(rank) for rank in range(world_size)]
    assert all(start % PAGE_BYTES == 0 for start, _ in areas)
    # Two slots and two of sums; in rank order, without a gap, after the flags.
    assert all(end - start == (2 + 2 * 0.5) * layout.piece_bytes for start, end in areas)
    assert [start for start, _ in areas] == [areas[0][0], *(end for _, end in areas[:-1])]
    assert areas[0][0] >= PAGE_BYTES + 2 * world_size * MAX_CHUNKS * 4
    assert areas[-1][1] == layout.num_bytes


def test_numbers_of_the_kernels_are_those_of_the_host() -> None:
    folder = Path(two_step.__file__).parent
    text = "".join(read_source(folder / f"host_memory{part}.cu") for part in ("", "_two_step"))
    found = defined(text)
    assert int(found["UNITS_PER_THREAD"]) * THREADS * UNIT_BYTES == CHUNK_BYTES
    expected = {"PAGE_BYTES": PAGE_BYTES, "ERROR_STRIDE": ERROR_STRIDE, "DATA_BYTES": DATA_BYTES,
                "LINE_BYTES": LINE_BYTES, "THREADS": THREADS, "MAX_CHUNKS": MAX_CHUNKS, "MAX_RANKS": MAX_RANKS,
                "UNIT_BYTES": UNIT_BYTES, "FLAG_BYTES": FLAG_BYTES}  # fmt: skip
    assert {name: int(found[name]) for name in expected} == expected


def defined(text: str) -> dict[str, str]:
    return dict(re.findall(r"^#define ([A-Z_]+) (\d+)$", text, re.MULTILINE))


@pytest.mark.parametrize(("lines", "data_bits"), ((EXACT, 16), (INT8, 8)))
def test_numbers_of_the_dense_kernels_are_those_of_the_host(lines: LineFormat, data_bits: int) -> None:
    found = defined(read_source(Path(dense.__file__).parent / lines.source))
    names = ("PAGE_BYTES", "ERROR_STRIDE", "UNIT_BYTES", "LANES", "NUM_TAGS")
    constants = {**vars(dense), "ERROR_STRIDE": ERROR_STRIDE}
    assert {name: int(found[name]) for name in names} == {name: constants[name] for name in names}
    assert (int(found["UNITS"]), int(found["LINES"])) == (lines.units, lines.lines)
    # Tiles fill pages: data, tags, and where they are rounded a scale beside each tag.
    beside = 2 if data_bits == 16 else 4
    data_bytes = lines.tiles_per_page * lines.tile_bytes * data_bits // 16
    assert data_bytes + PAGE_BYTES // dense.LINE_BYTES * beside == PAGE_BYTES


@pytest.mark.parametrize("lines", (EXACT, INT8))
@pytest.mark.parametrize("world_size", (2, 3, 4))
@pytest.mark.parametrize("max_bytes", (16, EXACT.tile_bytes, EXACT.tile_bytes + 1, dense.MAX_BYTES))
def test_dense_slots_hold_their_tiles_and_do_not_overlap(world_size: int, max_bytes: int, lines: LineFormat) -> None:
    layout = DenseLayout(world_size, max_bytes, lines)
    areas = [layout.own(rank) for rank in range(world_size)]
    assert areas[0][0] == PAGE_BYTES and areas[-1][1] == layout.num_bytes
    assert [start for start, _ in areas[1:]] == [end for _, end in areas[:-1]]
    # As the kernel counts them; each slot begins with a page.
    slot_bytes = layout.slot_tiles * lines.lines * dense.LANES * dense.LINE_BYTES
    assert all(end - start == 2 * slot_bytes for start, end in areas) and slot_bytes % PAGE_BYTES == 0
    assert (layout.slot_tiles - lines.tiles_per_page) * lines.tile_bytes < max_bytes
    assert max_bytes <= layout.slot_tiles * lines.tile_bytes


@pytest.mark.parametrize("lines", (EXACT, INT8))
@pytest.mark.parametrize("num_bytes", (16, EXACT.tile_bytes, EXACT.tile_bytes + 16, 64 * KIB, 128 * KIB, 512 * KIB))
def test_every_block_of_a_dense_launch_has_a_tile(num_bytes: int, lines: LineFormat) -> None:
    blocks, threads = dense.choose_launch(num_bytes, lines)
    tiles = -(-num_bytes // lines.tile_bytes)
    assert 1 <= blocks <= min(64, tiles) and threads % 32 == 0 and 32 <= threads <= 256
    # All that there is to carry while that is less than the most warps.
    assert blocks * threads // 32 >= min(tiles, 32)


class Renewed:
    """Which call each row of the slots was last written in, where calls are short or long at random."""

    def __init__(self, layout: DenseLayout, last_epoch: int) -> None:
        self.rows, self.epoch = np.full((2, layout.slot_rows), last_epoch), last_epoch

    def call(self, rows: int) -> int:
        """Of those that carry this call's message, the oldest one's age in calls before it was written."""
        self.epoch += 1
        slot = self.rows[self.epoch % 2]
        age = self.epoch - int(slot[:rows].min())
        slot[:rows] = slot[self.epoch // 2 % len(slot)] = self.epoch
        return age


def test_no_tag_comes_again_in_a_line_that_still_carries_it() -> None:
    layout = DenseLayout(2)
    renewed = Renewed(layout, 0)
    for _ in range(3):
        for _ in range(2 * layout.slot_rows):
            renewed.call(1)
        # Both slots in full.
        assert renewed.call(layout.slot_rows) <= 2 * layout.slot_rows + 2 < dense.NUM_TAGS
        assert renewed.call(layout.slot_rows) <= 2 * layout.slot_rows + 2
    with pytest.raises(AssertionError):
        DenseLayout(2, 16 * 2**20)


class Overrun(RuntimeError):
    """A line was overwritten before it was read."""


class Model:
    """What host_memory.cu does, a line at a time, by stores and loads of 8 bytes; `num_slots` of 2 is the real one."""

    def __init__(self, region: SharedRegion, layout: SlotLayout, rank: int, num_slots: int = 2) -> None:
        self.words: NDArray[np.uint64] = np.frombuffer(region.memory, dtype=np.uint64)
        self.layout, self.rank, self.num_slots, self.epoch = layout, rank, num_slots, 0

    def gather(self, message: bytes, between: Callable[[], object] = lambda: None) -> list[bytes]:
        """`between`: what happens after this rank has written and before it reads."""
        count = self.write(message)
        between()
        return [self._read(rank, count)[: len(message)] for rank in range(self.layout.world_size)]

    def write(self, message: bytes) -> int:
        """Writes the next call's message, words in any order; returns how many words it has."""
        self.epoch += 1
        data = np.frombuffer(message.ljust(-(-len(message) // 8) * 8, b"\0"), dtype=np.uint32).astype(np.uint64)
        flagged = data | np.uint64(self.epoch << 32)
        start = self._start(self.rank)
        for i in random.sample(range(len(flagged)), len(flagged)):
            self.words[start + i] = flagged[i]
        return len(flagged)

    def _start(self, rank: int) -> int:
        return self.layout.slot(rank, self.epoch % self.num_slots) // 8

    def _read(self, rank: int, count: int) -> bytes:
        start, end = self._start(rank), time.monotonic() + 100
        while True:
            found = self.words[start : start + count].copy()
            epochs = found >> np.uint64(32)
            if (epochs == self.epoch).all():
                return (found & np.uint64(0xFFFFFFFF)).astype(np.uint32).tobytes()
            if (epochs > self.epoch).any():
                raise Overrun(f"call {self.epoch} of rank {self.rank}")
            assert time.monotonic() < end, "a peer did not answer"
            time.sleep(0)


def exchange(communicator: Communicator, num_calls: int) -> int:
    """Calls of random sizes with random pauses; returns how many were right."""
    layout = SlotLayout(communicator.world_size, SMALL)
    model = Model(share_region(communicator, CPU, layout.num_bytes), layout, communicator.rank)
    shared, own = random.Random(5), random.Random(communicator.rank)
    right = 0
    for call in range(num_calls):
        size = shared.choice((1, 7, 8, 100, 2040, SMALL))
        messages = [random.Random(100 * call + rank).randbytes(size) for rank in range(layout.world_size)]
        pause = own.choice((0, 0, 0, 0.001))
        right += model.gather(messages[communicator.rank], lambda pause=pause: time.sleep(pause)) == messages
    return right


@pytest.mark.parametrize("world_size", (2, 3))
def test_two_slots_carry_every_message(world_size: int) -> None:
    assert run_on_ranks(exchange, world_size, 150) == [150] * world_size


def run_ahead(communicator: Communicator, num_slots: int) -> str:
    """Rank 0 does not read until its peer, which has all it needs, has written the next call."""
    layout = SlotLayout(communicator.world_size, SMALL)
    model = Model(share_region(communicator, CPU, layout.num_bytes), layout, communicator.rank, num_slots)
    if communicator.rank == 1:
        model.gather(b"first")
        model.write(b"second")
        communicator.barrier()
        return "fine"
    try:
        model.gather(b"first", communicator.barrier)
    except Overrun as error:
        return str(error)
    return "fine"


@pytest.mark.parametrize(("num_slots", "outcome"), [(1, "call 1 of rank 0"), (2, "fine")])
def test_one_slot_would_not_be_enough_and_two_are(num_slots: int, outcome: str) -> None:
    assert run_on_ranks(run_ahead, 2, num_slots) == [outcome, "fine"]


class FakeChannel:
    """Adds and gathers as if there were two ranks with the same message, and keeps what it was given."""

    def __init__(self) -> None:
        self.layout = SlotLayout(2, SMALL)
        self.state = torch.zeros(2)
        self.given: list[Tensor] = []

    def all_reduce(self, source: Tensor, target: Tensor) -> None:
        assert is_aligned(source, DATA_BYTES) and is_aligned(target, DATA_BYTES)
        self.given.append(source)
        target.copy_(ordered_sum([source, source]))

    def all_gather(self, source: Tensor, target: Tensor) -> None:
        assert is_aligned(source, DATA_BYTES) and is_aligned(target, DATA_BYTES)
        self.given.append(source)
        target.copy_(torch.stack([source, source]))

    def check(self) -> None: ...


class Counting(Solo):
    world_size = 2

    def __init__(self) -> None:
        super().__init__(CPU)
        self.calls = 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        self.calls += 1
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        self.calls += 1
        return torch.stack([tensor, tensor])


def opened() -> tuple[HostMemory, Counting, FakeChannel]:
    inner, channel = Counting(), FakeChannel()
    return HostMemory(inner, channel), inner, channel  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_messages_go_where_they_fit(dtype: torch.dtype) -> None:
    communicator, inner, channel = opened()
    largest = SMALL // dtype.itemsize
    communicator.all_reduce(torch.ones(largest, dtype=dtype))
    communicator.all_gather(torch.ones(largest, dtype=dtype))
    assert (inner.calls, len(channel.given)) == (0, 2)
    communicator.all_reduce(torch.ones(largest + 1, dtype=dtype))
    communicator.all_gather(torch.ones(largest + 1, dtype=dtype))
    communicator.max_bytes = 64
    communicator.all_reduce(torch.ones(64 // dtype.itemsize + 1, dtype=dtype))
    assert (inner.calls, len(channel.given)) == (3, 2)


def test_types_that_cannot_be_summed_go_to_the_other_and_are_still_gathered() -> None:
    communicator, inner, channel = opened()
    for dtype in (torch.float64, torch.int64, torch.bool):
        communicator.all_reduce(torch.ones(3, dtype=dtype))
        communicator.all_gather(torch.ones(3, dtype=dtype))
    assert (inner.calls, len(channel.given)) == (3, 3)


def test_empty_messages_reach_no_kernel() -> None:
    communicator, inner, channel = opened()
    communicator.all_reduce(torch.ones(0))
    communicator.all_gather(torch.ones(0, 3))
    assert (inner.calls, len(channel.given)) == (2, 0)


def test_two_steps_carry_large_all_reduces_of_whole_units() -> None:
    inner, channel = Counting(), FakeChannel()
    communicator = TwoStepHostMemory(inner, channel)  # type: ignore[arg-type]
    communicator.min_bytes = 64
    communicator.all_reduce(torch.ones(16))
    communicator.all_reduce(torch.ones(1000, dtype=torch.bfloat16).view(10, 100).T)
    assert (inner.calls, len(channel.given)) == (0, 2)
    # Too small, not whole units, of another type, and a gather.
    communicator.all_reduce(torch.ones(12))
    communicator.all_reduce(torch.ones(17))
    communicator.all_reduce(torch.ones(16, dtype=torch.float64))
    communicator.all_gather(torch.ones(16))
    assert (inner.calls, len(channel.given)) == (4, 2)


def test_dense_slots_carry_whole_units_up_to_their_size() -> None:
    inner, channel = Counting(), FakeChannel()
    channel.layout = DenseLayout(2, SMALL)  # type: ignore[assignment]
    communicator = DenseHostMemory(inner, channel)  # type: ignore[arg-type]
    communicator.all_reduce(torch.ones(4))
    communicator.all_reduce(torch.ones(SMALL // 2, dtype=torch.bfloat16))
    communicator.all_reduce(torch.ones(1000, dtype=torch.bfloat16).view(10, 100).T)
    assert (inner.calls, len(channel.given)) == (0, 3)
    # Too large, not whole units, empty, of another type, and a gather.
    communicator.all_reduce(torch.ones(SMALL // 4 + 4))
    communicator.all_reduce(torch.ones(5))
    communicator.all_reduce(torch.ones(0))
    communicator.all_reduce(torch.ones(16, dtype=torch.float64))
    communicator.all_gather(torch.ones(16))
    assert (inner.calls, len(channel.given)) == (5, 3)


def test_each_length_goes_its_way() -> None:
    ways, gather, inner = [Counting() for _ in range(3)], Counting(), Counting()
    communicator = BySize(inner, list(zip((64, 128, 256), ways, strict=True)), gather, CPU)
    for num_bytes, place in {0: 0, 4: 0, 64: 0, 68: 1, 128: 1, 132: 2, 256: 2, 260: 2, 4096: 2}.items():
        before = [way.calls for way in ways]
        communicator.all_reduce(torch.ones(num_bytes // 4))
        assert [way.calls - b for way, b in zip(ways, before, strict=True)] == [int(i == place) for i in range(3)]
    communicator.all_gather(torch.ones(3))
    communicator.barrier()
    assert (gather.calls, inner.calls) == (1, 0)


class Lost(Counting):
    """A call of it was given up."""

    def check(self) -> None:
        raise TransportError("a peer is gone")


@pytest.mark.parametrize("lost", range(5))
def test_a_peer_that_any_of_several_has_lost_is_told(lost: int) -> None:
    """Of two that carry sums, the one that gathers and the one within; before anyone waits for the peer."""
    parts = [Lost() if place == lost else Counting() for place in range(4)]
    first, second, gather, inner = parts
    communicator = BySize(inner, [(64, first), (128, second)], gather, CPU)
    inner.barrier = lambda: parts.clear()  # type: ignore[method-assign]
    for call in (communicator.check, communicator.barrier):
        if lost < 4:
            with pytest.raises(TransportError, match="a peer is gone"):
                call()
        else:
            call()
    assert len(parts) == (0 if lost == 4 else 4)


def test_a_peer_that_a_channel_or_what_is_within_has_lost_is_told() -> None:
    for communicator in (HostMemory(Lost(), FakeChannel()), ElidedAllReduce(Lost())):  # type: ignore[arg-type]
        with pytest.raises(TransportError, match="a peer is gone"):
            communicator.check()
    communicator, _, channel = opened()
    communicator.check()
    channel.check = Lost().check  # type: ignore[method-assign]
    with pytest.raises(TransportError, match="a peer is gone"):
        communicator.check()


@pytest.mark.parametrize(
    "view", (lambda t: t.view(-1)[1:36], lambda t: t.T, lambda t: t[:, 1:3], lambda t: t.view(-1)[4:])
)
def test_views_are_reduced_in_place(view: object) -> None:
    """Only the elements of the view double, whether the kernel could take it where it lies or not."""
    communicator, _, _ = opened()
    base = torch.arange(1.0, 41.0).to(torch.bfloat16).view(8, 5)
    expected = base.clone()
    view(expected).mul_(2)  # type: ignore[operator]
    seen = view(base)  # type: ignore[operator]
    assert communicator.all_reduce(seen) is seen
    assert torch.equal(base, expected)
    gathered = communicator.all_gather(seen)
    assert torch.equal(gathered, torch.stack([seen, seen]))
