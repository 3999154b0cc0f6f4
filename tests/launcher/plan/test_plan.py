import re
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
    KVDType,
    LimitsConfig,
    ModelConfig,
    ModelFacts,
    OffloadConfig,
    OffloadKind,
    PeerAccess,
    RunConfig,
    SpeculationKind,
    TaskConfig,
    TaskKind,
    TopologyConfig,
    TopologyKind,
    TransportKind,
)
from launcher.config.engine import PrefillGraphs
from launcher.hardware.inventory import Card, Inventory, Link, read_inventory
from launcher.memory.demand import Demand
from launcher.memory.fit import fits
from launcher.models.config_json import ShapeError
from launcher.models.shape import ModelShape, quantized_shape, shape_from_facts
from launcher.plan import remedies as plan_remedies
from launcher.plan.plan import DRIVER_RESERVED_BYTES, GIB, Plan, captures_passes, plan_run
from launcher.plan.timed import plan_timed
from launcher.plan.topology import PlanError, place_ranks, plan_topology, resolve_world_size
from launcher.report.plan_text import describe, plan_tables
from launcher.timing.predict import Times
from launcher.units import MIB
from parallel.checkpoint.quantize_schemes import QUANTIZE_SCHEMES
from parallel.kernels.footprint import held_bits

RTX_4090 = "NVIDIA GeForce RTX 4090"
LLAMA_70B = shape_from_facts(
    ModelFacts(
        hidden_size=8192,
        intermediate_size=28672,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128256,
        max_positions=131072,
    )
)
LLAMA_70B_AWQ = replace(LLAMA_70B, quantization="awq", linear_bits=4.15625)
LLAMA_8B = replace(LLAMA_70B, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32)
TINY = replace(LLAMA_8B, hidden_size=64, intermediate_size=256, num_layers=2, num_heads=8, head_dim=8, vocab_size=512)


def cards_of(num_cards: int, nvlink: tuple[tuple[int, int], ...] = (), **changes: Any) -> Inventory:
    """RTX 4090s; the pairs in `nvlink` are linked, which real ones never are."""
    card = Card(0, 0, RTX_4090, "", round(23.99 * GIB), None, 1008.0, 4, 16, 450.0)
    links = tuple(
        Link(a, b, "nvlink" if (a, b) in nvlink else "pcie", "host bridge", 0, None)
        for a, b in combinations(range(num_cards), 2)
    )
    cards = tuple(replace(card, index=i, nvml_index=i, **changes) for i in range(num_cards))
    return Inventory("nvml", cards, links, "580", "13.0", 64 * GIB, 60 * GIB, 16)


NO_TIMES = "nobody measured"
CPU = replace(cards_of(0), source="none")


# Nothing of the model may lie in host memory.
RESIDENT = {"offload": OffloadConfig(OffloadKind.off)}


def run_of(**changes: Any) -> RunConfig:
    """A run of task=plan; `section__field=value` sets one field of a section."""
    run = RunConfig(prompt="x", model=ModelConfig(path="org/name"), task=TaskConfig(TaskKind.plan))
    for name, value in changes.items():
        section, _, field = name.rpartition("__")
        setattr(getattr(run, section) if section else run, field, value)
    return run


def plan(shape: ModelShape, inventory: Inventory, world_size: int = 1, **changes: Any) -> Plan:
    run = run_of(**changes)
    return plan_run(run, place_ranks(run, world_size, inventory), shape, inventory)


def refused(shape: ModelShape, inventory: Inventory, world_size: int = 1, **changes: Any) -> str:
    with pytest.raises(PlanError) as caught:
        plan(shape, inventory, world_size, **changes)
    return str(caught.value)


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
    assert captures_passes(run, place_ranks(run, 2, inventory), inventory) is captured
    lines = plan(LLAMA_8B, inventory, 2, engine__prefill_graphs=asked).cards[0].lines
    never = plan(LLAMA_8B, inventory, 2, engine__prefill_graphs=PrefillGraphs.off).cards[0].lines
    # 1.1 to 1.4 MiB of each layer for each of seven sizes, beside what their pieces hand to one another.
    more = lines["graphs"] - never["graphs"]
    assert (32 * 7 * 1.1 < more / MIB < 32 * 7 * 1.4 + 150) if captured else more == 0
    assert {**lines, "graphs": 0} == {**never, "graphs": 0}


def test_the_slowest_card_and_the_cpu_decide() -> None:
    cards = cards_of(2, memory_gb_per_sec=4800.0)
    slower = replace(cards, cards=(cards.cards[0], replace(cards.cards[1], memory_gb_per_sec=1008.0)))
    run = run_of()
    assert not captures_passes(run, place_ranks(run, 2, slower), slower)
    assert captures_passes(run, place_ranks(run, 1, slower), slower)
    asked = run_of(engine__prefill_graphs=PrefillGraphs.on)
    assert not captures_passes(asked, place_ranks(asked, 2, CPU), CPU)


# How many ranks


