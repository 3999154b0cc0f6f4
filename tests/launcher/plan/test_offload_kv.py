"""Plans and runs whose streamed layers have their keys and values in host memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.config import (
    KVPlace,
    OffloadConfig,
    OffloadKind,
    SpeculationConfig,
    SpeculationKind,
    TaskConfig,
    TaskKind,
)
from launcher.hardware.inventory import Inventory
from launcher.models.shape import ModelShape
from launcher.plan.plan import Plan
from launcher.report.plan_text import describe
from launcher.timing.fit import fit_rates
from launcher.timing.predict import Copies, predict_times, read_tokens
from parallel.kernels.limits import PAGE_SIZE
from parallel.units import GIB
from tests.launcher.cli import SHORT
from tests.launcher.forked import run
from tests.launcher.plan.test_offload import AWQ_4, streamed
from tests.launcher.plans import LLAMA_8B, NO_TIMES, cards_of, plan, refused, run_of
from tests.launcher.timing.test_timing import LOAD, WIDE, Machine

# A token in a layer: 2 x 8 heads x 128 x 2 bytes.
TOKEN_BYTES = 4096
HALF = OffloadConfig(resident_layers=40)
HOSTED = replace(HALF, kv=KVPlace.host)
HAS_ROOM = "offload.kv=host has room for more"
HOST = {"offload": OffloadConfig(kv=KVPlace.host)}


def with_room(room_bytes: int) -> Inventory:
    """One card, and host memory for so much more than half of the layers."""
    needed = streamed(plan(AWQ_4, cards_of(1), offload=HALF)).needed_host_bytes
    return replace(cards_of(1), host_memory_bytes=needed + room_bytes)


def of_batch(offload: OffloadConfig, batch_size: int, max_context: int) -> dict[str, Any]:
    return {"offload": offload, "workload__batch_size": batch_size, "engine__max_context": max_context}


def test_card_holds_two_layers_in_place_of_those_in_host_memory() -> None:
    """Of half of a 70B, for 2 sequences of 4000 tokens, in pages of which one is nobody's."""
    slots = (1 + 2 * 63) * PAGE_SIZE
    on_card, hosted = (plan(AWQ_4, cards_of(1), **of_batch(each, 2, 4000)) for each in (HALF, HOSTED))
    before, after = on_card.cards[0].lines, hosted.cards[0].lines
    assert before["kv_cache"] == 80 * slots * TOKEN_BYTES
    assert (after["kv_cache"], after["kv_staging"]) == (40 * slots * TOKEN_BYTES, 2 * slots * TOKEN_BYTES)
    names = ("kv_cache", "kv_staging", "mappings", "load")
    assert {k: v for k, v in before.items() if k not in names} == {k: v for k, v in after.items() if k not in names}
    # Entries of 8 bytes for 4 KiB.
    assert after["mappings"] - before["mappings"] == pytest.approx(40 * slots * TOKEN_BYTES / 4096 * 8, abs=1)
    offload = streamed(hosted)
    assert offload.kv_host_bytes == (40 * slots * TOKEN_BYTES,)
    assert offload.needed_host_bytes == streamed(on_card).needed_host_bytes + 40 * slots * TOKEN_BYTES
    assert offload.kv_token_ms == pytest.approx(40 * TOKEN_BYTES / 25e9 * 1e3)
    assert (offload.pass_ms, streamed(on_card).kv_token_ms) == (streamed(on_card).pass_ms, 0)
    assert hosted.kv_tokens_that_fit == pytest.approx(on_card.kv_tokens_that_fit * 80 / 42, rel=0.02)
    text = dict(describe(hosted, AWQ_4, NO_TIMES))["KV in host memory, predicted"]
    assert f"{40 * slots * TOKEN_BYTES / GIB:.2f} GiB, of 40 layers; a pass brings 160 KiB a token" in text


