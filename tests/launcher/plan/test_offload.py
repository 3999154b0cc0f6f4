"""Plans whose layers lie partly in host memory, and a run of one through the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from launcher.config import OffloadConfig, OffloadKind, SpeculationConfig, SpeculationKind, TaskConfig, TaskKind
from launcher.memory.demand import Demand
from launcher.memory.fit import fits
from launcher.models.shape import TYPICAL_SCHEMES
from launcher.plan.limits import KEPT_FREE_STREAMED
from launcher.plan.offload import OffloadPlan
from launcher.plan.offload_disk import HOST_BYTES_PER_RANK
from launcher.plan.plan import Plan, plan_run
from launcher.plan.topology import place_ranks
from launcher.report.plan_text import describe
from parallel.layers.layout import ALIGNMENT
from parallel.units import GIB, MIB
from tests.launcher.cli import SHORT
from tests.launcher.forked import run
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

AWQ_4 = replace(LLAMA_70B_AWQ, linear_bits=4.25)
ON, OFF = ({"offload": OffloadConfig(kind)} for kind in (OffloadKind.on, OffloadKind.off))


def streamed(decided: Plan) -> OffloadPlan:
    assert decided.offload is not None
    return decided.offload


def test_70b_awq_streams_what_one_4090_does_not_hold() -> None:
    decided = plan(AWQ_4, cards_of(1))
    offload, lines = streamed(decided), decided.cards[0].lines
    # A layer: q, k, v and o of 8192 x (8192 + 1024), three times 8192 x 28672, in 4.25 bits, and two norms.
    layer_bytes = 8192 * (2 * (8192 + 1024) + 3 * 28672) * 4.25 / 8 + 2 * 8192 * 2
    assert offload.pass_bytes[0] == pytest.approx(len(offload.streamed_layers) * layer_bytes, rel=1e-6)
    assert lines["staging"] == pytest.approx(2 * layer_bytes, rel=1e-6)
    assert offload.host_bytes[0] - offload.pass_bytes[0] == 128256 * 8192 * 2
    assert (lines["weights.embedding"], lines["weights.head"]) == (0, 128256 * 8192 * 2)
    assert offload.resident_layers + len(offload.streamed_layers) == 80
    # A 4090's link is PCIe 4.0 x16.
    assert decided.tpot_floor_ms == pytest.approx(offload.pass_bytes[0] / 25e9 * 1e3)
    assert "graphs" not in lines


@pytest.mark.parametrize(
    ("batch_size", "resident", "peak_mib"),
    [(1, 45, 22952), (4, 45, 23890), (8, 43, 23752), (16, 40, 23936), (32, 33, 23882)],
)
def test_streamed_layers_take_what_an_h200_took(batch_size: int, resident: int, peak_mib: int) -> None:
    """A 70B in 4 bits, prompts of 512 tokens and answers of 32: of a batch, 2048 rows in a pass."""
    shape = replace(AWQ_4, quantization="compressed-tensors", linear_bits=4.125)
    shape = replace(shape, scheme=TYPICAL_SCHEMES["compressed-tensors"])
    card = cards_of(1, memory_bytes=140 * GIB, compute_capability=(9, 0))
    settings = {"workload__batch_size": batch_size, "engine__max_context": 544}
    decided = plan(shape, card, offload=OffloadConfig(resident_layers=resident, host_layers=0), **settings)
    assert peak_mib <= decided.cards[0].predicted_bytes / MIB <= 1.003 * peak_mib


def test_embedding_that_loads_first_and_leaves_the_card_takes_no_room() -> None:
    """Nor does a layer on its way, in whose place are buffers."""
    short = plan(AWQ_4, cards_of(1), engine__max_context=256, engine__prefill_chunk=64, workload__output_tokens=8)
    lines = short.cards[0].lines
    assert "load" not in lines and lines["kv_cache"] + lines["activations"] < 128256 * 8192 * 2 - lines["staging"]


def test_cards_hold_layers_in_place_of_room_that_no_sequence_needs() -> None:
    """Where lengths are known and layers are streamed; more room was asked for, or may be needed, in the others."""

    def decided(**settings: Any) -> Plan:
        return plan(AWQ_4, cards_of(1), workload__batch_size=4, workload__output_tokens=32, **settings)

    known, asked = decided(workload__prompt_tokens=512), decided(engine__max_context=544)
    assert (known.max_context, known.offload, known.cards) == (544, asked.offload, asked.cards)
    assert known.max_context_reason == "workload.prompt_tokens + workload.output_tokens = 544; " \
        "room for more would stream more layers."  # fmt: skip
    unknown, larger = decided(), decided(workload__prompt_tokens=512, engine__max_context=8192)
    assert (unknown.max_context, unknown.offload) == (8192, larger.offload)
    assert unknown.max_context_reason == "the default, until lengths of prompts are known."
    assert len(streamed(known).streamed_layers) < 40 < len(streamed(larger).streamed_layers)
    on_cards = plan(AWQ_4, cards_of(2), 2, workload__prompt_tokens=512, workload__output_tokens=32)
    assert (on_cards.offload, on_cards.max_context, on_cards.max_context_reason) == (None, 8192, "the default.")


def test_a_draft_model_beside_streamed_layers_takes_room_for_its_graphs() -> None:
    """As steps have them, or ten kernels a layer of about 10 kB; and rows of logits in bf16 and float32."""

    def graphs(speculation: SpeculationConfig, batch_size: int = 1) -> int:
        run, inventory = run_of(speculation=speculation, workload__batch_size=batch_size), cards_of(1)
        small = replace(LLAMA_8B, linear_bits=4.25)
        return plan_run(run, place_ranks(run, 1, inventory), AWQ_4, inventory, draft=small).cards[0].lines["graphs"]

    speculation = SpeculationConfig(SpeculationKind.draft, draft_path="org/small", tree_size=64)
    drafted = graphs(speculation)
    assert drafted == pytest.approx(55 * 2**20 + 6 * 128256 * (2 + 4), rel=0.05)
    more = graphs(replace(speculation, tree_top_k=48)) - drafted
    assert more == pytest.approx((48 - 6) * 128256 * (2 + 4), rel=0.2)
    looked_up = replace(speculation, kind=SpeculationKind.ngram, draft_path=None)
    assert "graphs" not in plan(AWQ_4, cards_of(1), speculation=looked_up).cards[0].lines
    # Trees of five depths and up to eight children, for 1, 2 and 3 sequences.
    chosen = graphs(replace(speculation, tree_size="auto"), 3)
    assert chosen == pytest.approx(3 * (3 + 4 + 8 + 5 + 10) * 32 * 10 * 10e3 + 3 * 8 * 128256 * (2 + 4), rel=0.25)


def test_one_layer_more_would_not_fit() -> None:
    decided = plan(AWQ_4, cards_of(1), engine__max_context=4096)
    card, room = decided.cards[0], decided.cards[0].budget_bytes * (1 - KEPT_FREE_STREAMED)
    left = room - card.predicted_bytes
    assert 0 <= left < card.lines["staging"] / 2


def test_shorter_sequences_leave_more_layers_on_the_card() -> None:
    short, default = (streamed(plan(AWQ_4, cards_of(1), engine__max_context=size)) for size in (1024, 8192))
    assert short.resident_layers > default.resident_layers


def test_what_fits_is_not_streamed() -> None:
    for changes in ({}, ON):
        assert plan(LLAMA_8B, cards_of(1), **changes).offload is None
        assert plan(AWQ_4, cards_of(2), 2, **changes).offload is None


def test_several_cards_stream_where_that_was_asked_for() -> None:
    """Each its shard; and the refusal names the way where host memory is large enough for it."""
    inventory = replace(cards_of(2), host_memory_bytes=128 * GIB)
    assert "offload.enabled=on, which streams " in refused(LLAMA_70B, inventory, 2)
    assert "offload.enabled" not in refused(LLAMA_70B, cards_of(2), 2)
    decided = plan(LLAMA_70B, inventory, 2, **ON)
    offload = streamed(decided)
    assert len(offload.host_bytes) == 2
    assert decided.tpot_floor_ms == pytest.approx(max(offload.pass_bytes) / 25e9 * 1e3)
    assert "offload" not in refused(LLAMA_70B, CPU)


def test_host_memory_decides_how_many_layers_make_room_for_more_than_is_needed() -> None:
    """For contexts of 8192 more layers would be streamed than it holds; the workload's own need fewer."""
    changes = {"workload__batch_size": 4}
    roomy, tight = (plan(AWQ_4, replace(cards_of(1), host_memory_bytes=room * GIB), **changes) for room in (64, 27))
    assert roomy.max_context == 8192 and 640 <= tight.max_context < 8192
    assert len(streamed(tight).streamed_layers) < len(streamed(roomy).streamed_layers)
    # The most: another layer would not have room.
    offload = streamed(tight)
    layer_bytes = offload.pass_bytes[0] / len(offload.streamed_layers)
    assert 0 <= 27 * GIB - offload.needed_host_bytes < layer_bytes


