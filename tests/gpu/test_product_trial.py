"""The trial of both ways on a card: what it answers, and that it leaves the card as it was."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from parallel.checkpoint.quantize_schemes import QUANTIZE_SCHEMES
from parallel.product_trial import TRIED_ROWS, measure_fused_rows
from parallel.transports.solo import Solo
from tests.launcher.cli import run

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)
# Gate and up of a rank of Llama-70B at TP2, of a Llama-8B, and of something small.
SHAPES = ((28672, 8192), (28672, 4096), (512, 256))
MIB = 1024**2


@pytest.mark.parametrize("kind", QUANTIZE_SCHEMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_limit_is_a_size_that_was_tried_and_the_memory_is_given_back(kind: str, shape: tuple[int, int]) -> None:
    solo = Solo(DEVICE)
    # A first time: kernels are compiled.
    measure_fused_rows(QUANTIZE_SCHEMES[kind], *shape, solo, DEVICE)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    allocated, reserved, start = torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), time.perf_counter()
    found = measure_fused_rows(QUANTIZE_SCHEMES[kind], *shape, solo, DEVICE)
    sec, peak = time.perf_counter() - start, torch.cuda.max_memory_allocated() - allocated
    print(
        f"{kind} {shape}: {sec:.2f} s, {peak / MIB:.0f} MiB; up to {found.limit} rows: {found.reason}; {asdict(found)}"
    )
    assert found.limit in TRIED_ROWS
    assert tuple(found.packed_ms) == tuple(found.dequantized_ms) == TRIED_ROWS
    assert all(math.isfinite(ms) and ms > 0 for way in (found.packed_ms, found.dequantized_ms) for ms in way.values())
    for way in (found.packed_ms, found.dequantized_ms):
        assert f"{way[found.limit]:.2f} ms" in found.reason
    assert torch.cuda.memory_allocated() == allocated and torch.cuda.memory_reserved() <= reserved
    assert peak <= 512 * MIB


def test_a_run_says_what_it_chose(tmp_path: Path) -> None:
    facts = ("model=llama3_1_8b", "model.path=nobody/has-this", "model.shape.num_layers=2", "model.weights=dummy")
    short = ("gpus=1", "model.quantize=int4", "workload.output_tokens=4", "engine.max_context=1024")
    measured = run(*facts, *short, folder=tmp_path / "measured", env={"HF_HUB_OFFLINE": "1"}).report
    assert measured.get("error") is None, measured["error"]
    rows = [str(rows) for rows in TRIED_ROWS]
    assert list(measured["fused_rows"]["packed_ms"]) == list(measured["fused_rows"]["dequantized_ms"]) == rows
    assert measured["fused_rows"]["limit"] in TRIED_ROWS
    override = "engine.fused_prefill_rows=300"
    asked = run(*facts, *short, override, folder=tmp_path / "asked", env={"HF_HUB_OFFLINE": "1"}).report
    assert asked["fused_rows"]["limit"] == 300 and override in asked["fused_rows"]["reason"]
