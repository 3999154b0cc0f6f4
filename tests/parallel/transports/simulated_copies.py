"""Plans of copies, carried out on the CPU by streams that run in any order their operations allow."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from parallel.transports.copy_layout import CopyLayout
from parallel.transports.copy_plan import Add, Begin, End, Meet, Operation, ToCard, ToHost, next_lane, plan_all_reduce

FLOAT_BYTES = 4
Floats = NDArray[np.float32]
# Gives False while it must wait, then one True for each bit of its work.
Steps = Iterator[bool]


CALLER = "caller"
# By lane, meeting, writer and reader.
Words = dict[tuple[int, int, int, int], bool]
Change = Callable[[Sequence[Operation]], Sequence[Operation]]


@dataclass
class Ticket:
    """One record of an event."""

    fired: bool = False


class SimulatedRank:
    """A card with its streams. Copies and sums take several turns, so that others may see them half done."""

    def __init__(self, layout: CopyLayout, rank: int, region: Floats, words: Words, one_queue: bool) -> None:
        self.layout, self.rank, self.region, self.words, self.one_queue = layout, rank, region, words, one_queue
        self.staging = np.full(layout.staging_bytes // FLOAT_BYTES, np.nan, dtype=np.float32)
        self.queues: dict[str | int, deque[Steps]] = {}
        self.lane = 0

    def all_reduce(self, message: Floats, change: Change) -> None:
        started = Ticket()
        self.queue(CALLER, self.fire(started))
        for each in change(plan_all_reduce(self.layout, self.rank, message.nbytes, self.lane)):
            if isinstance(each, Begin):
                self.queue(each.lane, self.wait(started))
            elif isinstance(each, End):
                ended = Ticket()
                self.queue(each.lane, self.fire(ended))
                self.queue(CALLER, self.wait(ended))
            else:
                self.queue(each.lane, STEPS[type(each)](self, each, message))
        self.lane = next_lane(self.layout, message.nbytes, self.lane)

    def queue(self, stream: str | int, steps: Steps) -> None:
        self.queues.setdefault("" if self.one_queue else stream, deque()).append(steps)

    def fire(self, ticket: Ticket) -> Steps:
        ticket.fired = True
        yield True

    def wait(self, ticket: Ticket) -> Steps:
        while not ticket.fired:
            yield False
        yield True

    def to_host(self, each: ToHost, message: Floats) -> Steps:
        return move(message, each.start, self.region, each.place, each.num_bytes)

    def to_card(self, each: ToCard, message: Floats) -> Steps:
        return move(self.region, each.place, message if each.is_sum else self.staging, each.at, each.num_bytes)

    def meet(self, each: Meet, message: Floats) -> Steps:
        peers = [peer for peer in range(self.layout.world_size) if peer != self.rank]
        theirs = [(each.lane, each.meeting, peer, self.rank) for peer in peers]
        for peer in peers:
            self.words[each.lane, each.meeting, self.rank, peer] = True
            yield True
        while not all(self.words.get(word) for word in theirs):
            yield False
        for word in theirs:
            self.words[word] = False
            yield True

    def add(self, each: Add, message: Floats) -> Steps:
        for start, num_bytes in halves(each.num_bytes):
            own = part(message, each.start + start, num_bytes)
            stride = self.layout.stride_bytes
            others = [
                part(self.staging, each.at + i * stride + start, num_bytes) for i in range(self.layout.world_size - 1)
            ]
            others.insert(self.rank, own.copy())
            own[:] = np.stack(others).sum(axis=0)
            yield True


STEPS: dict[type, Callable[..., Steps]] = {
    ToHost: SimulatedRank.to_host,
    ToCard: SimulatedRank.to_card,
    Meet: SimulatedRank.meet,
    Add: SimulatedRank.add,
}


def move(source: Floats, start: int, target: Floats, at: int, num_bytes: int) -> Steps:
    for offset, size in halves(num_bytes):
        part(target, at + offset, size)[:] = part(source, start + offset, size)
        yield True


def halves(num_bytes: int) -> list[tuple[int, int]]:
    first = num_bytes // FLOAT_BYTES // 2 * FLOAT_BYTES
    return [(0, first), (first, num_bytes - first)]


def part(values: Floats, start: int, num_bytes: int) -> Floats:
    assert start % FLOAT_BYTES == 0 and 0 <= start <= start + num_bytes <= values.nbytes, (start, num_bytes)
    return values[start // FLOAT_BYTES : (start + num_bytes) // FLOAT_BYTES]


@dataclass
class Simulation:
    """All ranks of one layout; each sums its message in place, many times over in the same memory."""

    layout: CopyLayout
    seed: int
    change: Change = lambda operations: operations
    # Whether all streams of a rank share a queue of its card.
    one_queue: bool = False
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random, self.values = random.Random(self.seed), np.random.default_rng(self.seed)
        region = np.full(self.layout.num_bytes // FLOAT_BYTES, np.nan, dtype=np.float32)
        words: Words = {}
        ranks = range(self.layout.world_size)
        self.ranks = [SimulatedRank(self.layout, rank, region, words, self.one_queue) for rank in ranks]

    def run(self, sizes: Sequence[int]) -> list[str]:
        """What came out wrong of messages of so many bytes, queued at once; "stopped" where nothing could go on."""
        memory = [np.full(max(sizes) // FLOAT_BYTES, np.nan, dtype=np.float32) for _ in self.ranks]
        for call, size in enumerate(sizes):
            values = [self.fresh(size) for _ in self.ranks]
            for each, owned, mine in zip(self.ranks, memory, values, strict=True):
                message = part(owned, 0, size)
                each.queue(CALLER, self.fill(message, mine))
                each.all_reduce(message, self.change)
                each.queue(CALLER, self.check(f"call {call} rank {each.rank}", message, np.stack(values).sum(axis=0)))
        return self.wrong if self.go() else [*self.wrong, "stopped"]

    def fresh(self, size: int) -> Floats:
        return self.values.integers(-99, 99, size // FLOAT_BYTES).astype(np.float32)

    def fill(self, message: Floats, values: Floats) -> Steps:
        message[:] = values
        yield True

    def check(self, name: str, message: Floats, expected: Floats) -> Steps:
        if not np.array_equal(message, expected):
            self.wrong.append(name)
        yield True

    def go(self) -> bool:
        """Runs all streams, some far more often than others, until nothing is left; False if that never comes."""
        queues = [queue for each in self.ranks for queue in each.queues.values()]
        while any(queues):
            waiting = [queue for queue in queues if queue]
            favoured = self.random.sample(waiting, self.random.randint(1, len(waiting)))
            turns = [queue for queue in favoured for _ in range(self.random.randint(1, 8))]
            # Not as any() would: everyone takes its turn.
            if not sum(map(advance, turns)) and not sum(map(advance, waiting)):
                return False
        return True


def advance(queue: deque[Steps]) -> bool:
    """Lets the first operation of a stream do a bit; False if it must wait."""
    if not queue:
        return False
    worked = next(queue[0], None)
    if worked is None:
        queue.popleft()
    return worked is not False
