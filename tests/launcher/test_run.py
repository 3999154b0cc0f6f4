"""The main job from the command line to the report, however it is started. Real processes, ranks on the CPU."""

from __future__ import annotations

import csv
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from launcher.config import ModelConfig
from launcher.job import load_job
from launcher.models.files import find_local_model
from parallel.checkpoint.headers import read_checkpoint
from tests.launcher.cli import PYTHON, SHORT, TORCHRUN, Result, started, torchrun
from tests.launcher.forked import ForkedProcess, run

# What scripts rely on, from DESIGN.md.
CONTRACT = {
    "task", "model", "world_size", "device", "topology", "transport", "load", "ttft_ms", "tpot_ms", "tokens_per_sec",
    "comm_share", "cards", "predicted", "outputs", "run_dir", "versions",
}  # fmt: skip
# Float32, so that the number of threads and of ranks leaves no trace in the tokens.
ARGS = (*SHORT, "model.dtype=float32", "engine.comm_share_steps=2")
WAYS = {"python": PYTHON, "torchrun": TORCHRUN, "torchrun of two": torchrun(2)}
SWEEP = "sweep"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Result]:
    """Every way to start two ranks, and a sweep, all at the same time: nothing may collide."""
    with ExitStack() as stack:
        contexts = {way: started("gpus=2", *ARGS, folder=folder / way, launcher=WAYS[way]) for way in WAYS}
        contexts[SWEEP] = started("-m", "gpus=1,9,2", *ARGS, folder=folder / SWEEP, sweep=True, launcher=ForkedProcess)
        running = {name: stack.enter_context(context) for name, context in contexts.items()}
        return {name: each.finish() for name, each in running.items()}


@pytest.fixture(scope="module", params=list(WAYS))
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def report(results: dict[str, Result], way: str) -> dict[str, Any]:
    assert results[way].returncode == 0, results[way].stderr
    return results[way].report


def tokens_of(report: dict[str, Any]) -> list[int]:
    (output,) = report["outputs"]
    return list(output["token_ids"])


# However it is started


def test_every_way_gives_the_same_tokens(results: dict[str, Result], report: dict[str, Any]) -> None:
    assert len(tokens_of(report)) == 8
    assert tokens_of(report) == tokens_of(results["python"].report)


def test_last_line_is_the_report_that_the_folder_holds(folder: Path, way: str, report: dict[str, Any]) -> None:
    assert json.loads((folder / way / "report.json").read_text()) == report
    assert report["run_dir"] == str(folder / way)


def test_stdout_is_the_answer_and_one_line_of_json(
    results: dict[str, Result], way: str, report: dict[str, Any]
) -> None:
    (output,) = report["outputs"]
    answer, line = results[way].stdout.rsplit("\n", 2)[:2]
    assert answer == output["text"]
    assert json.loads(line) == report


def test_report_has_every_field_of_the_contract(report: dict[str, Any]) -> None:
    assert set(report) >= CONTRACT
    assert (report["task"], report["model"], report["world_size"]) == ("generate", "demo", 2)
    assert (report["device"], report["topology"]) == ("cpu", "dual_pcie")
    assert {name: value["name"] for name, value in report["transport"].items()} == {"all_sizes": "gloo"}
    assert report["outputs"][0]["finish_reason"] == "length"
    assert report["versions"]["torch"]


def test_what_was_measured_is_there_and_the_rest_is_null(report: dict[str, Any]) -> None:
    assert report["ttft_ms"] > 0
    assert 0 < report["tpot_ms"]["p50"] <= report["tpot_ms"]["p99"]
    # Of the seven tokens after the first, four took the median or more.
    spent_ms = 8e3 / report["tokens_per_sec"]
    assert report["ttft_ms"] + 4 * report["tpot_ms"]["p50"] <= 1.001 * spent_ms
    assert spent_ms < 10 * (report["ttft_ms"] + 7 * report["tpot_ms"]["p99"])
    assert 0 <= report["comm_share"] < 1
    assert report["tokens_per_joule"] is None
    for card in report["cards"]:
        assert card["peak_bytes"] > 100_000_000
        assert card["predicted_bytes"] > 0
        assert 100_000_000 < card["host_peak_bytes"] < 4_000_000_000
        assert (card["power_w"], card["energy_j"], card["temperature_c"]) == (None, None, None)
        assert card["source"] == "resident memory of the rank's process"
    assert len(report["cards"]) == len(report["predicted"]["cards"]) == 2


