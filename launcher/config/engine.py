"""How a model answers: its engine, and how tokens are drawn."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from parallel.footprint import MIN_FUSED_ROWS

AUTO = "auto"
# Tokens of prompt in a pass while answers wait for it, where nobody knows how long passes take.
UNTIMED_CHUNK = 512
# As many as anyone can use: noise is a function of a seed and of what is drawn, and takes any number.
MAX_SEED = 2**32 - 1


class KVDType(str, Enum):
    """Type of keys and values in the cache; `auto` is the activations' own."""

    auto = "auto"
    fp8 = "fp8"


class TransportKind(str, Enum):
    """What carries collectives between cards: `auto` takes, for each size of message, the fastest that works."""

    auto = "auto"
    nccl = "nccl"
    host_memory = "host_memory"


class PrefillGraphs(str, Enum):
    """Whether small passes of prompts are captured; `auto`: on cards so fast that they would wait for the host, where
    there is memory for it."""

    auto = "auto"
    on = "on"
    off = "off"


@dataclass
class SamplingConfig:
    """How tokens are drawn from logits, and what ends an answer."""

    # 0 is greedy.
    temperature: float = 0.0
    # 0 keeps every token.
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    # Texts that end an answer; they are cut off it.
    stop: list[str] = field(default_factory=list)

    def problems(self) -> Iterator[str]:
        if not 0 <= self.temperature < math.inf:
            yield f"sampling.temperature={self.temperature} must be 0 (greedy) or above."
        if not 0 < self.top_p <= 1:
            yield f"sampling.top_p={self.top_p} must be above 0 and at most 1."
        if self.top_k < 0:
            yield f"sampling.top_k={self.top_k} must be 0 (all tokens) or above."
        if not 0 <= self.seed <= MAX_SEED:
            yield f"sampling.seed={self.seed} must be from 0 to {MAX_SEED}."
        if any(not text for text in self.stop):
            yield "sampling.stop holds an empty text, which would end every answer at once."


@dataclass
class EngineConfig:
    """How a model is run on its cards: context and KV cache, passes of prefill, all-reduces."""

    # Tokens a sequence may have, prompt and answer; null: 8192, or more where the workload needs it, as far as they fit
    # and the model's own limit goes; beside streamed layers what the prompts and answers need.
    max_context: int | None = None
    # `fp8` (e4m3) halves the KV cache and rounds it to 4 significant bits.
    kv_dtype: KVDType = KVDType.auto
    # Tokens of prompt that go through the model at a time; bounds the memory of activations.
    prefill_chunk: int = 2048
    # The same while answers are being written, each of which waits for the whole pass before its next token. auto: by
    # this machine's rates, as many as take with a step no longer than 100 ms, but not so few that prompts are read at
    # less than three quarters of the full chunk's rate; 512 where rates are not known. Where nobody waits for single
    # tokens, as large as prefill_chunk answers more of them a second.
    prefill_chunk_while_decoding: int | str = AUTO
    # Capture passes of up to 1024 tokens as CUDA graphs, for hosts that queue kernels slower than cards run them: the
    # first sizes that come a second time, which then take a moment, three at a time. Takes up to 1.2 MiB of card memory
    # a layer for each. auto, on or off.
    prefill_graphs: PrefillGraphs = PrefillGraphs.auto
    # Products of up to so many rows are with 4- and 8-bit weights as they are packed; for more the weights are
    # dequantised first. null: as many as a trial at the start shows to be faster so, on this card; near the crossing
    # answers may then differ from one start to the next, by roundings.
    fused_prefill_rows: int | None = None
    # Keep keys and values of prompts while there is room, in pages of 64 tokens, for prompts that begin the same.
    prefix_cache: bool = True
    # Steps timed with and without all-reduces to find the share of communication; 0 leaves it out.
    comm_share_steps: int = 16
    # Between cards; ranks on the CPU talk through gloo.
    transport: TransportKind = TransportKind.auto
    # 8 rounds partial sums of up to 2 MiB on their way through host memory, where that is faster: decode steps of many
    # sequences say less than six tenths of the bytes, and answers are no longer those of one card.
    all_reduce_bits: int = 16

    @property
    def untimed_chunk(self) -> int:
        """prefill_chunk_while_decoding, as far as that can be said without times."""
        asked = self.prefill_chunk_while_decoding
        return asked if isinstance(asked, int) else min(self.prefill_chunk, UNTIMED_CHUNK)

    def problems(self) -> Iterator[str]:
        if self.max_context is not None and self.max_context < 2:
            yield f"engine.max_context={self.max_context} must be at least 2: one token of prompt and one of answer."
        if self.prefill_chunk < 1:
            yield f"engine.prefill_chunk={self.prefill_chunk} must be at least 1."
        asked = self.prefill_chunk_while_decoding
        if asked != AUTO and not (isinstance(asked, int) and asked >= 1):
            yield f"engine.prefill_chunk_while_decoding={asked} must be at least 1, or {AUTO}."
        if self.fused_prefill_rows is not None and self.fused_prefill_rows < MIN_FUSED_ROWS:
            yield (
                f"engine.fused_prefill_rows={self.fused_prefill_rows} must be at least {MIN_FUSED_ROWS}, up to which "
                "products are with packed weights on any card; or null, to measure it."
            )
        if self.all_reduce_bits not in (8, 16):
            yield f"engine.all_reduce_bits={self.all_reduce_bits} must be 16 (exact) or 8."
        if self.all_reduce_bits == 8 and self.transport == TransportKind.nccl:
            yield "engine.all_reduce_bits=8 goes through host memory: leave engine.transport=auto, or keep 16 bits."
        if self.comm_share_steps < 0:
            yield f"engine.comm_share_steps={self.comm_share_steps} must be 0 (do not measure) or above."
