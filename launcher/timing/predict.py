"""How long a model's steps take on cards of known rates, and what holds them: sums of lines."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from functools import cache

from launcher.timing.chunks import Part, PassCost, chunk_cost
from launcher.timing.load import ALL_REDUCES_PER_LAYER, Work, Workload
from launcher.timing.passes import Answers, StepCost, median_of, run_through
from launcher.timing.power import PowerLimit
from launcher.timing.rates import MB, Rates, StepRates, interpolate


@dataclass(frozen=True)
class Times:
    """All predicted. `tpot_ms` is a step of all sequences, to which `parts_ms` adds up.

    `tokens_per_sec` counts prefill in, as runs do. `itl_ms` is the median over all tokens but first ones, also those of
    steps between which prompts are read; None where answers have one token.
    """

    source: str
    assumptions: tuple[str, ...]
    tpot_ms: float
    parts_ms: dict[str, float]
    comm_share: float
    limit: str
    tokens_per_sec: float
    ttft_ms: float
    prefill_tokens_per_sec: float
    tokens_per_joule: float | None
    itl_ms: float | None = None


# What each part of a step is held by.
LIMITS = {
    "weights": "memory bandwidth: reading the weights",
    "kv": "memory bandwidth: reading keys and values",
    "all_reduce": "communication between the cards",
    "starts": "the many small operations of a layer",
    "rest": "the head and sampling",
    "copies": "waiting for streamed layers: the link to the host, or the disk",
}


@dataclass(frozen=True)
class Copies:
    """Milliseconds that copies of a pass take while it computes: streamed layers, and for each token that it attends
    to, keys and values from host memory."""

    pass_ms: float = 0.0
    kv_token_ms: float = 0.0

    def ms(self, num_tokens: float) -> float:
        return self.pass_ms + self.kv_token_ms * num_tokens


NO_COPIES = Copies()


def predict_times(work: Work, load: Workload, rates: Rates, copies: Copies = NO_COPIES) -> Times:
    """The steps of `load`, in the middle of its answers.

    Raises:
        ValueError: the rates know nothing of the format.
    """
    rates.check_format(work.format)
    parts = decode_parts(work, load.batch_size, read_tokens(load), rates)
    copied_ms = copies.ms(read_tokens(load))
    if copied_ms:
        parts["copies"] = max(0.0, copied_ms - sum(parts.values()))
    tpot_ms = sum(parts.values())
    answers, prefill_only = (answer(work, each, rates, copies) for each in (load, load.prompts_only))
    tokens_per_sec = load.batch_size * load.output_tokens / answers.end_ms * 1e3
    return Times(
        source=rates.source,
        assumptions=rates.assumptions,
        tpot_ms=tpot_ms,
        parts_ms=parts,
        comm_share=parts["all_reduce"] / tpot_ms,
        limit=LIMITS[max(parts, key=lambda name: parts[name])],
        tokens_per_sec=tokens_per_sec,
        ttft_ms=statistics.median(answers.first_ms),
        prefill_tokens_per_sec=load.num_tokens / prefill_only.end_ms * 1e3,
        tokens_per_joule=tokens_per_joule(work, load, answers, rates),
        itl_ms=median_of(answers.gaps),
    )


def tokens_per_joule(work: Work, load: Workload, answers: Answers, rates: Rates) -> float | None:
    """Of all cards, from the first prompt to the last token; None where it is not known what they draw."""
    draw = rates.power_draws.get(work.format)
    if draw is None:
        return None
    steps, passes = draw.of_steps(load.batch_size) * answers.steps_ms, draw.passes * answers.passes_ms
    joules = rates.world_size * (steps + passes + draw.waiting * answers.waits_ms) / 1e3
    return load.batch_size * load.output_tokens / joules


def answer(work: Work, load: Workload, rates: Rates, copies: Copies) -> Answers:
    """The passes of `load`; each takes as long as its copies or more, and writes back what it reads of prompts."""
    table, tokens = rates.decode[work.format], load.middle_tokens
    power = PowerLimit(rates.slowdown.get(work.format, 1.0))

    @cache
    def step_cost(num_running: int) -> StepCost:
        # Steps are captured for some numbers of rows, those that are timed.
        num_rows = min((size for size in table if size >= num_running), default=load.batch_size)
        parts = decode_parts(work, min(num_rows, load.batch_size), num_running * tokens, rates)
        computed = sum(parts.values())
        waits = max(0.0, copies.ms(num_running * tokens) - computed)
        return StepCost(computed + waits, waits)

    def cost(parts: list[Part]) -> PassCost:
        found = chunk_cost(work, parts, rates)
        past, written_ms = sum(past for past, _ in parts), copies.kv_token_ms * sum(num for _, num in parts)
        computed = power.held(found.card)
        waits = max(written_ms, copies.ms(past) - computed)
        return replace(found, card=computed + waits, waits=waits)

    return run_through(load, cost, step_cost)


def decode_parts(work: Work, num_rows: int, num_tokens: int, rates: Rates) -> dict[str, float]:
    """Milliseconds of a step: weights, kv, all_reduce, starts (what no byte explains) and rest.

    Args:
        num_tokens: that all rows attend to.
    """
    table = rates.decode[work.format]

    def at_rows(name: str) -> float:
        return interpolate(table, num_rows, lambda entry: _values(entry, work)[name])

    message = work.message_bytes * num_rows
    call_us = interpolate(rates.all_reduce_us, message, float) if rates.all_reduce_us else 0.0
    layer = {
        "weights": at_rows("weights"),
        "kv": at_rows("kv_us_per_mb") * work.kv_bytes_per_token * num_tokens / MB,
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
    return load.batch_size * load.middle_tokens
