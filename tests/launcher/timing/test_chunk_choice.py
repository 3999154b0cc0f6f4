"""The chunk of prompts beside answers: by the machine's rates, where they are known and nobody chose it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from launcher.config import HardwareConfig, HardwareKind
from launcher.config.engine import UNTIMED_CHUNK
from launcher.config.offload import OffloadConfig, OffloadKind
from launcher.hardware.inventory import Inventory, read_inventory
from launcher.models.shape import quantized_shape
from launcher.plan.plan import Plan
from launcher.plan.timed import plan_timed
from launcher.plan.topology import place_ranks
from launcher.report.report import planned
from launcher.timing.chunk_choice import LEAST_SHARE, SIZES, UNNOTICED_MS, choose_chunk, predict_chunk
from launcher.timing.fit import fit_rates
from launcher.timing.published import Facts, rates_from_facts
from launcher.timing.work import OTHER
from tests.launcher.plans import LLAMA_70B, RTX_4090, run_of
from tests.launcher.timing.test_timing import WIDE, Machine

INT4 = quantized_shape(LLAMA_70B, "int4")


def test_a_fast_card_takes_what_is_over_unnoticed() -> None:
    """0.1 ms a token and nothing fixed: 768 take 76.8 ms and a step of 10, 1,024 more than 100."""
    found = choose_chunk(2048, lambda tokens: tokens / 10, 10.0)
    assert (found.tokens, found.wait_ms) == (768, pytest.approx(86.8))


def test_a_slow_card_takes_the_smallest_that_is_worth_its_fixed_costs() -> None:
    """170 ms to dequantise, half a millisecond a token: 1,687 a second in full chunks, 1,148 in 512, 1,338 in 768."""
    found = choose_chunk(2048, lambda tokens: 170 + tokens / 2, 20.0)
    assert (found.tokens, found.wait_ms) == (768, 574.0)


@pytest.mark.parametrize("seed", range(50))
def test_what_is_chosen_is_worth_it_and_none_better_is_left(seed: int) -> None:
    draw = random.Random(seed)
    fixed, token, step = draw.uniform(0, 200), draw.uniform(0.01, 2), draw.uniform(1, 50)
    prefill_chunk = draw.choice((100, 512, 2048, 5000))
    found = choose_chunk(prefill_chunk, lambda tokens: fixed + token * tokens, step)
    sizes = [*(size for size in SIZES if size < prefill_chunk), prefill_chunk]
    waits = {size: fixed + token * size + step for size in sizes}
    full = prefill_chunk / waits[prefill_chunk]
    worth = {size for size in sizes if size / waits[size] >= LEAST_SHARE * full}
    assert found.tokens in worth and found.wait_ms == pytest.approx(waits[found.tokens])
    if found.wait_ms <= UNNOTICED_MS:
        assert all(waits[size] > UNNOTICED_MS for size in worth if size > found.tokens)
    else:
        assert found.tokens == min(worth)


@pytest.mark.parametrize(("queue", "tokens"), [(400.0, 256), (4000.0, 1024)])
def test_passes_are_timed_as_predictions_time_them(queue: float, tokens: int) -> None:
    """By what the card takes, or what the host queues, where that is more; and by what neither side hides."""
    machine = Machine(3)
    machine.queue = queue
    rates = fit_rates(machine.calibration())
    found = predict_chunk(WIDE, rates, prefill_chunk=2048, batch_size=8, context=640)
    assert found.step_ms == pytest.approx(machine.step_ms(WIDE, 8, 640), rel=1e-6)
    assert found.tokens == tokens
    assert found.pass_ms == pytest.approx(machine.chunk_ms(WIDE, tokens), rel=1e-6)
    at_once = predict_chunk(WIDE, rates, prefill_chunk=128, batch_size=8, context=640)
    assert at_once.tokens == 128 and at_once.pass_ms == pytest.approx(machine.chunk_ms(WIDE, 128), rel=1e-6)


def test_weights_of_another_kind_have_no_times() -> None:
    rates = rates_from_facts(Facts("a card", 1000.0, 165.0, 4, 16, None), 2)
    with pytest.raises(ValueError, match="are of weights in bf16, int4, int8, fp8, and these are in another format"):
        predict_chunk(replace(WIDE, format=OTHER), rates, prefill_chunk=2048, batch_size=1, context=100)


def plan_4090s(tflops: float = 165, offload: OffloadKind = OffloadKind.off, **changes: object) -> Plan:
    facts = HardwareConfig(
        HardwareKind.facts,
        RTX_4090,
        memory_gib=23.99,
        memory_gb_per_sec=1008,
        pcie_generation=4,
        pcie_lanes=16,
        bf16_tflops=tflops,
    )
    return plan_by(read_inventory(facts, 2), hardware=facts, offload=OffloadConfig(offload), **changes)


def plan_by(inventory: Inventory, **changes: object) -> Plan:
    run = run_of(**{"workload__prompt_tokens": 512, "engine__max_context": 1024, **changes})
    return plan_timed(run, place_ranks(run, 2, inventory), INT4, inventory)[0]


def test_two_4090s_read_a_70b_in_chunks_that_their_rates_choose() -> None:
    """Less than half a second between two tokens, and not at the rate of the smallest chunks."""
    plan = plan_4090s(workload__batch_size=8)
    assert plan.prefill_chunk_while_decoding in (256, 384, 512, 768)
    assert plan.longest_wait_ms is not None and 100 < plan.longest_wait_ms < 500
    report = planned(plan, None)
    assert report["prefill_chunk_while_decoding"] == plan.prefill_chunk_while_decoding
    assert report["predicted"]["longest_wait_ms"] == plan.longest_wait_ms


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"engine__prefill_chunk_while_decoding": 100}, 100),
        ({"tflops": 0}, UNTIMED_CHUNK),
        ({"tflops": 0, "engine__prefill_chunk": 200}, 200),
        ({"offload": OffloadKind.on, "engine__max_context": 16384, "workload__batch_size": 8}, None),
    ],
)
def test_what_is_asked_for_or_has_no_rates_stays(changes: dict[str, object], expected: int | None) -> None:
    """Where layers are streamed a pass costs the same for few tokens."""
    plan = plan_4090s(**changes)  # type: ignore[arg-type]
    assert (plan.prefill_chunk_while_decoding, plan.longest_wait_ms) == (expected, None)
