"""Layers read from a checkpoint in every pass, on a card: the tokens of resident ones, the plan's memory, and the rate.

Each test prints what it measured, as a line of JSON.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from parallel.checkpoint.headers import read_checkpoint
from parallel.checkpoint.load import load_checkpoint
from parallel.checkpoint.quantize_schemes import QUANTIZE_SCHEMES
from parallel.checkpoint.read import TensorSlice
from parallel.communicator import Communicator
from parallel.engine.answer import StopRules
from parallel.engine.engine import Engine
from parallel.engine.generate import generate
from parallel.engine.limits import EngineLimits
from parallel.formats.scheme import Scheme
from parallel.kernels import pack_eight_bits, pack_four_bits, w4a16, w8a16
from parallel.layers.merged import LayerMerger
from parallel.offload.disk_layers import DiskLayers
from parallel.offload.disk_reads import DiskReads, Stamps
from parallel.offload.host_layers import HostLayers, HostLoader
from parallel.shard import share_process_group
from tests.gpu.one_card import DEVICE, run_on_one_card
from tests.launcher.cli import run
from tests.parallel.ranks import build, demo_tokenizer, numbered
from tests.parallel.small_models import DEMO, prompts_of
from tools.make_checkpoint import main as make_checkpoint

pytestmark = pytest.mark.gpu

# Of the five layers of the demo model, those in host memory and those on the disk.
SETS = (((), ()), ((1, 3), (0,)), ((0,), (2, 4)), ((), (0, 1, 2, 3, 4)))


def answers(communicator: Communicator, streamed: tuple[int, ...], on_disk: tuple[int, ...]) -> list[list[int]]:
    model, checkpoint = build(communicator, DEMO, torch.float32), read_checkpoint(DEMO)
    disk = DiskLayers(on_disk, DEVICE) if on_disk else None
    layers = HostLayers(streamed, DEVICE, disk=disk) if streamed or on_disk else None
    on_placed = LayerMerger(model.module) if layers is None else HostLoader(model.module, layers)
    if disk is not None:
        disk.open(model, checkpoint, None)
        assert disk.reads.ring.memory.is_pinned()
        disk.reads.ring.memory.fill_(0xFF)
    load_checkpoint(model, checkpoint, DEVICE, on_placed=on_placed)
    limits = EngineLimits(max_context=128, batch_size=3, prefill_chunk=16)
    engine = Engine(model.module, communicator, limits, host_layers=layers)
    result = generate(engine, numbered(prompts_of("demo")), demo_tokenizer(), StopRules(12))
    return [answer.token_ids for answer in result.answers]


def answers_of_sets(communicator: Communicator) -> list[list[list[int]]]:
    share_process_group(torch.device("cpu"))
    return [answers(communicator, *each) for each in SETS]


def test_sharded_ranks_that_read_layers_answer_as_resident_ones(tmp_path: Path) -> None:
    for resident, *others in run_on_one_card(answers_of_sets, 2, tmp_path):
        assert others == [resident] * (len(SETS) - 1)


def test_buffers_are_filled_again_only_when_their_copies_are_done(tmp_path: Path) -> None:
    """While the card is kept busy, so that copies wait long in the stream."""
    tensors = {f"{i}.{j}": torch.randn(3000, 2000) for i in range(3) for j in range(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    entries = read_checkpoint(tmp_path).tensors
    layers = [[TensorSlice(entries[f"{i}.{j}"], (slice(5, 2900),)) for j in range(3)] for i in range(3)]
    reads = DiskReads(layers, DEVICE, Stamps([tmp_path / "model.safetensors"]))
    expected = {name: tensor[5:2900].to(DEVICE) for name, tensor in tensors.items()}
    busy, wrong = torch.randn(8192, 8192, device=DEVICE), torch.zeros((), dtype=torch.int64, device=DEVICE)
    reads.start(0)
    for turn in range(12):
        for wanted in layers[turn % 3]:
            torch.mm(busy, busy)
            found: Tensor = reads.take(wanted)
            wrong += (found != expected[wanted.entry.name]).sum()
    assert int(wrong) == 0


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Six layers of a 70B: in AWQ, and as numbers."""
    root = tmp_path_factory.mktemp("checkpoints")
    made = {"awq": ["--quantization", "awq"], "bf16": []}
    for name, args in made.items():
        make_checkpoint(["--out", str(root / name), "--preset", "70b", "--num-layers", "6", *args])
    return {name: root / name for name in made}


def report_of(folder: Path, *args: str) -> dict[str, Any]:
    fixed = (
        *("model=local", "gpus=1", "workload.output_tokens=12", "workload.prompt_tokens=300", "task=bench"),
        *("engine.max_context=1024", "workload.batch_size=1", "workload.repeats=1", "workload.warm_up=0"),
        # Every step reads layers anew.
        "engine.comm_share_steps=1",
    )
    report = run(*fixed, *args, folder=folder).report
    assert report.get("error") is None, report["error"]
    return report


