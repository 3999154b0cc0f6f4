"""How long the prompts of a run are: before it, for plans that stream layers; after it, for what is predicted of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

from launcher.config import RunConfig, TaskKind
from launcher.hardware.inventory import Inventory
from launcher.job import Job
from launcher.plan.limits import context_limit
from launcher.plan.plan import Plan
from launcher.plan.timed import predict_run
from launcher.prompts import prompt_key, read_prompts
from launcher.timing.predict import Times

# Of text, English or code, there are about four.
CHARACTERS_PER_TOKEN = 3


def with_prompts_of(run: RunConfig, tokens: int | None) -> RunConfig:
    return replace(run, workload=replace(run.workload, prompt_tokens=tokens))


def wants_lengths(job: Job, plan: Plan) -> bool:
    """Whether a plan gets better by knowing them: in place of room that no prompt of the job needs, the card holds
    layers."""
    is_open = job.run.task.kind == TaskKind.generate and job.run.engine.max_context is None
    return is_open and plan.offload is not None and len(job.prompts) > 0


def longest_prompt(job: Job) -> int:
    """Tokens of the longest prompt of `job`, but no more than the model can also answer at full length.

    It takes a second or two, as transformers is imported for it.

    Raises:
        ValueError: as ranks would raise it, of a tokenizer or prompts that cannot be used.
    """
    from launcher.tasks.tokens import encode_prompts, load_tokenizer

    assert job.shape is not None
    limit, _ = context_limit(job.shape, None if job.draft is None else job.draft.shape)
    longest = max(map(len, encode_prompts(job, load_tokenizer(job))))
    return max(1, min(longest, limit - job.run.workload.output_tokens))


def answered_times(job: Job, inventory: Inventory, lengths: Sequence[tuple[int, int]]) -> Times | str | None:
    """What rates say of a batch of prompts and answers as long as those of `job` were on average.

    Args:
        lengths: tokens of each prompt, and of its answer, which may have ended early.
    """
    assert job.plan is not None and job.shape is not None
    prompt_tokens, output_tokens = (round(statistics.mean(tokens)) for tokens in zip(*lengths, strict=True))
    workload = replace(
        job.run.workload,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        batch_size=min(len(lengths), job.run.workload.batch_size),
    )
    return predict_run(replace(job.run, workload=workload), job.plan, job.shape, inventory)


def estimate_longest_prompt(run: RunConfig) -> int:
    """Tokens of the longest prompt of a run, by its characters.

    Raises:
        ConfigError: prompts_file cannot be read.
    """
    return max(math.ceil(len(prompt_key(each)) / CHARACTERS_PER_TOKEN) for each in read_prompts(run)) or 1
