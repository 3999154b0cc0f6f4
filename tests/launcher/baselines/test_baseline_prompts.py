"""What baselines are asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.baselines.measure import measure_run
from launcher.config import SamplingConfig, WorkloadConfig
from launcher.tasks.bench import Bench
from parallel.engine.arrivals import alone
from tests.launcher.jobs import make_job, make_run
from tests.launcher.plans import TINY


@pytest.mark.parametrize("num_requests", [None, 2, 5])
def test_baselines_get_the_prompts_of_this_engine(tmp_path: Path, num_requests: int | None) -> None:
    workload = WorkloadConfig(prompt_tokens=7, output_tokens=2, batch_size=3, num_requests=num_requests)
    run = make_run(workload=workload, sampling=SamplingConfig(seed=5))
    job = replace(make_job(tmp_path, run=run), shape=TINY)
    context: Any = SimpleNamespace(job=job)
    engine: Any = None
    bench, asked = Bench(context, engine, 7, TINY.vocab_size, alone), list[list[int]]()

    def answer(prompts: list[list[int]], num_tokens: int) -> list[float]:
        asked.extend(prompts)
        return [0.1 * (token + 1) for token in range(num_tokens)]

    measure_run(job, answer, 4)
    ours = [*bench.prompts(num_requests or 3, "run 4"), *bench.prompts(3, "prefill 4")]
    assert asked == [each.token_ids for each in ours]
