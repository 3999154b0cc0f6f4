"""What only cards can show: NCCL, memory limits, and the same answers as on one card. Run with `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.cards import needs_two_cards
from tests.launcher.cli import run

pytestmark = pytest.mark.gpu

FP32 = ("model.dtype=float32", "workload.output_tokens=48")


@pytest.fixture(scope="module")
def one_card_tokens(tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    report = run("gpus=1", *FP32, folder=tmp_path_factory.mktemp("one") / "run").report
    assert report["device"] == "cuda", "these tests need a card that NVML and torch can see"
    tokens: list[int] = report["outputs"][0]["token_ids"]
    return tokens


@needs_two_cards
@pytest.mark.parametrize("peer_access", ["auto", "off"])
@pytest.mark.parametrize("transport", ["auto", "nccl", "host_memory"])
def test_two_cards_answer_like_one(
    transport: str, peer_access: str, one_card_tokens: list[int], tmp_path: Path
) -> None:
    args = ("gpus=2", f"limits.peer_access={peer_access}", f"engine.transport={transport}", *FP32)
    report = run(*args, folder=tmp_path / "run").report
    names = [each["name"] for each in report["transport"].values()]
    assert set(names) <= {"host_memory", "host_memory_dense", "host_memory_two_step", "host_memory_copies", "nccl"}
    if transport == "nccl":
        assert names == ["nccl"]
    if transport == "host_memory":
        assert names[0] == "host_memory"
    assert report["outputs"][0]["token_ids"] == one_card_tokens


def test_cards_answer_like_the_cpu(one_card_tokens: list[int], tmp_path: Path) -> None:
    report = run("gpus=1", "hardware=cpu", *FP32, folder=tmp_path / "run").report
    assert report["device"] == "cpu"
    assert report["outputs"][0]["token_ids"] == one_card_tokens


@pytest.mark.parametrize("gpus", [1, pytest.param(2, marks=needs_two_cards)])
def test_peak_memory_is_near_the_plan(tmp_path: Path, gpus: int) -> None:
    report = run(f"gpus={gpus}", "limits=rtx4090", *FP32, folder=tmp_path / "run").report
    for card in report["cards"]:
        assert card["source"] == "nvml"
        assert card["peak_bytes"] == pytest.approx(card["predicted_bytes"], rel=0.1)


@needs_two_cards
def test_probe_measures_every_size_and_every_sum_is_exact(tmp_path: Path) -> None:
    report = run("task=probe", "gpus=2", "probe.repeats=5", folder=tmp_path / "run").report
    assert "gloo" in report["all_reduce"] and len(report["all_reduce"]) > 1
    for timings in report["all_reduce"].values():
        assert [timing["num_bytes"] for timing in timings] == [1024 * 4**i for i in range(9)]
        assert all(timing["exact"] for timing in timings)


def test_a_context_beyond_the_limit_is_refused_before_loading(tmp_path: Path) -> None:
    result = run("gpus=1", "limits.card_memory_gib=0.5", folder=tmp_path / "run")
    assert result.returncode == 1
    assert "not fit" in result.report["error"]["message"]
