"""Rates of cards that are not here, from published facts and from how near to them an H200 comes."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.config.hardware import LANE_GB_PER_SEC
from launcher.config.tasks import RATED_FORMATS
from launcher.timing.rates import ChunkRates, Line, PowerDraw, Rates, StepRates
from parallel.footprint import MIN_FUSED_ROWS

# Share of the memory bandwidth at which linears read their weights, by rows of a step: bytes over the time of a layer's
# linears, two H200 at Llama-70B's shapes (results/).
INT4_SHARE = {1: 0.75, 2: 0.75, 4: 0.74, 8: 0.72, 16: 0.58, 32: 0.44}
# 34.2 GB in 9.4, 10.2 and 10.7 ms at 1, 8 and 16 rows; at 32 between that and 14.6 at 48 (results/LOG.md).
BYTE_SHARE = {1: 0.76, 2: 0.75, 4: 0.73, 8: 0.70, 16: 0.67, 32: 0.56}
# Plain bf16 through cuBLAS.
PLAIN_SHARE = dict.fromkeys(INT4_SHARE, 0.9)
WEIGHTS_SHARE = {"bf16": PLAIN_SHARE, "int4": INT4_SHARE, "int8": BYTE_SHARE, "fp8": BYTE_SHARE}
HEAD_SHARE = 0.9
KV_SHARE = 0.6
COPY_SHARE = 0.88
# Norms, rotation, activation, attention at no context and the gaps between kernels, of a layer.
LAYER_START_US = 18.0
REST_START_US = 80.0
PRODUCT_SHARE = 0.7
# With weights as they are packed, it is assumed. Of cards that multiply by warp groups it is that of plain ones: 512
# rows of a 70B at TP2 took an H200 49.8 ms, and 48.1 with plain ones.
FUSED_SHARE = PRODUCT_SHARE * 8 / 9
WARP_GROUPS = 9.0
# With their scales.
PACKED_BITS = {"int4": 4.25, "int8": 8.25, "fp8": 8.25}
PLAIN_BITS = 16
# Read at 4 bits, written at 16, of a copy's bandwidth.
DEQUANTIZE_BYTES_PER_PLAIN_BYTE = 1.27
ATTENTION_SHARE = 0.4
FLOPS_PER_PAIR = 4 * 128
# An all-reduce of two ranks through host memory: 4.5 us and each byte 1.45 times (measured at PCIe 5.0), since it is
# written while others are read, and both directions at a time carry less than one. More ranks read as much from each
# other one, or take two such steps, each rank for its part: counted, not measured.
ALL_REDUCE_START_US = 4.5
WIRE_BYTES_PER_BYTE = 1.45
LINK_SHARE = 0.8
# Of its limit, what an H200 draws in steps of one sequence, and while it has nothing to do; passes of prompts reach it.
STEPS_POWER_SHARE, WAITING_POWER_SHARE = 0.7, 0.2
ROWS = tuple(INT4_SHARE)
TOKENS = (256, 512, 1024, 2048)
MESSAGE_BYTES = tuple(2**i for i in range(12, 21))


@dataclass(frozen=True)
class Facts:
    """Of one card and its link to the host, as published."""

    name: str
    memory_gb_per_sec: float
    bf16_tflops: float
    pcie_generation: int
    pcie_lanes: int
    power_w: float | None
    # As NVIDIA writes it; None: unknown.
    compute_capability: float | None = None

    @property
    def link_gb_per_sec(self) -> float:
        return LANE_GB_PER_SEC[self.pcie_generation] * self.pcie_lanes * LINK_SHARE


def rates_from_facts(facts: Facts, world_size: int) -> Rates:
    decode = {name: {rows: step_rates(facts, name, rows) for rows in ROWS} for name in RATED_FORMATS}
    prefill = {name: {tokens: chunk_rates(facts, name, tokens) for tokens in TOKENS} for name in RATED_FORMATS}
    return Rates(
        source=f"published figures of {facts.name}",
        assumptions=assumptions(facts, world_size),
        world_size=world_size,
        decode=decode,
        prefill=prefill,
        all_reduce_us={size: all_reduce_us(facts, world_size, size) for size in MESSAGE_BYTES if world_size > 1},
        pair_us=FLOPS_PER_PAIR * 1e6 / (facts.bf16_tflops * 1e12 * ATTENTION_SHARE) * 1e6,
        message_us_per_mb=us_per_mb(facts.link_gb_per_sec) * exchanged(world_size),
        power_draws={} if facts.power_w is None else dict.fromkeys(RATED_FORMATS, power_draw_of(facts.power_w)),
    )


def power_draw_of(limit_w: float) -> PowerDraw:
    return PowerDraw({1: STEPS_POWER_SHARE * limit_w}, limit_w, WAITING_POWER_SHARE * limit_w)


def step_rates(facts: Facts, name: str, rows: int) -> StepRates:
    return StepRates(
        layer=Line(LAYER_START_US, us_per_mb(facts.memory_gb_per_sec * WEIGHTS_SHARE[name][rows])),
        kv_us_per_mb=us_per_mb(facts.memory_gb_per_sec * KV_SHARE),
        rest=Line(REST_START_US, us_per_mb(facts.memory_gb_per_sec * HEAD_SHARE)),
    )


def all_reduce_us(facts: Facts, world_size: int, num_bytes: int) -> float:
    """Of a step's message, in one hop or in two, whichever is over first."""
    us = WIRE_BYTES_PER_BYTE * us_per_mb(facts.link_gb_per_sec) * num_bytes / 1e6
    return min(ALL_REDUCE_START_US + (world_size - 1) * us, 2 * ALL_REDUCE_START_US + exchanged(world_size) * us)


