"""Generation of one batch: prefill, then one token a step until every sequence has ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer
from torch import Tensor

from parallel.engine.engine import Engine
from parallel.engine.sampling import Sampler
from parallel.engine.text import TextStream


@dataclass(frozen=True)
class StopRules:
    """What ends an answer: its length, an end-of-sequence token, or one of some texts (which is cut off)."""

    max_tokens: int
    eos_ids: frozenset[int] = frozenset()
    texts: tuple[str, ...] = ()


@dataclass
class Answer:
    """One sequence's answer. `finish_reason` is eos, stop, length, or context where the cache was full."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None


@dataclass(frozen=True)
class BatchResult:
    """Answers in prompt order, time to the first token and of each further step."""

    answers: list[Answer]
    last_tokens: Tensor
    ttft_ms: float
    step_ms: list[float]


def generate_batch(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    sampler: Sampler,
    tokenizer: Tokenizer,
    rules: StopRules,
    *,
    on_text: Callable[[int, str], None] = lambda row, text: None,
    on_prefill: Callable[[int, int], None] = lambda done, total: None,
) -> BatchResult:
    """Answers `prompts` (token ids). Times run from the call until each token is on the host.

    Args:
        on_text: called with (row, text) as soon as text of a row may be shown.
        on_prefill: called with the columns of the prompts that are done, and all of them.

    Raises:
        ValueError: a prompt that does not fit the cache.
    """
    answers = [Answer() for _ in prompts]
    streams = [TextStream(tokenizer, rules.texts) for _ in prompts]
    longest = max(len(prompt) for prompt in prompts)
    start = time.perf_counter()
    tokens = sampler(engine.prefill(prompts, on_progress=on_prefill))
    step_ms: list[float] = []
    while True:
        ids = tokens.tolist()
        now = time.perf_counter()
        step_ms.append((now - start) * 1e3)
        start = now
        room = engine.max_context - longest - len(step_ms)
        for row, token in enumerate(ids):
            if answers[row].finish_reason is None:
                shown = take_token(answers[row], streams[row], token, rules, room)
                if shown:
                    on_text(row, shown)
        if all(answer.finish_reason for answer in answers):
            return BatchResult(answers, tokens, step_ms[0], step_ms[1:])
        tokens = sampler(engine.decode(tokens))


def take_token(answer: Answer, stream: TextStream, token: int, rules: StopRules, room: int) -> str:
    """Adds one token to an answer, decides whether it ends there, and returns the text that may be shown now."""
    answer.token_ids.append(token)
    shown = stream.add(token)
    if token in rules.eos_ids:
        answer.finish_reason = "eos"
    elif stream.stopped:
        answer.finish_reason = "stop"
    elif len(answer.token_ids) >= rules.max_tokens:
        answer.finish_reason = "length"
    elif room <= 0:
        answer.finish_reason = "context"
    if answer.finish_reason is not None and not stream.stopped:
        shown += stream.finish()
    answer.text += shown
    return shown


def time_steps(engine: Engine, tokens: Tensor, num_steps: int) -> list[float]:
    """Milliseconds of each of `num_steps` decode steps that leave the sequences as they were."""
    times = []
    for _ in range(num_steps):
        start = time.perf_counter()
        engine.repeat_step(tokens)
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)
        times.append((time.perf_counter() - start) * 1e3)
    return times
