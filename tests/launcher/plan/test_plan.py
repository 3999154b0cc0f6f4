"""Plans as a whole: what can run, what is captured, and a 70B on RTX 4090s."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
from pydantic import TypeAdapter
from rich.console import Console

from launcher.config import (
    DType,
    HardwareConfig,
    HardwareKind,
    LimitsConfig,
    OffloadConfig,
    OffloadKind,
    PeerAccess,
    TaskConfig,
    TaskKind,
    TopologyConfig,
    TopologyKind,
    TransportKind,
)
from launcher.config.engine import PrefillGraphs
from launcher.hardware.inventory import read_inventory
from launcher.models.config_json import ShapeError
from launcher.models.shape import quantized_shape, shape_from_checkpoint, typical_quantization
from launcher.plan.plan import Plan, plan_run
from launcher.plan.prefill import wanted_passes
from launcher.plan.topology import PLAIN_TOPOLOGY, PlanError, place_ranks
from launcher.report.plan_text import describe, plan_tables
from launcher.timing.predict import Times
from parallel.checkpoint.quantize_schemes import QUANTIZE_SCHEMES
from parallel.footprint import held_bits
from parallel.units import GIB, MIB
from tests.launcher.demo_model import DEMO
from tests.launcher.jobs import RTX_4090
from tests.launcher.plans import (
    CPU,
    LLAMA_8B,
    LLAMA_70B,
    LLAMA_70B_AWQ,
    NO_TIMES,
    RESIDENT,
    TINY,
    cards_of,
    plan,
    refused,
    run_of,
)

# What can run here


def test_too_few_cards_names_cuda_visible_devices() -> None:
    message = refused(TINY, cards_of(1), 2)
    assert "gpus=2 but 1 card can be seen" in message
    assert "CUDA_VISIBLE_DEVICES" in message


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_without_cards_ranks_run_on_the_cpu(world_size: int) -> None:
    decided = plan(TINY, CPU, world_size)
    assert (decided.placement.device, decided.tpot_floor_ms) == ("cpu", None)
    assert decided.placement.transport == ("gloo" if world_size > 1 else "solo")
    assert [(card.card, card.name) for card in decided.cards] == [(None, "CPU")] * world_size
    assert {card.budget_bytes for card in decided.cards} == {64 * GIB // world_size}


def test_cards_talk_through_nccl_and_one_alone_through_nothing() -> None:
    assert plan(TINY, cards_of(2), 2).placement.transport == "nccl"
    assert plan(TINY, cards_of(2), 1).placement.transport == "solo"


@pytest.mark.parametrize("kind", [TransportKind.nccl, TransportKind.host_memory])
def test_transports_between_cards_need_cards(kind: TransportKind) -> None:
    assert plan(TINY, cards_of(2), 2, engine__transport=kind).placement.transport == "nccl"
    with pytest.raises(PlanError, match=f"engine.transport={kind.value} connects cards, .* Set engine.transport=auto."):
        plan(TINY, CPU, 2, engine__transport=kind)


def test_fewer_kv_heads_than_ranks_suggests_as_many_ranks() -> None:
    message = refused(replace(TINY, num_kv_heads=2), cards_of(4), 4)
    assert message == "the model has 2 KV heads; over 4 ranks some would hold none. Use gpus=2."


def test_fewer_cards_come_with_the_topology_that_they_have_where_one_was_asked_for() -> None:
    """Its number of cards would contradict gpus."""
    quad = TopologyConfig(TopologyKind.quad)
    assert refused(replace(TINY, num_kv_heads=2), cards_of(4), 4, topology=quad).endswith(
        "Use gpus=2 topology=dual_pcie."
    )
    message = refused(TINY, cards_of(1), 4, topology=quad)
    assert message.startswith("gpus=4 topology=quad but 1 card can be seen. Set gpus=1 topology=single, show more")


def test_quantised_weights_that_cannot_be_loaded_are_planned_but_not_run() -> None:
    shape = replace(TINY, quantization="quanto", linear_bits=4.25, not_loadable="quanto is unknown.")
    assert plan(shape, cards_of(1)).placement.world_size == 1
    message = refused(shape, cards_of(1), task=TaskConfig(TaskKind.generate))
    assert message.startswith("weights quantised as quanto: quanto is unknown. Set model.path")


def test_dtype_is_the_checkpoints_unless_set() -> None:
    assert plan(replace(TINY, dtype="float16"), cards_of(1)).dtype == "float16"
    assert plan(TINY, cards_of(1), model__dtype=DType.float32).dtype == "float32"


def test_float16_on_the_cpu_names_model_dtype() -> None:
    assert "model.dtype=float32" in refused(replace(TINY, dtype="float16"), CPU)
    assert "model.dtype=float32" in refused(TINY, CPU, model__dtype=DType.float16)


def test_small_models_are_dealt_in_smaller_grains() -> None:
    assert plan(LLAMA_70B_AWQ, cards_of(3), 3).grain == 128
    assert plan(TINY, cards_of(3), 3).grain == 64


# Graphs of passes


@pytest.mark.parametrize(
    ("asked", "rate", "captured"),
    [
        (PrefillGraphs.auto, 1008.0, False),
        (PrefillGraphs.auto, 4800.0, True),
        (PrefillGraphs.auto, None, False),
        (PrefillGraphs.on, 1008.0, True),
        (PrefillGraphs.off, 4800.0, False),
    ],
)
def test_small_passes_are_captured_and_planned_where_a_card_would_wait(
    asked: PrefillGraphs, rate: float | None, captured: bool
) -> None:
    inventory = cards_of(2, memory_gb_per_sec=rate)
    run = run_of(engine__prefill_graphs=asked)
    decided = plan(LLAMA_8B, inventory, 2, engine__prefill_graphs=asked)
    assert decided.captured_passes == wanted_passes(run, place_ranks(run, 2, inventory), inventory)
    assert (decided.captured_passes, decided.captured_passes_left_out) == (3 if captured else 0, False)
    lines = decided.cards[0].lines
    never = plan(LLAMA_8B, inventory, 2, engine__prefill_graphs=PrefillGraphs.off).cards[0].lines
    # 1.1 to 1.4 MiB of each layer for each of three passes, beside what their pieces hand to one another.
    more = lines["graphs"] - never["graphs"]
    assert (32 * 3 * 1.1 < more / MIB < 32 * 3 * 1.4 + 150) if captured else more == 0
    assert {**lines, "graphs": 0} == {**never, "graphs": 0}


def test_the_slowest_card_and_the_cpu_decide() -> None:
    cards = cards_of(2, memory_gb_per_sec=4800.0)
    slower = replace(cards, cards=(cards.cards[0], replace(cards.cards[1], memory_gb_per_sec=1008.0)))
    run = run_of()
    assert not wanted_passes(run, place_ranks(run, 2, slower), slower)
    assert wanted_passes(run, place_ranks(run, 1, slower), slower)
    asked = run_of(engine__prefill_graphs=PrefillGraphs.on)
    assert not wanted_passes(asked, place_ranks(asked, 2, CPU), CPU)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_passes_stay_whole_where_nvlink_carries_their_sums(world_size: int) -> None:
    """A whole pass has all its activations at once, a pass in sections those of one."""
    linked = tuple(combinations(range(world_size), 2))
    lines = {
        name: plan(LLAMA_70B, cards_of(world_size, links, memory_bytes=140 * GIB), world_size, **changes).cards[0].lines
        for name, links, changes in (
            ("pcie", (), {}),
            ("one pair is not", linked[1:], {}),
            ("nvlink", linked, {}),
            ("by another name", linked, {"topology": TopologyConfig(PLAIN_TOPOLOGY[world_size])}),
            ("not used", linked, {"limits": LimitsConfig(peer_access=PeerAccess.off)}),
            ("host memory", linked, {"engine__transport": TransportKind.host_memory}),
        )
    }
    by_path = {name: each["activations"] for name, each in lines.items()}
    assert by_path["pcie"] == by_path["one pair is not"] == by_path["not used"] == by_path["host memory"]
    # Gate and up, and their product, of 2048 tokens in place of 1024.
    assert by_path["nvlink"] - by_path["pcie"] > 1024 * (2 + 1) * 28672 // world_size * 2
    assert by_path["by another name"] == by_path["nvlink"]
    assert lines["nvlink"]["communicator"] == 838 * MIB > lines["one pair is not"]["communicator"]


# H200 as far as they tell, of which a run may have 24 GiB.
H200S = cards_of(2, name="NVIDIA H200", memory_bytes=140 * GIB, memory_gb_per_sec=4800.0, compute_capability=(9, 0))
# RedHatAI/Llama-3.3-70B-Instruct-quantized.w4a16: symmetric.
W4A16 = replace(
    LLAMA_70B,
    quantization="compressed-tensors",
    linear_bits=4.125,
    **typical_quantization("compressed-tensors", 4.125),
)


def batch_of(size: int, prompt_tokens: int = 512, output_tokens: int = 256, **changes: Any) -> dict[str, Any]:
    workload = {"batch_size": size, "prompt_tokens": prompt_tokens, "output_tokens": output_tokens}
    limits = {"limits": LimitsConfig(card_memory_gib=24.0)}
    return {**limits, **{f"workload__{name}": value for name, value in workload.items()}, **changes}


def test_a_batch_that_fits_only_without_captured_passes_has_none_and_says_so() -> None:
    """32 x (512 + 256) tokens of a 70B in 4 bits on two cards of 24 GiB; nothing is streamed."""
    small, large = (plan(W4A16, H200S, 2, **batch_of(size)) for size in (8, 32))
    assert (small.captured_passes, small.captured_passes_left_out, small.offload) == (3, False, None)
    assert (large.captured_passes, large.captured_passes_left_out, large.offload) == (0, True, None)
    assert large.max_context >= 768
    rows = [dict(describe(each, W4A16, NO_TIMES)) for each in (small, large)]
    assert "graphs of prompts" not in rows[0] and "engine.prefill_graphs=auto" in rows[1]["graphs of prompts"]


def test_captured_passes_that_were_asked_for_are_not_left_out() -> None:
    asked = batch_of(32, engine__prefill_graphs=PrefillGraphs.on)
    assert "engine.prefill_graphs=auto" in refused(W4A16, H200S, 2, **asked)
    streamed = plan(W4A16, H200S, 2, **asked, offload=OffloadConfig(OffloadKind.on))
    assert streamed.offload is not None and streamed.captured_passes == 0


def test_what_streams_layers_anyway_does_not_speak_of_captured_passes() -> None:
    decided = plan(W4A16, H200S, 2, **batch_of(32, offload=OffloadConfig(resident_layers=40)))
    assert decided.offload is not None
    assert (decided.captured_passes, decided.captured_passes_left_out) == (0, False)


def test_cublas_takes_less_of_cards_before_sm90() -> None:
    """On the stream of passes, and in the memory of graphs; as much as of any where one card is later, or unknown."""
    ada, later = (cards_of(2, compute_capability=each) for each in ((8, 9), (12, 0)))
    mixed = replace(ada, cards=(ada.cards[0], later.cards[1]))
    known, *others = (plan(W4A16, each, 2, **batch_of(1)) for each in (ada, later, mixed, cards_of(2)))
    assert len({tuple(card.predicted_bytes for card in each.cards) for each in others}) == 1
    for card, other in zip(known.cards, others[0].cards, strict=True):
        less = {name: size - card.lines[name] for name, size in other.lines.items() if size != card.lines[name]}
        # Beside two pieces of 4 MiB and eight of 16 KiB.
        assert less == dict.fromkeys(("activations", "graphs"), 32 * MIB - 8_519_680)


def test_dequantised_weights_are_counted_where_a_card_may_have_some() -> None:
    """By its compute capability, unless engine.fused_prefill_rows says; in 8 bits always."""
    unknown = replace(H200S, cards=tuple(replace(card, compute_capability=None) for card in H200S.cards))
    mixed = replace(H200S, cards=(H200S.cards[0], replace(H200S.cards[1], compute_capability=(8, 9))))
    batch = batch_of(8, engine__max_context=1024)
    known, *others = (plan(W4A16, cards, 2, **batch) for cards in (H200S, unknown, mixed))
    assert [known.fused_rows, *(each.fused_rows for each in others)] == [2048, 256, 256]
    large = [each.cards[0].lines["activations"] for each in others]
    # Both halves of a pass and their weights, 64 and 80 MiB of them at a time.
    assert large[0] == large[1] and 100 < (large[0] - known.cards[0].lines["activations"]) / MIB < 200
    asked = plan(W4A16, unknown, 2, **batch, engine__fused_prefill_rows=2048)
    assert asked.cards[0].lines["activations"] == known.cards[0].lines["activations"]
    lower = plan(W4A16, H200S, 2, **batch, engine__fused_prefill_rows=1024)
    assert (lower.fused_rows, lower.cards[0].lines["activations"]) == (1024, large[0])
    in_8_bits = plan(quantized_shape(LLAMA_8B, "int8"), H200S, 2)
    assert in_8_bits.fused_rows == 256
    assert plan(W4A16, H200S, 2, **batch, engine__prefill_chunk=4096).cards[0].lines["activations"] > large[0]


def test_a_draft_model_in_bf16_has_no_weights_to_dequantise() -> None:
    run = run_of(**batch_of(1))
    placement = place_ranks(run, 2, H200S)
    small = replace(LLAMA_8B, num_layers=2)
    drafts = (small, quantized_shape(small, "int4"), quantized_shape(small, "int8"))
    found = [plan_run(run, placement, W4A16, H200S, draft=each).fused_rows for each in drafts]
    assert found == [2048, 2048, 256]


def test_plans_are_above_what_two_h200_took() -> None:
    """results/asking_ahead_h200_202611.json: peaks in MiB, by sequences, prompt, answer and context."""
    taken = {(1, 512, 256, 8192): 21596, (8, 512, 256, 1984): 22890, (1, 2048, 64, 8192): 21610}
    for (size, prompt, output, context), peak in taken.items():
        card = plan(W4A16, H200S, 2, **batch_of(size, prompt, output, engine__max_context=context)).cards[0]
        assert 1.005 < card.predicted_bytes / MIB / peak < 1.025


@pytest.mark.parametrize(("world_size", "peak"), [(1, 444.4), (2, 432.0), (3, 424.7)])
def test_plans_of_a_cpu_are_what_the_demo_model_took(world_size: int, peak: float) -> None:
    """MiB of the fullest rank, of a prompt of 692 tokens (torch 2.13, transformers 5.23)."""
    cards = plan(shape_from_checkpoint(DEMO), CPU, world_size).cards
    assert 0.995 < max(card.predicted_bytes for card in cards) / MIB / peak < 1.02


# Llama-70B on RTX 4090s


@pytest.fixture
def facts() -> HardwareConfig:
    return HardwareConfig(HardwareKind.facts, RTX_4090, memory_gib=23.99, memory_gb_per_sec=1008)


def test_70b_bf16_fits_no_number_of_4090s(facts: HardwareConfig) -> None:
    message = refused(LLAMA_70B, read_inventory(facts, 2), 2)
    for part in ("weights in bfloat16 do not fit", "rank 0 on card 0", "rank 1 on card 1", "weights 65.71", "of 23.60",
                 "model.quantize=int4 (in bfloat16 no number of such cards from 1 to 4)"):  # fmt: skip
        assert part in message
    assert "int8" not in message
    plan(quantized_shape(LLAMA_70B, "int4"), read_inventory(facts, 2), 2)
    refused(quantized_shape(LLAMA_70B, "int8"), read_inventory(facts, 2), 2)


def test_70b_bf16_on_one_4090_names_the_cards_that_4_bits_need(facts: HardwareConfig) -> None:
    message = refused(LLAMA_70B, read_inventory(facts, 1), 1, **RESIDENT)
    assert "model.quantize=int4 on gpus=2 (in bfloat16 no number" in message


def test_fewer_bits_are_advised_beside_more_cards(facts: HardwareConfig) -> None:
    message = refused(LLAMA_8B, read_inventory(facts, 1), 1, limits=LimitsConfig(card_memory_gib=12), **RESIDENT)
    assert "gpus=2 with 2 such cards; or model.quantize=int8 or model.quantize=int4; or offload" in message
    for kind in ("int8", "int4"):
        plan(quantized_shape(LLAMA_8B, kind), read_inventory(facts, 1), limits=LimitsConfig(card_memory_gib=12))


def test_context_that_does_not_fit_may_fit_beside_fewer_bits(facts: HardwareConfig) -> None:
    changes = {"engine__max_context": 66000}
    message = refused(LLAMA_8B, read_inventory(facts, 1), 1, **changes)
    assert "model.quantize=int8 or model.quantize=int4" in message
    plan(quantized_shape(LLAMA_8B, "int8"), read_inventory(facts, 1), 1, **changes)


def test_fewer_bits_are_advised_on_the_cpu() -> None:
    small = replace(CPU, host_memory_bytes=12 * GIB)
    message = refused(LLAMA_8B, small)
    assert "What would fit: model.quantize=int8 or model.quantize=int4." in message
    assert "gpus=" not in message


@pytest.mark.parametrize("kind", QUANTIZE_SCHEMES)
def test_rounded_weights_are_counted_as_kernels_hold_them(kind: str) -> None:
    decided = plan(quantized_shape(LLAMA_8B, kind), cards_of(2), 2)
    bits = held_bits(QUANTIZE_SCHEMES[kind], "cuda", "bfloat16", LLAMA_8B.hidden_size)
    for card in decided.cards:
        linears = card.lines["weights.attention"] + card.lines["weights.mlp"]
        assert linears == pytest.approx(LLAMA_8B.num_linear_weights / 2 * bits / 8, rel=1e-6)


def test_quantised_shape_is_not_rounded_again() -> None:
    with pytest.raises(ShapeError, match=r"model\.quantize=int4 rounds .* quantised as awq already"):
        quantized_shape(LLAMA_70B_AWQ, "int4")


def test_70b_awq_fits_two_4090s(facts: HardwareConfig) -> None:
    decided = plan(LLAMA_70B_AWQ, read_inventory(facts, 2), 2)
    assert decided.placement.topology == "dual_pcie"
    assert decided.max_context == 8192
    # 160 KiB a token: what is left of 24 GB beside 18.5 GiB of weights holds some 26 thousand.
    assert 20_000 < decided.kv_tokens_that_fit < 32_000
    assert decided.tpot_floor_ms == pytest.approx(18.7, abs=0.3)


def test_70b_awq_does_not_fit_one_4090(facts: HardwareConfig) -> None:
    message = refused(LLAMA_70B_AWQ, read_inventory(facts, 1), 1, **RESIDENT)
    assert "weights in awq do not fit" in message
    assert "gpus=2 with 2 such cards" in message


def test_weights_beyond_the_host_are_refused_without_advice_about_cards() -> None:
    message = refused(LLAMA_70B, CPU)
    assert "on the CPU" in message
    assert "gpus=" not in message


# Output


def test_plan_survives_json(facts: HardwareConfig) -> None:
    adapter = TypeAdapter(Plan)
    for decided in (plan(LLAMA_70B_AWQ, read_inventory(facts, 3), 3), plan(TINY, CPU, 2)):
        assert adapter.validate_json(adapter.dump_json(decided)) == decided


def test_tables_say_that_numbers_are_predicted() -> None:
    decided = plan(LLAMA_70B_AWQ, cards_of(4), 4)
    console = Console(width=140)
    with console.capture() as captured:
        for table in plan_tables(decided, LLAMA_70B_AWQ, NO_TIMES):
            console.print(table)
    text = captured.get()
    parts = ("Memory in GiB, predicted", "weights.mlp", "rank 3", f"{decided.kv_tokens_that_fit:,}", "left, predicted")
    assert all(part in text for part in parts)
    assert all("predicted" in label for label, value in describe(decided, LLAMA_70B_AWQ, NO_TIMES) if " ms" in value)


def test_seconds_a_token_read_as_milliseconds_without_exponents() -> None:
    times = Times("a test", (), 1421.4, {}, 0.0, "", 0.7, 2316.0, 1e4, None)
    said = dict(describe(plan(TINY, CPU, 1), TINY, times))
    assert said["time a token, predicted"] == "1,421 ms at batch 1"
