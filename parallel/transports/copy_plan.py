"""What the streams of a card do for an all-reduce by its copy engines, and what waits for what.

A message goes in pieces. Each has a turn on one of the lanes, which are streams that take turns; a lane has one slot of
each rank in host memory and one buffer on each card. In its turn a rank

- copies the piece into its slot, and meets the others: the slots are written;
- copies what it needs of the others' slots into its buffer, and adds it to its own;
- meets the others once more: everything was read, and the lane is free for another turn.

Two ranks take the whole piece: each byte crosses a link once in each direction. Three and four take their part of the
piece only, copy the sum of it back into their slot, meet in between, and fetch the sums of the other parts straight
into the message: 1.33 and 1.5 times the message instead of 2 and 3. While one lane copies to the host another copies
from it, so that both directions are busy.

To meet is to write 1 for each of the others, to wait for 1 from each, and then to write 0 over what they wrote. A rank
comes to the next meeting of a lane only after it has met all others at this one, which differs from it; so nobody finds
a word that the other has not yet put back, and the values are the same in every turn: calls can be prepared once.

Results may overwrite the message: its copy to the slot came before, on the same stream.

Why it cannot stop: in the order in which operations are listed, the same on all ranks, each waits only for what comes
before it. So streams that share a queue of the card by chance cost time and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

from parallel.transports.copy_layout import READ, SUMMED, WRITTEN, CopyLayout, part_bytes


@dataclass(frozen=True)
class Begin:
    """The lane waits for what the caller's stream has been given before the call."""

    lane: int


@dataclass(frozen=True)
class ToHost:
    """`num_bytes` from `start` of the message, or of the result where they are sums, to `place` in the region."""

    lane: int
    start: int
    place: int
    num_bytes: int
    is_sum: bool = False


@dataclass(frozen=True)
class ToCard:
    """`num_bytes` from `place` in the region to `at` in the buffers, or in the result where they are sums."""

    lane: int
    place: int
    at: int
    num_bytes: int
    is_sum: bool = False


@dataclass(frozen=True)
class Meet:
    """All ranks come to this point of the lane; what each of them did before is seen by all."""

    lane: int
    meeting: int


@dataclass(frozen=True)
class Add:
    """Into `num_bytes` of the result from `start`: the message there and what lies from `at` in the buffers."""

    lane: int
    start: int
    num_bytes: int
    at: int


@dataclass(frozen=True)
class End:
    """The caller's stream waits for what the lane has been given so far."""

    lane: int


Operation = Begin | ToHost | ToCard | Meet | Add | End


@lru_cache(maxsize=64)
def plan_all_reduce(layout: CopyLayout, rank: int, num_bytes: int, first_lane: int) -> tuple[Operation, ...]:
    """What `rank` does for a message of `num_bytes`, in the order of issue; pieces take lanes from `first_lane` on."""
    planner = Planner(layout, rank)
    pieces = cut(num_bytes, layout.piece_bytes)
    lanes = [(first_lane + place) % layout.num_lanes for place in range(len(pieces))]
    for place, (lane, piece) in enumerate(zip(lanes, pieces, strict=True)):
        if place < layout.num_lanes:
            planner.add(Begin(lane))
        planner.exchange(lane, *piece)
    planner.add(*(End(lane) for lane in lanes[: layout.num_lanes]))
    return tuple(planner.operations)


def cut(num_bytes: int, most: int) -> list[tuple[int, int]]:
    """Start and length of as few pieces of up to `most` as there can be, about alike, in whole units."""
    count = -(-num_bytes // most)
    each = part_bytes(num_bytes, count)
    return [(start, min(each, num_bytes - start)) for start in range(0, num_bytes, each)]


@lru_cache(maxsize=256)
def next_lane(layout: CopyLayout, num_bytes: int, first_lane: int) -> int:
    """Where the call after one of `num_bytes` begins."""
    return (first_lane + len(cut(num_bytes, layout.piece_bytes))) % layout.num_lanes


@dataclass
class Planner:
    """Lists the operations of one rank."""

    layout: CopyLayout
    rank: int
    operations: list[Operation] = field(default_factory=list)

    def add(self, *operations: Operation) -> None:
        self.operations += operations

    def exchange(self, lane: int, start: int, num_bytes: int) -> None:
        """One turn: the sum of `num_bytes` of the message from `start`."""
        self.add(ToHost(lane, start, self.layout.slot(self.rank, lane), num_bytes), Meet(lane, WRITTEN))
        at, size = self.part(num_bytes, self.rank) if self.layout.in_two_steps else (0, num_bytes)
        for peer in self.peers():
            self.fetch(lane, self.layout.slot(peer, lane) + at, self.buffer(lane, peer), size)
        # Also of nothing: it is how others see that this rank goes on.
        self.add(Add(lane, start + at, size, self.buffer(lane)))
        if self.layout.in_two_steps:
            self.exchange_sums(lane, start, num_bytes)
        self.add(Meet(lane, READ))

    def exchange_sums(self, lane: int, start: int, num_bytes: int) -> None:
        """The sum of this rank's part, in place of the part, which no one else reads, to the others, and theirs."""
        at, size = self.part(num_bytes, self.rank)
        if size:
            self.add(ToHost(lane, start + at, self.layout.slot(self.rank, lane) + at, size, is_sum=True))
        self.add(Meet(lane, SUMMED))
        for peer in self.peers():
            at, size = self.part(num_bytes, peer)
            self.fetch(lane, self.layout.slot(peer, lane) + at, start + at, size, is_sum=True)

    def fetch(self, lane: int, place: int, at: int, num_bytes: int, is_sum: bool = False) -> None:
        if num_bytes:
            self.add(ToCard(lane, place, at, num_bytes, is_sum))

    def peers(self) -> list[int]:
        """From the next rank on, so that ranks do not all read one slot at once."""
        world_size = self.layout.world_size
        return [(self.rank + distance) % world_size for distance in range(1, world_size)]

    def part(self, num_bytes: int, rank: int) -> tuple[int, int]:
        """Start within a piece and length of what `rank` sums up; the last may be empty."""
        most = part_bytes(num_bytes, self.layout.world_size)
        start = min(rank * most, num_bytes)
        return start, min(most, num_bytes - start)

    def buffer(self, lane: int, peer: int | None = None) -> int:
        """Where on the card the bytes of a peer go, or of the first: peers are in rank order, without this rank."""
        place = 0 if peer is None else peer - (peer > self.rank)
        return lane * self.layout.buffer_bytes + place * self.layout.stride_bytes
