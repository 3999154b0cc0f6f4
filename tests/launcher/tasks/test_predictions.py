"""task=predictions on two ranks of the CPU, and what becomes of its points."""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from torch import Tensor

from launcher.config import PredictionsConfig, TaskConfig, TaskKind
from launcher.plan.grid import GridPoint
from launcher.rank.context import RankContext
from launcher.report.accuracy import compare, point_row, summarise_errors
from launcher.report.accuracy_text import accuracy_page
from launcher.report.outcome import discard_report
from launcher.tasks.bench import Bench
from launcher.tasks.predictions import keep_rows, warm_up, warm_up_prompts, warm_up_tokens
from launcher.timing.fit import Calibration
from launcher.timing.load import Work
from launcher.timing.store import save_calibration
from parallel.engine.answer import StopRules
from parallel.engine.arrivals import alone
from parallel.engine.engine import Engine
from parallel.engine.generate import generate
from parallel.engine.limits import EngineLimits
from parallel.engine.prefill.graphs import PassGraphs
from parallel.engine.sequence import Part
from parallel.transports.solo import Solo
from tests.launcher.cli import texts
from tests.launcher.forked import run, started
from tests.launcher.jobs import make_job, make_run
from tests.launcher.timing.test_timing import Machine
from tests.parallel.ranks import CPU, demo_tokenizer, make_engine, numbered
from tests.parallel.small_models import DEMO
from tools.predictions import main

# Of the demo model on one of two ranks; the machine's sizes are far above.
SMALL = Work("bf16", 6, 900_000, 900_000, 1_000_000, 512, 2, 512)
GRID = ("predictions.batch_sizes=[1,3]", "predictions.prompt_tokens=[16,2000]")


def slowed(calibration: Calibration, factor: float) -> Calibration:
    """Steps that take `factor` times as long."""
    points = [
        replace(
            point,
            steps={
                rows: replace(
                    step,
                    short=factor * step.short,
                    long=factor * step.long,
                    without_all_reduce=factor * step.without_all_reduce,
                )
                for rows, step in point.steps.items()
            },
        )
        for point in calibration.points
    ]
    return replace(calibration, points=tuple(points))


def bf16_calibration() -> Calibration:
    found = Machine(1).calibration()
    points = (replace(point, work=replace(point.work, format="bf16")) for point in found.points)
    return replace(found, points=tuple(points))


def test_two_ranks_measure_a_grid_and_a_wrong_rate_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    few = ("workload.output_tokens=4", "workload.repeats=1", "engine.comm_share_steps=2")
    result = run("task=predictions", "gpus=2", "hardware=cpu", *GRID, *few, folder=folder)
    assert result.returncode == 0, result.stderr
    points = result.report["predictions"]["points"]
    assert texts(folder / "predictions.jsonl") == points
    assert [(each["batch_size"], each["prompt_tokens"]) for each in points] == [(1, 16), (1, 2000), (3, 16), (3, 2000)]
    for each in points:
        if each["prompt_tokens"] == 2000:
            assert "1024 positions" in each["skipped"] and each["measured"] is None
            continue
        measured = each["measured"]
        assert each["skipped"] is None and measured["itl_ms"] == measured["tpot_ms"]["p50"]
        assert min(measured[name] for name in ("step_ms", "itl_ms", "ttft_ms", "prefill_tokens_per_sec")) > 0
        assert each["no_times_because"] == "there are no rates of CPUs"
        assert set(each["error"].values()) == {None}
    page = (folder / "predictions.md").read_text()
    assert "| 3 | 16 |" in page and "| 3 | 2000 |" not in page and "batch 3, prompts of 2000: " in page
    assert (
        page.splitlines()[2:]
        == result.stderr[result.stderr.index("| batch") :].splitlines()[: len(page.splitlines()) - 2]
    )
    assert result.report["kernels"] is not None and result.report["load"]["sec"] > 0

    def errors(calibration: Calibration) -> list[dict[str, float]]:
        save_calibration(tmp_path / "rates.json", calibration)
        assert main([str(folder), "--rates", str(tmp_path / "rates.json"), "--json"]) == 0
        again = json.loads(capsys.readouterr().out)["runs"][str(folder)]
        for row, old in zip(again, points, strict=True):
            assert row["measured"] == old["measured"] and row["skipped"] == old["skipped"]
        return [row["error"] for row in again if row["skipped"] is None]

    right, wrong = errors(bf16_calibration()), errors(slowed(bf16_calibration(), 3.0))
    for a, b in zip(right, wrong, strict=True):
        assert 1 + b["step_ms"] == pytest.approx(3 * (1 + a["step_ms"]))
        assert b["itl_ms"] > a["itl_ms"] and b["prefill_tokens_per_sec"] == a["prefill_tokens_per_sec"]
    assert main([str(folder)]) == 0
    assert "## demo, 2 x CPU" in capsys.readouterr().out