@pytest.mark.parametrize(("name", "quantize"), [("awq", "none"), ("bf16", "none"), ("bf16", "int4")])
def test_large_layers_stay_within_the_plan(
    name: str, quantize: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Prints what a pass took beside the prediction, and what of it the disk's bytes are."""
    disk = ("offload.resident_layers=1", "offload.disk=checkpoint", "offload.disk_layers=3", "offload.host_layers=0")
    report = report_of(tmp_path, f"model.path={checkpoints[name]}", f"model.quantize={quantize}", *disk)
    card, predicted = report["cards"][0], report["predicted"]
    line = {
        "name": name,
        "quantize": quantize,
        "step_ms": report["decode_step_ms"]["measured"],
        "offload": report["offload"],
        "predicted": predicted["offload"],
        "peak": card["peak_bytes"],
        "allocated": card["memory"]["allocated_peak_bytes"],
        "lines": predicted["cards"][0]["lines"],
        "breakdown": report["breakdown"],
    }
    print(json.dumps(line))
    lines = predicted["cards"][0]["lines"]
    torch_bytes = sum(size for part, size in lines.items() if part not in ("context", "communicator", "graphs"))
    assert card["memory"]["allocated_peak_bytes"] < 1.03 * torch_bytes


GENERATE = (
    *("model=local", "gpus=1", "task=generate", "workload.output_tokens=12", "engine.max_context=512"),
    # Captured passes, which only resident layers have, are filled up to rows that other kernels multiply.
    "engine.prefill_graphs=off",
    # Greedy answers of random weights repeat a token, whatever a layer may lack.
    *("sampling.temperature=1.0", "sampling.seed=5"),
)


@pytest.mark.parametrize(("name", "quantize"), [("awq", "none"), ("bf16", "fp8")])
def test_large_layers_answer_as_resident_ones(
    name: str, quantize: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    args = (*GENERATE, f"model.path={checkpoints[name]}", f"model.quantize={quantize}")
    tokens = []
    for place, offload in enumerate(
        ([], ["offload.resident_layers=1", "offload.disk=checkpoint", "offload.disk_layers=3", "offload.host_layers=0"])
    ):
        report = run(*args, *offload, folder=tmp_path / str(place)).report
        assert report.get("error") is None, report["error"]
        tokens.append(report["outputs"][0]["token_ids"])
    assert len(set(tokens[0])) > len(tokens[0]) // 2
    assert tokens[0] == tokens[1]


def layer_costs(communicator: Communicator, folder: Path, quantize: Scheme | None) -> list[tuple[float, float]]:
    """ms until a layer that has been read is queued, and done; half of it, as of one rank of two."""
    share_process_group(torch.device("cpu"))
    model, checkpoint = build(communicator, folder, torch.bfloat16), read_checkpoint(folder)
    disk, times = DiskLayers((1, 2, 3), DEVICE), []
    disk.open(model, checkpoint, quantize)
    for turn in range(7 if communicator.rank == 0 else 0):
        disk.reads.start(turn % 3)
        for _, _, future in list(disk.reads.reading):
            future.result()
        torch.cuda.synchronize()
        start = time.perf_counter()
        disk.make(disk.sources[turn % 3])
        queued = time.perf_counter()
        torch.cuda.synchronize()
        times.append((1e3 * (queued - start), 1e3 * (time.perf_counter() - start)))
    return times


@pytest.mark.parametrize(("name", "quantize"), [("awq", None), *(("bf16", kind) for kind in QUANTIZE_SCHEMES)])
def test_what_a_layer_costs_the_card(
    name: str, quantize: str | None, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    scheme = None if quantize is None else QUANTIZE_SCHEMES[quantize]
    times = run_on_one_card(layer_costs, 2, tmp_path, checkpoints[name], scheme)[0]
    print(json.dumps({f"half a layer of a 70B, {name}, {quantize=}, ms queued and done": times}))
    assert len(times) == 7


@pytest.mark.parametrize("in_pairs", [False, True])
def test_card_packs_as_plain_torch_does(in_pairs: bool) -> None:
    values = torch.randint(0, 16, (2064, 8064), dtype=torch.uint8)
    packed = pack_four_bits.pack(values.to(DEVICE), in_pairs=in_pairs)
    assert torch.equal(packed.cpu(), w4a16.pack_values(values, in_pairs=in_pairs))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_card_packs_eight_bits_as_plain_torch_does(dtype: torch.dtype) -> None:
    values = torch.randint(0, 256, (2064, 8064), dtype=torch.uint8)
    packed = pack_eight_bits.pack(values.to(DEVICE).view(dtype))
    assert torch.equal(packed.cpu(), w8a16.pack_values(values.view(dtype)))
