"""How long a pass takes that reads some tokens of some prompts. No torch."""

from __future__ import annotations

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


def chunk_ms(work: Work, parts: list[Part], rates: Rates) -> float:
    """A pass over `parts`: what the card takes, or the host to queue it, whichever is more, and what neither hides."""
    tokens = sum(num for _, num in parts)
    return interpolate(rates.prefill[work.format], tokens, lambda entry: _pass_us(work, parts, rates, entry)) / 1e3


def _pass_us(work: Work, parts: list[Part], rates: Rates, entry: ChunkRates) -> float:
    tokens, more_parts = sum(num for _, num in parts), len(parts) - 1
    pairs = sum(past * num + square_pairs(num) for past, num in parts) - entry.pairs
    message_us = ALL_REDUCES_PER_LAYER * rates.message_us_per_mb * work.message_bytes * tokens / MB
    attention_us = rates.pair_us * work.num_heads * pairs / 1e6
    layer_us = max(entry.layer.at(work.layer_plain_bytes), message_us) + attention_us + rates.part_us * more_parts
    queue_us = entry.host_layer.at(work.layer_plain_bytes) + rates.host_part_us * more_parts
    card_us = work.num_layers * layer_us + entry.rest.at(work.head_bytes)
    return max(card_us, work.num_layers * queue_us + entry.host_rest_us) + entry.lead_us
