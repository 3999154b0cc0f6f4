"""Where an all-reduce by copy engines keeps things: slots and flags in host memory, buffers on the card."""

from __future__ import annotations

from dataclasses import dataclass

from parallel.transports.region_layout import MAX_RANKS, PAGE_BYTES, UNIT_BYTES
from parallel.units import MIB

FLAG_STRIDE = 64
# Flags are 32 bits.
COUNTS = 2**32
# What ranks meet for in a turn: slots are written, sums are written, everything was read.
MEETINGS = WRITTEN, SUMMED, READ = 0, 1, 2


@dataclass(frozen=True)
class CopyLayout:
    """Error words, words of progress, flags, then the slots of each rank; the sizes that go through them, in bytes."""

    world_size: int
    # What is exchanged in a turn, at most.
    piece_bytes: int
    # How many turns are under way at once.
    num_lanes: int

    def __post_init__(self) -> None:
        assert 2 <= self.world_size <= MAX_RANKS, self.world_size
        # Slots are whole pages, so that each lies near the processor of the rank that writes it.
        assert self.piece_bytes > 0 and self.piece_bytes % PAGE_BYTES == 0, self.piece_bytes
        assert self.num_lanes > 0, self.num_lanes

    @property
    def in_two_steps(self) -> bool:
        return self.world_size > 2

    @property
    def num_bytes(self) -> int:
        return self.own(self.world_size)[0]

    def own(self, rank: int) -> tuple[int, int]:
        """Start and end of the slots that `rank` writes."""
        slots = -(-self.flag(self.num_lanes, 0, 0, 0) // PAGE_BYTES) * PAGE_BYTES
        area = self.num_lanes * self.piece_bytes
        return slots + rank * area, slots + (rank + 1) * area

    def slot(self, rank: int, lane: int) -> int:
        return self.own(rank)[0] + lane * self.piece_bytes

    def progress(self, rank: int) -> int:
        """A word that changes whenever the card of `rank` has added something up."""
        return PAGE_BYTES + rank * FLAG_STRIDE

    def flag(self, lane: int, meeting: int, writer: int, reader: int) -> int:
        """The word by which `writer` tells `reader` that it has come to a meeting of a lane."""
        place = (lane * len(MEETINGS) + meeting) * self.world_size**2 + writer * self.world_size + reader
        return 2 * PAGE_BYTES + place * FLAG_STRIDE

    @property
    def stride_bytes(self) -> int:
        """From one peer's bytes to the next one's in a buffer."""
        return part_bytes(self.piece_bytes, self.world_size) if self.in_two_steps else self.piece_bytes

    @property
    def buffer_bytes(self) -> int:
        return (self.world_size - 1) * self.stride_bytes

    @property
    def staging_bytes(self) -> int:
        """Of all buffers on a card, one for each lane."""
        return self.num_lanes * self.buffer_bytes


def choose_layout(world_size: int) -> CopyLayout:
    """The one in use: 36 MiB of host memory and 18 MiB of each card on two ranks, 64 and 12 MiB on four."""
    if world_size == 2:
        # So that a section of 768 rows of a 70B goes in two pieces: each costs the host five calls of the driver.
        return CopyLayout(world_size, piece_bytes=6 * MIB, num_lanes=3)
    return CopyLayout(world_size, piece_bytes=4 * MIB, num_lanes=4)


def part_bytes(num_bytes: int, world_size: int) -> int:
    """Of a piece, for each rank; the last parts may be shorter."""
    return -(-num_bytes // (UNIT_BYTES * world_size)) * UNIT_BYTES
