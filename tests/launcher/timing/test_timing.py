"""Predicted times: lines through known machines give those machines back, and facts give sane figures."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from launcher.timing.chunks import PassCost, chunk_cost
from launcher.timing.fit import Calibration, ChunkTimes, Point, StepTimes, fit_rates
from launcher.timing.load import Work, Workload
from launcher.timing.passes import Answers, StepCost, median_of, run_through
from launcher.timing.power import LAG_MS, PowerLimit
from launcher.timing.predict import Copies, Times, predict_times
from launcher.timing.published import Facts, rates_from_facts
from launcher.timing.rates import MB, Line, fit_line, interpolate

WIDE = Work("int4", 80, 220_000_000, 855_000_000, 1_050_000_000, 2048, 32, 16384)
NARROW = replace(
    WIDE, layer_bytes=58_000_000, layer_plain_bytes=218_000_000, head_bytes=525_000_000, message_bytes=8192
)
LOAD = Workload(8, 512, 256, prefill_chunk=2048, prefill_chunk_while_decoding=2048)
ROWS, CHUNKS = (1, 8, 32), (128, 512, 2048)
SHORT, LONG, PART = 512, 4096, 128
FACTS = Facts("RTX 4090", 1008.0, 165.0, 4, 16, 450.0)


class Machine:
    """Times as some card might have them: every operation a line over its bytes."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed).uniform
        self.start, self.per_mb, self.kv = draw(5, 30), draw(0.25, 1.2), draw(0.3, 2)
        self.rest, self.rest_mb = draw(20, 90), draw(0.2, 1.1)
        self.call, self.call_mb = draw(3, 20), draw(20, 100)
        self.token = draw(0.0005, 0.005)
        # The host queues a layer, a prompt's part of it, and the rest; of a pass, what neither side hides.
        self.queue, self.queue_part, self.queue_rest = draw(1, 5), draw(0.1, 0.5), draw(10, 50)
        self.lead, self.part, self.pair = draw(100, 900), draw(0.5, 5), draw(2, 9)

    def step_ms(self, work: Work, rows: int, context: int, *, talks: bool = True) -> float:
        kv = self.kv * rows * context * work.kv_bytes_per_token / MB
        calls = 2 * (self.call + self.call_mb * rows * work.message_bytes / MB) if talks else 0.0
        layer = self.start + self.per_mb * (1 + rows / 32) * work.layer_bytes / MB + kv + calls
        return (work.num_layers * layer + self.rest + self.rest_mb * work.head_bytes / MB) / 1e3

    def card_ms(self, work: Work, parts: list[tuple[int, int]]) -> float:
        pairs = sum(past * num + num * num / 2 for past, num in parts)
        layer = self.start + self.token * sum(num for _, num in parts) * work.layer_plain_bytes / MB
        layer += self.part * (len(parts) - 1) + self.pair * pairs * work.num_heads / 1e6
        return (work.num_layers * layer + self.rest + self.rest_mb * work.head_bytes / MB) / 1e3

    def queued_ms(self, work: Work, parts: list[tuple[int, int]]) -> float:
        return (work.num_layers * (self.queue + self.queue_part * (len(parts) - 1)) + self.queue_rest) / 1e3

    def chunk_times(self, work: Work, parts: list[tuple[int, int]]) -> ChunkTimes:
        card, queued = self.card_ms(work, parts), self.queued_ms(work, parts)
        return ChunkTimes(max(card, queued) + self.lead / 1e3, queued, card)

    def chunk_ms(self, work: Work, tokens: int, past: int = 0, num_parts: int = 1) -> float:
        return self.chunk_times(work, [(past, tokens // num_parts)] * num_parts).whole

    def calibration(self, world_size: int = 2) -> Calibration:
        points = [
            self.point(name, replace(work, num_layers=depth))
            for name, work in (("wide", WIDE), ("narrow", NARROW))
            for depth in (2, 6)
        ]
        return Calibration("a card", world_size, {}, SHORT, LONG, PART, tuple(points))

    def point(self, size: str, work: Work) -> Point:
        def step(rows: int) -> StepTimes:
            elided = self.step_ms(work, rows, SHORT, talks=False)
            return StepTimes(self.step_ms(work, rows, SHORT), self.step_ms(work, rows, LONG), elided)

        chunks = {tokens: self.chunk_times(work, [(0, tokens)]) for tokens in CHUNKS}
        past = {tokens: self.chunk_times(work, [(tokens, tokens)]) for tokens in (512, 2048)}
        parts = {tokens: self.chunk_times(work, [(0, PART)] * (tokens // PART)) for tokens in (512, 2048)}
        return Point(size, work, {rows: step(rows) for rows in ROWS}, chunks, past, parts)


@pytest.fixture(params=range(3))
def machine(request: pytest.FixtureRequest) -> Machine:
    return Machine(request.param)


def predict(machine: Machine, load: Workload = LOAD, work: Work = WIDE) -> Times:
    return predict_times(work, load, fit_rates(machine.calibration()))


def test_a_calibrated_machine_is_predicted_at_the_rows_that_were_timed(machine: Machine) -> None:
    for rows in ROWS:
        times = predict(machine, replace(LOAD, batch_size=rows))
        assert times.tpot_ms == pytest.approx(machine.step_ms(WIDE, rows, 512 + 128), rel=1e-6)
        assert sum(times.parts_ms.values()) == pytest.approx(times.tpot_ms)


def test_steps_of_more_rows_go_on_up_to_a_pass_of_as_many_tokens(machine: Machine) -> None:
    load = replace(LOAD, batch_size=64)
    machine.token = 1.0
    goes_on = predict_times(WIDE, load, fit_rates(machine.calibration(1))).parts_ms
    assert sum(goes_on.values()) == pytest.approx(machine.step_ms(WIDE, 64, 640, talks=False), rel=1e-6)
    # A pass of 128 tokens that takes as long as a step of 48 rows would.
    machine.token = machine.per_mb * (1 + 48 / 32) * WIDE.layer_bytes / (128 * WIDE.layer_plain_bytes)
    held = predict_times(WIDE, load, fit_rates(machine.calibration(1))).parts_ms
    rows = 32 + (64 - 32) / (128 - 32) * (48 - 32)
    assert sum(held.values()) - held["kv"] == pytest.approx(machine.step_ms(WIDE, rows, 0, talks=False), rel=1e-6)


def test_more_rows_read_keys_and_values_as_fast_as_the_most_that_were_timed(machine: Machine) -> None:
    calibration = machine.calibration(1)
    for point in calibration.points:
        timed = point.steps[max(ROWS)]
        point.steps[max(ROWS)] = replace(timed, long=1.2 * timed.long)  # type: ignore[index]
    at_32, at_64 = (
        predict_times(WIDE, replace(LOAD, batch_size=rows), fit_rates(calibration)).parts_ms["kv"] for rows in (32, 64)
    )
    assert at_64 == pytest.approx(2 * at_32)


def test_models_between_and_beyond_the_sizes_are_predicted_too(machine: Machine) -> None:
    for scale in (0.5, 1.7):
        work = replace(WIDE, layer_bytes=round(WIDE.layer_bytes * scale), num_layers=48)
        assert predict(machine, work=work).tpot_ms == pytest.approx(machine.step_ms(work, 8, 640), rel=1e-6)


def test_the_share_of_communication_is_that_of_the_steps_with_and_without(machine: Machine) -> None:
    talking, silent = machine.step_ms(WIDE, 8, 640), machine.step_ms(WIDE, 8, 640, talks=False)
    assert predict(machine).comm_share == pytest.approx(1 - silent / talking, rel=1e-6)


def test_one_rank_talks_to_nobody(machine: Machine) -> None:
    times = predict_times(WIDE, LOAD, fit_rates(machine.calibration(world_size=1)))
    assert times.comm_share == 0.0


def half_step_ms(machine: Machine, num_running: int) -> float:
    """Of so many answers half way through: rows as they are captured, keys and values as there are."""
    num_rows = min(rows for rows in ROWS if rows >= num_running)
    spare = machine.step_ms(WIDE, num_rows, 0)
    return spare + machine.step_ms(WIDE, num_running, 640) - machine.step_ms(WIDE, num_running, 0)


def test_prompts_of_a_chunk_end_together(machine: Machine) -> None:
    # Eight prompts of 512 fill two chunks of 2048, between which the first four take a step, of eight rows as captured.
    # What hides nothing at the start is hidden later: the card is busy while the host queues the second.
    first, step = machine.chunk_ms(WIDE, 2048, num_parts=4), half_step_ms(machine, 4)
    chunk = machine.card_ms(WIDE, [(0, 512)] * 4)
    times = predict(machine)
    assert times.ttft_ms == pytest.approx((first + (first + step + chunk)) / 2, rel=1e-6)
    assert times.prefill_tokens_per_sec == pytest.approx(8 * 512 / (first + chunk) * 1e3, rel=1e-6)


def test_chunks_are_shorter_once_answers_are_under_way(machine: Machine) -> None:
    """The first chunk ends four prompts; each of the others one of the last four, after a step."""
    first, chunk = machine.chunk_ms(WIDE, 2048, num_parts=4), machine.card_ms(WIDE, [(0, 512)])
    load = replace(LOAD, prefill_chunk_while_decoding=512)
    times = predict(machine, load)
    assert times.ttft_ms == pytest.approx((first + (first + half_step_ms(machine, 4) + chunk)) / 2, rel=1e-6)
    assert times.prefill_tokens_per_sec == predict(machine).prefill_tokens_per_sec
    # Each chunk brings one more answer into the steps; at the end they leave as they came.
    steps = {num: half_step_ms(machine, num) for num in range(1, 9)}
    last = first + 4 * chunk + sum(steps[num] for num in (4, 5, 6, 7)) + 251 * steps[8]
    last += sum(steps[num] for num in (4, 3, 2, 1))
    assert times.tokens_per_sec == pytest.approx(8 * 256 / last * 1e3, rel=1e-6)
    assert times.itl_ms == pytest.approx(steps[8], rel=1e-6) == times.tpot_ms
    both = machine.card_ms(WIDE, [(0, 512)] * 4)
    assert predict(machine, replace(load, output_tokens=1)).ttft_ms == pytest.approx(first + both / 2, rel=1e-6)


def test_a_long_prompt_pays_for_attending_to_its_past(machine: Machine) -> None:
    load = replace(LOAD, batch_size=1, prompt_tokens=4096, output_tokens=2)
    whole = machine.chunk_ms(WIDE, 2048) + machine.card_ms(WIDE, [(2048, 2048)])
    assert predict(machine, load).ttft_ms == pytest.approx(whole, rel=1e-6)


def test_a_slow_host_holds_up_passes_of_few_tokens_and_of_many_prompts(machine: Machine) -> None:
    machine.queue, machine.queue_part = 1.1 * machine.card_ms(WIDE, [(0, 128)]) / 80 * 1e3, 40.0
    for load in (replace(LOAD, batch_size=1, prompt_tokens=128), replace(LOAD, batch_size=16, prompt_tokens=128)):
        queued = machine.queued_ms(WIDE, [(0, 128)] * load.batch_size) + machine.lead / 1e3
        card = machine.card_ms(WIDE, [(0, 128)] * load.batch_size) + machine.lead / 1e3
        assert predict(machine, load).ttft_ms == pytest.approx(max(queued, card), rel=1e-6)
    assert machine.queued_ms(WIDE, [(0, 128)]) > machine.card_ms(WIDE, [(0, 128)])


def test_the_largest_part_is_the_limit() -> None:
    machine = Machine(0)
    machine.call = 1e4
    assert "communication" in predict(machine).limit
    machine.call, machine.kv = 0.0, 1e3
    assert "keys and values" in predict(machine).limit


def test_streamed_layers_hold_up_what_computes_faster(machine: Machine) -> None:
    rates = fit_rates(machine.calibration())
    free = predict_times(WIDE, LOAD, rates)
    hidden, waiting = (predict_times(WIDE, LOAD, rates, Copies(factor * free.tpot_ms)) for factor in (0.5, 3.0))
    assert hidden.tpot_ms == pytest.approx(free.tpot_ms)
    assert waiting.tpot_ms == pytest.approx(3 * free.tpot_ms)
    assert waiting.parts_ms["copies"] == pytest.approx(2 * free.tpot_ms)
    assert "host" in waiting.limit
    # A chunk of prompts streams the layers once.
    chunk_ms = machine.chunk_ms(WIDE, 2048, num_parts=4)
    prefill = predict_times(WIDE, replace(LOAD, batch_size=4), rates, Copies(2 * chunk_ms))
    assert prefill.ttft_ms == pytest.approx(2 * chunk_ms + machine.lead / 1e3, rel=1e-6)


def test_a_format_that_was_not_timed_is_refused(machine: Machine) -> None:
    with pytest.raises(ValueError, match=r"are of weights in int4, and these are in fp8"):
        predict(machine, work=replace(WIDE, format="fp8"))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_published_facts_say_what_they_assume(world_size: int) -> None:
    times = predict_times(WIDE, LOAD, rates_from_facts(FACTS, world_size))
    assert "RTX 4090" in times.source and any("TFLOP/s" in each for each in times.assumptions)
    assert (times.comm_share > 0) == (world_size > 1)


H200 = Facts("H200", 4800.0, 989.0, 5, 16, 700.0, 9.0)
# Seconds of 500,000 weights, a megabyte at 16 bits, by rows: two operations a weight at 70 % of the tensor cores' rate,
# or with the weight as it is packed at 62 %, by warp groups at 70 % too; to dequantise, 1.27 MB at 88 %.
PLAIN = {"4090": lambda rows: rows * 1e6 / (165e12 * 0.7), "H200": lambda rows: rows * 1e6 / (989e12 * 0.7)}
PACKED = {"4090": lambda rows: rows * 1e6 / (165e12 * 0.7 * 8 / 9), "H200": PLAIN["H200"]}
DEQUANTIZE = {"4090": 1.27e6 / (1008e9 * 0.88), "H200": 1.27e6 / (4800e9 * 0.88)}


@pytest.mark.parametrize(("card", "facts", "limit"), [("4090", FACTS, 1024), ("H200", H200, 2048)])
def test_prompts_go_by_the_faster_of_both_ways(card: str, facts: Facts, limit: int) -> None:
    rates = rates_from_facts(facts, 1)
    for rows in (256, 512, 1024, 2048):
        plain, packed = PLAIN[card](rows), PACKED[card](rows)
        is_packed = rows <= 256 or packed < plain + DEQUANTIZE[card]
        assert is_packed == (rows <= limit)
        for name in ("int4", "int8", "fp8"):
            found = rates.prefill[name][rows].layer.us_per_mb
            assert found == pytest.approx(1e6 * (packed if is_packed else plain + DEQUANTIZE[card]))
        assert rates.prefill["bf16"][rows].layer.us_per_mb == pytest.approx(1e6 * plain)
    assert any(f"up to {limit} tokens by 4-bit weights as they are packed" in each for each in rates.assumptions)


def test_few_tokens_take_as_long_as_reading_their_packed_weights() -> None:
    """Of a card whose tensor cores are much faster than its memory."""
    rates = rates_from_facts(slower(bf16_tflops=1e6, memory_gb_per_sec=1.0), 1)
    # 4.25 and 8.25 bits of 16 of a megabyte.
    for name, share in (("int4", 4.25 / 16), ("fp8", 8.25 / 16)):
        assert rates.prefill[name][256].layer.us_per_mb == pytest.approx(1e6 * share * 1e6 / (1e9 * 0.88))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8, 16, 24, 32, 48])
def test_fewer_bits_take_no_longer_to_decode(rows: int) -> None:
    """Of one layer, in 4, 8 and 16 bits."""
    rates, load = rates_from_facts(FACTS, 2), replace(LOAD, batch_size=rows)
    sizes = {"int4": 4.125, "int8": 8.004, "bf16": 16.0}
    works = [replace(WIDE, format=name, layer_bytes=int(bits * 53_000_000)) for name, bits in sizes.items()]
    times = [predict_times(work, load, rates).tpot_ms for work in works]
    assert times == sorted(times)


def test_more_ranks_read_more_from_one_another() -> None:
    """In one hop a short message from each other rank; a long one in two, a part of it each time. 25.2 GB/s."""
    two, three, four = (rates_from_facts(FACTS, num) for num in (2, 3, 4))
    mb = 1e6 / (1.969e9 * 16 * 0.8) * 1e6
    short, long = 16384, 2**19
    assert two.all_reduce_us[long] == pytest.approx(4.5 + 1.45 * long / 1e6 * mb)
    assert three.all_reduce_us[short] == pytest.approx(4.5 + 1.45 * 2 * short / 1e6 * mb)
    assert four.all_reduce_us[short] == pytest.approx(4.5 + 1.45 * 3 * short / 1e6 * mb)
    assert four.all_reduce_us[long] == pytest.approx(9.0 + 1.45 * 1.5 * long / 1e6 * mb)
    assert [each.message_us_per_mb / mb for each in (two, three, four)] == pytest.approx([1, 4 / 3, 3 / 2])
    alone = rates_from_facts(FACTS, 1)
    assert (alone.all_reduce_us, alone.message_us_per_mb) == ({}, 0)


def slower(**changes: float) -> Facts:
    return replace(FACTS, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("facts", "of"),
    [
        (slower(memory_gb_per_sec=500.0), lambda times: times.tpot_ms),
        (slower(bf16_tflops=80.0), lambda times: times.ttft_ms),
        (slower(pcie_lanes=4), lambda times: times.comm_share),
    ],
)
def test_a_slower_part_makes_what_it_holds_slower(facts: Facts, of: Callable[[Times], float]) -> None:
    assert of(predict_times(WIDE, LOAD, rates_from_facts(facts, 2))) > of(
        predict_times(WIDE, LOAD, rates_from_facts(FACTS, 2))
    )


def test_lines_neither_start_nor_fall_below_zero() -> None:
    assert fit_line([(1e6, 10.0), (3e6, 20.0)]) == Line(5.0, 5.0)
    assert fit_line([(1e6, 10.0), (3e6, 90.0)]) == Line(0.0, 30.0)
    assert fit_line([(1e6, 10.0), (3e6, 8.0)]) == Line(10.0, 0.0)


def test_interpolation_goes_on_beyond_the_largest_and_stops_below_the_smallest() -> None:
    table = {2: 10.0, 4: 20.0, 8: 60.0}
    assert [interpolate(table, at, float) for at in (1, 2, 3, 6, 12)] == [10.0, 10.0, 15.0, 40.0, 100.0]
    with pytest.raises(ValueError, match="nothing"):
        interpolate({}, 1, float)


def test_a_step_goes_on_while_the_host_queues_the_next_pass() -> None:
    """Of two prompts, each a pass: the host queues the second from when it sees the first one's token."""
    load = Workload(2, 100, 9, prefill_chunk=100, prefill_chunk_while_decoding=100)
    steps = {1: 5.0, 2: 6.0}

    def times(queue: float, card: float) -> Answers:
        return run_through(load, lambda parts: PassCost(queue, card, 1.0), lambda num: StepCost(steps[num]))

    slow_host, slow_card = times(20.0, 8.0), times(3.0, 8.0)
    # 20 + 1; then 20 + 1 more, in which the step of 5 is over.
    assert slow_host.first_ms == [21.0, 42.0]
    # The step was over before, but is seen once the second pass is queued.
    assert slow_host.gaps[:3] == [(20.0, 1), (6.0, 1), (7.0, 1)]
    assert slow_card.first_ms == [9.0, 9.0 + 5.0 + 8.0]
    # Seven steps together, each answer one by itself.
    # The first answer's third token waited for the second prompt.
    assert slow_card.gaps == [(5.0, 1), (6.0, 1), (14.0, 1), (6.0, 12), (5.0, 1)]
    assert slow_card.end_ms == 22.0 + 7 * 6.0 + 5.0
    assert median_of(slow_card.gaps) == 6.0 and median_of([]) is None


def test_what_is_no_single_prompt_from_its_start_costs_what_was_timed_of_it(machine: Machine) -> None:
    """Passes of up to 512 tokens as if captured where all prompts are whole: there further ones cost nothing."""
    plain_card, plain_queue = machine.card_ms, machine.queued_ms

    def more_us(parts: list[tuple[int, int]]) -> float:
        is_captured = sum(num for _, num in parts) <= 512 and all(past == 0 for past, _ in parts)
        return 0.0 if is_captured else 30.0 * len(parts)

    def more(plain: Callable[..., float]) -> Callable[..., float]:
        return lambda work, parts: plain(work, parts) + work.num_layers * more_us(parts) / 1e3

    machine.part = machine.queue_part = 0.0
    machine.card_ms, machine.queued_ms = more(plain_card), more(plain_queue)  # type: ignore[method-assign]
    rates = fit_rates(machine.calibration())
    for parts in ([(0, 128)] * 4, [(0, 128)] * 16, [(512, 512)], [(0, 512)], [(900, 256), (0, 256)]):
        found = chunk_cost(WIDE, parts, rates)
        assert found.card == pytest.approx(machine.card_ms(WIDE, parts), rel=1e-6)
        assert found.queue == pytest.approx(machine.queued_ms(WIDE, parts), rel=1e-6)


def slowed(calibration: Calibration, slowdown: float) -> Calibration:
    """The same machine, whose largest engine's largest chunks take so many times as long in the long run."""
    points = list(calibration.points)
    place = max(range(len(points)), key=lambda place: points[place].chunks[2048].card)
    points[place] = replace(points[place], sustained_ms=slowdown * points[place].chunks[2048].card)
    return replace(calibration, points=tuple(points))


def test_passes_are_slower_once_power_holds_the_cards(machine: Machine) -> None:
    load = replace(LOAD, batch_size=64, output_tokens=1)
    found, held = (
        predict_times(WIDE, load, fit_rates(slowed(machine.calibration(), slowdown))) for slowdown in (0.9, 1.25)
    )
    # A card is never faster in the long run; here it is the one that is waited for.
    assert found == predict_times(WIDE, load, fit_rates(machine.calibration()))
    passes_ms = 64 * 512 / found.prefill_tokens_per_sec * 1e3
    assert machine.card_ms(WIDE, [(0, 512)] * 4) > machine.queued_ms(WIDE, [(0, 512)] * 4)
    assert 64 * 512 / held.prefill_tokens_per_sec * 1e3 == pytest.approx(1.25 * passes_ms - 0.25 * LAG_MS, rel=0.01)
    assert held.tpot_ms == found.tpot_ms


def test_a_card_is_held_after_a_while_whatever_the_passes_are() -> None:
    power = PowerLimit(slowdown=2.0)
    first = 0.6 * LAG_MS
    assert [power.held(card_ms) for card_ms in (first, first, 10.0)] == pytest.approx([first, 0.8 * LAG_MS, 20.0])
    assert PowerLimit(2.0).held(LAG_MS + 5.0) == LAG_MS + 10.0
