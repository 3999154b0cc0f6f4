"""task=bench through the command line, on the demo model and the CPU."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from launcher.baseline_runs import refusal, run_baselines
from launcher.config import (
    BaselineKind,
    BenchConfig,
    ConfigError,
    HardwareConfig,
    HardwareKind,
    QuantizeKind,
    TaskConfig,
    TaskKind,
    WorkloadConfig,
)
from launcher.failures import Failure, RunFailed
from launcher.hardware.inventory import read_inventory
from launcher.job import Job
from launcher.processes.start import SIGNAL_EXIT_CODE, StartRanks
from launcher.rank.context import RankContext
from launcher.report.bench_text import predicted_row
from launcher.report.report import predicted_times
from launcher.run import check_baselines
from launcher.tasks import bench as bench_module
from launcher.tasks.bench import Bench
from launcher.timing.predict import Times
from parallel.engine.arrivals import alone
from parallel.engine.engine import Engine
from parallel.engine.generate import Prompt, Result
from tests.launcher.cli import StartProcess, started, torchrun
from tests.launcher.forked import ForkedProcess, run
from tests.launcher.jobs import make_job, make_run

SMALL = (
    *("task=bench", "hardware=cpu", "engine.comm_share_steps=1"),
    *("workload.prompt_tokens=24", "workload.output_tokens=5", "workload.batch_size=2", "workload.repeats=2"),
)
ALL = "bench.baselines=[deepspeed,transformers,vllm]"


@pytest.mark.slow
def test_two_ranks_and_baselines_are_measured_on_the_same_requests(tmp_path: Path) -> None:
    result = run("gpus=2", *SMALL, ALL, "workload.num_requests=3", folder=tmp_path / "run")
    assert result.returncode == 0, result.stderr
    report = result.report
    assert (report["task"], report["world_size"], report["max_context"]) == ("bench", 2, 1024)
    assert report["workload"]["prompt_tokens"] == 24
    # Two runs of three answers of full length.
    assert report["generated_tokens"] == 2 * 3 * 5
    # One step of each kind, of which a busy machine may hold up either.
    step_ms = report["decode_step_ms"]
    assert report["comm_share"] == max(0.0, 1 - step_ms["without_all_reduce"] / step_ms["measured"]) < 1
    assert (report["bandwidth_share"], report["bandwidth"]["copy_gb_per_sec"]) == (None, None)
    # All weights but the embedding, 1 MiB a rank; 26 tokens of two sequences: in 5 layers 2 KV heads of 64 a rank.
    weights = report["cards"][0]["memory"]["weights_bytes"] - 2**20
    assert report["bandwidth"]["step_bytes"] == {"weights": weights, "kv": 2 * 26 * 5 * 2 * 128 * 2}
    prefill = report["prefill_breakdown"]
    assert (prefill["tokens"], prefill["problem"]) == (2 * 24, None)
    assert all(sec > 0 for sec in prefill["pass_ms"].values())
    assert 0 < prefill["parts"]["all_reduce_alone"]["us"] < 1.001 * prefill["parts"]["all_reduce"]["us"]
    parts = report["breakdown"]["parts"]
    assert all(parts[name]["us"] > 0 for name in parts if name != "between")
    rows = {row["name"]: row for row in report["baselines"]}
    assert list(rows) == ["deepspeed", "transformers", "vllm"]
    assert "not installed" in rows["vllm"]["error"]
    whole = sum(card["memory"]["weights_bytes"] for card in report["cards"])
    for row in (report, rows["deepspeed"], rows["transformers"]):
        assert row["ttft_ms"] > 0 and row["tpot_ms"]["p99"] >= row["tpot_ms"]["p50"] > 0
        for name in ("tokens_per_sec", "prefill_tokens_per_sec"):
            assert row["spread"][name]["min"] <= row[name] <= row["spread"][name]["max"]
    for name in ("deepspeed", "transformers"):
        # Sharded: a rank holds about half, in DeepSpeed the whole embedding besides.
        assert rows[name]["weights_bytes"] < 0.6 * whole
        assert rows[name]["peak_bytes"] > 2**26
        assert f"│ {name}" in result.stderr
    assert "vllm: not installed" in result.stderr
    assert "tokens/s" in result.stderr and "all-reduce" in result.stderr


def test_one_rank_answers_requests_that_come_over_time(tmp_path: Path) -> None:
    rate = ("workload.num_requests=4", "workload.arrival_rate=50", "workload.warm_up=0", "sampling.temperature=1")
    result = run(*SMALL, *rate, folder=tmp_path / "run")
    assert result.returncode == 0, result.stderr
    report = result.report
    assert report["generated_tokens"] == 2 * 4 * 5
    assert (report["comm_share"], report["baselines"]) == (0, [])
    assert report["decode_step_ms"]["measured"] > 0
    assert report["breakdown"]["parts"]["all_reduce"]["us"] == 0
    prefill = report["prefill_breakdown"]
    assert (prefill["pass_ms"]["without_all_reduce"], prefill["parts"]["all_reduce"]["us"]) == (None, 0)
    assert prefill["parts"]["products"]["us"] > 0
    assert "50 requests/s" in result.stderr


@pytest.mark.parametrize("launcher", [ForkedProcess, torchrun(2)], ids=["python", "torchrun of two"])
def test_bench_that_is_ended_reports_the_repeats_that_it_had(
    tmp_path: Path, launcher: Sequence[str] | StartProcess
) -> None:
    endless = ("gpus=2", *SMALL, "workload.repeats=100000", "workload.warm_up=0")
    with started(*endless, folder=tmp_path / "run", launcher=launcher) as running:
        running.wait_for("finished.json")
        running.process.send_signal(signal.SIGTERM)
        result = running.finish()
    report = result.report
    assert result.returncode != 0 and report["error"]["type"] == "Interrupted"
    assert (report["ttft_ms"], report["tokens_per_sec"]) == (None, None)
    measured = report["incomplete"]
    assert 1 <= measured["repeats"] < measured["wanted_repeats"] == 100000
    assert measured["ttft_ms"] > 0 and measured["tpot_ms"]["p99"] >= measured["tpot_ms"]["p50"] > 0
    assert f"incomplete, {measured['repeats']} of 100000 repeats: time to first token " in result.stderr


def test_predicted_tokens_wait_for_prompts_as_measured_ones_do() -> None:
    """A step takes 3.6 ms; most tokens of few after long prompts wait for another's prompt."""
    times = Times("a test", (), 3.6, {}, 0.0, "", 100.0, 726.0, 1e4, None, itl_ms=21.0)
    report = {"predicted": {"cards": [{"predicted_bytes": 5}]} | predicted_times(times)}
    (row,) = predicted_row(report)
    assert row["tpot_ms"] == {"p50": 21.0, "p99": None} and report["predicted"]["tpot_ms"] == 3.6


