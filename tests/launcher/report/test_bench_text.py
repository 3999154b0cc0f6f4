"""The table of task=bench, as people read it."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.report.bench_text import bench_table
from tests.launcher.sweep_jobs import bench_report


def report_of(repeats: int, lowest_ms: float) -> dict[str, Any]:
    workload = {"prompt_tokens": 64, "output_tokens": 8, "batch_size": 1, "arrival_rate": None, "repeats": repeats}
    spread = {"ttft_ms": {"min": lowest_ms, "max": 120.0}}
    return bench_report(workload=workload, spread=spread, prefill_tokens_per_sec=500.0, predicted={})


@pytest.mark.parametrize(
    ("repeats", "lowest_ms", "cell", "caption"),
    [(3, 110.0, "120 (110-120)", "lowest to highest of 3 runs in brackets"), (1, 120.0, "120", "")],
)
def test_one_run_has_no_spread(repeats: int, lowest_ms: float, cell: str, caption: str) -> None:
    table = bench_table(report_of(repeats, lowest_ms))
    assert list(table.columns[1].cells) == [cell]
    assert table.caption == caption
