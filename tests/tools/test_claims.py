"""Claims held against a card: ceilings worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from tools.claims import HOST_GB_PER_SEC, judge, usable_gb

CARD: dict[str, Any] = {"memory_gib": 24.0, "memory_gb_per_sec": 1000, "pcie_generation": 4, "pcie_lanes": 16}


def speed(**fields: Any) -> dict[str, Any]:
    return {"claim": "", "params_b": 40, "bits": 4, "cards": 1, "tokens_per_sec": 10, **fields}


def test_what_fits_is_bound_by_the_cards_memory() -> None:
    # 20 GB at 1000 GB/s: 50 a second.
    arithmetic, verdict = judge(speed(), CARD)
    assert "20.0 GB: at most 50 tokens/s" in arithmetic
    assert verdict == "possible, 20% of the ceiling"


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
