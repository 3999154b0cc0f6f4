"""task=generate: load the model, answer the prompts, measure as it goes."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from launcher.prompts import Prompt, prompt_key, where_from
from launcher.rank.context import RankContext
from launcher.tasks.copy_rates import pinned_copy_bandwidth
from launcher.tasks.loaded import LoadedModel, load_model
from launcher.tasks.measure import communication, latencies, reuse
from launcher.tasks.offload import streaming
from launcher.tasks.speculated import Steps, speculated
from launcher.tasks.tokens import (
    check_known,
    check_lengths,
    encode_prompts,
    load_tokenizer,
)
from parallel.engine import generate
from parallel.engine.answer import Answer, StopRules
from parallel.engine.generate import Result
from parallel.engine.pending import ModelError

WARM_UP_TOKENS = 64


def run_generate(context: RankContext) -> dict[str, Any]:
    """Answers every prompt of the job. Rank 0 writes the answers; all ranks return the same measurements.

    Raises:
        ValueError: the tokenizer's files cannot be used or are another model's, a prompt has no tokens or too many for
            the cache, or is chat messages for a model without a chat template.
        ModelError: after a prompt the model gives no numbers.
        RuntimeError: ranks picked different tokens.
    """
    job = context.job
    assert job.plan is not None, "the parent plans a model for this task"
    tokenizer = load_tokenizer(job)
    # Before the weights: a prompt that cannot be answered is told in seconds.
    token_ids = encode_prompts(job, tokenizer)
    check_lengths(job, token_ids)
    check_known(job, token_ids)
    pinned_copy = pinned_copy_bandwidth(context.device) if job.plan.offload else None
    loaded = load_model(context, job.plan, tokenizer)
    warm_up_sec = warm_up(loaded)
    context.reached("ready")
    started = time.time()
    result = answer_prompts(context, loaded, token_ids)
    ended = time.time()
    check_same_tokens(context, result.answers)
    contexts = longest_contexts(token_ids, result)
    offload = streaming(loaded.engine, contexts, statistics.median(result.step_ms or [0.0]), pinned_copy)
    steps = Steps(result.acceptance, result.step_ms, result.plans)
    return {
        "warm_up_sec": warm_up_sec,
        **latencies(result),
        "prefix_cache": reuse(result) if job.run.engine.prefix_cache else None,
        "generated_tokens": sum(len(answer.token_ids) for answer in result.answers),
        "generation": [(started, ended)],
        "speculation": speculated(context, loaded, steps, contexts, offload),
        "offload": offload,
        **communication(context, loaded.engine, contexts),
        **loaded.results(context),
        "outputs": [output_line(*each) for each in zip(job.prompts, token_ids, result.answers, strict=True)],
    }


def warm_up(loaded: LoadedModel) -> float:
    """A few tokens through every row, untimed: first calls load kernels. Returns the seconds."""
    start = time.perf_counter()
    limits = loaded.engine.limits
    prompt = [0] * min(WARM_UP_TOKENS, limits.max_context - 1)
    prompts = [generate.Prompt(row, prompt) for row in range(limits.batch_size)]
    generate.generate(loaded.engine, prompts, loaded.tokenizer, StopRules(max_tokens=2))
    return time.perf_counter() - start


def answer_prompts(context: RankContext, loaded: LoadedModel, token_ids: list[list[int]]) -> Result:
    """Answers all prompts; those to a file are written as each ends."""
    job, events = context.job, context.events
    single = job.run.prompts_file is None
    num_done = 0

    def show_text(row: int, text: str) -> None:
        if single:
            events.text(text)

    def show_prefill(done: int, total: int) -> None:
        if single:
            events.progress("prefill", done, total, "tokens")

    def keep_answer(row: int, answer: Answer) -> None:
        nonlocal num_done
        num_done += 1
        if context.rank == 0 and not single:
            append_lines(job.output_path, [output_line(job.prompts[row], token_ids[row], answer)])
            events.progress("answering", num_done, len(token_ids), "prompts")

    prompts = [
        generate.Prompt(prompt.index, ids, seed=prompt.seed) for prompt, ids in zip(job.prompts, token_ids, strict=True)
    ]
    listener = generate.Listener(show_text, show_prefill, keep_answer)
    try:
        return generate.generate(loaded.engine, prompts, loaded.tokenizer, loaded.rules, listener)
    except ModelError as error:
        (prompt,) = (each for each in job.prompts if each.index == error.index)
        raise ModelError(error.index, f"{where_from(job.run)}{prompt.name}") from None


def longest_contexts(token_ids: Sequence[list[int]], result: Result) -> list[int]:
    """Tokens of each sequence at its end, prompt and answer."""
    return [len(ids) + len(answer.token_ids) for ids, answer in zip(token_ids, result.answers, strict=True)]


def check_same_tokens(context: RankContext, answers: Sequence[Answer]) -> None:
    """Ranks that drifted apart would go on to write nonsense, each its own; one small exchange a run finds them."""
    digest = hash(tuple(tuple(answer.token_ids) for answer in answers)) % 2**31
    digests = context.communicator.all_gather(torch.tensor([float(digest)], dtype=torch.float64, device=context.device))
    if not bool((digests == digests[0]).all()):
        raise RuntimeError("ranks picked different tokens: the links or a card corrupt data. Check with task=probe.")


def output_line(prompt: Prompt, token_ids: Sequence[int], answer: Answer) -> dict[str, Any]:
    of_prompt = {"index": prompt.index, "prompt": prompt_key(prompt), "seed": prompt.seed}
    return of_prompt | {"num_prompt_tokens": len(token_ids), **asdict(answer)}


def append_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Appends and flushes, so that a crash loses no answer that was done.

    Raises:
        OSError: with the file's name, which a full disk's own error lacks.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