@pytest.mark.parametrize(
    ("gpus", "topology", "env", "world_size"),
    [
        (None, "auto", None, 1),
        (3, "auto", None, 3),
        (3, "auto", 1, 3),
        (3, "triple", 3, 3),
        (None, "single", None, 1),
        (None, "dual_pcie", 1, 2),
        (None, "quad", 4, 4),
        (None, "auto", 2, 2),
        (None, "auto", 1, 1),
    ],
)
def test_world_size_is_gpus_else_topology_else_torchruns(
    gpus: int | None, topology: str, env: int | None, world_size: int
) -> None:
    run = run_of(gpus=gpus, topology=TopologyConfig(TopologyKind(topology)))
    assert resolve_world_size(run, env) == world_size


def test_gpus_and_topology_that_disagree_are_both_named() -> None:
    with pytest.raises(PlanError) as caught:
        resolve_world_size(run_of(gpus=3, topology=TopologyConfig(TopologyKind.dual_pcie)), None)
    assert str(caught.value) == "gpus=3 but topology=dual_pcie means 2 cards. Set gpus=2 or topology=triple."


def test_other_world_size_than_torchruns_names_both_and_both_ways_to_start() -> None:
    with pytest.raises(PlanError) as caught:
        resolve_world_size(run_of(gpus=2), 4)
    for part in ("WORLD_SIZE=4", "2 are asked for", "`torchrun -m launcher gpus=2`",
                 "`torchrun --nproc-per-node 2 -m launcher gpus=2`"):  # fmt: skip
        assert part in str(caught.value)


def test_more_ranks_than_supported_are_refused() -> None:
    with pytest.raises(PlanError, match="WORLD_SIZE=8 ranks were started; at most 4"):
        resolve_world_size(run_of(), 8)


# Topology


@pytest.mark.parametrize(("world_size", "name"), [(1, "single"), (2, "dual_pcie"), (3, "triple"), (4, "quad")])
@pytest.mark.parametrize("inventory", [CPU, cards_of(4)])
def test_auto_topology_follows_the_number_of_ranks(world_size: int, name: str, inventory: Inventory) -> None:
    chosen, reason = plan_topology(run_of(), world_size, inventory)
    assert chosen == name
    assert reason.endswith(".")


def test_auto_pair_with_nvlink_is_dual_nvlink() -> None:
    assert plan_topology(run_of(), 2, cards_of(2, nvlink=((0, 1),)))[0] == "dual_nvlink"


def test_auto_pair_with_peer_access_off_is_dual_pcie() -> None:
    run = run_of(limits=LimitsConfig(peer_access=PeerAccess.off))
    name, reason = plan_topology(run, 2, cards_of(2, nvlink=((0, 1),)))
    assert name == "dual_pcie"
    assert "limits.peer_access=off" in reason


def test_nvlink_between_other_cards_does_not_count() -> None:
    assert plan_topology(run_of(), 2, cards_of(4, nvlink=((2, 3),)))[0] == "dual_pcie"


def nvlink_refusal(inventory: Inventory, **limits: Any) -> str:
    run = run_of(topology=TopologyConfig(TopologyKind.dual_nvlink), limits=LimitsConfig(**limits))
    with pytest.raises(PlanError) as caught:
        plan_topology(run, 2, inventory)
    return str(caught.value)


def test_dual_nvlink_without_nvlink_names_the_card_and_dual_pcie() -> None:
    message = nvlink_refusal(cards_of(2))
    assert all(part in message for part in (RTX_4090, "RTX 4090s never have", "topology=dual_pcie"))


def test_dual_nvlink_names_the_pair_that_has_it() -> None:
    assert "Cards 1 and 2 have: choose them with CUDA_VISIBLE_DEVICES" in nvlink_refusal(cards_of(3, nvlink=((1, 2),)))


def test_dual_nvlink_on_the_cpu_is_refused() -> None:
    assert "topology=dual_pcie" in nvlink_refusal(CPU)


def test_dual_nvlink_without_peer_access_is_refused() -> None:
    message = nvlink_refusal(cards_of(2, nvlink=((0, 1),)), peer_access=PeerAccess.off)
    assert "limits.peer_access=off" in message


def test_dual_nvlink_is_kept_where_the_pair_has_it() -> None:
    run = run_of(topology=TopologyConfig(TopologyKind.dual_nvlink))
    assert plan_topology(run, 2, cards_of(2, nvlink=((0, 1),)))[0] == "dual_nvlink"


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


# Memory


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


# Context


def test_context_that_is_set_is_kept() -> None:
    decided = plan(LLAMA_8B, cards_of(1), engine__max_context=1001)
    assert (decided.max_context, decided.max_context_reason) == (1001, "engine.max_context was set.")


def test_context_beyond_the_model_is_refused() -> None:
    message = refused(TINY, cards_of(1), engine__max_context=131073)
    assert "engine.max_context=131073" in message
    assert "131072 positions" in message


def test_context_beyond_a_sliding_window_is_refused() -> None:
    shape = replace(TINY, sliding_window=4096)
    assert "sliding window of 4096" in refused(shape, cards_of(1), engine__max_context=5000)
    assert plan(shape, cards_of(1), engine__max_context=4096).max_context == 4096


