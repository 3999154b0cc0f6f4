"""Where an all-reduce by copy engines keeps things: slots and flags in host memory, buffers on the card."""

from __future__ import annotations

from dataclasses import dataclass

from parallel.units import MIB

PAGE_BYTES = 4096
UNIT_BYTES = 16
FLAG_STRIDE = 64
# Flags count in 32 bits, and wrap.
COUNTS = 2**32
MAX_RANKS = 4
# Each has a flag a rank, and two streams on every card.
LANES = (0, 1)


@dataclass(frozen=True)
class CopyLayout:
    """A page of error words, a page of flags, then the slots of each rank; the sizes that go through them, in bytes."""

    world_size: int
    segment_bytes: int
    # What is copied at a time of a segment, on two ranks.
    piece_bytes: int
    # How many segments are under way at once.
    ahead: int

    def __post_init__(self) -> None:
        assert 2 <= self.world_size <= MAX_RANKS, self.world_size
        # Slots are whole pages, so that each lies near the processor of the rank that writes it.
        assert self.segment_bytes > 0 and self.segment_bytes % PAGE_BYTES == 0, self.segment_bytes
        assert self.piece_bytes > 0 and self.piece_bytes % UNIT_BYTES == 0, self.piece_bytes

    @property
    def in_two_steps(self) -> bool:
        return self.world_size > 2

    @property
    def num_slots(self) -> int:
        """Of a rank, one segment each."""
        return 2 * self.ahead

    @property
    def num_bytes(self) -> int:
        return self.own(self.world_size)[0]

    def own(self, rank: int) -> tuple[int, int]:
        """Start and end of the slots that `rank` writes."""
        area = self.num_slots * self.segment_bytes
        return 2 * PAGE_BYTES + rank * area, 2 * PAGE_BYTES + (rank + 1) * area

    def slot(self, rank: int, segment: int) -> int:
        return self.own(rank)[0] + segment % self.num_slots * self.segment_bytes

    def flag(self, rank: int, lane: int) -> int:
        return PAGE_BYTES + (rank * len(LANES) + lane) * FLAG_STRIDE

    @property
    def stride_bytes(self) -> int:
        """From one peer's bytes to the next one's in a buffer."""
        return part_bytes(self.segment_bytes, self.world_size) if self.in_two_steps else self.segment_bytes

    @property
    def buffer_bytes(self) -> int:
        return (self.world_size - 1) * self.stride_bytes

    @property
    def staging_bytes(self) -> int:
        """Of all buffers on a card, one for each segment that is under way."""
        return self.ahead * self.buffer_bytes


def choose_layout(world_size: int) -> CopyLayout:
    """The one in use: 64 MiB of host memory and 16 MiB of each card on two ranks, 128 and 12 MiB on four."""
    if world_size == 2:
        return CopyLayout(world_size, segment_bytes=8 * MIB, piece_bytes=2 * MIB, ahead=2)
    return CopyLayout(world_size, segment_bytes=4 * MIB, piece_bytes=4 * MIB, ahead=4)


def part_bytes(num_bytes: int, world_size: int) -> int:
    """Of a segment, for each rank; the last parts may be shorter."""
    return -(-num_bytes // (UNIT_BYTES * world_size)) * UNIT_BYTES
