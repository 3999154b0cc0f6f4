"""Claims held against a card: ceilings worked out by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.launcher.plans import LLAMA_70B_AWQ, cards_of, plan
from tools.claims import HOST_GB_PER_SEC, ROOT, judge, read_card, usable_gb

CARD: dict[str, Any] = {"memory_gib": 24.0, "memory_gb_per_sec": 1000, "pcie_generation": 4, "pcie_lanes": 16}


def speed(**fields: Any) -> dict[str, Any]:
    return {"claim": "", "params_b": 40, "bits": 4, "embedding_gb": 0, "cards": 1, "tokens_per_sec": 10, **fields}


def test_what_fits_is_bound_by_the_cards_memory() -> None:
    # 20 GB at 1000 GB/s: 50 a second.
    arithmetic, verdict = judge(speed(), CARD)
    assert "20.0 GB; a step reads 20.0: at most 50 tokens/s" in arithmetic
    assert verdict == "possible, 20% of the ceiling"


def test_of_the_embedding_a_step_reads_nothing() -> None:
    # 28 GB of which 8 are the embedding: those 20 fit one card.
    arithmetic, verdict = judge(speed(params_b=56, embedding_gb=8), CARD)
    assert arithmetic == "56 B x 4 bits = 28.0 GB; a step reads 20.0: at most 50 tokens/s"
    assert verdict == "possible, 20% of the ceiling"


def test_a_ceiling_is_the_floor_of_a_plan() -> None:
    """Both are of the same bytes."""
    kept = json.loads((ROOT / "docs" / "claims.json").read_text(encoding="utf-8"))
    claimed = next(each for each in kept if "100 tokens/s" in each["claim"])
    planned = plan(LLAMA_70B_AWQ, cards_of(2), 2, workload__output_tokens=1)
    assert planned.tpot_floor_ms is not None
    ceiling = float(judge(claimed, read_card())[0].partition("at most ")[2].partition(" ")[0])
    assert ceiling == pytest.approx(1e3 / planned.tpot_floor_ms, rel=0.01)


def test_cards_and_batches_raise_the_ceiling() -> None:
    assert "at most 100 tokens/s" in judge(speed(cards=2), CARD)[0]
    assert "at most 200 tokens/s from 4 answers" in judge(speed(batch=4), CARD)[0]


def test_what_does_not_fit_is_bound_by_the_host() -> None:
    arithmetic, verdict = judge(speed(bits=16), CARD)
    outside = 80 - usable_gb(CARD)
    assert f"{HOST_GB_PER_SEC / outside:.3g} tokens/s" in arithmetic and f"{outside:.1f} of them" in arithmetic
    assert verdict.startswith("does not fit; **impossible** at batch 1")


@pytest.mark.parametrize(("gb", "verdict"), [(20.5, "true"), (10, "**impossible**: 10 GB is not it")])
def test_a_size_is_its_parameters_times_its_bits(gb: float, verdict: str) -> None:
    assert judge({"claim": "", "params_b": 40, "bits": 4, "gb": gb}, CARD) == ("40 B x 4 bits = 20 GB", verdict)
