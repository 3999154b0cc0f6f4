"""Rounding and dummy weights on cards: the bits of the CPU, the kernels of read checkpoints, the memory of the plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.checkpoint.load_memory import load_bytes
from parallel.checkpoint.quantize import quantize_weight
from parallel.checkpoint.quantize_schemes import QUANTIZE_SCHEMES
from parallel.kernels import round_groups
from parallel.kernels.choice import pack_linear
from tests.launcher.cli import run
from tests.parallel.kernels.test_round_groups import extremes, undecided

pytestmark = pytest.mark.gpu
KINDS = tuple(QUANTIZE_SCHEMES)
# A rank of Llama-70B at TP2: the larger linears.
SHAPE = (14336, 8192)
# Four layers of Llama-70B, of which nothing is on this machine.
FOUR_LAYERS = ("model=llama3_3_70b", "model.path=nobody/has-this", "model.shape.num_layers=4", "model.weights=dummy")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_card_rounds_as_the_cpu_does(kind: str, dtype: torch.dtype) -> None:
    weight = (torch.randn(512, 1000) * torch.rand(512, 1) * 0.1).to(dtype)
    expected = quantize_weight(weight, QUANTIZE_SCHEMES[kind])
    rounded = quantize_weight(weight.cuda(), QUANTIZE_SCHEMES[kind])
    assert torch.equal(rounded.values.cpu().view(torch.uint8), expected.values.view(torch.uint8))
    assert torch.equal(rounded.scales.cpu(), expected.scales)
    assert expected.zeros is None or torch.equal(rounded.zeros.cpu(), expected.zeros)  # type: ignore[union-attr]


@pytest.mark.parametrize("make", [extremes, undecided])
@pytest.mark.parametrize("kind", KINDS)
def test_card_rounds_hard_groups_as_the_cpu_does(kind: str, make: Callable[[], Tensor]) -> None:
    weight, scheme = make(), QUANTIZE_SCHEMES[kind]
    assert round_groups.takes(weight.cuda(), scheme)
    rounded, expected = quantize_weight(weight.cuda(), scheme), quantize_weight(weight, scheme)
    assert torch.equal(rounded.scales.cpu(), expected.scales)
    assert expected.zeros is None or torch.equal(rounded.zeros.cpu(), expected.zeros)  # type: ignore[union-attr]
    assert torch.equal(rounded.values.cpu().view(torch.uint8), expected.values.view(torch.uint8))


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_and_packing_stay_within_the_plan(kind: str) -> None:
    scheme, numel = QUANTIZE_SCHEMES[kind], SHAPE[0] * SHAPE[1]
    # A first, small one: kernels that are compiled and checked, and what they leave in the allocator.
    pack_linear(quantize_weight(torch.randn(256, 8192, device="cuda", dtype=torch.bfloat16), scheme), torch.bfloat16)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    stored = [0.02 * torch.randn(SHAPE, device="cuda", dtype=torch.bfloat16)]
    torch.cuda.reset_peak_memory_stats()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    layer, kernel = pack_linear(quantize_weight(stored.pop(), scheme), torch.bfloat16)
    end.record()
    torch.cuda.synchronize()
    held = sum(buffer.nbytes for buffer in layer.buffers())
    peak = torch.cuda.max_memory_allocated() - before
    predicted = load_bytes(scheme, "cuda", "bfloat16", 2, SHAPE[1], numel)
    print(f"{kind}: {begin.elapsed_time(end):.1f} ms for {SHAPE}, {kernel}; peak {(peak - held) / numel:.2f} bytes a "
          f"weight beside what stays, predicted {predicted / numel:.2f}")  # fmt: skip
    assert peak - held <= 1.02 * predicted


@pytest.mark.parametrize("kind", ["none", *KINDS])
@pytest.mark.parametrize("gpus", [1, 2])
def test_dummy_layers_of_a_70b_run_within_the_plan(tmp_path: Path, kind: str, gpus: int) -> None:
    if gpus > torch.cuda.device_count():
        pytest.skip(f"{gpus} cards are needed")
    args = (f"gpus={gpus}", f"model.quantize={kind}", "workload.output_tokens=16", "engine.max_context=1024")
    report: dict[str, Any] = run(*FOUR_LAYERS, *args, folder=tmp_path / "run", env={"HF_HUB_OFFLINE": "1"}).report
    assert report.get("error") is None, report["error"]
    assert report["weights"] == "dummy"
    assert len(report["outputs"][0]["token_ids"]) == 16
    for card, predicted in zip(report["cards"], report["predicted"]["cards"], strict=True):
        lines = predicted["lines"]
        weights = sum(size for name, size in lines.items() if name.startswith("weights."))
        assert card["memory"]["weights_bytes"] == pytest.approx(weights, rel=0.01)
        beside = lines["context"] + lines["communicator"]
        assert card["memory"]["allocated_peak_bytes"] <= 1.05 * (card["predicted_bytes"] - beside)
    kernel = next(iter(report["load"]["kernels"]), "")
    print(
        f"{kind} on {gpus}: made in {report['load']['sec']:.2f} s, {report['tpot_ms']['p50']:.2f} ms a token, {kernel}"
    )
    assert kind != "int4" or kernel.startswith("w4a16")
