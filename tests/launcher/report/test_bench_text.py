"""The table of task=bench, as people read it."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.report.bench_text import bench_table, step_text
from launcher.report.speed_text import speed_table
from tests.launcher.sweep_jobs import bench_report


def report_of(repeats: int, lowest_ms: float) -> dict[str, Any]:
    workload = {"prompt_tokens": 64, "output_tokens": 8, "batch_size": 1, "arrival_rate": None, "repeats": repeats}
    spread = {"ttft_ms": {"min": lowest_ms, "max": 120.0}}
    return bench_report(workload=workload, spread=spread, prefill_tokens_per_sec=500.0, predicted={})


JOULES = "tokens per joule 0.25"


@pytest.mark.parametrize(
    ("repeats", "lowest_ms", "cell", "caption"),
    [
        (3, 110.0, "120 (110-120)", f"lowest to highest of 3 runs in brackets\n{JOULES}"),
        (1, 120.0, "120", JOULES),
    ],
)
def test_one_run_has_no_spread(repeats: int, lowest_ms: float, cell: str, caption: str) -> None:
    table = bench_table(report_of(repeats, lowest_ms))
    assert list(table.columns[1].cells) == [cell]
    assert table.caption == caption


@pytest.mark.parametrize(
    ("measured", "predicted", "text"),
    [(0.25, 0.3, "0.25, predicted 0.3"), (0.25, None, "0.25"), (None, 0.3, "-, predicted 0.3"), (None, None, "-")],
)
def test_tokens_per_joule_are_said_beside_the_plans(measured: float | None, predicted: float | None, text: str) -> None:
    report = report_of(1, 120.0) | {"tokens_per_joule": measured, "predicted": {"tokens_per_joule": predicted}}
    assert bench_table(report).caption == f"tokens per joule {text}"
    unmeasured = dict.fromkeys(("load", "prefix_cache", "speculation", "offload"))
    rows = dict(zip(*(column.cells for column in speed_table(report | unmeasured).columns), strict=True))
    assert rows["tokens per joule"] == text


def test_answers_are_said_beside_what_the_plan_said_of_them() -> None:
    unmeasured = dict.fromkeys(("load", "prefix_cache", "speculation", "offload", "tokens_per_joule"))
    predicted = {"ttft_ms": 70.0, "itl_ms": 7.2, "tpot_ms": 7.1, "tokens_per_sec": 130.0}
    report = report_of(1, 120.0) | unmeasured | {"predicted": predicted}
    rows = dict(zip(*(column.cells for column in speed_table(report).columns), strict=True))
    told = {name: text.partition(", predicted ")[2] for name, text in rows.items()}
    assert {name: text for name, text in told.items() if text} == {
        "time to first token": "70",
        "time per output token": "7.2",
        "output": "130",
    }


@pytest.mark.parametrize(
    ("drive_share", "share", "text"),
    [
        (0.25, 0.8, ", 25.0 % from the drive, the rest from the page cache, 80.0 % of the floor"),
        (None, None, ""),
    ],
)
def test_steps_that_read_the_disk_are_held_against_a_floor_that_is_known(
    drive_share: float | None, share: float | None, text: str
) -> None:
    disk = {"bytes_per_pass": 8_890_000_000, "gb_per_sec": 1.4, "drive_share": drive_share}
    step = {"decode_step_ms": {"measured": 6350.0}, "bandwidth_share": share, "bandwidth": {}}
    said = step_text(bench_report(**step, offload={"disk": disk}))
    assert said == f"decode step 6,350 ms, from the disk 8.89 GB a pass at 1.4 GB/s a rank{text}; with the profiler:"
