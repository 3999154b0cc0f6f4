"""Keys and values in pinned memory, brought to a card for each attention: exact, as planned, and how fast."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from parallel.checkpoint.headers import read_checkpoint
from parallel.checkpoint.load import load_checkpoint
from parallel.communicator import Communicator
from parallel.engine.answer import StopRules
from parallel.engine.engine import Engine
from parallel.engine.generate import generate
from parallel.engine.limits import EngineLimits
from parallel.engine.speculation.speculator import Speculation
from parallel.kernels.limits import PAGE_SIZE
from parallel.kernels.pages import FP8
from parallel.layers.merged import LayerMerger
from parallel.offload.copies import CardCopies
from parallel.offload.host_kv import HostKV
from parallel.offload.host_layers import HostLayers, HostLoader
from parallel.offload.spread import NUM_STAGED
from parallel.shard import share_process_group
from tests.gpu.one_card import DEVICE, run_on_one_card
from tests.launcher.cli import run_together
from tests.parallel.offload.test_host_kv import GROWN, NGRAM, TREE, prompts_of_pages
from tests.parallel.ranks import build, demo_tokenizer, numbered
from tests.parallel.small_models import DEMO

pytestmark = pytest.mark.gpu


class PoisonedCopies(CardCopies):
    """Leaves nothing in a staging cache that has been used, in the order in which the card gets to it."""

    def __init__(self, host_kv: HostKV) -> None:
        super().__init__(DEVICE, NUM_STAGED)
        self.host_kv = host_kv

    def mark_used(self, buffer: int) -> None:
        self.host_kv.staging[buffer].view(torch.uint8).fill_(0xFF)
        super().mark_used(buffer)


def answers(
    communicator: Communicator,
    streamed: tuple[int, ...],
    speculation: Speculation | None,
    kv_dtype: torch.dtype | None,
    *,
    with_kv: bool,
) -> list[list[int]]:
    """Three rows for seven prompts of up to three pages, in chunks that end within pages."""
    model, layers = build(communicator, DEMO, torch.bfloat16), HostLayers(streamed, DEVICE, with_kv=with_kv)
    load_checkpoint(model, read_checkpoint(DEMO), DEVICE, on_placed=HostLoader(model.module, layers))
    if speculation is not None and speculation.kind == "draft":
        draft = build(communicator, DEMO, torch.bfloat16)
        load_checkpoint(draft, read_checkpoint(DEMO), DEVICE, on_placed=LayerMerger(draft.module))
        speculation = replace(speculation, draft=draft.module)
    limits = EngineLimits(max_context=192, batch_size=3, prefill_chunk=45)
    engine = Engine(model.module, communicator, limits, kv_dtype=kv_dtype, speculation=speculation, host_layers=layers)
    host_kv = engine.decoder.host_kv
    assert (host_kv is not None) == with_kv
    if host_kv is not None:
        assert host_kv.buffer.memory.is_pinned()
        host_kv.copies = PoisonedCopies(host_kv)
    result = generate(engine, numbered(prompts_of_pages()), demo_tokenizer(), StopRules(16))
    return [answer.token_ids for answer in result.answers]


KINDS: dict[str, tuple[Speculation | None, torch.dtype | None]] = {
    "plain": (None, None),
    "fp8": (None, FP8),
    "ngram": (NGRAM, None),
    "tree": (TREE, None),
    "grown": (GROWN, None),
}


def answers_of_kinds(communicator: Communicator) -> dict[str, list[list[list[int]]]]:
    """Of three streamed layers of five, with pages on the card and with their layers."""
    share_process_group(torch.device("cpu"))
    return {
        name: [answers(communicator, (0, 2, 4), *kind, with_kv=with_kv) for with_kv in (False, True)]
        for name, kind in KINDS.items()
    }


def test_ranks_answer_as_with_pages_on_the_card(tmp_path: Path) -> None:
    for found in run_on_one_card(answers_of_kinds, 2, tmp_path):
        for name, (on_card, hosted) in found.items():
            assert len(set(map(tuple, on_card))) == len(on_card)
            assert hosted == on_card, name


# A layer of a 70B, its head 128 wide in bf16.
KV_HEADS, HEAD_DIM, NUM_PAGES = 8, 128, 600
LAYERS = (0, 1, 2, 3)
PAGES = {"in a row": range(1, 513), "each third": range(1, 600, 3), "each tenth": range(1, 600, 10)}


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds until the card has done it, and of these, in which the host queues it."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    queued = time.perf_counter()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3, (queued - start) * 1e3


def pass_over(host_kv: HostKV, pages: range, slots: torch.Tensor) -> None:
    host_kv.begin(pages, slots)
    for _ in host_kv.through([nn.Identity() for _ in LAYERS]):
        pass


@torch.inference_mode()
def test_pages_and_tokens_of_large_layers_are_exact_and_how_fast_they_go() -> None:
    """Bytes of all kinds; what is not asked for stays as it was. Times are printed: GB/s of pages, us of writes."""
    host_kv = HostKV(LAYERS, NUM_PAGES, KV_HEADS, HEAD_DIM, torch.bfloat16, DEVICE)
    host_kv.pages.random_()
    found: dict[str, Any] = {}
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    for name, pages in PAGES.items():
        call = partial(pass_over, host_kv, pages, none)
        host_kv.staged_words.fill_(-1)
        call()
        # The last two layers are still there.
        wanted = host_kv.pages[2:].to(DEVICE)
        assert torch.equal(host_kv.staged_words[:, :, list(pages)], wanted[:, :, list(pages)])
        is_there = torch.zeros(NUM_PAGES, dtype=torch.bool)
        for each in host_kv.ranges:
            is_there[slice(*each)] = True
        assert (host_kv.staged_words[:, :, ~is_there] == -1).all()
        all_ms, queue_ms = min(timed(call) for _ in range(3))
        num_pages = int(is_there.sum())
        gb_per_sec = len(LAYERS) * num_pages * 2 * KV_HEADS * PAGE_SIZE * HEAD_DIM * 2 / all_ms / 1e6
        found[name] = {
            "pages": num_pages,
            "copies": len(host_kv.ranges),
            "queue_ms": queue_ms,
            "gb_per_sec": gb_per_sec,
        }
    for num_tokens in (16, 2048):
        slots = torch.randperm(NUM_PAGES * PAGE_SIZE, device=DEVICE)[:num_tokens]
        before = host_kv.pages.clone()
        new = torch.randint(2**60, host_kv.staged_words.shape, device=DEVICE)
        host_kv.begin([], slots)
        for place, _ in enumerate(host_kv.through([nn.Identity() for _ in LAYERS])):
            host_kv.staged_words[place % NUM_STAGED].copy_(new[place % NUM_STAGED] + place)
        torch.cuda.synchronize()
        is_written = torch.zeros(NUM_PAGES * PAGE_SIZE, dtype=torch.bool).index_fill(0, slots.cpu(), 1)
        is_written = is_written.view(NUM_PAGES, 1, PAGE_SIZE, 1)
        for place, layer in enumerate(host_kv.pages):
            assert torch.equal(layer, torch.where(is_written, new[place % NUM_STAGED].cpu() + place, before[place]))
        host_kv.begin([], slots)
        all_ms, queue_ms = min(timed(partial(host_kv.write_back, 0)) for _ in range(5))
        gb_per_sec = num_tokens * 2 * KV_HEADS * HEAD_DIM * 2 / all_ms / 1e6
        found[f"write {num_tokens}"] = {"queue_us": queue_ms * 1e3, "us": all_ms * 1e3, "gb_per_sec": gb_per_sec}
    print(json.dumps(found))


FACTS = (
    *("model=llama3_3_70b_awq", "model.path=nobody/has-this", "model.shape.num_layers=10", "model.weights=dummy"),
    *("gpus=1", "workload.output_tokens=16", "workload.prompt_tokens=2048", "workload.batch_size=16"),
    *("engine.max_context=2112", "offload.resident_layers=3", "limits.card_memory_gib=24"),
    # Greedy answers of random weights repeat a token, whatever a layer may lack.
    *("sampling.temperature=1.0", "sampling.seed=5"),
)


def reports_of(folder: Path, *commands: tuple[str, ...]) -> list[dict[str, Any]]:
    results = run_together(folder, *((*FACTS, *args) for args in commands), env={"HF_HUB_OFFLINE": "1"})
    for result in results:
        assert result.report.get("error") is None, result.report["error"]
    return [result.report for result in results]


def test_large_layers_answer_as_with_pages_on_the_card_in_the_memory_that_was_planned(tmp_path: Path) -> None:
    """Seven of ten layers of a 70B: five fewer have pages on the card, beside two staging caches."""
    prompts = tmp_path / "prompts.txt"
    # More than rows.
    prompts.write_text("\n".join(f"number {number}" for number in range(18)))
    on_card, hosted = reports_of(
        tmp_path, *((f"prompts_file={prompts}", f"offload.kv={kv}") for kv in ("card", "host"))
    )
    tokens = [output["token_ids"] for output in hosted["outputs"]]
    assert tokens == [output["token_ids"] for output in on_card["outputs"]]
    assert len(set(tokens[0])) > len(tokens[0]) // 2
    memory = [report["cards"][0]["memory"] for report in (on_card, hosted)]
    lines = [report["predicted"]["cards"][0]["lines"] for report in (on_card, hosted)]
    for measured, planned in zip(memory, lines, strict=True):
        for name in ("kv_cache", "kv_staging"):
            assert measured[f"{name}_bytes"] == planned.get(name, 0)
    assert memory[1]["host_kv_bytes"] == hosted["predicted"]["offload"]["kv_host_bytes"][0]
    saved, planned = (before - after for before, after in (
        # What a load takes beyond all else is not taken at the same time.
        [each["allocated_peak_bytes"] for each in memory], [sum(each.values()) - each.get("load", 0) for each in lines]
    ))  # fmt: skip
    print(json.dumps({"saved": saved, "planned": planned, "memory": memory, "lines": lines}))
    assert saved == pytest.approx(planned, rel=0.05)


def test_bench_with_pages_in_host_memory(tmp_path: Path) -> None:
    args = ("task=bench", "workload.repeats=1", "workload.warm_up=1")
    (report,) = reports_of(tmp_path, (*args, "offload.kv=host"))
    print(json.dumps({name: report[name] for name in ("offload", "decode_step_ms", "ttft_ms", "tokens_per_sec")}))
    print(json.dumps(report["breakdown"]))
    offload = report["offload"]
    assert 0 < offload["kv_bytes_per_pass"] < offload["bytes_per_pass"]
    assert report["bandwidth"]["floor_ms"] >= offload["floor_ms"]