def test_steps_to_the_first_answer_follow_one_another(report: dict[str, Any]) -> None:
    startup = report["startup"]
    steps = ("rank_started", "imported", "joined", "links_tested", "loaded", "ready")
    assert list(startup) == [f"{step}_sec" for step in steps]
    times = [0, *startup.values(), 600]
    assert times == sorted(times) and len(set(times)) == len(times)
    assert startup["ready_sec"] - startup["loaded_sec"] >= report["warm_up_sec"]


def test_each_rank_reads_its_half_of_the_checkpoint(report: dict[str, Any]) -> None:
    folder = find_local_model(ModelConfig("pkg://launcher/models/demo"))
    assert folder is not None
    total = read_checkpoint(folder).total_bytes
    assert report["load"]["bytes_read_per_rank"] == pytest.approx([total / 2] * 2, rel=0.01)
    assert report["load"]["bytes_read"] == sum(report["load"]["bytes_read_per_rank"])
    assert report["load"]["gb_per_sec"] == pytest.approx(report["load"]["bytes_read"] / report["load"]["sec"] / 1e9)


def test_folder_holds_the_job_and_what_happened(folder: Path, way: str, report: dict[str, Any]) -> None:
    run_dir = folder / way
    assert load_job(run_dir / "job.json").placement.world_size == 2
    with (run_dir / "telemetry.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["index"] for row in rows} == {"0", "1"}
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().split("\n") if line]
    assert {event.get("stage") for event in events} >= {"loading weights", "prefill"}
    assert "".join(event["text"] for event in events if event["kind"] == "text") == report["outputs"][0]["text"]
    assert (run_dir / "logs" / "rank1.log").exists()
    assert not (run_dir / "error.json").exists()


def test_ranks_agree_on_the_answer(folder: Path, way: str, report: dict[str, Any]) -> None:
    assert json.loads((folder / way / "ranks" / "1.json").read_text())["outputs"] == report["outputs"]


def test_tables_for_people_are_on_stderr(results: dict[str, Result], way: str) -> None:
    stderr = results[way].stderr
    for words in ("predicted", "loading weights", "time to first token", "share of communication", "report.json"):
        assert words in stderr
    assert "Traceback" not in stderr


# A sweep


def test_jobs_of_a_sweep_have_their_own_world_size_and_folder(results: dict[str, Result], folder: Path) -> None:
    reports = results[SWEEP].reports
    assert [each.get("world_size") for each in reports] == [1, None, 2]
    assert [each["run_dir"] for each in reports] == [str(folder / SWEEP / str(n)) for n in range(3)]
    for number, each in enumerate(reports):
        assert json.loads((folder / SWEEP / str(number) / "report.json").read_text()) == each


def test_job_that_fails_stops_no_other_and_shows_in_the_exit_code(results: dict[str, Result]) -> None:
    first, failed, last = results[SWEEP].reports
    assert results[SWEEP].returncode == 1
    assert failed["error"]["message"].startswith("gpus=9 must be from 1 to 4")
    assert tokens_of(first) == tokens_of(last) == tokens_of(results["python"].report)


def test_stdout_of_a_sweep_is_answers_and_reports_in_turn(results: dict[str, Result]) -> None:
    first, failed, last = results[SWEEP].reports
    expected = [first["outputs"][0]["text"], first, failed, last["outputs"][0]["text"], last]
    parts = [part if isinstance(part, str) else json.dumps(part) for part in expected]
    assert results[SWEEP].stdout == "\n".join(parts) + "\n"


def test_one_rank_has_no_communication(results: dict[str, Result]) -> None:
    first = results[SWEEP].reports[0]
    assert (first["topology"], first["transport"]["all_sizes"]["name"]) == ("single", "solo")


# The same folder again


def test_run_in_the_folder_of_an_earlier_one_reports_itself_only(folder: Path, results: dict[str, Result]) -> None:
    """An earlier run's answer, failure and results lie there; the prompt is another."""
    run_dir = folder / "python"
    (run_dir / "error.json").write_text('{"type": "Old", "message": "an old failure"}')
    again = run("gpus=1", *SHORT, "prompt='import os'", "workload.output_tokens=2", folder=run_dir)
    assert again.returncode == 0, again.stderr
    (output,) = again.report["outputs"]
    assert len(output["token_ids"]) == 2
    assert again.stdout.startswith(output["text"] + "\n")
    assert len(again.report["cards"]) == 1