def exchanged(world_size: int) -> float:
    """Of a message, what a rank reads where each sums up its part: the others' shares of it, then the other parts."""
    return 2 * (world_size - 1) / world_size


def chunk_rates(facts: Facts, name: str, tokens: int) -> ChunkRates:
    """By the faster way, which a run finds out for itself; up to MIN_FUSED_ROWS it asks no further."""
    whole, packed = plain_us_per_mb(facts, name, tokens), packed_us_per_mb(facts, name, tokens)
    layer = packed if tokens <= MIN_FUSED_ROWS else min(whole, packed)
    return ChunkRates(Line(LAYER_START_US, layer), Line(REST_START_US, read_us_per_mb(facts)))


def plain_us_per_mb(facts: Facts, name: str, tokens: int) -> float:
    """Of a weight's bytes at 16 bits: dequantised where it is packed, then multiplied by."""
    dequantize = 0.0 if name not in PACKED_BITS else read_us_per_mb(facts) * DEQUANTIZE_BYTES_PER_PLAIN_BYTE
    return max(multiply_us_per_mb(tokens, facts.bf16_tflops * PRODUCT_SHARE), read_us_per_mb(facts)) + dequantize


def packed_us_per_mb(facts: Facts, name: str, tokens: int) -> float:
    """Of a weight's bytes at 16 bits, multiplied by as it is packed; as it is where it is not."""
    if name not in PACKED_BITS:
        return plain_us_per_mb(facts, name, tokens)
    read = read_us_per_mb(facts) * PACKED_BITS[name] / PLAIN_BITS
    return max(multiply_us_per_mb(tokens, fused_tflops(facts)), read)


def fused_tflops(facts: Facts) -> float:
    return facts.bf16_tflops * (PRODUCT_SHARE if facts.compute_capability == WARP_GROUPS else FUSED_SHARE)


def multiply_us_per_mb(tokens: int, tflops: float) -> float:
    """A weight of 2 bytes at 16 bits takes 2 operations a token."""
    return tokens / tflops


def read_us_per_mb(facts: Facts) -> float:
    return us_per_mb(facts.memory_gb_per_sec * COPY_SHARE)


def fused_up_to(facts: Facts, name: str) -> int:
    """Of TOKENS, the most that go with the weight as it is packed."""
    return max(
        tokens
        for tokens in TOKENS
        if tokens <= MIN_FUSED_ROWS or packed_us_per_mb(facts, name, tokens) < plain_us_per_mb(facts, name, tokens)
    )


def us_per_mb(gb_per_sec: float) -> float:
    return 1e3 / gb_per_sec


def assumptions(facts: Facts, world_size: int) -> tuple[str, ...]:
    """What the figures rest on, for reading."""
    found = [
        f"4-bit weights are read at {INT4_SHARE[1]:.0%} of {facts.memory_gb_per_sec:g} GB/s at one row, "
        f"{INT4_SHARE[32]:.0%} at 32, 8-bit ones at {BYTE_SHARE[1]:.0%} and {BYTE_SHARE[32]:.0%}, as on an H200",
        f"prompts are multiplied at {PRODUCT_SHARE:.0%} of {facts.bf16_tflops:g} TFLOP/s",
        f"up to {fused_up_to(facts, 'int4')} tokens by 4-bit weights as they are packed, at "
        f"{fused_tflops(facts):.0f} TFLOP/s; more by weights that are dequantised first",
    ]
    if facts.power_w is not None:
        found.append(
            f"a card draws {STEPS_POWER_SHARE:.0%} of {facts.power_w:g} W in steps, {WAITING_POWER_SHARE:.0%} while it "
            "waits, all of it in passes of prompts"
        )
    if world_size > 1:
        found.append(
            f"an all-reduce takes {ALL_REDUCE_START_US} us and its bytes {WIRE_BYTES_PER_BYTE:g} times over "
            f"{facts.link_gb_per_sec:.0f} GB/s"
            f"{' from each other card, or two such steps' * (world_size > 2)}; in prefill it runs beside the products"
        )
    return tuple(found)
