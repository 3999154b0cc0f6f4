"""The report: what the contract promises, null for what was not measured, and how the parts are joined."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import pytest

from launcher.config import LimitsConfig, ModelFacts, TaskConfig, TaskKind, WorkloadConfig
from launcher.failures import Failure
from launcher.finished import keep_finished
from launcher.hardware.inventory import Inventory
from launcher.job import Job
from launcher.models.shape import shape_from_facts
from launcher.plan.plan import plan_run
from launcher.prompts import Prompt
from launcher.report import report as report_module
from launcher.report.console import print_report
from launcher.report.outcome import discard_report, report_failure, write_report
from launcher.report.report import base_report, build_report, failure_report
from launcher.report.slow import slow_kernels
from launcher.telemetry.sampler import Telemetry
from launcher.telemetry.usage import CardUsage
from launcher.timing.predict import Times
from tests.launcher.jobs import make_job, make_run

CONTRACT = {
    "task", "model", "world_size", "device", "topology", "transport", "load", "ttft_ms", "tpot_ms", "tokens_per_sec",
    "comm_share", "cards", "predicted", "run_dir", "versions",
}  # fmt: skip
MEASURED = (
    "transport", "load", "ttft_ms", "tpot_ms", "prefix_cache", "tokens_per_sec", "tokens_per_joule", "comm_share",
)  # fmt: skip
INVENTORY = Inventory("none", (), (), None, None, 64 * 2**30, 60 * 2**30, 16)
SHAPE = shape_from_facts(
    ModelFacts(
        hidden_size=64,
        intermediate_size=256,
        num_layers=2,
        num_heads=8,
        num_kv_heads=4,
        head_dim=8,
        vocab_size=512,
        max_positions=1024,
    )
)
RESULT = {
    "transport": {"all_sizes": {"name": "gloo", "reason": "why"}},
    "load": {"bytes_read": 100, "sec": 2.0, "gb_per_sec": 5e-8, "disk_wait_sec": 1.9, "decode_sec": 0.1},
    "ttft_ms": 20.0,
    "tpot_ms": {"p50": 10.0, "p99": 12.0},
    "prefix_cache": {"prompt_tokens": 90, "reused_tokens": 64},
    "generated_tokens": 30,
    "generation": [(1000.0, 1002.0), (1010.0, 1011.0)],
    "comm_share": 0.25,
    "decode_step_ms": {"measured": 10.0, "without_all_reduce": 7.5},
    "memory": {"weights_bytes": 50},
    "host_peak_bytes": 5000,
    "outputs": [{"index": 0, "token_ids": [1, 2]}],
}
SLOW_LOAD = {"bytes_read": 300, "sec": 4.0, "disk_wait_sec": 0.5, "decode_sec": 3.0}


class FakeTelemetry:
    """A telemetry that has seen these usages, and so many watts from the first second of RESULT's generation on."""

    def __init__(self, *usages: CardUsage, power_w: float | None = None) -> None:
        self.usages = usages
        self.power_w = power_w

    def summary(self) -> tuple[CardUsage, ...]:
        return self.usages

    def energy_between(self, start_sec: float, end_sec: float) -> float | None:
        return None if self.power_w is None or start_sec < 1000.0 else self.power_w * (end_sec - start_sec)


USAGES = (
    CardUsage(1, "driver's name", "nvml", peak_bytes=700, baseline_bytes=300, power_w=90.0),
    CardUsage(2, "", "nvml"),
)


def planned_job(run_dir: Path) -> Job:
    job = make_job(run_dir, cards=True, run=make_run(limits=LimitsConfig(card_memory_gib=24)))
    on_cpu = make_job(run_dir)
    return replace(job, plan=plan_run(job.run, on_cpu.placement, SHAPE, INVENTORY))


def build(run_dir: Path, *results: dict[str, Any], job: Job | None = None, **telemetry: Any) -> dict[str, Any]:
    """The report of two ranks, the second of which read more and slower."""
    (run_dir / "ranks").mkdir()
    slower = RESULT | {"load": SLOW_LOAD, "ttft_ms": 99.0, "memory": {"weights_bytes": 60}, "host_peak_bytes": 6000}
    for rank, result in enumerate(results or (RESULT, slower)):
        (run_dir / "ranks" / f"{rank}.json").write_text(json.dumps(result))
    fake = FakeTelemetry(*USAGES, **telemetry)
    return build_report(job or planned_job(run_dir), INVENTORY, cast(Telemetry, fake))


def test_every_field_of_the_contract_is_there(tmp_path: Path) -> None:
    report = build(tmp_path)
    assert set(report) >= CONTRACT | {"outputs"}
    for card in report["cards"]:
        assert {"name", "predicted_bytes", "peak_bytes", "power_w", "energy_j"} <= set(card)
    assert set(report["load"]) >= {"sec", "bytes_read", "gb_per_sec"}
    json.dumps(report, allow_nan=False)


