"""What the streams of a card do for an all-reduce by its copy engines, and what waits for what.

A message goes in segments. Each rank copies its segment into a slot of its own in host memory and raises a flag; it
waits for all ranks' flags, copies what it needs of the others' slots into a buffer on its card, and adds it to its own.

- Two ranks take the whole segment and are done: each byte crosses a link once in each direction. A segment goes in
  pieces, so that both directions are busy, but is added at once: a kernel may wait long for multiprocessors.
- Three and four take their part of the segment only, copy the sum of it back into their slot, and fetch the sums of the
  other parts straight into the message: 1.33 and 1.5 times the message instead of 2 and 3.

Streams come in two lanes, each with its flags. On two ranks pieces take turns, so that one lane copies while the other
raises its flag; on more the first lane carries parts and the second sums, since parts must not wait behind them.

Why slots can be used again: let D be `ahead`; a rank has 2 D slots. `done(s)` is the event after which it has read all
that it needs of segment s, and its copies to the slot of s wait for its own `done(s - D)`. That came after the flags of
all ranks for s - D, and a rank raises such a flag only after it has itself waited for its `done(s - 2 D)`, directly or
by way of what its sums are made of. So when a slot is written again, 2 D segments later, every rank has read it. D
buffers on the card are enough: what is copied there waits for the rank's own flag too, thus for `done(s - D)`. For the
same reason results may overwrite the message: its copy to the slot came before the flag.

Why it cannot stop: in the order in which operations are listed, the same on all ranks, each waits only for what comes
before it. So streams that share a queue of the card by chance cost time and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

from parallel.transports.copy_layout import LANES, CopyLayout, part_bytes

PARTS, SUMS = LANES
# Streams: the one that a call comes on, one for sums, and two of each lane.
CALLER, ADD = "caller", "add"
SEND, RECEIVE = ("send 0", "send 1"), ("receive 0", "receive 1")
START = "start"


@dataclass(frozen=True)
class Record:
    """An event for what the stream has been given so far."""

    stream: str
    event: str


@dataclass(frozen=True)
class Wait:
    """For the event as it was recorded last; for nothing where it never was."""

    stream: str
    event: str


@dataclass(frozen=True)
class ToHost:
    """`num_bytes` from `start` of the message, or of the result where they are sums, to `place` in the region."""

    stream: str
    start: int
    place: int
    num_bytes: int
    is_sum: bool = False


@dataclass(frozen=True)
class ToCard:
    """`num_bytes` from `place` in the region to `at` in the buffers, or in the result where they are sums."""

    stream: str
    place: int
    at: int
    num_bytes: int
    is_sum: bool = False


@dataclass(frozen=True)
class Raise:
    """This rank's flag of the lane, to what it was before the call and `count`; what came before is seen first."""

    stream: str
    lane: int
    count: int


@dataclass(frozen=True)
class Await:
    """All ranks' flags of the lane, each to be at least what it was before the call and `count`."""

    stream: str
    lane: int
    count: int


@dataclass(frozen=True)
class Add:
    """Into `num_bytes` of the result from `start`: the message there and what lies from `at` in the buffers."""

    stream: str
    start: int
    num_bytes: int
    at: int


Operation = Record | Wait | ToHost | ToCard | Raise | Await | Add


@dataclass(frozen=True)
class Plan:
    """All operations of a call, in the order of their issue, and by how much it moves the counts on."""

    operations: tuple[Operation, ...]
    num_segments: int
    raised: tuple[int, ...]


@dataclass(frozen=True)
class Segment:
    """`number` counts over all calls."""

    number: int
    start: int
    num_bytes: int


@lru_cache(maxsize=64)
def plan_all_reduce(layout: CopyLayout, rank: int, num_bytes: int, first: int) -> Plan:
    """The operations of `rank` for `num_bytes`; `first` is the first segment's number, modulo `layout.num_slots`."""
    planner = Planner(layout, rank)
    spans = split(num_bytes, layout.segment_bytes)
    segments = [Segment(number, *span) for number, span in enumerate(spans, start=first)]
    planner.add(Record(CALLER, START), *(Wait(stream, START) for stream in SEND))
    (plan_two_steps if layout.in_two_steps else plan_one_step)(planner, segments)
    planner.add(Wait(CALLER, planner.done(segments[-1])))
    return Plan(tuple(planner.operations), len(segments), tuple(planner.raised))


def split(num_bytes: int, most: int) -> list[tuple[int, int]]:
    """Start and length of pieces of up to `most`."""
    return [(start, min(most, num_bytes - start)) for start in range(0, num_bytes, most)]


def plan_one_step(planner: Planner, segments: Sequence[Segment]) -> None:
    for segment in segments:
        planner.exchange_all(segment)


