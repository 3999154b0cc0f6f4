"""Plans of all-reduces by copy engines: sums are right in whatever order streams run, and every wait is needed."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from parallel.transports.channel import ERROR_STRIDE, PAGE_BYTES
from parallel.transports.copy_layout import LANES, UNIT_BYTES, CopyLayout, choose_layout, part_bytes
from parallel.transports.copy_plan import (
    ADD,
    CALLER,
    RECEIVE,
    SEND,
    START,
    Await,
    Operation,
    Raise,
    ToCard,
    ToHost,
    Wait,
    plan_all_reduce,
)
from parallel.units import MIB
from tests.parallel.simulated_copies import Simulation

SEED = int.from_bytes(os.urandom(4), "little")
LAYOUTS = {
    2: CopyLayout(2, segment_bytes=4096, piece_bytes=1024, ahead=2),
    3: CopyLayout(3, segment_bytes=4096, piece_bytes=4096, ahead=2),
    4: CopyLayout(4, segment_bytes=4096, piece_bytes=4096, ahead=3),
}

WHOLE_SEGMENTS = CopyLayout(2, segment_bytes=4096, piece_bytes=4096, ahead=2)
ONE_AHEAD = CopyLayout(2, segment_bytes=4096, piece_bytes=1024, ahead=1)


def sizes(generator: random.Random) -> list[int]:
    """Of a few messages: around a unit, a piece and a segment, and of several segments."""
    choices = (16, 32, 48, 1008, 1024, 1040, 4080, 4096, 4112, 3 * 4096, 20_000, 5 * 4096 + 16)
    return generator.choices(choices, k=6)


def wrong_of(layout: CopyLayout, seed: int, **options: object) -> list[str]:
    return Simulation(layout, seed, **options).run(sizes(random.Random(seed)))  # type: ignore[arg-type]


@pytest.mark.parametrize("one_queue", (False, True))
@pytest.mark.parametrize("layout", [*LAYOUTS.values(), WHOLE_SEGMENTS, ONE_AHEAD])
def test_sums_are_right_in_any_order_of_streams(layout: CopyLayout, one_queue: bool) -> None:
    """Also where all streams of a card share one queue, which must never stop."""
    for seed in range(SEED, SEED + 15):
        assert wrong_of(layout, seed, one_queue=one_queue) == [], seed


Change = Callable[[Sequence[Operation]], Sequence[Operation]]


def without(unwanted: Callable[[Operation], bool]) -> Change:
    return lambda operations: [each for each in operations if not unwanted(each)]


def waits(streams: Sequence[str], event: str) -> Change:
    return without(lambda each: isinstance(each, Wait) and each.stream in streams and each.event.startswith(event))


MISSING: dict[str, tuple[int, Change]] = {
    "start": (2, waits(SEND, START)),
    "slots": (2, waits(SEND, "done")),
    "received": (2, waits((ADD,), "received")),
    "end": (2, waits((CALLER,), "done")),
    "flags": (2, without(lambda each: isinstance(each, Await))),
    "slots of three": (3, waits(SEND, "done")),
    "received by four": (4, waits((ADD,), "received")),
    "summed": (4, waits(SEND, "summed")),
    "end of four": (4, waits((CALLER,), "done")),
    "flags of sums": (4, without(lambda each: isinstance(each, Await) and each.stream == RECEIVE[1])),
}


@pytest.mark.parametrize("name", MISSING)
def test_every_wait_is_needed(name: str) -> None:
    world_size, change = MISSING[name]
    assert any(wrong_of(LAYOUTS[world_size], SEED + turn, change=change) for turn in range(100)), SEED


class FewerSlots(CopyLayout):
    """One slot less than the proof asks for."""

    @property
    def num_slots(self) -> int:
        return self.ahead


@pytest.mark.parametrize("world_size", (2, 4))
def test_fewer_slots_are_not_enough(world_size: int) -> None:
    layout = LAYOUTS[world_size]
    fewer = FewerSlots(layout.world_size, layout.segment_bytes, layout.piece_bytes, layout.ahead)
    # Of two ranks about every seventh shows it.
    assert any(wrong_of(fewer, SEED + turn) for turn in range(300)), SEED


def test_a_rank_that_is_missing_stops_the_others() -> None:
    silent = without(lambda each: isinstance(each, Raise))
    assert "stopped" in wrong_of(LAYOUTS[2], SEED, change=silent)


@pytest.mark.parametrize(("world_size", "share"), [(2, 1.0), (3, 4 / 3), (4, 1.5)])
def test_links_carry_what_they_must(world_size: int, share: float) -> None:
    """Times the message: to the card at most `share`, to the host no more than that."""
    layout, num_bytes = choose_layout(world_size), 32 * MIB
    operations = plan_all_reduce(layout, 0, num_bytes, 0).operations
    to_card = sum(each.num_bytes for each in operations if isinstance(each, ToCard))
    to_host = sum(each.num_bytes for each in operations if isinstance(each, ToHost))
    assert to_card == pytest.approx(share * num_bytes, rel=1e-3)
    assert num_bytes <= to_host <= to_card * 1.001


@pytest.mark.parametrize("world_size", (2, 3, 4))
def test_nothing_overlaps_in_the_region(world_size: int) -> None:
    layout = choose_layout(world_size)
    starts = [layout.slot(rank, number) for rank in range(world_size) for number in range(layout.num_slots)]
    assert [*starts[1:], layout.num_bytes] == [start + layout.segment_bytes for start in starts]
    assert all(start % PAGE_BYTES == 0 for start in starts)
    flags = [layout.flag(rank, lane) for rank in range(world_size) for lane in LANES]
    assert len(set(flags)) == len(flags) and flags == sorted(flags)
    assert world_size * ERROR_STRIDE <= PAGE_BYTES <= flags[0] <= flags[-1] + 4 <= starts[0]
    assert [layout.own(rank)[0] for rank in range(world_size)] == starts[:: layout.num_slots]
    assert layout.num_bytes <= 256 * MIB and layout.staging_bytes <= 16 * MIB


@pytest.mark.parametrize("num_bytes", (16, 32, 48, 64, 4096, 4112, 4 * MIB))
@pytest.mark.parametrize("world_size", (3, 4))
def test_parts_cover_a_segment_in_whole_units(world_size: int, num_bytes: int) -> None:
    part = part_bytes(num_bytes, world_size)
    assert part % UNIT_BYTES == 0
    assert num_bytes <= world_size * part < num_bytes + world_size * UNIT_BYTES


@pytest.mark.parametrize("wrong", [{"world_size": 1}, {"world_size": 5}, {"segment_bytes": 4000}, {"piece_bytes": 24}])
def test_layouts_that_cannot_work_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(AssertionError):
        replace(LAYOUTS[2], **wrong)
