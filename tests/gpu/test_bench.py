"""task=bench on cards: the breakdown from the kernels of a captured graph, and a step no faster than its memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.gpu.cards import needs_two_cards
from tests.launcher.cli import run

pytestmark = pytest.mark.gpu

# Linears of 8 layers of Llama-8B's shape and some: large enough that reading them is most of a step.
FACTS = (
    "model=llama3_1_8b",
    "model.path=nobody/has-this",
    *(f"model.shape.{name}={value}" for name, value in {
        "hidden_size": 4096, "intermediate_size": 14336, "num_layers": 8, "num_heads": 32, "num_kv_heads": 8,
        "head_dim": 128, "vocab_size": 32000, "max_positions": 2048,
    }.items()),
    "model.weights=dummy",
)  # fmt: skip
WORKLOAD = ("task=bench", "workload.prompt_tokens=256", "workload.output_tokens=32", "workload.batch_size=4")


def measured(folder: Path, *args: str) -> dict[str, Any]:
    result = run(*FACTS, *WORKLOAD, *args, folder=folder)
    assert result.returncode == 0, result.stderr
    return result.report


@pytest.mark.parametrize("quantize", ("none", "int4"))
def test_step_of_one_card_is_told_apart(tmp_path: Path, quantize: str) -> None:
    report = measured(tmp_path / "run", "gpus=1", f"model.quantize={quantize}")
    found = report["breakdown"]
    assert found["problem"] is None
    us = {name: part["us"] for name, part in found["parts"].items()}
    for name in ("linears", "attention", "norms", "rotary", "head", "sampling"):
        assert us[name] > 0, (name, found["other_us"])
    # Of packed weights in one with the product before it.
    assert (us["activation"] > 0) == (quantize == "none"), found["other_us"]
    assert us["all_reduce"] == 0
    # The embedding, slots and positions of rows: a dozen small kernels.
    assert us["other"] < 0.2 * found["step_us"], found["other_us"]
    assert us["linears"] > us["attention"] + us["norms"]
    # The profiler costs a graph's kernels little; a breakdown that lost or doubled kernels would be far off.
    assert found["step_us"] == pytest.approx(1e3 * report["decode_step_ms"]["measured"], rel=0.5)
    assert 0.2 < report["bandwidth_share"] < 1.1
    assert 100 < report["bandwidth"]["copy_gb_per_sec"] < 10_000
    assert report["tokens_per_joule"] is None or report["tokens_per_joule"] > 0


def test_requests_over_time_on_one_card(tmp_path: Path) -> None:
    report = measured(tmp_path / "run", "gpus=1", "workload.num_requests=16", "workload.arrival_rate=20")
    assert report["generated_tokens"] == 3 * 16 * 32


@needs_two_cards
def test_two_cards_and_baselines_say_why_not(tmp_path: Path) -> None:
    report = measured(tmp_path / "run", "gpus=2", "bench.baselines=[deepspeed,transformers]")
    assert report["breakdown"]["parts"]["all_reduce"]["us"] > 0
    assert 0 < report["comm_share"] < 1
    assert ["model.weights=dummy" in row["error"] for row in report["baselines"]] == [True, True]
