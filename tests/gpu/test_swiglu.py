"""Gate and up with their activation in one kernel on a card: bit for bit what the two kernels give, and float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.footprint import WIDE_WORKSPACE_BYTES
from parallel.kernels import wide
from parallel.kernels.fused import silu_mul
from parallel.kernels.merge import merge
from parallel.kernels.warp_groups import GroupLaunch
from parallel.layers import merged
from parallel.layers.merged import MAX_SWIGLU_ROWS, MergedLinear, swiglu
from tools.bench.linear_formats import (
    FORMATS,
    AnyLaunch,
    OwnFormat,
    Packed,
    compile_in_threads,
    rounded_codebook,
)
from tools.bench.linear_launches import launches

pytestmark = pytest.mark.gpu
# [gates and ups, inputs]: of Llama-70B at TP2, of Qwen-72B at TP2 (924 tiles of each), and few tiles and odd units.
SHAPES = ((28672, 1024), (29568, 512), (2080, 384), (32, 256))
NUM_ROWS = (1, 3, 8, 9, 16, 17, 32, 47, 64, 100, 256)


def random_rows(num_rows: int, weight: Tensor) -> Tensor:
    """Rows whose gates are of all kinds: about 1."""
    rows = torch.randn(num_rows, weight.shape[1], device="cuda")
    return (rows / (weight.double().square().sum(1).mean().sqrt().float())).bfloat16()


def run(own: OwnFormat, launch: AnyLaunch, rows: Tensor, packed: Packed, num_out: int, *, has_swiglu: bool) -> Tensor:
    """The kernel's output, in memory filled with NaN, of which it leaves what follows."""
    memory = torch.full((len(rows) + 1, num_out), float("nan"), device="cuda", dtype=torch.bfloat16)
    workspace = torch.full((WIDE_WORKSPACE_BYTES // 4,), float("nan"), device="cuda")
    own.run(launch, rows, packed, memory[:-1], workspace, swiglu=has_swiglu)
    assert memory[-1].isnan().all() and not memory[:-1].isnan().any()
    return memory[:-1]


def check_launch(own: OwnFormat, launch: AnyLaunch, rows: Tensor, packed: Packed, num_out: int) -> Tensor:
    """The activated product, having compared it with that of two kernels.

    Of many rows blocks share tiles, with cuts at other places where tiles come in pairs: other orders of sums.
    """
    found = run(own, launch, rows, packed, num_out // 2, has_swiglu=True)
    apart = silu_mul(run(own, launch, rows, packed, num_out, has_swiglu=False))
    same = (
        torch.allclose(found, apart, rtol=2**-5, atol=2e-3)
        if isinstance(launch, wide.Launch)
        else torch.equal(found, apart)
    )
    assert same, f"{launch}, {len(rows)} rows of {num_out}"
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_one_kernel_gives_bit_for_bit_what_two_give_and_what_float64_does(name: str) -> None:
    own = FORMATS[name]
    chosen = [own.choose(num_rows, shape, swiglu=True) for num_rows, shape in product(NUM_ROWS, SHAPES)]
    compile_in_threads(product([own], chosen, (False, True)))
    for num_out, num_in in SHAPES:
        weight = rounded_codebook(own.random_weight(num_out, num_in))
        exact, packed, layer = weight.dequantize(torch.float32), own.pack(weight), own.layer(weight)
        for num_rows in NUM_ROWS:
            rows = random_rows(num_rows, exact)
            launch = own.choose(num_rows, (num_out, num_in), swiglu=True)
            found = check_launch(own, launch, rows, packed, num_out)
            assert torch.equal(layer.swiglu(rows), found)
            gate, up = (rows.double() @ exact.double().t()).chunk(2, dim=1)
            # Gate, up, silu and the product are each rounded to bf16.
            allowed = (F.silu(gate) * up).abs() * 2**-5 + up.abs() * gate.abs().clamp(max=1) * 2**-6 + 2e-3
            assert ((found.double() - F.silu(gate) * up).abs() <= allowed).all(), f"{num_rows} of {num_out} x {num_in}"


@pytest.mark.parametrize("name", ["w4", "nf4", "int8-g128"])
def test_every_launch_that_may_be_tuned_gives_what_two_kernels_give(name: str) -> None:
    own, (num_out, num_in) = FORMATS[name], (2112, 640)
    weight = own.random_weight(num_out, num_in)
    exact, packed = weight.dequantize(torch.float32), own.pack(weight)
    for num_rows in (5, 13, 40):
        usable = [
            each
            for each in launches(own, num_rows, num_in)
            if not isinstance(each, GroupLaunch) and each.row_tiles % 2 == 0
        ]
        compile_in_threads(product([own], usable, (False, True)))
        rows = random_rows(num_rows, exact)
        for launch in usable:
            check_launch(own, launch, rows, packed, num_out)


@pytest.mark.parametrize("name", ["w4", "int8", "fp8-block"])
def test_merged_gate_and_up_are_activated_by_one_launch_in_graphs_too(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = FORMATS[name]
    joined = merge([own.layer(own.random_weight(1856, 1024)) for _ in range(2)])
    assert joined is not None
    gate_up = MergedLinear(joined, None)
    hidden = [random_rows(num_rows, joined.dequantize(slice(0, 3712)).float()) for num_rows in (1, 8, 20, 32, 33)]
    expected = [silu_mul(gate_up(rows)) for rows in hidden]
    two_kernels: list[int] = []
    monkeypatch.setattr(merged, "silu_mul", lambda rows: two_kernels.append(len(rows)) or silu_mul(rows))
    graph = torch.cuda.CUDAGraph()
    for rows in hidden:
        swiglu(gate_up, rows)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        outputs = [swiglu(gate_up, rows) for rows in hidden]
    assert two_kernels == [MAX_SWIGLU_ROWS + 1] * 2
    for _ in range(3):
        for output in outputs:
            output.fill_(float("nan"))
        graph.replay()
        # Of 8 bits and few rows, launches may add up in another order than those of the product alone.
        for found, apart in zip(outputs, expected, strict=True):
            assert torch.allclose(found.float(), apart.float(), rtol=2**-6, atol=0.01)
