"""Bytes a card, line by line, and what is refused for want of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console

from launcher.config import (
    DType,
    HardwareConfig,
    HardwareKind,
    KVDType,
    LimitsConfig,
    OffloadConfig,
    SpeculationKind,
    TaskConfig,
    TaskKind,
)
from launcher.hardware.inventory import read_inventory
from launcher.memory.demand import Demand
from launcher.models.shape import ModelShape, quantized_shape
from launcher.plan.plan import DRIVER_RESERVED_BYTES
from launcher.plan.timed import plan_timed
from launcher.plan.topology import place_ranks
from launcher.report.plan_text import plan_tables
from launcher.timing.predict import Times
from parallel.checkpoint.quantize_schemes import QUANTIZE_SCHEMES
from parallel.units import GIB
from tests.launcher.jobs import RTX_4090
from tests.launcher.plans import (
    CPU,
    LLAMA_8B,
    LLAMA_70B,
    LLAMA_70B_AWQ,
    NO_TIMES,
    TINY,
    cards_of,
    plan,
    refused,
    run_of,
)


def test_lines_add_up_and_name_every_part() -> None:
    decided = plan(LLAMA_70B_AWQ, cards_of(3), 3)
    parts = [f"weights.{part}" for part in ("embedding", "head", "attention", "mlp", "norms")]
    for card in decided.cards:
        assert list(card.lines) == ["context", "communicator", *parts, "kv_cache", "activations", "graphs"]
        assert sum(card.lines.values()) == card.predicted_bytes <= card.budget_bytes


def test_kv_cache_is_counted_for_the_heads_of_each_rank() -> None:
    decided = plan(LLAMA_70B_AWQ, cards_of(3), 3, engine__max_context=1000, workload__batch_size=4)
    # 16 pages a sequence and one more, of 64 tokens x 80 layers x keys and values x 3, 3 and 2 heads x 128 x bf16.
    assert [card.lines["kv_cache"] for card in decided.cards] == [
        (4 * 16 + 1) * 64 * 80 * 2 * heads * 128 * 2 for heads in (3, 3, 2)
    ]
    assert decided.kv_bytes_per_token == 80 * 2 * 3 * 128 * 2


def test_fp8_halves_the_kv_cache_and_is_advised_where_it_would_fit() -> None:
    sizes = [plan(LLAMA_70B_AWQ, cards_of(2), 2, engine__kv_dtype=kind) for kind in (KVDType.auto, KVDType.fp8)]
    bf16, fp8 = (decided.cards[0].lines["kv_cache"] / decided.max_context for decided in sizes)
    assert fp8 == pytest.approx(bf16 / 2, rel=0.02)
    changes = {"engine__max_context": 40000}
    assert "engine.kv_dtype=fp8" in refused(LLAMA_70B_AWQ, cards_of(2), 2, **changes)
    plan(LLAMA_70B_AWQ, cards_of(2), 2, engine__kv_dtype=KVDType.fp8, **changes)


def test_budget_is_the_card_less_what_the_driver_keeps() -> None:
    decided = plan(TINY, cards_of(1, memory_bytes=10 * GIB))
    assert decided.cards[0].budget_bytes == 10 * GIB - DRIVER_RESERVED_BYTES


@pytest.mark.parametrize(("limit_gib", "expected_gib"), [(6.0, 6), (100.0, 10)])
def test_card_memory_limit_lowers_the_budget_only(limit_gib: float, expected_gib: int) -> None:
    decided = plan(TINY, cards_of(1, memory_bytes=10 * GIB), limits=LimitsConfig(card_memory_gib=limit_gib))
    assert decided.cards[0].budget_bytes == expected_gib * GIB - DRIVER_RESERVED_BYTES


def test_card_memory_limit_holds_on_the_cpu() -> None:
    assert plan(TINY, CPU, 2, limits=LimitsConfig(card_memory_gib=3)).cards[0].budget_bytes == 3 * GIB


def test_memory_that_others_hold_counts_for_a_run_but_not_for_a_plan() -> None:
    busy = cards_of(1, free_bytes=2 * GIB)
    assert plan(TINY, busy).cards[0].budget_bytes > 20 * GIB
    assert plan(TINY, busy, task=TaskConfig(TaskKind.generate)).cards[0].budget_bytes == 2 * GIB
    assert "2.00 free" in refused(LLAMA_8B, busy, task=TaskConfig(TaskKind.generate))


def test_card_that_hides_its_memory_asks_for_a_limit() -> None:
    hidden = cards_of(1, memory_bytes=0)
    assert "limits.card_memory_gib" in refused(TINY, hidden)
    assert plan(TINY, hidden, limits=LimitsConfig(card_memory_gib=8)).placement.world_size == 1


def test_no_line_shrinks_as_the_context_grows() -> None:
    demand = Demand(LLAMA_8B, 3, 128, "bfloat16", "auto", "cuda", "nccl", batch_size=3, prefill_chunk=512)
    totals = [sum(demand.lines(tokens)[0].values()) for tokens in range(1, 6000, 7)]
    assert totals == sorted(totals)


def test_smaller_prefill_chunks_take_less() -> None:
    large, small = (
        plan(LLAMA_8B, cards_of(1), engine__prefill_chunk=chunk).cards[0].lines["activations"] for chunk in (2048, 256)
    )
    assert small < large


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("shape", "world_size"), [(LLAMA_70B_AWQ, 2), (LLAMA_8B, 1)])
def test_tokens_that_fit_are_those_of_the_longest_sequences(
    shape: ModelShape, world_size: int, batch_size: int
) -> None:
    """Asked for, they fit, and a page more does not: activations and places in the cache grow with them."""
    changes = {"workload__batch_size": batch_size, "workload__output_tokens": 1}
    cards = cards_of(world_size)
    tokens, left = divmod(plan(shape, cards, world_size, **changes).kv_tokens_that_fit, batch_size)
    assert left == 0
    longest = plan(shape, cards, world_size, engine__max_context=tokens, **changes)
    assert longest.kv_tokens_that_fit == batch_size * tokens
    assert f"up to {tokens} tokens" in refused(shape, cards, world_size, engine__max_context=tokens + 64, **changes)


@pytest.mark.parametrize(("batch_size", "kv_dtype", "kv_bytes"), [(1, KVDType.auto, 2), (8, KVDType.fp8, 1)])
def test_time_floor_reads_keys_and_values_and_all_weights_but_the_embedding(
    batch_size: int, kv_dtype: KVDType, kv_bytes: int
) -> None:
    """Of the batch that is asked for, half way through its answers."""
    changes = {"workload__prompt_tokens": 512, "workload__output_tokens": 256, "engine__kv_dtype": kv_dtype}
    decided = plan(LLAMA_8B, cards_of(1), workload__batch_size=batch_size, **changes)
    lines = decided.cards[0].lines
    read_bytes = sum(lines[f"weights.{part}"] for part in ("head", "attention", "mlp", "norms"))
    read_bytes += batch_size * (512 + 128) * 32 * 2 * 8 * 128 * kv_bytes
    assert decided.tpot_floor_ms == pytest.approx(read_bytes / 1008e9 * 1e3)


@pytest.mark.parametrize("quantization", ["none", *QUANTIZE_SCHEMES])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_no_time_is_predicted_below_its_floor(quantization: str, world_size: int) -> None:
    """By rates from published facts, of plain weights too, which are read faster than a copy goes."""
    shape = LLAMA_8B if quantization == "none" else quantized_shape(LLAMA_8B, quantization)
    hardware = HardwareConfig(HardwareKind.facts, RTX_4090, 23.99, 1008.0, 4, 16, bf16_tflops=165.0)
    for batch_size in (1, 8, 32):
        run = run_of(hardware=hardware, workload__batch_size=batch_size, workload__prompt_tokens=256)
        inventory = read_inventory(hardware, world_size)
        decided, times = plan_timed(run, place_ranks(run, world_size, inventory), shape, inventory)
        assert isinstance(times, Times) and decided.tpot_floor_ms is not None
        assert decided.tpot_floor_ms < times.tpot_ms


def test_time_floor_is_of_steps_that_read_all_and_give_a_token() -> None:
    """Drafts give a step several tokens, and layers that the host computes are not copied."""
    assert plan(LLAMA_8B, cards_of(1), speculation__kind=SpeculationKind.ngram).tpot_floor_ms is None
    shared = plan(quantized_shape(LLAMA_70B, "int4"), cards_of(1), offload=OffloadConfig(host_layers=8))
    assert shared.offload is not None and shared.offload.host_may_compute and shared.tpot_floor_ms is None


def test_time_floor_reads_a_tied_embedding_as_the_head() -> None:
    tied = plan(replace(LLAMA_8B, tied_embeddings=True), cards_of(1)).tpot_floor_ms
    assert tied == pytest.approx(plan(LLAMA_8B, cards_of(1)).tpot_floor_ms)


def test_time_floor_is_unknown_without_bandwidth() -> None:
    assert plan(TINY, cards_of(1, memory_gb_per_sec=None)).tpot_floor_ms is None


# Memory of the load


def test_load_counts_where_it_takes_more_than_what_comes_after() -> None:
    """Of 8192 x 14336 weights: 2 bytes each as stored, and one rounded; less what stays."""
    shape = quantized_shape(LLAMA_70B, "int4")
    short = plan(shape, cards_of(2), 2, engine__max_context=256, engine__prefill_chunk=64, workload__output_tokens=8)
    numel = 8192 * 14336
    for card in short.cards:
        after = card.lines["kv_cache"] + card.lines["activations"]
        assert card.lines["load"] == pytest.approx(numel * (3 - (4 + 20 / 128) / 8) - after, rel=1e-6)
        assert sum(card.lines.values()) == card.predicted_bytes
    assert all("load" not in card.lines for card in plan(shape, cards_of(2), 2).cards)


def test_plain_load_counts_where_the_dtype_changes() -> None:
    small = {"engine__max_context": 32, "engine__prefill_chunk": 8, "workload__output_tokens": 8}
    (card,) = plan(LLAMA_8B, cards_of(1), 1, **small).cards
    # A layer in pieces, beside itself in one.
    layer = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336 + 2)
    assert card.lines["load"] == layer * 2 - card.lines["kv_cache"] - card.lines["activations"]
    (card,) = plan(replace(LLAMA_8B, dtype="float32"), cards_of(1), 1, model__dtype=DType.bfloat16, **small).cards
    after = card.lines["kv_cache"] + card.lines["activations"]
    assert card.lines["load"] == 128256 * 4096 * 4 - after


def test_plan_with_a_load_line_is_shown_whole() -> None:
    shape = quantized_shape(LLAMA_70B, "int4")
    decided = plan(shape, cards_of(2), 2, engine__max_context=256, engine__prefill_chunk=64, workload__output_tokens=8)
    console = Console(width=140)
    with console.capture() as captured:
        for table in plan_tables(decided, shape, NO_TIMES):
            console.print(table)
    assert "load" in captured.get() and "weights in int4, rounded while they load" in captured.get()
