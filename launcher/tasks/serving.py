"""What those who send requests get: their waits, how many are answered a second, and how many of them in good time."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from launcher.config import WorkloadConfig
from launcher.tasks.summary import MeasuredRun
from parallel.engine.answer import RequestTimes
from parallel.timing import p50_p99


def serving(runs: Sequence[MeasuredRun], workload: WorkloadConfig) -> dict[str, Any]:
    """Over the requests of all runs; a second's are medians of the runs, each from its start to its last token.

    `itl_ms` is between two tokens of an answer, `tpot_ms` the mean of it in an answer. A request is good with a first
    token within workload.max_ttft_ms and a `tpot_ms` within workload.max_tpot_ms.
    """
    requests = [request for run in runs for request in run.requests]
    return {
        "offered_per_sec": workload.arrival_rate,
        "per_sec": statistics.median(len(run.requests) / run.sec for run in runs),
        "ttft_ms": p50_p99([request.ttft_ms for request in requests]),
        "itl_ms": p50_p99([ms for run in runs for ms in run.token_ms]),
        "tpot_ms": p50_p99([request.tpot_ms for request in requests if request.tpot_ms is not None]),
        "max_ttft_ms": workload.max_ttft_ms,
        "max_tpot_ms": workload.max_tpot_ms,
        "good_share": num_good(requests, workload) / len(requests),
        "good_per_sec": statistics.median(num_good(run.requests, workload) / run.sec for run in runs),
    }


def num_good(requests: Sequence[RequestTimes], workload: WorkloadConfig) -> int:
    return sum(
        request.ttft_ms <= workload.max_ttft_ms and (request.tpot_ms or 0.0) <= workload.max_tpot_ms
        for request in requests
    )
