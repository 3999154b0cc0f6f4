"""The requests of task=bench: random prompts of equal length, at times that a seed decides."""

from __future__ import annotations

import random
from itertools import accumulate

from launcher.config import RunConfig, WorkloadConfig


def random_prompts(num: int, num_tokens: int, vocab_size: int, seed: str) -> list[list[int]]:
    """`num` prompts of `num_tokens` ids below `vocab_size`, the same ones for the same seed."""
    draw = random.Random(seed)
    return [draw.choices(range(vocab_size), k=num_tokens) for _ in range(num)]


def run_prompts(run: RunConfig, name: str, num: int, num_tokens: int, vocab_size: int) -> list[list[int]]:
    """Those of one run of the workload, called `name`: of its own for each length, for a longer prompt would begin as a
    shorter one, which the cache may still have."""
    return random_prompts(num, num_tokens, vocab_size, f"{run.sampling.seed} {name} {num_tokens}")


def arrival_times(num: int, rate: float, seed: int) -> list[float]:
    """Seconds from the start at which each of `num` requests comes, `rate` a second on average (a Poisson process).

    The first comes at the start.
    """
    draw = random.Random(seed)
    return [0.0, *accumulate(draw.expovariate(rate) for _ in range(num - 1))]


def num_requests(workload: WorkloadConfig) -> int:
    """Requests of a measured run."""
    return workload.num_requests or workload.batch_size