def test_default_context_is_capped_by_model_and_window() -> None:
    assert plan(TINY, cards_of(1)).max_context == 8192
    assert plan(replace(TINY, max_positions=1000), cards_of(1)).max_context == 1000
    decided = plan(replace(TINY, sliding_window=4096), cards_of(1))
    assert decided.max_context == 4096
    assert "sliding window" in decided.max_context_reason


def test_default_context_grows_with_the_workload() -> None:
    decided = plan(TINY, cards_of(1), workload__prompt_tokens=20000)
    assert decided.max_context == 20128


def test_default_context_shrinks_to_what_fits_in_whole_pages_with_a_little_kept_free() -> None:
    changes = {"workload__batch_size": 8}
    decided = plan(LLAMA_70B_AWQ, cards_of(2), 2, **changes)
    assert decided.max_context % 64 == 0
    assert 2000 < decided.max_context < 8192
    assert "fits" in decided.max_context_reason
    assert decided.kv_tokens_that_fit >= 8 * decided.max_context
    more = plan(LLAMA_70B_AWQ, cards_of(2), 2, engine__max_context=decided.max_context + 64, **changes)
    for chosen, larger in zip(decided.cards, more.cards, strict=True):
        assert chosen.predicted_bytes <= 0.98 * chosen.budget_bytes < larger.predicted_bytes


def test_workload_beyond_the_model_names_output_tokens() -> None:
    message = refused(replace(TINY, max_positions=100), cards_of(1))
    assert "workload.prompt_tokens + workload.output_tokens = 129" in message
    assert "Lower workload.output_tokens" in message


def test_workload_that_does_not_fit_is_refused_with_sizes() -> None:
    message = refused(LLAMA_70B_AWQ, cards_of(2), 2, workload__prompt_tokens=60000)
    assert "sequences of 60128 tokens" in message
    assert "kv_cache 9.19" in message


def test_workload_that_does_not_fit_is_told_how_much_of_it_would() -> None:
    """Not a smaller engine.max_context, which the same workload exceeds."""
    message = refused(LLAMA_70B_AWQ, cards_of(2), 2, workload__prompt_tokens=60000, workload__output_tokens=100)
    assert "engine.max_context" not in message
    advised = int(message.split("(workload.prompt_tokens + workload.output_tokens=")[1].split(")")[0])
    decided = plan(LLAMA_70B_AWQ, cards_of(2), 2, workload__prompt_tokens=advised - 100, workload__output_tokens=100)
    assert decided.max_context == advised


def test_advice_for_a_huge_batch_is_found_in_few_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = []
    monkeypatch.setattr(plan_remedies, "fits", lambda *args: trials.append(args) or fits(*args))
    message = refused(LLAMA_70B_AWQ, cards_of(2), 2, workload__batch_size=10**6, engine__max_context=129)
    advised = int(re.findall(r"workload.batch_size=(\d+)", message)[-1])
    assert len(trials) < 500
    plan(LLAMA_70B_AWQ, cards_of(2), 2, workload__batch_size=advised, engine__max_context=129)
    refused(LLAMA_70B_AWQ, cards_of(2), 2, workload__batch_size=advised + 1, engine__max_context=129)


def test_limit_below_what_the_driver_keeps_leaves_nothing_and_not_less() -> None:
    message = refused(LLAMA_70B_AWQ, cards_of(2), 2, limits__card_memory_gib=0.1)
    assert "GiB of 0.00" in message


def test_context_that_does_not_fit_names_sizes_and_what_fits() -> None:
    changes = {"engine__max_context": 11500, "workload__batch_size": 4}
    message = refused(LLAMA_70B_AWQ, cards_of(2), 2, **changes)
    assert f"rank 1 on card 1 ({RTX_4090}): " in message
    assert "weights 18.52, kv_cache 7.04" in message
    assert "workload.batch_size=2" in message
    assert "gpus=3 with 3 such cards" in message
    advised = int(message.split("engine.max_context=")[1].split(")")[0])
    assert plan(LLAMA_70B_AWQ, cards_of(2), 2, **(changes | {"engine__max_context": advised})).max_context == advised
    refused(LLAMA_70B_AWQ, cards_of(2), 2, **(changes | {"engine__max_context": advised + 1}))
    plan(LLAMA_70B_AWQ, cards_of(2), 2, **(changes | {"workload__batch_size": 2}))
    plan(LLAMA_70B_AWQ, cards_of(3), 3, **changes)


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


# Memory of the load


def test_load_counts_where_it_takes_more_than_what_comes_after() -> None:
    """Of 8192 x 14336 weights: 2 bytes each as stored, one rounded, and 16 while one of 4 Mi is; less what stays."""
    shape = quantized_shape(LLAMA_70B, "int4")
    short = plan(shape, cards_of(2), 2, engine__max_context=256, engine__prefill_chunk=64, workload__output_tokens=8)
    numel = 8192 * 14336
    for card in short.cards:
        after = card.lines["kv_cache"] + card.lines["activations"]
        assert card.lines["load"] == pytest.approx(
            numel * (3 - (4 + 20 / 128) / 8) + 16 * 4 * 1024**2 - after, rel=1e-6
        )
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
