"""task=bench times passes over trees of several sizes: of a streamed model beside a draft model, on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.config import BenchConfig, SpeculationConfig, TaskConfig, TaskKind
from launcher.report.passes_text import passes_table
from launcher.tasks.tree_passes import assumed, pass_row
from parallel.engine.speculation.pass_timer import PlanCost
from parallel.engine.speculation.tree_plan import TreePlan
from tests.launcher.forked import run
from tests.launcher.plans import LLAMA_70B, cards_of, plan, run_of
from tests.parallel.engine.speculation.draft_models import write_truncated
from tests.parallel.small_models import DEMO

BENCH = TaskConfig(TaskKind.bench)
SMALL = (
    *("task=bench", "hardware=cpu", "engine.comm_share_steps=1", "workload.prompt_tokens=24", "workload.warm_up=0"),
    *("workload.output_tokens=5", "workload.batch_size=2", "workload.repeats=1", "engine.max_context=96"),
)


def test_sizes_are_timed_in_one_run(tmp_path: Path) -> None:
    draft = write_truncated(DEMO, tmp_path / "draft", 1)
    trees = ("bench.tree_sizes=[1,4,70]", "bench.acceptance=0.5")
    drawn = ("speculation.kind=draft", f"speculation.draft_path={draft}")
    streamed = ("offload.enabled=on", "offload.resident_layers=2")
    result = run(*SMALL, *trees, *drawn, *streamed, folder=tmp_path / "run")
    assert result.returncode == 0, result.stderr
    report = result.report
    rows, offload = report["passes"], report["offload"]
    assert [(row["tree_size"], row["depth"]) for row in rows] == [(1, 0), (4, 3), (70, 6)]
    for row in rows:
        step_ms = row["step_ms"]
        assert row["pass_ms"] > 0
        assert (row["draft_ms"] > 0) == (row["tree_size"] > 1)
        assert row["passes_per_sec"] == pytest.approx(1e3 / step_ms)
        # A CPU has no link to compare with.
        assert (row["link_bytes"], row["share_of_floor"]) == (offload["bytes_per_pass"], None)
        tokens = 2 - 0.5 ** row["depth"]
        assert row["assumed"]["tokens_per_pass"] == pytest.approx(tokens)
        assert row["assumed"]["tokens_per_sec"] == pytest.approx(tokens * 2 / step_ms * 1e3)
    assert "assumed, not measured" in result.stderr
    for card, predicted in zip(report["cards"], report["predicted"]["cards"], strict=True):
        # With 69 nodes.
        assert card["memory"]["kv_cache_bytes"] == predicted["lines"]["kv_cache"]


@pytest.mark.parametrize(("batch_size", "words"), [(1, "1 sequence at a time"), (2, "2 sequences at a time")])
def test_what_nobody_assumed_is_not_told(batch_size: int, words: str) -> None:
    plan, cost = TreePlan(16, 6, 6), PlanCost(320.0, 0.0, 320.0)
    row = pass_row(plan, cost) | {"link_bytes": 0, "share_of_floor": None} | assumed(plan, cost, 2, None)
    assert row["assumed"] == {"acceptance": None, "tokens_per_pass": None, "tokens_per_sec": None}
    (table,) = passes_table({"passes": [row], "workload": {"batch_size": batch_size}})
    assert table.caption is None
    assert str(table.title).endswith(words)
    assert [column.header for column in table.columns][-1] == "of its floor"


@pytest.mark.parametrize(
    ("bench", "words"),
    [
        (BenchConfig(tree_sizes=[4, 0]), "bench.tree_sizes: 0 must be from 1 to 256"),
        (BenchConfig(tree_sizes=[257]), "bench.tree_sizes: 257 must be"),
        (BenchConfig(tree_sizes=[2], acceptance=1.5), "bench.acceptance=1.5 must be from 0 to 1"),
        (BenchConfig(acceptance=0.5), "bench.acceptance=0.5 is read with bench.tree_sizes only"),
    ],
)
def test_values_that_cannot_run_are_refused(bench: BenchConfig, words: str) -> None:
    assert [words in problem for problem in run_of(task=BENCH, bench=bench).problems()] == [True]


def test_other_tasks_refuse_sizes() -> None:
    (problem,) = run_of(task=TaskConfig(TaskKind.generate), bench=BenchConfig(tree_sizes=[4])).problems()
    assert "bench.tree_sizes is read by task=bench only" in problem


def test_depth_is_checked_where_it_is_used() -> None:
    deep = SpeculationConfig(tree_depth=17)
    assert list(run_of(task=BENCH, speculation=deep, bench=BenchConfig(tree_sizes=[1])).problems()) == []
    (problem,) = run_of(task=BENCH, speculation=deep, bench=BenchConfig(tree_sizes=[4])).problems()
    assert "speculation.tree_depth=17" in problem


def test_a_plan_has_room_for_the_largest_size() -> None:
    plain, timed = (
        plan(LLAMA_70B, cards_of(2, memory_bytes=200 * 2**30), task=BENCH, bench=bench, engine__max_context=1024)
        for bench in (BenchConfig(), BenchConfig(tree_sizes=[256, 4]))
    )
    for before, after in zip(plain.cards, timed.cards, strict=True):
        # Sixteen pages and the one of nobody; four more for 255 nodes.
        assert after.lines["kv_cache"] * 17 == before.lines["kv_cache"] * 21
        assert after.lines["draft.tokens"] == 4 * 1025
