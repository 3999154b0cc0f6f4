"""How long a pass takes that reads some tokens of some prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from launcher.timing.load import ALL_REDUCES_PER_LAYER, Work
from launcher.timing.rates import MB, ChunkRates, Rates, interpolate

# A token that is read, and those of its prompt before it.
Part = tuple[int, int]


def parts_of(start: int, tokens: int, prompt_tokens: int) -> list[Part]:
    """(past, tokens) of each prompt in a chunk of `tokens` from token `start` of prompts one after another."""
    parts, end = [], start + tokens
    while start < end:
        past = start % prompt_tokens
        num = min(end - start, prompt_tokens - past)
        parts.append((past, num))
        start += num
    return parts


def square_pairs(tokens: int) -> float:
    """Pairs of a token and one that it attends to, of a prompt's first `tokens`."""
    return tokens * tokens / 2


@dataclass(frozen=True)
class PassCost:
    """Milliseconds of a pass: to queue it, on the card, and of what neither hides where the card has nothing else.

    `waits`, of `card`: for what is copied to it.
    """

    queue: float
    card: float
    lead: float
    waits: float = 0.0


def chunk_cost(work: Work, parts: list[Part], rates: Rates) -> PassCost:
    """Of a pass over `parts`, in proportion between the numbers of tokens that were timed."""
    tokens, table = sum(num for _, num in parts), rates.prefill[work.format]

    def at_tokens(us: Callable[[ChunkRates], float]) -> float:
        return interpolate(table, tokens, us) / 1e3

    return PassCost(
        queue=at_tokens(lambda entry: _queue_us(work, parts, rates, entry)),
        card=at_tokens(lambda entry: _card_us(work, parts, rates, entry)),
        lead=at_tokens(lambda entry: entry.lead_us),
    )


def _card_us(work: Work, parts: list[Part], rates: Rates, entry: ChunkRates) -> float:
    tokens = sum(num for _, num in parts)
    pairs = sum(past * num + square_pairs(num) for past, num in parts) - entry.pairs
    message_us = ALL_REDUCES_PER_LAYER * rates.message_us_per_mb * work.message_bytes * tokens / MB
    attention_us = rates.pair_us * work.num_heads * pairs / 1e6
    layer_us = max(entry.layer.at(work.layer_plain_bytes), message_us) + attention_us
    layer_us += _extra_us(work, parts, rates, "card_us")
    return work.num_layers * layer_us + entry.rest.at(work.head_bytes)


def _queue_us(work: Work, parts: list[Part], rates: Rates, entry: ChunkRates) -> float:
    layer_us = entry.host_layer.at(work.layer_plain_bytes) + _extra_us(work, parts, rates, "queue_us")
    return work.num_layers * layer_us + entry.host_rest_us


def _extra_us(work: Work, parts: list[Part], rates: Rates, name: str) -> float:
    """Of a layer, for what is not one prompt from its start. Where a pass begins within one, prompts cost what they do
    in the largest chunks: passes of whole prompts are captured up to some size, all others launched one by one."""
    is_fresh = all(past == 0 for past, _ in parts)
    more_parts = _at(work, parts, getattr(rates.parts if is_fresh else rates.parts.largest, name)) * (len(parts) - 1)
    return more_parts + (0.0 if is_fresh else _at(work, parts, getattr(rates.past, name)))


def _at(work: Work, parts: list[Part], table: Mapping[int, Mapping[int, float]]) -> float:
    if not table:
        return 0.0
    tokens = sum(num for _, num in parts)
    return interpolate(table, tokens, lambda by_bytes: interpolate(by_bytes, work.layer_plain_bytes, float))