def test_rates_that_cannot_be_had_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = tmp_path / "rates.json"
    for words in ("is not there", "is no calibration, or one of another version"):
        with pytest.raises(SystemExit):
            main([str(tmp_path), "--rates", str(rates)])
        assert f"--rates {rates} {words}. task=calibrate makes one." in " ".join(capsys.readouterr().err.split())
        rates.write_text("{}")


def test_a_grid_that_is_ended_reports_the_workloads_that_it_had(tmp_path: Path) -> None:
    """All but the first of them are the same, so that none is the last before the run is ended."""
    grid = ("predictions.batch_sizes=[1]", f"predictions.prompt_tokens=[2000,{','.join(['16'] * 100)}]")
    few = ("workload.output_tokens=4", "workload.repeats=1", "engine.comm_share_steps=1")
    folder = tmp_path / "run"
    with started("task=predictions", "gpus=1", "hardware=cpu", *grid, *few, folder=folder) as running:
        running.wait_for("finished.json", '"measured": {')
        running.process.send_signal(signal.SIGTERM)
        result = running.finish()
    report, points = result.report, texts(folder / "predictions.jsonl")
    assert report["error"]["type"] == "Interrupted" and json.loads((folder / "report.json").read_text()) == report
    incomplete = report["incomplete"]
    # The rank may have been ended between both files.
    kept = incomplete["predictions"]["points"]
    assert len(points) - 1 <= len(kept) == incomplete["workloads"] < incomplete["wanted_workloads"] == 101
    assert kept == points[: len(kept)] and kept[0]["skipped"] and kept[-1]["measured"]["ttft_ms"] > 0
    assert incomplete["predictions"]["summary"] == summarise_errors(kept)
    assert f"incomplete, {len(kept)} of 101 workloads, as in predictions.md" in result.stderr


def measured_row(point: GridPoint, **measured: float) -> dict[str, Any]:
    return point_row(
        point, 8, {"step_ms": 1.0, "itl_ms": 2.0, "ttft_ms": 4.0, "prefill_tokens_per_sec": 8.0} | measured
    )


def test_errors_are_of_the_measured_and_limits_differ() -> None:
    found = compare(
        {"step_ms": 10.0, "itl_ms": 10.0, "ttft_ms": 100.0}, {"step_ms": 9.0, "itl_ms": 11.5, "ttft_ms": 86}
    )
    assert found == pytest.approx({"step_ms": -0.1, "itl_ms": 0.15, "ttft_ms": -0.14, "prefill_tokens_per_sec": None})
    rows = [{"skipped": None, "error": found}, {"skipped": None, "error": found | {"step_ms": 0.3}}]
    summary = summarise_errors([*rows, {"skipped": "too large", "error": found | {"step_ms": 0.9}}])
    assert summary["step_ms"] == {"limit": 0.1, "points": 2, "within": 1, "worst": 0.3, "median": pytest.approx(0.2)}
    assert (summary["itl_ms"]["within"], summary["ttft_ms"]["within"]) == (0, 2)
    assert summary["prefill_tokens_per_sec"]["points"] == 0


