"""What is asked of a model: how many tokens, how many requests, and what else is measured on them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from parallel.kernels.limits import MAX_NODES

# Tokens of a random prompt where workload.prompt_tokens does not say.
RANDOM_PROMPT_TOKENS = 512


def middle_tokens(prompt_tokens: int, output_tokens: int) -> int:
    """Of a sequence half way through its answer, whose step stands for all of them."""
    return prompt_tokens + output_tokens // 2


class BaselineKind(str, Enum):
    """What task=bench can measure beside this engine; the last two beside layers that are streamed."""

    deepspeed = "deepspeed"
    transformers = "transformers"
    vllm = "vllm"
    accelerate = "accelerate"
    deepspeed_zero = "deepspeed_zero"


@dataclass
class WorkloadConfig:
    """The requests: what a plan counts with, what task=bench sends."""

    # Tokens of a prompt that the plan counts with; null where the prompts themselves tell (task=bench: 512).
    prompt_tokens: int | None = None
    # Tokens to generate per prompt, at most.
    output_tokens: int = 128
    # Prompts that run together.
    batch_size: int = 1
    # The rest is for task=bench. Requests of a measured run; null: batch_size.
    num_requests: int | None = None
    # Requests a second, at random times (Poisson, by sampling.seed); null: the next comes when one before it has ended.
    arrival_rate: float | None = None
    # A request is answered in good time with its first token, and then a token on average, within these; MLPerf's
    # limits of a served 70B.
    max_ttft_ms: float = 2000.0
    max_tpot_ms: float = 200.0
    # Measured runs; numbers are of all of them, with the spread between them.
    repeats: int = 3
    # Runs before them that are not measured.
    warm_up: int = 1

    def problems(self) -> Iterator[str]:
        for name in ("prompt_tokens", "output_tokens", "batch_size", "num_requests", "repeats"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"workload.{name}={value} must be at least 1."
        if self.arrival_rate is not None and not 0 < self.arrival_rate < math.inf:
            yield f"workload.arrival_rate={self.arrival_rate} must be above 0 requests a second, or null."
        for name in ("max_ttft_ms", "max_tpot_ms"):
            if not 0 < getattr(self, name) < math.inf:
                yield f"workload.{name}={getattr(self, name)} must be above 0 milliseconds."
        if self.warm_up < 0:
            yield f"workload.warm_up={self.warm_up} must be 0 (none) or above."

    def beyond_a_batch(self) -> list[str]:
        """Settings by which requests do not come as one batch, all at once, which is what plans predict times of."""
        more = [] if self.num_requests in (None, self.batch_size) else [f"workload.num_requests={self.num_requests}"]
        return more + ([] if self.arrival_rate is None else [f"workload.arrival_rate={self.arrival_rate}"])

    def bench_keys(self) -> list[str]:
        """Keys that were set and that only task=bench reads."""
        names = ("num_requests", "arrival_rate", "max_ttft_ms", "max_tpot_ms", "repeats", "warm_up")
        default = WorkloadConfig()
        return [f"workload.{name}" for name in names if getattr(self, name) != getattr(default, name)]


@dataclass
class BenchConfig:
    """What task=bench measures beside its workload."""

    # Others that run the same workload in ranks of their own afterwards: deepspeed, transformers, vllm; where
    # layers are streamed accelerate, which holds the same layers on the card, and deepspeed_zero, which holds none.
    baselines: list[BaselineKind] = field(default_factory=list)
    # Also time a pass that checks trees of drafts, for each of these numbers of tokens; 1 is a step without drafts.
    # Trees are as deep as speculation.tree_depth.
    tree_sizes: list[int] = field(default_factory=list)
    # What such passes would give if at each depth a draft came true with this chance, which only you can know.
    acceptance: float | None = None

    def problems(self) -> Iterator[str]:
        for size in self.tree_sizes:
            if not 1 <= size <= MAX_NODES:
                yield f"bench.tree_sizes: {size} must be from 1 to {MAX_NODES}."
        if self.acceptance is not None and not 0 <= self.acceptance <= 1:
            yield f"bench.acceptance={self.acceptance} must be from 0 to 1, or null."
        if self.acceptance is not None and not self.tree_sizes:
            yield f"bench.acceptance={self.acceptance} is read with bench.tree_sizes only. Set both, or neither."

    def bench_keys(self) -> list[str]:
        """As WorkloadConfig's."""
        default = BenchConfig()
        return [f"bench.{name}" for name in vars(default) if getattr(self, name) != getattr(default, name)]
