"""How many tokens of prompts a pass reads while answers wait for it, by how long such passes take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from launcher.timing.chunks import chunk_cost
from launcher.timing.load import Work
from launcher.timing.predict import decode_parts
from launcher.timing.rates import Rates

# What a reader hardly notices between two tokens; answers of ten tokens a second are still faster than anyone reads.
UNNOTICED_MS = 100.0
# A pass reads and dequantises all weights, however few its tokens are. Where not even small ones are over in time, they
# are no smaller than reads prompts at such a share of the full chunk's rate: results/LOG.md, "chunks of prompts beside
# answers", has what smaller ones cost.
LEAST_SHARE = 3 / 4
SIZES = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)


@dataclass(frozen=True)
class ChunkChoice:
    """Tokens of prompts in a pass, and the milliseconds of such a pass and of a step after it: what an answer may have
    to wait for its next token."""

    tokens: int
    pass_ms: float
    step_ms: float

    @property
    def wait_ms(self) -> float:
        return self.pass_ms + self.step_ms

    @property
    def tokens_per_sec(self) -> float:
        """Of prompts, while answers take a step after each pass."""
        return self.tokens / self.wait_ms * 1e3


def choose_chunk(prefill_chunk: int, pass_ms: Callable[[int], float], step_ms: float) -> ChunkChoice:
    """The largest that is over unnoticed, of those up to `prefill_chunk` that are worth their fixed costs; where none
    is, the smallest of these."""
    sizes = [*(size for size in SIZES if size < prefill_chunk), prefill_chunk]
    choices = [ChunkChoice(size, pass_ms(size), step_ms) for size in sizes]
    least = LEAST_SHARE * choices[-1].tokens_per_sec
    worth = [choice for choice in choices if choice.tokens_per_sec >= least]
    unnoticed = [choice for choice in worth if choice.wait_ms <= UNNOTICED_MS]
    return unnoticed[-1] if unnoticed else worth[0]


def predict_chunk(work: Work, rates: Rates, *, prefill_chunk: int, batch_size: int, context: int) -> ChunkChoice:
    """By the rates of a machine, beside the steps of full rows of `context` tokens each.

    Raises:
        ValueError: the rates know nothing of the format.
    """
    rates.check_format(work.format)
    step_ms = sum(decode_parts(work, batch_size, batch_size * context, rates).values())
    slowdown = rates.slowdown.get(work.format, 1.0)

    def pass_ms(tokens: int) -> float:
        cost = chunk_cost(work, [(0, tokens)], rates)
        return max(cost.card * slowdown, cost.queue) + cost.lead

    return choose_chunk(prefill_chunk, pass_ms, step_ms)
