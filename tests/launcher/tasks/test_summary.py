"""Runs as one set of numbers, and the requests of a run."""

from __future__ import annotations

import statistics
from itertools import pairwise

import pytest

from launcher.config import WorkloadConfig
from launcher.tasks.requests import arrival_times, num_requests, random_prompts
from launcher.tasks.summary import MeasuredRun, summarise


def test_latencies_are_over_all_requests_and_rates_medians_of_runs() -> None:
    runs = [
        MeasuredRun([1.0, 2.0, 9.0], [10.0, 11.0], 100, 1.0, 5000.0),
        MeasuredRun([3.0], [12.0, 13.0, 50.0], 100, 4.0, 7000.0),
        MeasuredRun([4.0], [14.0], 100, 2.0, 6000.0),
    ]
    found = summarise(runs)
    assert found["ttft_ms"] == 3.0
    assert found["tpot_ms"] == {"p50": 12.5, "p99": 50.0}
    assert (found["tokens_per_sec"], found["prefill_tokens_per_sec"]) == (50.0, 6000.0)
    assert found["spread"] == {
        "ttft_ms": {"min": 2.0, "max": 4.0},
        "tpot_p50_ms": {"min": 10.5, "max": 14.0},
        "tpot_p99_ms": {"min": 11.0, "max": 50.0},
        "tokens_per_sec": {"min": 25.0, "max": 100.0},
        "prefill_tokens_per_sec": {"min": 5000.0, "max": 7000.0},
    }


def test_answers_of_one_token_have_no_steps() -> None:
    found = summarise([MeasuredRun([1.0], [], 1, 1.0, 1.0)])
    assert found["tpot_ms"] == {"p50": None, "p99": None}
    assert "tpot_p50_ms" not in found["spread"]


def test_prompts_have_the_length_asked_for_and_follow_the_seed() -> None:
    first, again, other = (random_prompts(3, 50, 7, seed) for seed in ("a", "a", "b"))
    assert first == again != other
    assert [len(prompt) for prompt in first] == [50] * 3
    assert {token for prompt in first for token in prompt} == set(range(7))
    assert first[0] != first[1]


def test_requests_arrive_at_the_rate_asked_for_and_at_random() -> None:
    times = arrival_times(4000, 8.0, seed=3)
    assert times == arrival_times(4000, 8.0, seed=3) != arrival_times(4000, 8.0, seed=4)
    assert times[0] == 0 and times == sorted(times)
    gaps = [after - before for before, after in pairwise(times)]
    # Of an exponential distribution mean and deviation are equal.
    assert statistics.mean(gaps) == pytest.approx(1 / 8, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(1 / 8, rel=0.1)


def test_as_many_requests_as_run_together_unless_told() -> None:
    assert num_requests(WorkloadConfig(batch_size=5)) == 5
    assert num_requests(WorkloadConfig(batch_size=5, num_requests=2)) == 2
