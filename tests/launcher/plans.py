"""Models, cards and runs to plan with, and their plans."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest

from launcher.config import ModelConfig, ModelFacts, OffloadConfig, OffloadKind, RunConfig, TaskConfig, TaskKind
from launcher.hardware.inventory import Card, Inventory, Link
from launcher.models.shape import ModelShape, shape_from_facts
from launcher.plan.plan import Plan, plan_run
from launcher.plan.topology import PlanError, place_ranks
from parallel.units import GIB
from tests.launcher.jobs import RTX_4090

LLAMA_70B = shape_from_facts(
    ModelFacts(
        hidden_size=8192,
        intermediate_size=28672,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128256,
        max_positions=131072,
    )
)
LLAMA_70B_AWQ = replace(LLAMA_70B, quantization="awq", linear_bits=4.15625)
LLAMA_8B = replace(LLAMA_70B, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32)
TINY = replace(LLAMA_8B, hidden_size=64, intermediate_size=256, num_layers=2, num_heads=8, head_dim=8, vocab_size=512)


def cards_of(num_cards: int, nvlink: tuple[tuple[int, int], ...] = (), **changes: Any) -> Inventory:
    """RTX 4090s; the pairs in `nvlink` are linked, which real ones never are."""
    card = Card(0, 0, RTX_4090, "", round(23.99 * GIB), None, 1008.0, 4, 16, 450.0)
    links = tuple(
        Link(a, b, "nvlink" if (a, b) in nvlink else "pcie", "host bridge", 0, None)
        for a, b in combinations(range(num_cards), 2)
    )
    cards = tuple(replace(card, index=i, nvml_index=i, **changes) for i in range(num_cards))
    return Inventory("nvml", cards, links, "580", "13.0", 64 * GIB, 60 * GIB, 16)


NO_TIMES = "nobody measured"
CPU = replace(cards_of(0), source="none")
# Nothing of the model may lie in host memory.
RESIDENT = {"offload": OffloadConfig(OffloadKind.off)}


def run_of(**changes: Any) -> RunConfig:
    """A run of task=plan; `section__field=value` sets one field of a section."""
    run = RunConfig(prompt="x", model=ModelConfig(path="org/name"), task=TaskConfig(TaskKind.plan))
    for name, value in changes.items():
        section, _, field = name.rpartition("__")
        setattr(getattr(run, section) if section else run, field, value)
    return run


def plan(shape: ModelShape, inventory: Inventory, world_size: int = 1, **changes: Any) -> Plan:
    run = run_of(**changes)
    return plan_run(run, place_ranks(run, world_size, inventory), shape, inventory)


def refused(shape: ModelShape, inventory: Inventory, world_size: int = 1, **changes: Any) -> str:
    with pytest.raises(PlanError) as caught:
        plan(shape, inventory, world_size, **changes)
    return str(caught.value)