def test_base_report_has_the_same_fields_with_null_for_what_was_not_measured(tmp_path: Path) -> None:
    for job in (planned_job(tmp_path), make_job(tmp_path)):
        report = base_report(job)
        assert set(report) >= CONTRACT
        assert {name: report[name] for name in MEASURED} == dict.fromkeys(MEASURED)
        assert report["cards"] == []


def test_job_without_a_model_has_no_predictions(tmp_path: Path) -> None:
    report = base_report(make_job(tmp_path))
    assert (report["model"], report["predicted"]) == (None, None)


def test_measurements_of_rank_0_are_the_runs(tmp_path: Path) -> None:
    report = build(tmp_path)
    for name in ("transport", "ttft_ms", "tpot_ms", "prefix_cache", "comm_share", "decode_step_ms", "outputs"):
        assert report[name] == RESULT[name]


def test_load_is_as_long_as_the_slowest_rank_and_reads_what_all_read(tmp_path: Path) -> None:
    assert build(tmp_path)["load"] == {
        "sec": 4.0,
        "disk_wait_sec": 0.5,
        "decode_sec": 3.0,
        "bytes_read": 400,
        "gb_per_sec": pytest.approx(1e-7),
        "bytes_read_per_rank": [100, 300],
        "kernels": {},
    }


def test_speed_covers_all_generation_and_energy_the_same_time(tmp_path: Path) -> None:
    report = build(tmp_path, power_w=20.0)
    assert (report["generated_tokens"], report["tokens_per_sec"], report["tokens_per_joule"]) == (30, 10.0, 0.5)


@pytest.mark.parametrize("power_w", [None, 0.0])
def test_energy_that_was_not_measured_gives_no_tokens_per_joule(tmp_path: Path, power_w: float | None) -> None:
    report = build(tmp_path, power_w=power_w)
    assert (report["tokens_per_sec"], report["tokens_per_joule"]) == (10.0, None)


def test_energy_of_a_part_of_the_generation_gives_no_tokens_per_joule(tmp_path: Path) -> None:
    partly = RESULT | {"generation": [(990.0, 992.0), (1010.0, 1011.0)]}
    assert build(tmp_path, partly, partly, power_w=20.0)["tokens_per_joule"] is None


def test_run_that_had_nothing_to_do_has_no_speed(tmp_path: Path) -> None:
    nothing = RESULT | {"generated_tokens": 0, "ttft_ms": None, "tpot_ms": {"p50": None, "p99": None}, "outputs": []}
    report = build(tmp_path, nothing, nothing, power_w=5.0)
    assert (report["tokens_per_sec"], report["tokens_per_joule"], report["ttft_ms"]) == (None, None, None)


def test_task_without_a_model_has_no_load(tmp_path: Path) -> None:
    probed = {"transport": RESULT["transport"], "all_reduce": {"gloo": []}}
    report = build(tmp_path, probed, probed, job=make_job(tmp_path))
    assert (report["load"], report["tokens_per_sec"], report["ttft_ms"]) == (None, None, None)
    assert report["all_reduce"] == {"gloo": []}
    assert [card["predicted_bytes"] for card in report["cards"]] == [None, None]


def test_cards_join_plan_telemetry_and_ranks(tmp_path: Path) -> None:
    job = planned_job(tmp_path)
    first, second = build(tmp_path, job=job)["cards"]
    assert job.plan is not None
    assert [first["predicted_bytes"], second["predicted_bytes"]] == [c.predicted_bytes for c in job.plan.cards]
    assert first["name"] == job.placement.names[0]
    assert (first["memory"], second["memory"]) == ({"weights_bytes": 50}, {"weights_bytes": 60})
    assert (first["host_peak_bytes"], second["host_peak_bytes"]) == (5000, 6000)
    assert first["power_w"] == 90.0


def test_peak_leaves_out_what_others_held_before_and_stays_null_where_unknown(tmp_path: Path) -> None:
    first, second = build(tmp_path)["cards"]
    assert (first["peak_bytes"], first["baseline_bytes"]) == (400, 300)
    assert (second["peak_bytes"], second["power_w"], second["energy_j"]) == (None, None, None)


def test_predictions_stand_apart(tmp_path: Path) -> None:
    job = planned_job(tmp_path)
    predicted = build(tmp_path, job=job)["predicted"]
    assert job.plan is not None
    assert predicted["tpot_floor_ms"] is None
    for card, planned in zip(predicted["cards"], job.plan.cards, strict=True):
        assert card["predicted_bytes"] == planned.predicted_bytes == sum(card["lines"].values())


