"""How long a model's steps take on cards of known rates, and what holds them: sums of lines. No torch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace

from launcher.timing.rates import MB, ChunkRates, Rates, StepRates, interpolate

ALL_REDUCES_PER_LAYER = 2


@dataclass(frozen=True)
class Work:
    """What the rank that has most does for a model; bytes of one layer, one token or the head on that rank."""

    format: str
    num_layers: int
    layer_bytes: int
    # At 16 bits, whatever the format.
    layer_plain_bytes: int
    head_bytes: int
    kv_bytes_per_token: int
    num_heads: int
    message_bytes: int


@dataclass(frozen=True)
class Workload:
    batch_size: int
    prompt_tokens: int
    output_tokens: int
    prefill_chunk: int
    # Where answers are under way.
    prefill_chunk_while_decoding: int

    @property
    def prompts_only(self) -> Workload:
        return replace(self, output_tokens=1)


@dataclass(frozen=True)
class Times:
    """All predicted. `parts_ms` adds up to `tpot_ms`; `floor_ms` reads each byte once at the speed of a copy, on
    the card or, of streamed layers, from the host.

    `tokens_per_sec` counts prefill in, as runs do.
    """

    source: str
    assumptions: tuple[str, ...]
    tpot_ms: float
    parts_ms: dict[str, float]
    floor_ms: float
    comm_share: float
    limit: str
    tokens_per_sec: float
    ttft_ms: float
    prefill_tokens_per_sec: float
    tokens_per_joule: float | None


# What each part of a step is held by.
LIMITS = {
    "weights": "memory bandwidth: reading the weights",
    "kv": "memory bandwidth: reading keys and values",
    "all_reduce": "communication between the cards",
    "starts": "the many small operations of a layer",
    "rest": "the head and sampling",
    "copies": "the link to the host: waiting for streamed layers",
}


def predict_times(work: Work, load: Workload, rates: Rates, pass_ms: float = 0.0) -> Times:
    """The steps of `load`, in the middle of its answers.

    Args:
        pass_ms: what streamed layers take to be copied, which goes on while the others compute.

    Raises:
        ValueError: the rates know nothing of the format.
    """
    if work.format not in rates.decode:
        raise ValueError(f"rates of {rates.source} have no {work.format}; they have {', '.join(rates.decode)}")
    parts = decode_parts(work, load, rates)
    if pass_ms:
        parts["copies"] = max(0.0, pass_ms - sum(parts.values()))
    tpot_ms = sum(parts.values())
    prompts_ms = prefill_ms(work, load, rates, tpot_ms, pass_ms)
    prefill_only_ms = max(prefill_ms(work, load.prompts_only, rates, tpot_ms, pass_ms))
    answers_ms = max(prompts_ms) + (load.output_tokens - 1) * tpot_ms
    tokens_per_sec = load.batch_size * load.output_tokens / answers_ms * 1e3
    return Times(
        source=rates.source,
        assumptions=rates.assumptions,
        tpot_ms=tpot_ms,
        parts_ms=parts,
        floor_ms=max(step_bytes(work, load) / rates.copy_gb_per_sec / 1e6, pass_ms),
        comm_share=parts["all_reduce"] / tpot_ms,
        limit=LIMITS[max(parts, key=lambda name: parts[name])],
        tokens_per_sec=tokens_per_sec,
        ttft_ms=statistics.median(prompts_ms),
        prefill_tokens_per_sec=load.batch_size * load.prompt_tokens / prefill_only_ms * 1e3,
        tokens_per_joule=tokens_per_sec / (rates.power_w * rates.world_size) if rates.power_w else None,
    )


def decode_parts(work: Work, load: Workload, rates: Rates) -> dict[str, float]:
    """Milliseconds of a step: weights, kv, all_reduce, starts (what no byte explains) and rest."""
    table = rates.decode[work.format]

    def at_rows(name: str) -> float:
        return interpolate(table, load.batch_size, lambda entry: _values(entry, work)[name])

    kv_mb = work.kv_bytes_per_token * read_tokens(load) / MB
    message = work.message_bytes * load.batch_size
    call_us = interpolate(rates.all_reduce_us, message, float) if rates.all_reduce_us else 0.0
    layer = {
        "weights": at_rows("weights"),
        "kv": at_rows("kv_us_per_mb") * kv_mb,
        "all_reduce": call_us * ALL_REDUCES_PER_LAYER,
        "starts": at_rows("starts"),
    }
    return {name: work.num_layers * us / 1e3 for name, us in layer.items()} | {"rest": at_rows("rest") / 1e3}


def _values(entry: StepRates, work: Work) -> dict[str, float]:
    return {
        "weights": entry.layer.at(work.layer_bytes) - entry.layer.start_us,
        "starts": entry.layer.start_us,
        "kv_us_per_mb": entry.kv_us_per_mb,
        "rest": entry.rest.at(work.head_bytes),
    }


def read_tokens(load: Workload) -> int:
    """Tokens that all sequences of a step attend to, half way through their answers."""
    return load.batch_size * (load.prompt_tokens + load.output_tokens // 2)


def step_bytes(work: Work, load: Workload) -> float:
    layers = work.num_layers * (work.layer_bytes + work.kv_bytes_per_token * read_tokens(load))
    return layers + work.head_bytes


def prefill_ms(work: Work, load: Workload, rates: Rates, step_ms: float, pass_ms: float) -> list[float]:
    """When each prompt of the batch has its first token: chunks are filled in order, and a prompt ends in one.

    Once answers are under way chunks are shorter, with a step between every two, counted as one of all rows.
    """
    table = rates.prefill[work.format]
    total, done_ms, clock, start = load.batch_size * load.prompt_tokens, list[float](), 0.0, 0
    while start < total:
        chunk, is_decoding = load.prefill_chunk, bool(done_ms) and load.output_tokens > 1
        if is_decoding:
            chunk, clock = min(chunk, load.prefill_chunk_while_decoding), clock + step_ms
        tokens = min(chunk, total - start)
        computed_ms = chunk_ms(work, table, tokens, rates) + past_ms(work, load, start, tokens, rates)
        clock += max(computed_ms, pass_ms)
        ended = (start + tokens) // load.prompt_tokens - start // load.prompt_tokens
        done_ms += [clock] * ended
        start += tokens
    return done_ms


def chunk_ms(work: Work, table: Mapping[int, ChunkRates], tokens: int, rates: Rates) -> float:
    message_us = ALL_REDUCES_PER_LAYER * rates.message_us_per_mb * work.message_bytes * tokens / MB

    def one(entry: ChunkRates) -> float:
        layer_us = max(entry.layer.at(work.layer_plain_bytes), message_us)
        return work.num_layers * layer_us + entry.rest.at(work.head_bytes)

    return interpolate(table, tokens, one) / 1e3


def past_ms(work: Work, load: Workload, start: int, tokens: int, rates: Rates) -> float:
    """What a chunk's tokens take to attend to those of their prompt that are in the cache already."""
    past = start % load.prompt_tokens
    inside = min(tokens, load.prompt_tokens - past)
    pairs = past * inside if past else 0
    return work.num_layers * work.num_heads * rates.pair_us * pairs / 1e6 / 1e3
