"""The passes of a batch of requests one after another, as the engine's scheduler orders them. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from launcher.timing.chunks import parts_of
from launcher.timing.load import Workload

# (parts of prompts) -> ms, and (sequences) -> ms.
ChunkMs = Callable[[list[tuple[int, int]]], float]
StepMs = Callable[[int], float]


@dataclass
class Answers:
    """When each prompt has its first token, and how long the others take: (milliseconds, tokens that took as long)."""

    first_ms: list[float] = field(default_factory=list)
    gaps: list[tuple[float, int]] = field(default_factory=list)
    end_ms: float = 0.0


def run_through(load: Workload, chunk_ms: ChunkMs, step_ms: StepMs) -> Answers:
    """Chunks are filled in order. Once answers are under way they are shorter, and a step follows each.

    As runs measure it, a token's time starts with the last arrival of any token, a prompt's first one too.
    """
    answers, read, left, clock = Answers(), 0, list[int](), 0.0
    while read < load.num_tokens:
        before = clock
        size = min(load.prefill_chunk_while_decoding, load.prefill_chunk) if left else load.prefill_chunk
        tokens = min(size, load.num_tokens - read)
        clock += chunk_ms(parts_of(read, tokens, load.prompt_tokens))
        started = (read + tokens) // load.prompt_tokens - read // load.prompt_tokens
        read += tokens
        answers.first_ms += [clock] * started
        left = [num for num in (*left, *[load.output_tokens - 1] * started) if num]
        if left:
            since, clock = clock if started else before, clock + step_ms(len(left))
            answers.gaps.append((clock - since, len(left)))
            left = [num - 1 for num in left if num > 1]
    while left:
        num_steps = min(left)
        each_ms = step_ms(len(left))
        clock += num_steps * each_ms
        answers.gaps.append((each_ms, num_steps * len(left)))
        left = [num - num_steps for num in left if num > num_steps]
    answers.end_ms = clock
    return answers


def median_of(gaps: list[tuple[float, int]]) -> float | None:
    """Of all tokens; None where there are none."""
    half, seen = sum(num for _, num in gaps) / 2, 0
    for each_ms, num in sorted(gaps):
        seen += num
        if seen >= half:
            return each_ms
    return None
