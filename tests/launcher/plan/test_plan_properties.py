"""What no plan of published cards may break, over a grid of runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from launcher.config import HardwareConfig, HardwareKind, OffloadConfig, OffloadKind
from launcher.hardware.inventory import read_inventory
from launcher.models.shape import ModelShape, quantized_shape
from launcher.plan.options import rank_options, variants
from launcher.plan.plan import Plan
from launcher.plan.timed import plan_timed
from launcher.plan.topology import PlanError, place_ranks
from launcher.timing.predict import Times
from tests.launcher.plans import LLAMA_8B, LLAMA_70B, run_of

CARDS = HardwareConfig(HardwareKind.facts, "a card", 23.99, 1008.0, 4, 16, bf16_tflops=165.0)
LARGE = replace(CARDS, memory_gib=300.0)
FORMATS = ("int4", "int8", "bf16")
BATCHES = (1, 2, 3, 5, 8, 9, 16, 24, 32, 33, 48)
# Of one size, so that passes of prompts are alike.
CHUNK = {"engine__prefill_chunk_while_decoding": 512}


def in_format(shape: ModelShape, name: str) -> ModelShape:
    return shape if name == "bf16" else quantized_shape(shape, name)


def planned(shape: ModelShape, world_size: int, hardware: HardwareConfig, **changes: Any) -> tuple[Plan, Times] | None:
    """None where it does not fit."""
    run = run_of(hardware=hardware, **{"workload__prompt_tokens": 512} | changes)
    inventory = read_inventory(hardware, world_size)
    try:
        plan, times = plan_timed(run, place_ranks(run, world_size, inventory), shape, inventory)
    except PlanError:
        return None
    assert isinstance(times, Times)
    return plan, times


def timed(shape: ModelShape, world_size: int, hardware: HardwareConfig, **changes: Any) -> tuple[Plan, Times]:
    found = planned(shape, world_size, hardware, **changes)
    assert found is not None
    return found


def grows(values: Sequence[float]) -> bool:
    return all(after >= before * (1 - 1e-9) for before, after in pairwise(values))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("world_size", "prompt_tokens"), [(1, 128), (2, 700), (4, 2048)])
def test_larger_batches_give_more_take_longer_and_need_more(name: str, world_size: int, prompt_tokens: int) -> None:
    changes = {"workload__prompt_tokens": prompt_tokens, **CHUNK}
    shape = in_format(LLAMA_70B, name)
    found = [timed(shape, world_size, LARGE, workload__batch_size=size, **changes) for size in BATCHES]
    assert grows([size / times.tpot_ms for size, (_, times) in zip(BATCHES, found, strict=True)])
    assert grows([times.tpot_ms for _, times in found]) and grows([times.ttft_ms for _, times in found])
    assert grows([plan.cards[0].predicted_bytes for plan, _ in found])


@pytest.mark.parametrize("streamed", [0, 40])
@pytest.mark.parametrize("world_size", [1, 3])
def test_longer_contexts_need_no_less(streamed: int, world_size: int) -> None:
    contexts = (2, 64, 65, 1024, 2048, 2049, 8192, 8193, 32768, 131072)
    changes: dict[str, Any] = {"workload__prompt_tokens": 1, "workload__output_tokens": 1}
    changes["offload"] = OffloadConfig(resident_layers=80 - streamed)
    shape = in_format(LLAMA_70B, "int4")
    plans = [timed(shape, world_size, LARGE, engine__max_context=each, **changes)[0] for each in contexts]
    assert all(grows([plan.cards[rank].predicted_bytes for plan in plans]) for rank in range(world_size))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_larger_chunks_of_prompts_need_no_less(name: str, world_size: int) -> None:
    """A smaller pass may be left whole, or go in fewer sections, where the largest goes in more."""
    chunks = (128, 255, 256, 257, 1023, 1024, 1025, 2048, 2049, 4096, 4097, 5000, 8192)
    shape = in_format(LLAMA_70B, name)
    plans = [timed(shape, world_size, LARGE, engine__prefill_chunk=each, **CHUNK)[0] for each in chunks]
    assert grows([plan.cards[0].predicted_bytes for plan in plans])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [LLAMA_8B, LLAMA_70B], ids=["8b", "70b"])
def test_more_cards_have_room_for_more_and_take_less_time(name: str, shape: ModelShape) -> None:
    off = {"offload": OffloadConfig(OffloadKind.off)}
    found = [planned(in_format(shape, name), num, CARDS, **off) for num in (1, 2, 3, 4)]
    assert grows([0 if each is None else each[0].kv_tokens_that_fit for each in found])
    assert grows([-each[1].tpot_ms for each in found if each is not None])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_slower_links_make_nothing_faster(world_size: int) -> None:
    """Layers are streamed by one card; more of them talk."""
    links = [
        replace(CARDS, pcie_generation=each, pcie_lanes=lanes) for each, lanes in ((5, 16), (4, 16), (4, 8), (3, 1))
    ]
    for batch_size in (1, 8):
        changes = {"workload__batch_size": batch_size, **CHUNK}
        times = [timed(in_format(LLAMA_70B, "int4"), world_size, link, **changes)[1] for link in links]
        assert grows([each.tpot_ms for each in times]) and grows([each.ttft_ms for each in times])
        assert grows([-each.tokens_per_sec for each in times]) and times[0].tpot_ms < times[-1].tpot_ms


def test_options_are_the_plans_that_they_compare() -> None:
    run = run_of(hardware=CARDS, gpus=4, workload__prompt_tokens=512, workload__batch_size=2)
    options = rank_options(run, LLAMA_70B, read_inventory(CARDS, 4), 4)
    off = {"offload": OffloadConfig(OffloadKind.off), "workload__batch_size": 2}
    for option in options:
        single = planned(variants(run, LLAMA_70B)[option.format], option.world_size, CARDS, **off)
        assert option.fits == (single is not None)
        if single is not None:
            plan, times = single
            assert (option.tpot_ms, option.ttft_ms) == (times.tpot_ms, times.ttft_ms)
            assert option.tokens_per_sec == option.replicas * times.tokens_per_sec
            assert option.kv_tokens == option.replicas * plan.kv_tokens_that_fit
    assert {option.world_size for option in options if option.fits} == {2, 3, 4}