def test_a_context_that_no_number_of_streamed_layers_has_room_for_costs_none() -> None:
    """32 sequences of 8192 tokens do not fit however many are streamed: then as many as the workload's own need."""
    changes: dict[str, Any] = {"workload__batch_size": 32, "workload__prompt_tokens": 2000} | ON
    offload = streamed(plan(AWQ_4, cards_of(2), 2, **changes))
    assert 0 < len(offload.streamed_layers) < 40
    # Beyond what is kept free.
    fewer = OffloadConfig(resident_layers=offload.resident_layers + 4)
    assert "do not fit" in refused(AWQ_4, cards_of(2), 2, **changes | {"offload": fewer})


def test_off_refuses_and_names_the_way() -> None:
    message = refused(AWQ_4, cards_of(1), **OFF)
    num = int(message.partition("offload.enabled=on, which streams ")[2].split()[0])
    assert num == len(streamed(plan(AWQ_4, cards_of(1))).streamed_layers)


def test_sequences_that_do_not_fit_stream_only_where_that_was_asked_for() -> None:
    changes = {"engine__max_context": 66000}
    assert "offload.enabled=on" in refused(LLAMA_8B, cards_of(1), **changes)
    decided = plan(LLAMA_8B, cards_of(1), **changes, **ON)
    assert decided.max_context == 66000
    assert streamed(decided).resident_layers > 0


