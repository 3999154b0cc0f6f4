"""Which rates plans predict with: facts that are not known give none, and the plan says which."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from launcher.config import HardwareConfig, HardwareKind
from launcher.hardware.inventory import read_inventory
from launcher.plan.timed import plan_timed
from launcher.plan.topology import place_ranks
from launcher.timing.predict import Times
from tests.launcher.plans import LLAMA_8B, run_of

FACTS = HardwareConfig(
    HardwareKind.facts,
    "a card",
    memory_gib=24,
    memory_gb_per_sec=1008,
    pcie_generation=4,
    pcie_lanes=16,
    bf16_tflops=165,
)


def times_by(hardware: HardwareConfig, **changes: Any) -> Times | str:
    inventory = read_inventory(hardware, 2)
    run = run_of(hardware=hardware, workload__prompt_tokens=512, **changes)
    return plan_timed(run, place_ranks(run, 2, inventory), LLAMA_8B, inventory)[1]


def test_cards_of_which_all_is_known_have_times() -> None:
    assert isinstance(times_by(FACTS), Times)


@pytest.mark.parametrize("name", ["memory_gb_per_sec", "bf16_tflops", "pcie_generation", "pcie_lanes"])
def test_fact_that_is_not_known_is_named_where_times_would_be(name: str) -> None:
    assert times_by(replace(FACTS, **{name: 0})) == f"hardware=a card does not say hardware.{name}"


def test_times_say_what_of_the_workload_they_leave_out() -> None:
    whole = times_by(FACTS, workload__num_requests=1)
    more = times_by(FACTS, workload__num_requests=64, workload__arrival_rate=2.0)
    assert isinstance(whole, Times) and isinstance(more, Times)
    left_out = "of 1 request at once, workload.num_requests=64 and workload.arrival_rate=2.0 left out"
    assert more == replace(whole, assumptions=(*whole.assumptions, left_out))