def plan_two_steps(planner: Planner, segments: Sequence[Segment]) -> None:
    """The sums of a segment come after the parts of the next, which would wait for them in a queue that both share."""
    planner.exchange_parts(segments[0])
    for before, segment in pairwise(segments):
        planner.exchange_parts(segment)
        planner.exchange_sums(before)
    planner.exchange_sums(segments[-1])


@dataclass
class Planner:
    """Lists the operations of one rank."""

    layout: CopyLayout
    rank: int
    operations: list[Operation] = field(default_factory=list)
    raised: list[int] = field(default_factory=lambda: [0] * len(LANES))

    def add(self, *operations: Operation) -> None:
        self.operations += operations

    def exchange_all(self, segment: Segment) -> None:
        """A segment to and from the other ranks in pieces, then its sum."""
        pieces = split(segment.num_bytes, self.layout.piece_bytes)
        turns = [(segment.number + place) % len(LANES) for place in range(len(pieces))]
        lanes = sorted(set(turns))
        self.add(*(Wait(SEND[lane], self.done(segment)) for lane in lanes))
        for lane, (start, num_bytes) in zip(turns, pieces, strict=True):
            self.send(lane, segment, start, num_bytes)
            for peer in self.peers():
                self.fetch(lane, segment, peer, start, num_bytes, self.buffer(segment, peer) + start)
        self.sum(segment, lanes, 0, segment.num_bytes)
        self.add(Record(ADD, self.done(segment)))

    def exchange_parts(self, segment: Segment) -> None:
        """A segment to the other ranks, and this rank's part of theirs; then its sum."""
        self.add(Wait(SEND[PARTS], self.done(segment)))
        self.send(PARTS, segment, 0, segment.num_bytes)
        start, num_bytes = self.part(segment, self.rank)
        for peer in self.peers():
            self.fetch(PARTS, segment, peer, start, num_bytes, self.buffer(segment, peer))
        self.sum(segment, (PARTS,), start, num_bytes)
        self.add(Record(ADD, self.summed(segment)))

    def exchange_sums(self, segment: Segment) -> None:
        """The sum of this rank's part, in place of the part, to the other ranks, and theirs."""
        self.add(Wait(SEND[SUMS], self.summed(segment)))
        self.send(SUMS, segment, *self.part(segment, self.rank), is_sum=True)
        for peer in self.peers():
            start, num_bytes = self.part(segment, peer)
            self.fetch(SUMS, segment, peer, start, num_bytes, segment.start + start, is_sum=True)
        self.add(Record(RECEIVE[SUMS], self.done(segment)))

    def send(self, lane: int, segment: Segment, start: int, num_bytes: int, is_sum: bool = False) -> None:
        """Bytes of a segment to this rank's slot; its flag; and the wait for all ranks' before anything is fetched."""
        place = self.layout.slot(self.rank, segment.number) + start
        if num_bytes:
            self.add(ToHost(SEND[lane], segment.start + start, place, num_bytes, is_sum))
        self.raised[lane] += 1
        self.add(Raise(SEND[lane], lane, self.raised[lane]), Await(RECEIVE[lane], lane, self.raised[lane]))

    def fetch(
        self, lane: int, segment: Segment, peer: int, start: int, num_bytes: int, at: int, is_sum: bool = False
    ) -> None:
        if num_bytes:
            place = self.layout.slot(peer, segment.number) + start
            self.add(ToCard(RECEIVE[lane], place, at, num_bytes, is_sum))

    def sum(self, segment: Segment, lanes: Sequence[int], start: int, num_bytes: int) -> None:
        """Of what has been fetched on `lanes`."""
        for lane in lanes:
            received = f"received {lane}"
            self.add(Record(RECEIVE[lane], received), Wait(ADD, received))
        if num_bytes:
            self.add(Add(ADD, segment.start + start, num_bytes, self.buffer(segment)))

    def peers(self) -> list[int]:
        """From the next rank on, so that ranks do not all read one slot at once."""
        world_size = self.layout.world_size
        return [(self.rank + distance) % world_size for distance in range(1, world_size)]

    def part(self, segment: Segment, rank: int) -> tuple[int, int]:
        """Start within the segment and length of what `rank` sums up; the last may be empty."""
        most = part_bytes(segment.num_bytes, self.layout.world_size)
        start = min(rank * most, segment.num_bytes)
        return start, min(most, segment.num_bytes - start)

    def buffer(self, segment: Segment, peer: int | None = None) -> int:
        """Where on the card the bytes of a peer go, or of the first: peers are in rank order, without this rank."""
        at = segment.number % self.layout.ahead * self.layout.buffer_bytes
        place = 0 if peer is None else peer - (peer > self.rank)
        return at + place * self.layout.stride_bytes

    def done(self, segment: Segment) -> str:
        return f"done {segment.number % self.layout.ahead}"

    def summed(self, segment: Segment) -> str:
        return f"summed {segment.number % self.layout.ahead}"
