"""Plans of all-reduces by copy engines: sums are right in whatever order streams run, and every wait is needed."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest

from parallel.transports.copy_layout import (
    FLAG_STRIDE,
    MEETINGS,
    READ,
    SUMMED,
    WRITTEN,
    CopyLayout,
    choose_layout,
    part_bytes,
)
from parallel.transports.copy_plan import (
    Begin,
    End,
    Meet,
    Operation,
    ToCard,
    ToHost,
    cut,
    next_lane,
    plan_all_reduce,
)
from parallel.transports.region_layout import ERROR_STRIDE, PAGE_BYTES, UNIT_BYTES
from parallel.units import MIB
from tests.parallel.transports.simulated_copies import Change, Simulation

SEED = int.from_bytes(os.urandom(4), "little")
LAYOUTS = {
    2: CopyLayout(2, piece_bytes=4096, num_lanes=2),
    3: CopyLayout(3, piece_bytes=4096, num_lanes=3),
    4: CopyLayout(4, piece_bytes=4096, num_lanes=2),
}
THREE_LANES = CopyLayout(2, piece_bytes=4096, num_lanes=3)
ONE_LANE = CopyLayout(2, piece_bytes=4096, num_lanes=1)


def sizes(generator: random.Random) -> list[int]:
    """Of a few messages: around a unit and a piece, and of several pieces."""
    choices = (16, 32, 48, 1008, 1024, 1040, 4080, 4096, 4112, 3 * 4096, 20_000, 5 * 4096 + 16)
    return generator.choices(choices, k=6)


def wrong_of(layout: CopyLayout, seed: int, **options: object) -> list[str]:
    return Simulation(layout, seed, **options).run(sizes(random.Random(seed)))  # type: ignore[arg-type]


@pytest.mark.parametrize("one_queue", (False, True))
@pytest.mark.parametrize("layout", [*LAYOUTS.values(), THREE_LANES, ONE_LANE])
def test_sums_are_right_in_any_order_of_streams(layout: CopyLayout, one_queue: bool) -> None:
    """Also where all streams of a card share one queue, which must never stop."""
    for seed in range(SEED, SEED + 15):
        assert wrong_of(layout, seed, one_queue=one_queue) == [], seed


def without(unwanted: Callable[[Operation], bool]) -> Change:
    return lambda operations: [each for each in operations if not unwanted(each)]


def without_meeting(meeting: int) -> Change:
    return without(lambda each: isinstance(each, Meet) and each.meeting == meeting)


MISSING: dict[str, tuple[int, Change]] = {
    "begin": (2, without(lambda each: isinstance(each, Begin))),
    "written": (2, without_meeting(WRITTEN)),
    "read": (2, without_meeting(READ)),
    "end": (2, without(lambda each: isinstance(each, End))),
    "written by four": (4, without_meeting(WRITTEN)),
    "summed": (4, without_meeting(SUMMED)),
    "read by four": (4, without_meeting(READ)),
    "end of four": (4, without(lambda each: isinstance(each, End))),
}


@pytest.mark.parametrize("name", MISSING)
def test_every_wait_is_needed(name: str) -> None:
    world_size, change = MISSING[name]
    assert any(wrong_of(LAYOUTS[world_size], SEED + turn, change=change) for turn in range(100)), SEED


def test_a_rank_that_is_missing_stops_the_others() -> None:
    turn = iter(range(10**6))
    # Ranks are asked in turn: the second never comes.
    silent: Change = lambda operations: [] if next(turn) % 2 else operations  # noqa: E731
    assert "stopped" in wrong_of(LAYOUTS[2], SEED, change=silent)


@pytest.mark.parametrize(("world_size", "share"), [(2, 1.0), (3, 4 / 3), (4, 1.5)])
def test_links_carry_what_they_must(world_size: int, share: float) -> None:
    """Times the message: to the card at most `share`, to the host no more than that."""
    layout, num_bytes = choose_layout(world_size), 32 * MIB
    operations = plan_all_reduce(layout, 0, num_bytes, 0)
    to_card = sum(each.num_bytes for each in operations if isinstance(each, ToCard))
    to_host = sum(each.num_bytes for each in operations if isinstance(each, ToHost))
    assert to_card == pytest.approx(share * num_bytes, rel=1e-3)
    assert num_bytes <= to_host <= to_card * 1.001


@pytest.mark.parametrize("world_size", (2, 3, 4))
def test_nothing_overlaps_in_the_region(world_size: int) -> None:
    layout = choose_layout(world_size)
    ranks, lanes = range(world_size), range(layout.num_lanes)
    starts = [layout.slot(rank, lane) for rank in ranks for lane in lanes]
    assert [*starts[1:], layout.num_bytes] == [start + layout.piece_bytes for start in starts]
    assert all(start % PAGE_BYTES == 0 for start in starts)
    errors = [rank * ERROR_STRIDE for rank in ranks]
    progress = [layout.progress(rank) for rank in ranks]
    flags = [
        layout.flag(lane, meeting, writer, reader)
        for lane in lanes
        for meeting in MEETINGS
        for writer in ranks
        for reader in ranks
    ]
    words = [*errors, *progress, *flags, starts[0]]
    assert all(after - before >= FLAG_STRIDE for before, after in pairwise(words))
    assert [layout.own(rank)[0] for rank in ranks] == starts[:: layout.num_lanes]
    assert layout.num_bytes <= 256 * MIB and layout.staging_bytes <= 18 * MIB


@pytest.mark.parametrize("num_bytes", (16, 48, 4096, 4112, 8192, 8208, 40_000, 12 * MIB))
def test_pieces_are_few_and_alike(num_bytes: int) -> None:
    pieces = cut(num_bytes, 4096)
    assert [start for start, _ in pieces] == [0, *(start + size for start, size in pieces[:-1])]
    assert sum(size for _, size in pieces) == num_bytes
    lengths = [size for _, size in pieces]
    assert all(size % UNIT_BYTES == 0 for size in lengths) and max(lengths) <= 4096
    assert len(pieces) <= -(-num_bytes // 4096) and set(lengths[:-1]) <= {max(lengths)}
    assert next_lane(THREE_LANES, num_bytes, 2) == (2 + len(pieces)) % 3


@pytest.mark.parametrize("num_bytes", (16, 32, 48, 64, 4096, 4112, 4 * MIB))
@pytest.mark.parametrize("world_size", (3, 4))
def test_parts_cover_a_segment_in_whole_units(world_size: int, num_bytes: int) -> None:
    part = part_bytes(num_bytes, world_size)
    assert part % UNIT_BYTES == 0
    assert num_bytes <= world_size * part < num_bytes + world_size * UNIT_BYTES


@pytest.mark.parametrize("wrong", [{"world_size": 1}, {"world_size": 5}, {"piece_bytes": 4000}, {"num_lanes": 0}])
def test_layouts_that_cannot_work_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(AssertionError):
        replace(LAYOUTS[2], **wrong)
