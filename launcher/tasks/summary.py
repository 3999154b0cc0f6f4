"""Several runs of one workload as one set of numbers, the same for this engine and for what it is compared with."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from parallel.engine.answer import RequestTimes
from parallel.engine.speculation.acceptance import Acceptance
from parallel.engine.speculation.tree_plan import TreePlan
from parallel.timing import p50_p99, p99


@dataclass(frozen=True)
class MeasuredRun:
    """One run of a workload.

    `ttft_ms` of each request, `token_ms` of tokens after the first (see generate.Result; a baseline's of each step of
    its batch), and the tokens of all answers over the seconds of the run.
    `prefill_tokens_per_sec`: tokens of the prompts of a batch over the seconds to its answers' first tokens.
    """

    ttft_ms: list[float]
    token_ms: list[float]
    output_tokens: int
    sec: float
    prefill_tokens_per_sec: float
    acceptance: Acceptance = field(default_factory=Acceptance)
    step_ms: list[float] = field(default_factory=list)
    plans: Counter[TreePlan] = field(default_factory=Counter)
    # Of each answer, where they are told apart.
    requests: list[RequestTimes] = field(default_factory=list)
    # When the answers were made, in seconds since 1970; what else is timed of a run is outside.
    span: tuple[float, float] | None = None

    @property
    def tokens_per_sec(self) -> float:
        return self.output_tokens / self.sec


def summarise(runs: Sequence[MeasuredRun]) -> dict[str, Any]:
    """Latencies over the requests and tokens of all runs, medians of their rates; `spread` is between the runs."""
    tokens = [ms for run in runs for ms in run.token_ms]
    has_tokens = all(run.token_ms for run in runs)
    per_run = {
        "ttft_ms": [statistics.median(run.ttft_ms) for run in runs],
        "tpot_p50_ms": [statistics.median(run.token_ms) for run in runs] if has_tokens else [],
        "tpot_p99_ms": [p99(run.token_ms) for run in runs] if has_tokens else [],
        "tokens_per_sec": [run.tokens_per_sec for run in runs],
        "prefill_tokens_per_sec": [run.prefill_tokens_per_sec for run in runs],
    }
    return {
        "ttft_ms": statistics.median(ms for run in runs for ms in run.ttft_ms),
        "tpot_ms": p50_p99(tokens),
        "tokens_per_sec": statistics.median(per_run["tokens_per_sec"]),
        "prefill_tokens_per_sec": statistics.median(per_run["prefill_tokens_per_sec"]),
        "spread": {name: {"min": min(values), "max": max(values)} for name, values in per_run.items() if values},
    }