def test_resident_layers_are_as_asked() -> None:
    decided = plan(LLAMA_8B, cards_of(1), offload=OffloadConfig(resident_layers=24))
    assert streamed(decided).streamed_layers == (2, 6, 10, 14, 18, 22, 26, 30)
    assert plan(LLAMA_8B, cards_of(1), offload=OffloadConfig(resident_layers=32)).offload is None
    message = refused(LLAMA_8B, cards_of(1), offload=OffloadConfig(resident_layers=33))
    assert message == "offload.resident_layers=33 exceeds the model's 32 layers. Lower it."
    assert len(streamed(plan(TINY, CPU, offload=OffloadConfig(resident_layers=0))).streamed_layers) == 2


def test_host_memory_that_does_not_suffice_is_told_with_both_sizes() -> None:
    half: dict[str, Any] = {"offload": OffloadConfig(resident_layers=40)}
    needed = streamed(plan(AWQ_4, cards_of(1), **half)).host_bytes[0] + HOST_BYTES_PER_RANK
    small = replace(cards_of(1), host_memory_bytes=32 * GIB, host_free_bytes=needed - 1)
    # A plan is about the machine, a run about what is free.
    streamed(plan(AWQ_4, small, **half))
    message = refused(AWQ_4, small, task=TaskConfig(TaskKind.generate), **half)
    for part in (
        f"{needed / GIB:.2f}",
        "of 32.00 are free",
        "What would fit: gpus=2 with 2 such cards without offload.resident_layers; or offload.disk=checkpoint, which",
        "or more free host memory",
    ):
        assert part in message
    streamed(plan(AWQ_4, replace(small, host_free_bytes=needed), task=TaskConfig(TaskKind.generate), **half))


def test_host_memory_of_another_machine_is_not_checked() -> None:
    elsewhere = replace(cards_of(1), source="facts", host_memory_bytes=4 * GIB, host_free_bytes=GIB)
    assert streamed(plan(AWQ_4, elsewhere)).host_bytes[0] > 4 * GIB


def test_link_of_fewer_lanes_is_slower_and_an_unknown_one_says_nothing() -> None:
    times = [plan(AWQ_4, cards_of(1, pcie_generation=5, pcie_lanes=lanes)).tpot_floor_ms for lanes in (16, 8)]
    assert times[0] is not None
    assert times[1] == pytest.approx(2 * times[0])
    unknown = plan(AWQ_4, cards_of(1, pcie_generation=None))
    assert unknown.tpot_floor_ms is None
    assert "GB/s" not in dict(describe(unknown, AWQ_4, NO_TIMES))["streamed layers, predicted"]


@pytest.mark.parametrize("num_streamed", [3, 8, 32])
def test_more_streamed_layers_take_less_of_the_card(num_streamed: int) -> None:
    fewer, more = (
        sum(
            Demand(LLAMA_8B, 1, 128, "bfloat16", "auto", "cuda", "solo", 1, 512, num_streamed=num)
            .lines(512)[0]
            .values()
        )
        for num in (num_streamed - 1, num_streamed)
    )
    if num_streamed > 3:
        assert more < fewer
    assert not fits(Demand(LLAMA_8B, 1, 128, "bfloat16", "auto", "cuda", "solo", 1, 512), (more,), 512)