def test_ranks_that_torchrun_started_leave_no_cards_to_baselines() -> None:
    wanted = make_run(task=TaskConfig(TaskKind.bench), bench=BenchConfig([BaselineKind.transformers]))
    with pytest.raises(ConfigError, match="Use `torchrun -m launcher gpus=2`"):
        check_baselines(wanted, 2)
    check_baselines(wanted, 1)
    check_baselines(make_run(), 2)


def failing_start(exit_code: int) -> StartRanks:
    def start(job: Job, job_file: Path) -> None:
        assert job_file.parent == Path(job.run_dir)
        raise RunFailed(Failure("OutOfMemoryError", "no room"), exit_code)

    return start


def test_a_baseline_that_fails_has_its_reason_in_its_row(tmp_path: Path) -> None:
    kinds = [BaselineKind.deepspeed, BaselineKind.transformers, BaselineKind.deepspeed]
    job = make_job(tmp_path, run=make_run(task=TaskConfig(TaskKind.bench), bench=BenchConfig(kinds)))
    inventory = read_inventory(HardwareConfig(HardwareKind.cpu), 2)
    rows = run_baselines(job, inventory, failing_start(1))
    assert [(row["name"], row["error"]) for row in rows] == [
        ("deepspeed", "OutOfMemoryError: no room"),
        ("transformers", "OutOfMemoryError: no room"),
    ]
    assert (tmp_path / "baselines" / "deepspeed" / "job.json").exists()


def test_a_signal_during_a_baseline_ends_the_run(tmp_path: Path) -> None:
    wanted = make_run(task=TaskConfig(TaskKind.bench), bench=BenchConfig([BaselineKind.deepspeed]))
    inventory = read_inventory(HardwareConfig(HardwareKind.cpu), 2)
    with pytest.raises(RunFailed):
        run_baselines(make_job(tmp_path, run=wanted), inventory, failing_start(SIGNAL_EXIT_CODE + 15))


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        (BaselineKind.deepspeed, {"arrival_rate": 1.0}, "workload.arrival_rate"),
        (BaselineKind.transformers, {"quantize": QuantizeKind.int4}, "model.quantize=int4"),
        (BaselineKind.vllm, {}, "not installed"),
    ],
)
def test_what_a_baseline_cannot_run_is_said(tmp_path: Path, kind: BaselineKind, fields: dict, words: str) -> None:
    workload = WorkloadConfig(arrival_rate=fields.get("arrival_rate"))
    wanted = make_run(task=TaskConfig(TaskKind.bench), workload=workload, bench=BenchConfig([kind]))
    wanted.model.quantize = fields.get("quantize", QuantizeKind.none)
    assert words in str(refusal(make_job(tmp_path, run=wanted), kind))


def test_energy_is_that_of_answers_and_not_of_passes_that_time_prompts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock = [1000.0]

    def answer(bench: Bench, prompts: list[Prompt], num_tokens: int) -> tuple[Result, float]:
        clock[0] += 10.0
        return Result([]), 10.0

    monkeypatch.setattr(Bench, "answer", answer)
    monkeypatch.setattr(bench_module, "check_same_tokens", lambda context, answers: None)
    monkeypatch.setattr(bench_module, "time", SimpleNamespace(time=lambda: clock[0]))
    context = cast(RankContext, SimpleNamespace(job=make_job(tmp_path)))
    assert Bench(context, cast(Engine, None), 8, 512, alone).measure(0).span == (1000.0, 1010.0)
    assert clock == [1020.0]