def test_ranks_have_their_heads_there() -> None:
    inventory = replace(cards_of(3), host_memory_bytes=256 * GIB)
    decided = plan(AWQ_4, inventory, 3, offload=replace(HOSTED, enabled=OffloadKind.on))
    heads = [2, 3, 3]
    assert sorted(streamed(decided).kv_bytes_per_token) == [40 * 2 * num * 128 * 2 for num in heads]


def step_ms(decided: Plan, num_tokens: int) -> float:
    offload = streamed(decided)
    assert offload.pass_ms is not None
    return offload.pass_ms + num_tokens * offload.kv_token_ms


def test_keys_and_values_lie_where_a_step_copies_less() -> None:
    """The card has room for sequences at their longest, a pass brings what there is: at a fifteenth of that three more
    layers stay for less, at the whole of it for as much."""
    places = [OffloadConfig(kv=place) for place in KVPlace]
    short, long = (
        {"engine__max_context": 8192, "workload__prompt_tokens": 512},
        {"engine__max_context": 2048, "workload__prompt_tokens": 2000},
    )
    for workload, batch_size, hosted in ((short, 1, True), (long, 12, False)):
        changes = workload | {"workload__output_tokens": 48, "workload__batch_size": batch_size}
        on_card, on_host, chosen = (plan(AWQ_4, cards_of(1), offload=each, **changes) for each in places)
        assert chosen == (on_host if hosted else on_card)
        tokens = batch_size * (changes["workload__prompt_tokens"] + 24)
        assert step_ms(chosen, tokens) == min(step_ms(each, tokens) for each in (on_card, on_host))
        if hosted:
            assert step_ms(on_host, tokens) < 0.94 * step_ms(on_card, tokens)
    # With drafts all pages of a sequence come.
    guessed = SpeculationConfig(SpeculationKind.ngram)
    full = {"engine__max_context": 2048, "workload__prompt_tokens": 64, "workload__output_tokens": 1984}
    known, unknown = (
        plan(AWQ_4, cards_of(1), offload=places[2], workload__batch_size=12, **full, **each)
        for each in ({}, {"speculation": guessed})
    )
    assert streamed(known).kv_token_ms > 0
    assert streamed(unknown).kv_token_ms == 0


def test_where_keys_and_values_lie_is_chosen_of_what_there_is_room_for() -> None:
    auto = OffloadConfig(kv=KVPlace.auto)
    # 16 sequences of 832 tokens fit beside no layer but with theirs.
    fits = plan(AWQ_4, cards_of(1), **of_batch(replace(auto, resident_layers=40), 16, 832))
    assert streamed(fits).kv_token_ms > 0
    assert streamed(plan(AWQ_4, with_room(-GIB), offload=auto)).kv_token_ms == 0
    assert plan(LLAMA_8B, cards_of(1), offload=auto).offload is None
    with_disk = replace(auto, disk="checkpoint")
    assert streamed(plan(AWQ_4, cards_of(1), offload=with_disk)).kv_token_ms == 0


