"""Layers streamed from pinned memory: the answers of a resident model, on ranks that share a card and on one alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from parallel.checkpoint.headers import read_checkpoint
from parallel.checkpoint.load import load_checkpoint
from parallel.communicator import Communicator
from parallel.engine.answer import StopRules
from parallel.engine.engine import Engine
from parallel.engine.generate import generate
from parallel.engine.limits import EngineLimits
from parallel.layers.merged import LayerMerger
from parallel.offload.embedding import move_embedding
from parallel.offload.host_layers import HostLayers, HostLoader
from parallel.offload.host_memory import HostBuffer
from parallel.shard import share_process_group
from tests.gpu.one_card import DEVICE, run_on_one_card
from tests.launcher.cli import run
from tests.parallel.ranks import build, demo_tokenizer, numbered
from tests.parallel.small_models import DEMO, prompts_of

pytestmark = pytest.mark.gpu

SETS = ((), (2,), (1, 3), (0, 1, 2, 3, 4))


def answers(communicator: Communicator, streamed: tuple[int, ...]) -> list[list[int]]:
    """Of the demo prompts, three rows for four of them; staging buffers hold nonsense at first."""
    model = build(communicator, DEMO, torch.float32)
    layers = HostLayers(streamed, DEVICE) if streamed else None
    on_placed = LayerMerger(model.module) if layers is None else HostLoader(model.module, layers)
    load_checkpoint(model, read_checkpoint(DEMO), DEVICE, on_placed=on_placed)
    limits = EngineLimits(max_context=128, batch_size=3, prefill_chunk=16)
    engine = Engine(model.module, communicator, limits, host_layers=layers)
    assert engine.captures == (not streamed)
    if engine.streamer is not None:
        engine.streamer.buffers.fill_(0xFF)
        assert all(layer.memory.is_pinned() for layer in engine.streamer.layers)
    result = generate(engine, numbered(prompts_of("demo")), demo_tokenizer(), StopRules(12))
    return [answer.token_ids for answer in result.answers]


def answers_of_sets(communicator: Communicator) -> list[list[list[int]]]:
    share_process_group(torch.device("cpu"))
    return [answers(communicator, streamed) for streamed in SETS]


def test_sharded_ranks_that_stream_answer_as_resident_ones(tmp_path: Path) -> None:
    for resident, *streamed in run_on_one_card(answers_of_sets, 2, tmp_path):
        assert streamed == [resident] * (len(SETS) - 1)


FACTS = (
    *("model=llama3_3_70b", "model.path=nobody/has-this", "model.shape.num_layers=10", "model.weights=dummy"),
    *("gpus=1", "workload.output_tokens=24", "workload.prompt_tokens=700", "engine.prefill_chunk=512"),
    # Greedy answers of random weights repeat a token, whatever a layer may lack.
    *("engine.max_context=1024", "workload.batch_size=1", "sampling.temperature=1.0", "sampling.seed=5"),
)


def report_of(folder: Path, *args: str) -> dict[str, Any]:
    report = run(*FACTS, *args, folder=folder, env={"HF_HUB_OFFLINE": "1"}).report
    assert report.get("error") is None, report["error"]
    return report


@pytest.mark.parametrize("quantize", ["int4", "int8", "none"])
def test_large_layers_answer_as_resident_ones(quantize: str, tmp_path: Path) -> None:
    """Ten layers of a 70B, of which seven are streamed: an odd number, so that buffers change at every pass."""
    kind = f"model.quantize={quantize}"
    resident = report_of(tmp_path / "resident", kind)
    streamed = report_of(tmp_path / "streamed", kind, "offload.resident_layers=3", "offload.host_layers=0")
    offload, memory = streamed["offload"], streamed["cards"][0]["memory"]
    print(json.dumps({quantize: offload, "load": streamed["load"]["sec"], "resident": resident["tpot_ms"]}))
    tokens = streamed["outputs"][0]["token_ids"]
    assert len(set(tokens)) > len(tokens) // 2
    assert tokens == resident["outputs"][0]["token_ids"]
    assert offload["share_of_copy"] > 0
    freed = resident["cards"][0]["memory"]["allocated_peak_bytes"] - memory["allocated_peak_bytes"]
    assert freed > 0.9 * (offload["host_bytes"] - memory["staging_bytes"]) - 2**28


def test_bench_of_streamed_layers(tmp_path: Path) -> None:
    args = ("task=bench", "workload.repeats=1", "workload.warm_up=1", "workload.prompt_tokens=512")
    report = report_of(tmp_path, *args, "model.quantize=int4", "offload.resident_layers=3", "offload.host_layers=0")
    print(json.dumps({name: report[name] for name in ("offload", "bandwidth", "decode_step_ms", "ttft_ms")}))
    print(json.dumps(report["breakdown"]))
    assert report["breakdown"]["problem"] is None
    assert report["breakdown"]["host_copies_us"] > 0
    assert report["bandwidth"]["floor_ms"] == pytest.approx(report["offload"]["floor_ms"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_in_host_memory_gives_the_same_rows(dtype: torch.dtype) -> None:
    embedding = nn.Embedding(5003, 96, dtype=dtype, device=DEVICE).requires_grad_(requires_grad=False)
    ids = torch.randint(5003, (700,), device=DEVICE)
    before = F.embedding(ids, embedding.weight).clone()
    held = torch.cuda.memory_allocated()
    hosted = move_embedding(embedding, DEVICE)
    assert embedding.weight.device == DEVICE
    assert torch.equal(F.embedding(ids, embedding.weight), before)
    assert torch.cuda.memory_allocated() <= held - 5003 * 96 * dtype.itemsize
    assert embedding.weight.data_ptr() != 0 != hosted.buffer.memory.data_ptr()


def test_buffers_are_pinned_for_as_long_as_they_live() -> None:
    for _ in range(3):
        buffer = HostBuffer(3 * 2**20 + 5, DEVICE)
        assert buffer.memory.is_pinned()
        source = torch.randint(256, (buffer.memory.nbytes,), dtype=torch.uint8)
        buffer.memory.copy_(source)
        assert torch.equal(buffer.memory.to(DEVICE, non_blocking=True).cpu(), source)
        del buffer
