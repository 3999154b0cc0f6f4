"""What cards draw under the loads of a calibration, and how many joules answers so take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from launcher.timing.chunks import PassCost
from launcher.timing.load import Workload
from launcher.timing.passes import StepCost, run_through
from launcher.timing.power_draw import MARGIN_SEC, Load, find_power_draws
from launcher.timing.predict import NO_COPIES, Copies, Times, predict_times
from launcher.timing.published import rates_from_facts
from launcher.timing.rates import PowerDraw
from tests.launcher.timing.test_timing import FACTS, LOAD, WIDE

LOADS = [
    Load("int4", "steps", 0.0, 1.0, rows=1),
    Load("int4", "steps", 1.0, 2.0, rows=32),
    Load("int4", "passes", 2.0, 3.0),
    Load("int4", "waiting", 3.0, 4.0),
]
WATTS = {0: 300.0, 1: 400.0, 2: 600.0, 3: 100.0}


def energy_of_two(start: float, end: float) -> float:
    """Of cards that draw more than a card can where one load may be taken for the next."""
    second = int(start)
    is_inside = start >= second + MARGIN_SEC and end <= second + 1 - MARGIN_SEC
    return 2 * (end - start) * (WATTS[second] if is_inside else 1e6)


def test_a_card_draws_its_part_of_the_energy_in_the_middle_of_each_load() -> None:
    draw = find_power_draws(LOADS, energy_of_two, 2)["int4"]
    assert draw.steps == pytest.approx({1: 300.0, 32: 400.0})
    assert (draw.passes, draw.waiting) == pytest.approx((600.0, 100.0))


@pytest.mark.parametrize("place", range(4))
def test_a_format_of_which_something_is_not_known_is_left_out(place: int) -> None:
    fp8 = [replace(load, format="fp8", start=load.start + 4, end=load.end + 4) for load in LOADS]

    def energy(start: float, end: float) -> float | None:
        return None if int(start) == 4 + place else end - start

    assert list(find_power_draws([*LOADS, *fp8], energy, 1)) == ["int4"]
    short = replace(LOADS[place], end=LOADS[place].start + 1.9 * MARGIN_SEC)
    assert find_power_draws([*LOADS[:place], short, *LOADS[place + 1 :]], energy_of_two, 1) == {}


def test_steps_of_more_rows_draw_more_up_to_what_passes_draw() -> None:
    draw = PowerDraw({1: 300.0, 32: 500.0}, 600.0, 100.0)
    assert [draw.of_steps(rows) for rows in (1, 16.5, 32, 256)] == [300.0, 400.0, 500.0, 600.0]


def test_a_card_computes_passes_and_steps_and_waits_for_the_rest() -> None:
    """Of two prompts, each a pass of 8 ms and 1 ms before it, and steps of 5 and 6 ms of which 2 wait for copies."""
    load = Workload(2, 100, 9, prefill_chunk=100, prefill_chunk_while_decoding=100)
    steps = {1: StepCost(5.0, waits=2.0), 2: StepCost(6.0, waits=2.0)}
    answers = run_through(load, lambda parts: PassCost(3.0, 8.0, 1.0, waits=3.0), steps.__getitem__)
    assert answers.end_ms == 1 + 8 + 5 + 8 + 7 * 6 + 5
    assert (answers.passes_ms, answers.steps_ms) == (2 * 5.0, 3.0 + 7 * 4.0 + 3.0)
    assert answers.waits_ms == 1 + 2 * 3 + 9 * 2


def energy(draw: PowerDraw, copies: Copies = NO_COPIES) -> tuple[float, Times]:
    """Joules of LOAD on two cards, and its times."""
    rates = replace(rates_from_facts(FACTS, 2), power_draws={"int4": draw})
    times = predict_times(WIDE, LOAD, rates, copies)
    assert times.tokens_per_joule is not None
    return LOAD.batch_size * LOAD.output_tokens / times.tokens_per_joule, times


@pytest.mark.parametrize("copies", [NO_COPIES, Copies(pass_ms=500.0)])
def test_two_cards_that_always_draw_as_much_take_that_from_start_to_end(copies: Copies) -> None:
    joules, times = energy(PowerDraw({1: 100.0}, 100.0, 100.0), copies)
    assert joules == pytest.approx(2 * 100.0 * LOAD.batch_size * LOAD.output_tokens / times.tokens_per_sec)


def test_cards_that_wait_for_copies_draw_little() -> None:
    def waiting_share(copies: Copies) -> float:
        return 1 - energy(PowerDraw({1: 1.0}, 1.0, 0.0), copies)[0] / energy(PowerDraw({1: 1.0}, 1.0, 1.0), copies)[0]

    assert waiting_share(NO_COPIES) < 0.02
    # Steps of some 20 ms, passes of 0.5 s and more.
    assert waiting_share(Copies(pass_ms=500.0)) > 0.9


@pytest.mark.parametrize(
    "more", [lambda draw: replace(draw, steps={1: 400.0}), lambda draw: replace(draw, passes=800.0)]
)
def test_steps_and_passes_count_for_as_long_as_they_take(more: Callable[[PowerDraw], PowerDraw]) -> None:
    draw = PowerDraw({1: 300.0}, 600.0, 100.0)
    before, after = energy(draw), energy(more(draw))
    answers_sec = LOAD.batch_size * LOAD.output_tokens / before[1].tokens_per_sec
    added_w = (after[0] - before[0]) / 2 / answers_sec
    prompts_share = LOAD.batch_size * LOAD.prompt_tokens / before[1].prefill_tokens_per_sec / answers_sec
    share = added_w / 200 if more(draw).passes > draw.passes else 1 - added_w / 100
    assert share == pytest.approx(prompts_share, rel=0.05)


def test_nothing_is_said_of_a_format_whose_draw_is_not_known() -> None:
    rates = replace(rates_from_facts(FACTS, 2), power_draws={"fp8": PowerDraw({1: 1.0}, 1.0, 1.0)})
    assert predict_times(WIDE, LOAD, rates).tokens_per_joule is None
