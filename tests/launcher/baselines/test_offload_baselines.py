"""accelerate and DeepSpeed's ZeRO-3 beside layers that this engine streams."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launcher.baseline_runs import refusal
from launcher.config import BaselineKind
from tests.launcher.forked import run
from tests.launcher.jobs import make_job

BOTH = [BaselineKind.accelerate, BaselineKind.deepspeed_zero]


@pytest.mark.slow
def test_both_answer_the_requests_of_streamed_layers(tmp_path: Path) -> None:
    args = ("task=bench", "gpus=1", "hardware=cpu", "engine.comm_share_steps=1", "offload.resident_layers=2")
    sizes = ("workload.prompt_tokens=24", "workload.output_tokens=5", "workload.repeats=1", "workload.warm_up=0")
    result = run(*args, *sizes, "bench.baselines=[accelerate,deepspeed_zero]", folder=tmp_path / "run")
    assert result.returncode == 0, result.stderr
    rows = {row["name"]: row for row in result.report["baselines"]}
    assert list(rows) == ["accelerate", "deepspeed_zero"]
    for row in rows.values():
        assert row["error"] is None
        assert row["version"] is not None
        assert row["ttft_ms"] > 0 and row["tpot_ms"]["p50"] > 0
    # Its parameters are empty until a layer's turn has come.
    assert rows["deepspeed_zero"]["weights_bytes"] == 0


@pytest.mark.parametrize("kind", BOTH)
def test_a_model_that_is_all_on_the_card_is_refused(tmp_path: Path, kind: BaselineKind) -> None:
    assert "Set offload.resident_layers" in str(refusal(make_job(tmp_path), kind))


def test_accelerate_gets_the_layers_of_the_plan() -> None:
    from launcher.baselines.accelerate import place_modules

    places = place_modules(12, (1, 10), torch.device("cuda", 0))
    assert {name for name, place in places.items() if place == "cpu"} == {"model.layers.1", "model.layers.10"}
    assert places["model.layers.0"] == places["lm_head"] == "cuda:0"
    assert len(places) == 12 + 4