def test_tokens_that_fit_are_those_that_host_memory_holds_too() -> None:
    """In whole pages; page 0, which is nobody's, counts."""
    sizes = [with_room(room) for room in (GIB, GIB // 2, 100 * GIB)]
    more, few, most = (plan(AWQ_4, each, **of_batch(HOSTED, 1, 64)).kv_tokens_that_fit for each in sizes)
    page_bytes = 40 * TOKEN_BYTES * PAGE_SIZE
    assert [each + PAGE_SIZE for each in (few, more)] == [room // page_bytes * PAGE_SIZE for room in (GIB // 2, GIB)]
    assert more < most


def test_context_is_what_host_memory_has_room_for() -> None:
    small = with_room(GIB)
    decided = plan(AWQ_4, small, offload=HOSTED, workload__batch_size=4)
    assert "host memory" in decided.max_context_reason
    assert decided.max_context % PAGE_SIZE == 0
    offload = streamed(decided)
    assert 0 <= small.host_memory_bytes - offload.needed_host_bytes < 40 * 4 * PAGE_SIZE * TOKEN_BYTES
    assert plan(AWQ_4, cards_of(1), offload=HOSTED, workload__batch_size=1).max_context > decided.max_context


def test_host_memory_that_does_not_suffice_is_told_with_what_would() -> None:
    small = with_room(GIB)
    message = refused(AWQ_4, small, **of_batch(HOSTED, 4, 3072))
    assert "for keys and values of sequences of 3072 tokens with workload.batch_size=4" in message
    most = int(message.partition("sequences of up to ")[2].split()[0])
    streamed(plan(AWQ_4, small, **of_batch(HOSTED, 4, most)))
    refused(AWQ_4, small, **of_batch(HOSTED, 4, most + 1))
    assert "offload.kv=card" not in message and "offload.disk" not in message
    assert "offload.kv=card" in refused(AWQ_4, small, **of_batch(HOSTED, 1, 7680))
    streamed(plan(AWQ_4, small, **of_batch(HALF, 1, 7680)))


def test_refusal_names_the_knob_where_it_helps() -> None:
    """Also where nothing would be streamed yet; not where it would not do."""
    knob = "offload.kv=host, which keeps keys and values of 40 layers in host memory"
    assert knob in refused(AWQ_4, cards_of(1), **of_batch(HALF, 16, 832))
    streamed(plan(AWQ_4, cards_of(1), **of_batch(HOSTED, 16, 832)))
    assert "offload.kv" not in refused(AWQ_4, cards_of(1), **of_batch(HALF, 16, 4096))
    # All layers are streamed, and still it does not fit; so they leave room for fewer of them to be.
    knob = "offload.kv=host, which keeps keys and values of "
    message = refused(AWQ_4, cards_of(1), **of_batch(OffloadConfig(), 40, 2112))
    assert layers_named(message, knob) == num_streamed(AWQ_4, cards_of(1), KVPlace.host, 40, 2112) < 80
    small, roomy = (replace(cards_of(1), host_memory_bytes=room * GIB) for room in (44, 512))
    assert knob not in refused(AWQ_4, small, **of_batch(OffloadConfig(), 40, 2112))
    knob = "offload.enabled=on with offload.kv=host, which streams "
    message = refused(LLAMA_8B, roomy, **of_batch(OffloadConfig(), 4, 65536))
    assert layers_named(message, knob) == num_streamed(LLAMA_8B, roomy, KVPlace.host, 4, 65536)


def layers_named(message: str, knob: str) -> int:
    return int(message.partition(knob)[2].split()[0])


def num_streamed(shape: ModelShape, inventory: Inventory, kv: KVPlace, batch_size: int, max_context: int) -> int:
    changes = of_batch(OffloadConfig(OffloadKind.on, kv=kv), batch_size, max_context)
    return len(streamed(plan(shape, inventory, **changes)).streamed_layers)


def test_context_that_had_to_be_cut_names_the_knob() -> None:
    for offload, named in ((HALF, True), (HOSTED, False)):
        decided = plan(AWQ_4, cards_of(1), offload=offload, workload__batch_size=8)
        assert decided.max_context < 8192
        assert (HAS_ROOM in decided.max_context_reason) == named


def test_context_that_had_to_be_cut_names_no_knob_that_would_not_help() -> None:
    """Host memory has room for little more than the layers; offload.disk goes with keys and values on the card."""
    cut = plan(AWQ_4, cards_of(1), offload=HALF, workload__batch_size=8).max_context
    # A page of each sequence in each layer, and page 0.
    pages_bytes = (1 + 8 * (1 + cut // PAGE_SIZE)) * PAGE_SIZE * 40 * TOKEN_BYTES
    for room_bytes, named in ((pages_bytes, True), (pages_bytes - 1, False), (0, False)):
        decided = plan(AWQ_4, with_room(room_bytes), offload=HALF, workload__batch_size=8)
        assert decided.max_context == cut
        assert (HAS_ROOM in decided.max_context_reason) == named
    decided = plan(AWQ_4, cards_of(1), offload=replace(HALF, disk="checkpoint"), workload__batch_size=8)
    assert decided.max_context == cut and HAS_ROOM not in decided.max_context_reason


def test_fewer_layers_are_streamed_where_their_tokens_go_with_them() -> None:
    sizes: list[Plan] = [
        plan(AWQ_4, cards_of(1), engine__max_context=2112, workload__batch_size=16, **each) for each in ({}, HOST)
    ]
    on_card, hosted = (len(streamed(each).streamed_layers) for each in sizes)
    assert hosted < on_card


def test_without_streamed_layers_nothing_changes() -> None:
    assert plan(LLAMA_8B, cards_of(1), **HOST) == plan(LLAMA_8B, cards_of(1))


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (OffloadConfig(OffloadKind.off, kv=KVPlace.host), "offload.kv=host is for layers in host memory, but "),
        (OffloadConfig(kv=KVPlace.host, disk="checkpoint"), "but offload.disk=checkpoint is for hosts with too little"),
    ],
)
def test_values_that_contradict_are_named(config: OffloadConfig, problem: str) -> None:
    problems = list(run_of(offload=config).problems())
    assert len(problems) == 1 and problem in problems[0]
    assert not list(run_of(**HOST, task=TaskConfig(TaskKind.plan)).problems())


def test_steps_bring_what_they_attend_to() -> None:
    """And passes of prompts what was there before them, while they write what they read."""
    machine = Machine(0)
    rates = fit_rates(machine.calibration())
    free = predict_times(WIDE, LOAD, rates)
    token_ms = 3 * free.tpot_ms / read_tokens(LOAD)
    with_kv = predict_times(WIDE, LOAD, rates, Copies(free.tpot_ms, token_ms))
    assert with_kv.tpot_ms == pytest.approx(4 * free.tpot_ms)
    chunks = replace(LOAD, batch_size=1, prompt_tokens=3 * 2048, prefill_chunk=2048, output_tokens=1)
    # At a second a token nothing else counts: each chunk writes 2048, and the third waits for 4096.
    times = predict_times(WIDE, chunks, rates, Copies(0.0, 1e3))
    assert times.ttft_ms == pytest.approx((2048 + 2048 + 4096) * 1e3, rel=0.01)


def report_of(folder: Path, *args: str) -> dict[str, Any]:
    result = run("hardware=cpu", *SHORT, *args, folder=folder)
    assert result.returncode == 0, result.stderr
    return result.report


def test_run_answers_the_same_and_holds_what_was_planned(tmp_path: Path) -> None:
    """Of five layers three are streamed; on a CPU, where host memory is the rank's own."""
    half = "offload.resident_layers=2"
    on_card, hosted = (report_of(tmp_path / name, half, f"offload.kv={name}") for name in ("card", "host"))
    assert hosted["outputs"] == on_card["outputs"]
    memory, lines = hosted["cards"][0]["memory"], hosted["predicted"]["cards"][0]["lines"]
    for name in ("kv_cache", "kv_staging", "host_kv"):
        assert memory[f"{name}_bytes"] == lines[name] > 0
    before = on_card["cards"][0]["memory"]
    assert before["kv_cache_bytes"] * 2 == memory["kv_cache_bytes"] * 5
    assert (before["kv_staging_bytes"], before["host_kv_bytes"]) == (0, 0)
    offload = hosted["offload"]
    assert offload["kv_bytes_per_pass"] == offload["bytes_per_pass"] - on_card["offload"]["bytes_per_pass"] > 0
    assert offload["kv_bytes_per_pass"] % hosted["predicted"]["offload"]["kv_bytes_per_token"][0] == 0
    assert on_card["offload"]["kv_bytes_per_pass"] == 0