def test_room_is_kept_for_layers_that_the_host_may_compute() -> None:
    """Those are wider by scales of 32 bits a group in place of 16 and zeros of 4, in both buffers."""
    resident = OffloadConfig(resident_layers=40, host_layers=None)
    shape = replace(LLAMA_70B_AWQ, scheme=TYPICAL_SCHEMES["awq"])
    decided = plan(shape, cards_of(1), offload=resident)
    without = plan(shape, cards_of(1), offload=replace(resident, host_layers=0))
    lines, weights = decided.cards[0].lines, 8192 * (2 * (8192 + 1024) + 3 * 28672)
    assert lines["sharing"] >= 2 * weights * (32 - 16 - 4) / 128 / 8
    assert {name: size for name, size in lines.items() if name != "sharing"} == without.cards[0].lines
    assert streamed(decided).host_may_compute
    assert not streamed(without).host_may_compute
    plain = plan(LLAMA_8B, cards_of(1), offload=OffloadConfig(resident_layers=8, host_layers=None))
    assert "sharing" not in plain.cards[0].lines
    assert not streamed(plain).host_may_compute


def test_layers_that_the_host_cannot_compute_are_refused() -> None:
    message = refused(LLAMA_8B, cards_of(1), offload=OffloadConfig(resident_layers=8, host_layers=4))
    assert "offload.host_layers=4: the host computes only linears of 4 bits." in message


def test_plan_with_streamed_layers_survives_json() -> None:
    decided, adapter = plan(AWQ_4, cards_of(1)), TypeAdapter(Plan)
    assert adapter.validate_json(adapter.dump_json(decided)) == decided


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (OffloadConfig(resident_layers=-1), "offload.resident_layers=-1 must be 0 or above."),
        (
            OffloadConfig(OffloadKind.off, 3),
            "offload.resident_layers=3 streams all other layers, but offload.enabled=off.",
        ),
        (OffloadConfig(host_layers=-2), "offload.host_layers=-2 must be 0 or above."),
    ],
)
def test_values_that_contradict_are_named(config: OffloadConfig, problem: str) -> None:
    assert any(problem in each for each in run_of(offload=config).problems())


def report_of(folder: Path, *args: str) -> dict[str, Any]:
    result = run("hardware=cpu", *SHORT, *args, folder=folder)
    assert result.returncode == 0, result.stderr
    return result.report


def test_run_with_streamed_layers_answers_the_same_and_counts_its_bytes(tmp_path: Path) -> None:
    resident, half = (
        report_of(tmp_path / name, *args) for name, args in (("a", []), ("b", ["offload.resident_layers=2"]))
    )
    assert resident["offload"] is None
    assert half["outputs"] == resident["outputs"]
    offload, predicted = half["offload"], half["predicted"]["offload"]
    assert (offload["resident_layers"], offload["streamed_layers"]) == (2, [0, 2, 4])
    # Each tensor begins at a multiple of ALIGNMENT.
    assert 0 <= offload["bytes_per_pass"] - predicted["pass_bytes"][0] < 3 * 6 * ALIGNMENT
    assert 0 <= offload["host_bytes"] - predicted["host_bytes"][0] < 3 * 6 * ALIGNMENT
    assert offload["gb_per_sec"] == pytest.approx(offload["bytes_per_pass"] / offload["step_ms"] / 1e6)
    memory, lines = half["cards"][0]["memory"], half["predicted"]["cards"][0]["lines"]
    assert memory["staging_bytes"] == lines["staging"]
    assert memory["host_weights_bytes"] == offload["host_bytes"] == lines["host_weights"]
    assert memory["weights_bytes"] == sum(size for name, size in lines.items() if name.startswith("weights."))


def test_bench_measures_streamed_steps(tmp_path: Path) -> None:
    workload = ("workload.repeats=1", "workload.warm_up=0", "workload.prompt_tokens=8", "workload.output_tokens=4")
    report = report_of(tmp_path, "task=bench", "offload.resident_layers=1", *workload)
    assert report["offload"]["step_ms"] == report["decode_step_ms"]["measured"] > 0
    assert report["breakdown"]["problem"] is None
    assert report["bandwidth"]["step_bytes"]["weights"] > report["offload"]["bytes_per_pass"]
