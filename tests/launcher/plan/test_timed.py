"""Which rates plans predict with: facts that are not known give none, and the plan says which."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from launcher.config import EngineConfig, HardwareConfig, HardwareKind, OffloadConfig, TransportKind
from launcher.hardware.inventory import read_inventory
from launcher.models.shape import ModelShape, quantized_shape
from launcher.plan.timed import WHOLE_SUMS, keep_calibration, plan_timed
from launcher.plan.topology import place_ranks
from launcher.timing.power_draw import Load
from launcher.timing.predict import Times
from launcher.timing.store import load_calibration
from tests.launcher.plans import LLAMA_8B, run_of
from tests.launcher.timing.test_timing import Machine

FACTS = HardwareConfig(
    HardwareKind.facts,
    "a card",
    memory_gib=24,
    memory_gb_per_sec=1008,
    pcie_generation=4,
    pcie_lanes=16,
    bf16_tflops=165,
)


def times_by(hardware: HardwareConfig, num_cards: int = 2, shape: ModelShape = LLAMA_8B, **changes: Any) -> Times | str:
    inventory = read_inventory(hardware, num_cards)
    run = run_of(hardware=hardware, workload__prompt_tokens=512, **changes)
    return plan_timed(run, place_ranks(run, num_cards, inventory), shape, inventory)[1]


def test_cards_of_which_all_is_known_have_times() -> None:
    assert isinstance(times_by(FACTS), Times)


@pytest.mark.parametrize("name", ["memory_gb_per_sec", "bf16_tflops", "pcie_generation", "pcie_lanes"])
def test_fact_that_is_not_known_is_named_where_times_would_be(name: str) -> None:
    assert times_by(replace(FACTS, **{name: 0})) == f"hardware=a card does not say hardware.{name}"


def test_sums_that_facts_do_not_tell_of_have_no_times() -> None:
    """Theirs are through host memory: NCCL takes five times as long for those of a step."""
    said = times_by(FACTS, engine=EngineConfig(transport=TransportKind.nccl))
    assert said == "hardware=a card does not say what sums take through NCCL alone (engine.transport=nccl)"
    alone = times_by(FACTS, 1, engine=EngineConfig(transport=TransportKind.nccl))
    assert isinstance(alone, Times) and alone == times_by(FACTS, 1)


def test_sums_of_fewer_bits_are_said_to_be_counted_whole() -> None:
    whole, rounded = times_by(FACTS), times_by(FACTS, engine=EngineConfig(all_reduce_bits=8))
    assert isinstance(whole, Times) and isinstance(rounded, Times)
    assert rounded == replace(whole, assumptions=(*whole.assumptions, WHOLE_SUMS))
    assert times_by(FACTS, 1, engine=EngineConfig(all_reduce_bits=8)) == times_by(FACTS, 1)


def test_what_cards_drew_while_they_were_calibrated_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    inventory, run = read_inventory(FACTS, 2), run_of(hardware=FACTS)
    kinds = [("steps", 1), ("passes", 0), ("waiting", 0)]
    loads = [Load("int4", kind, second, second + 1.0, rows) for second, (kind, rows) in enumerate(kinds)]
    report = {"calibration": asdict(Machine(0).calibration()), "loads": [asdict(load) for load in loads]}

    def energy_between(start: float, end: float) -> float:
        return 2 * (end - start) * 100.0 * (1 + int(start))

    path = keep_calibration(run, place_ranks(run, 2, inventory), inventory, report, energy_between)
    kept = load_calibration(path)
    assert kept is not None and kept.points == Machine(0).calibration().points
    (draw,) = kept.power_draws.values()
    assert (draw.steps[1], draw.passes, draw.waiting) == pytest.approx((100.0, 200.0, 300.0))


def test_times_say_what_of_the_workload_they_leave_out() -> None:
    whole = times_by(FACTS, workload__num_requests=1)
    more = times_by(FACTS, workload__num_requests=64, workload__arrival_rate=2.0)
    assert isinstance(whole, Times) and isinstance(more, Times)
    left_out = "of 1 request at once, workload.num_requests=64 and workload.arrival_rate=2.0 left out"
    assert more == replace(whole, assumptions=(*whole.assumptions, left_out))


def test_times_say_that_layers_are_copied_which_the_host_may_compute() -> None:
    packed = quantized_shape(LLAMA_8B, "int4")
    copied, shared = (
        times_by(FACTS, 1, packed, offload=OffloadConfig(resident_layers=8, host_layers=num)) for num in (0, 8)
    )
    assert isinstance(copied, Times) and isinstance(shared, Times)
    assert shared.assumptions == (
        *copied.assumptions,
        "every streamed layer is copied, what the host computes left out",
    )
    assert shared.tpot_ms == copied.tpot_ms