@pytest.mark.parametrize(
    ("workload", "is_of_the_run"),
    [({}, True), ({"num_requests": 4}, True), ({"num_requests": 8}, False), ({"arrival_rate": 2.0}, False)],
)
def test_times_of_a_batch_do_not_stand_beside_those_of_other_requests(
    tmp_path: Path, workload: dict[str, Any], is_of_the_run: bool
) -> None:
    times = Times("a test", (), 3.6, {}, 0.1, "", 100.0, 726.0, 1e4, 0.2, itl_ms=21.0)
    for task, is_told in ((TaskKind.bench, is_of_the_run), (TaskKind.plan, True)):
        job = replace(planned_job(tmp_path), times=times)
        run = replace(job.run, task=TaskConfig(task), workload=WorkloadConfig(batch_size=4, **workload))
        predicted = base_report(replace(job, run=run))["predicted"]
        names = ("ttft_ms", "itl_ms", "tokens_per_sec", "tokens_per_joule")
        assert [predicted[name] for name in names] == ([726.0, 21.0, 100.0, 0.2] if is_told else [None] * 4)
        assert (predicted["tpot_ms"], predicted["comm_share"], predicted["prefill_tokens_per_sec"]) == (3.6, 0.1, 1e4)


@pytest.mark.parametrize(("num_prompts", "is_told"), [(1, True), (4, True), (5, False)])
def test_times_of_a_batch_do_not_stand_beside_those_of_more_prompts(
    tmp_path: Path, num_prompts: int, is_told: bool
) -> None:
    times = Times("a test", (), 3.6, {}, 0.1, "", 100.0, 726.0, 1e4, 0.2, itl_ms=21.0)
    job = replace(planned_job(tmp_path), times=times, prompts=tuple(Prompt(i, "x") for i in range(num_prompts)))
    predicted = base_report(replace(job, run=replace(job.run, workload=WorkloadConfig(batch_size=4))))["predicted"]
    assert (predicted["ttft_ms"], predicted["tpot_ms"]) == (726.0 if is_told else None, 3.6)


def test_versions_are_those_that_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_module, "PACKAGES", ("torch", "no-such-package"))
    versions = report_module.versions()
    assert versions["torch"] and versions["no-such-package"] is None


# Failures


def test_failed_run_says_what_it_was_and_why() -> None:
    failure = Failure("RankDied", "rank 1 died", "a hint", 1, "log")
    report = failure_report(failure, make_run(), Path("/run"))
    assert (report["task"], report["model"], report["run_dir"]) == ("generate", "some-model", "/run")
    assert report["error"] == asdict(failure)
    assert failure_report(failure, None, None)["task"] is None


def test_last_line_and_file_are_the_same_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_report({"task": "plan", "é": [None, 1.5]}, tmp_path)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == json.loads((tmp_path / "report.json").read_text()) == {"task": "plan", "é": [None, 1.5]}


def test_failure_is_told_to_people_scripts_and_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failure = Failure("ValueError", "too [b]long[/b]: " + "x" * 300, "Shorten it.", 0, "/logs/rank0.log")
    assert report_failure(failure, make_run(), tmp_path, 7) == 7
    out, err = capsys.readouterr()
    assert failure.message in err and "Shorten it." in err and "Log: /logs/rank0.log" in err
    assert json.loads(out)["error"] == json.loads((tmp_path / "report.json").read_text())["error"] == asdict(failure)


def test_figures_of_an_earlier_run_in_the_folder_are_not_those_of_one_that_failed(tmp_path: Path) -> None:
    keep_finished(tmp_path, {"repeats": 1})
    assert failure_report(Failure("OSError", "gone"), None, tmp_path)["incomplete"] == {"repeats": 1}
    discard_report(tmp_path)
    assert failure_report(Failure("OSError", "gone"), None, tmp_path)["incomplete"] is None


def test_failure_is_told_even_where_the_folder_is_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report_failure(Failure("OSError", "gone"), None, tmp_path / "missing") == 1
    assert json.loads(capsys.readouterr().out)["error"]["message"] == "gone"


def test_an_operation_is_an_own_kernel_where_every_rank_has_it(tmp_path: Path) -> None:
    first = RESULT | {"kernels": {"own": ["norms", "attention"], "plain_torch": {}}}
    second = RESULT | {"kernels": {"own": ["norms"], "plain_torch": {"attention": "heads of 80"}}}
    report = build(tmp_path, first, second)
    assert report["kernels"] == {"own": ["norms"], "plain_torch": {"attention": "heads of 80"}}
    report["load"]["kernels"] = {"w4a16 (the fastest)": 3, "dequantize (not w4a16: 8 bits)": 2}
    assert slow_kernels(report) == [
        "attention in plain torch: heads of 80",
        "2 linears by dequantize (not w4a16: 8 bits)",
    ]
    assert slow_kernels(report | {"kernels": None, "load": None}) == []


def test_brackets_in_names_are_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = build(tmp_path, RESULT, RESULT) | {"model": "llama[awq]", "run_dir": "/runs/[red]x"}
    print_report(report)
    shown = capsys.readouterr().err
    assert "llama[awq] on" in shown and "report: /runs/[red]x/report.json" in shown