def test_what_was_done_is_kept_after_every_point(tmp_path: Path) -> None:
    context = cast(RankContext, SimpleNamespace(rank=0, run_dir=tmp_path, job=make_job(tmp_path)))
    rows = [measured_row(GridPoint(2, 64)), point_row(GridPoint(4, 64, skipped="too large"), 8, None)]
    keep_rows(context, rows[:1])
    assert len(texts(tmp_path / "predictions.jsonl")) == 1
    assert "too large" not in (tmp_path / "predictions.md").read_text()
    keep_rows(context, rows)
    assert texts(tmp_path / "predictions.jsonl") == rows
    assert "too large" in (tmp_path / "predictions.md").read_text()
    # Another run in the folder has none of them among its own.
    discard_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_page_shows_measured_predicted_and_error() -> None:
    row = measured_row(GridPoint(2, 64), ttft_ms=200.0) | {
        "predicted": {"ttft_ms": 150.0, "tpot_floor_ms": 3.25, "limit": "x"}
    }
    row["error"] = compare(row["measured"], row["predicted"])
    page = accuracy_page("title", [row])
    assert "200, 150, -25.0%" in page and "0 of 1 within 15%, worst -25.0%" in page
    # As in results of before, whose floor was another.
    older = row | {"predicted": {"ttft_ms": 150.0, "floor_ms": 3.75, "limit": "x"}}
    assert "| 3.25 | x |" in page and "| 3.75 | x |" in accuracy_page("title", [older])


def test_a_warm_up_makes_passes_of_both_sizes() -> None:
    limits = EngineLimits(8192, 32, 2048, 512)
    assert [warm_up_prompts(limits, tokens) for tokens in (128, 512, 4096)] == [20, 5, 2]
    assert warm_up_prompts(replace(limits, batch_size=8), 128) == 8
    assert warm_up_prompts(replace(limits, batch_size=1), 4096) == 1


def test_a_warm_up_reads_a_prompt_beside_answers_as_the_workload_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes that begin within a prompt come twice: they are captured then."""
    engine = make_engine(Solo(CPU), DEMO, max_context=128, batch_size=4, prefill_chunk=32)
    engine.limits = replace(engine.limits, prefill_chunk_while_decoding=8)
    passes = []

    def prefill(parts: Sequence[Part]) -> Tensor:
        passes.append([(part.sequence.index, part.start, part.end) for part in parts])
        return Engine.prefill(engine, parts)

    monkeypatch.setattr(engine, "prefill", prefill)
    prompts = numbered([[3 + place] * 32 for place in range(warm_up_prompts(engine.limits, 32))])
    generate(engine, prompts, demo_tokenizer(), StopRules(warm_up_tokens(engine.limits, 32)))
    assert passes == [[(0, 0, 32)], *([(1, start, start + 8)] for start in (0, 8, 16, 24))]


def test_what_is_measured_replays_a_pass_for_the_second_time_or_later(tmp_path: Path) -> None:
    """A card takes longer over the first replay."""
    engine, replays = make_engine(Solo(CPU), DEMO, max_context=128, batch_size=1, prefill_chunk=64), Counter[int]()

    def record(calls: Sequence[Callable[[], None]], pool: object) -> list[Callable[[], None]]:
        def replay(place: int) -> None:
            replays[place] += 1
            calls[place]()

        return [partial(replay, place) for place in range(len(calls))]

    graphs = PassGraphs(engine.decoder, engine.caches, [32, 64], None, record)
    engine.target = replace(engine.target, graphs=graphs)
    context = cast(RankContext, SimpleNamespace(job=make_job(tmp_path), communicator=engine.communicator))
    warm_up(Bench(context, engine, 32, 512, alone), 3)
    assert set(replays.values()) == {1}


def test_lists_are_checked_and_repeats_are_read() -> None:
    wanted = make_run(task=TaskConfig(TaskKind.predictions), predictions=PredictionsConfig([], [0]))
    wanted.workload.repeats = 2
    problems = list(wanted.problems())
    assert [problem.partition("=")[0] for problem in problems] == [
        "predictions.batch_sizes",
        "predictions.prompt_tokens",
    ]
