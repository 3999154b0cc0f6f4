"""A workload answered by something that takes a batch and gives all its answers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from launcher.events import EventWriter
from launcher.job import Job
from launcher.tasks.requests import num_requests, run_prompts
from launcher.tasks.summary import MeasuredRun, summarise

# (prompts of equal length, tokens of each answer) -> the seconds until each token of the batch, one time for all rows
Answer = Callable[[list[list[int]], int], list[float]]


@dataclass(frozen=True)
class Baseline:
    """A loaded model. `weights_bytes` are those of this rank; None where other processes hold them."""

    answer: Answer
    weights_bytes: int | None


def measure(job: Job, baseline: Baseline, events: EventWriter) -> dict[str, Any]:
    """As task=bench measures its own engine; batches follow each other, since none can be joined."""
    workload = job.run.workload
    for number in range(workload.warm_up):
        measure_run(job, baseline.answer, -1 - number)
    runs = []
    for number in range(workload.repeats):
        runs.append(measure_run(job, baseline.answer, number))
        events.progress(f"measuring {job.baseline.value if job.baseline else ''}", number + 1, workload.repeats, "runs")
    return summarise(runs) | {"weights_bytes": baseline.weights_bytes}


def measure_run(job: Job, answer: Answer, number: int) -> MeasuredRun:
    workload = job.run.workload
    prompts = make_prompts(job, f"run {number}", num_requests(workload))
    first = make_prompts(job, f"prefill {number}", workload.batch_size)
    ttft_ms, token_ms, sec = [], [], 0.0
    for start in range(0, len(prompts), workload.batch_size):
        batch = prompts[start : start + workload.batch_size]
        times = answer(batch, workload.output_tokens)
        ttft_ms += [times[0] * 1e3] * len(batch)
        token_ms += [(after - before) * 1e3 for before, after in itertools.pairwise(times)]
        sec += times[-1]
    prefill_sec = answer(first, 1)[-1]
    prefill_rate = sum(len(prompt) for prompt in first) / prefill_sec
    return MeasuredRun(ttft_ms, token_ms, len(prompts) * workload.output_tokens, sec, prefill_rate)


def make_prompts(job: Job, name: str, num: int) -> list[list[int]]:
    """The prompts that this engine gets, too."""
    assert job.shape is not None and job.run.num_prompt_tokens is not None
    return run_prompts(job.run, name, num, job.run.num_prompt_tokens, job.shape.vocab_size)
