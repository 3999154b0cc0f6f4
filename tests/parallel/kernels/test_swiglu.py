"""Gate and up with their activation in one kernel: its source run on the CPU, its launches, and when it is not used."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.kernels import tiles, w4a16, w8a16, wide
from parallel.kernels.dequantize import DequantizeLinear
from parallel.kernels.tiles import Launch
from parallel.layers.merged import MAX_SWIGLU_ROWS, MergedLinear, SideBySide, swiglu
from parallel.quantized import QuantizedWeight
from tests.parallel.kernels.test_emulated_kernels import (
    NUM_IN,
    buffers_of,
    codebook,
    compile_source,
    draw,
    float8,
    layer_and_layout,
    pointer,
)

Layer = w4a16.W4A16Linear | w8a16.W8A16Linear
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
# Three tiles of gates and three of ups: blocks of four cannot share them, and those of many rows are half empty.
UNEVEN = 96
NARROW: dict[str, tuple[Callable[[], QuantizedWeight], Launch, int]] = {
    "4 bits in 32s": (lambda: draw(16, 32, zeros=True, num_out=UNEVEN), Launch(2, 2, 2, 2), 13),
    "float16 scales, zeros": (lambda: draw(16, 128, zeros=True, dtype=torch.float16), Launch(1, 4, 2, 2), 7),
    "codebook": (codebook, Launch(1, 2, 4, 2), 1),
    "int8": (lambda: draw(256, 128, zeros=True, num_out=UNEVEN), Launch(1, 2, 2, 4), 3),
    "float8": (float8, Launch(1, 4, 2, 2), 8),
}
# Blocks that share tiles, and, of 8 bits, threads that copy one tile at a time.
WIDE: dict[str, tuple[Callable[[], QuantizedWeight], wide.Launch, int, int]] = {
    "4 bits": (lambda: draw(16, 128, zeros=True, num_out=UNEVEN), wide.Launch(2, 2, 2, 2, 3, 1), 40, 3),
    "bf16 scales in 32s": (
        lambda: draw(16, 32, zeros=True, dtype=torch.bfloat16, num_out=UNEVEN),
        wide.Launch(1, 2, 4, 1, 2, 1),
        5,
        2,
    ),
    "codebook": (codebook, wide.Launch(1, 4, 2, 2, 4, 1), 11, 4),
    "int8": (lambda: draw(256, 128, zeros=True, num_out=UNEVEN), wide.Launch(2, 2, 4, 1, 2, 1), 9, 4),
    "float8": (float8, wide.Launch(3, 2, 4, 1, 2, 1), 25, 2),
}


def small(weight: QuantizedWeight) -> QuantizedWeight:
    """With gates of all kinds: most of the random weights' would be so large that silu is the gate, or zero."""
    return replace(weight, scales=(weight.scales / weight.dequantize(torch.float32).std() / 8).to(weight.scales.dtype))


def activated(gate_up: Tensor) -> Tensor:
    """[m, out] -> [m, out / 2] in float64, rounded as the kernels do it."""
    gate, up = gate_up.bfloat16().double().chunk(2, dim=-1)
    return (F.silu(gate).bfloat16().double() * up).bfloat16().double()


def check(output: Tensor, gate_up: Tensor, rows: Tensor, weight: QuantizedWeight) -> None:
    """`output`: with SWIGLU, and beyond what it writes NaN; `gate_up`: without."""
    exact = rows.double() @ weight.dequantize(torch.float64).t()
    assert float(exact.std()) > 0.3, "gates of all kinds"
    size = len(rows), weight.shape[0] // 2
    assert output[size[0] * size[1] :].isnan().all()
    found = output[: size[0] * size[1]].view(size).double()
    # Where the same sums are rounded at other places, most of the results differ; by another expf, next to none.
    assert float((found != activated(gate_up)).double().mean()) < 0.01
    error = (found - activated(exact)).abs()
    assert (error <= activated(exact).abs() * 2**-5 + exact.abs().mean() * 2e-2).all()


@needs_compiler
@pytest.mark.parametrize("name", NARROW)
def test_the_source_of_few_rows_activates_what_it_would_write(name: str) -> None:
    make, launch, num_rows = NARROW[name]
    weight = small(make())
    rows = torch.randn(num_rows, NUM_IN).bfloat16()
    outputs = []
    for has_swiglu in (False, True):
        layer, layout = layer_and_layout(weight, swiglu=has_swiglu)
        file = f"w{weight.bits}a16"
        options = [option for option in layout.options if not option.startswith("-DBITS")]
        options = [f"-DMULTIPLY={file}", *launch.options(), *options]
        library = compile_source(f"{file}.cu", options)
        num_out = weight.shape[0]
        output = torch.full((num_rows, num_out), float("nan"), dtype=torch.bfloat16)
        library.run_multiply(*buffers_of(layer), pointer(rows), pointer(output), num_out, NUM_IN, num_rows)
        outputs.append(output)
    check(outputs[1].flatten(), outputs[0], rows, weight)


@needs_compiler
@pytest.mark.parametrize("name", WIDE)
def test_the_source_of_many_rows_activates_what_it_would_write(name: str) -> None:
    make, launch, num_rows, num_blocks = WIDE[name]
    weight = small(make())
    rows = torch.randn(num_rows, NUM_IN).bfloat16()
    outputs = []
    for has_swiglu in (False, True):
        layer, layout = layer_and_layout(weight, swiglu=has_swiglu)
        options = ["-DRUN_WIDE", *launch.options(launch.stages), *layout.options]
        library = compile_source("wide.cu", options)
        output = torch.full((num_rows, weight.shape[0]), float("nan"), dtype=torch.bfloat16)
        workspace = torch.full((2 * num_blocks * launch.part_bytes // 4,), float("nan"))
        tensors = [layer.packed, layer.scales, getattr(layer, "codebook", None), rows, output, workspace]
        library.run_wide(*map(pointer, tensors), weight.shape[0] // 16, NUM_IN // 128, num_rows, num_blocks, 0)
        outputs.append(output)
    check(outputs[1].flatten(), outputs[0], rows, weight)


@pytest.mark.parametrize("num_tiles", [2, 6, 66, 448, 512, 896, 1040, 1792, 1848, 3584, 3696])
@pytest.mark.parametrize("num_rows", [1, 8, 9, 16])
def test_every_launch_takes_tiles_in_pairs_and_fits_its_block(num_rows: int, num_tiles: int) -> None:
    forms = (128, 16, torch.bfloat16), (32, 16, torch.float32)
    fours = [w4a16.find_layout(*form, has_codebook=False) for form in forms]
    found = [
        (w4a16.launches_for(has_codebook=False, swiglu=True), [layout.unit_bytes for layout in fours]),
        (w4a16.launches_for(has_codebook=True, swiglu=True), [fours[1].unit_bytes]),
        (w8a16.launches_for(swiglu=True), [w8a16.wide_layout(is_grouped=True, is_float=False).unit_bytes]),
    ]
    for launches, unit_bytes in found:
        if num_rows <= max(launches):
            launch = tiles.choose_launch(launches, num_rows, num_tiles)
            assert launch.token_tiles * tiles.ROWS_PER_TILE >= num_rows
            assert num_tiles % launch.row_tiles == 0 and launch.row_tiles % 2 == 0
            assert all(launch.shared_bytes(each) <= tiles.MAX_SHARED_BYTES for each in unit_bytes)


def test_blocks_that_have_two_tiles_anyway_stay_as_they_were_tuned() -> None:
    for num_rows, num_tiles in ((1, 3584), (1, 1792), (1, 896), (8, 1792), (16, 3584), (16, 896)):
        apart = tiles.choose_launch(w4a16.LAUNCHES, num_rows, num_tiles)
        assert tiles.choose_launch(w4a16.launches_for(has_codebook=False, swiglu=True), num_rows, num_tiles) == apart
    assert all(launch.row_tiles % 2 == 0 for launch in wide.LAUNCHES.values())


def test_the_dispatcher_knows_that_the_result_is_half_as_wide() -> None:
    with torch._subclasses.FakeTensorMode():
        rows, words = torch.empty(3, 256, dtype=torch.bfloat16), torch.empty(6, 2, 2, 32, 4, dtype=torch.int32)
        assert w4a16.w4a16(rows, words, torch.empty(6, 2, 16)).shape == (3, 96)
        assert w4a16.w4a16(rows, words, torch.empty(6, 2, 16), None, True).shape == (3, 48)
        words = torch.empty(6, 2, 4, 32, 4, dtype=torch.int32)
        assert w8a16.w8a16(rows, words, torch.empty(6, 2, 16), False, swiglu=True).shape == (3, 48)


LAYERS: dict[str, Callable[[], Layer]] = {
    "4 bits": lambda: w4a16.W4A16Linear(small(draw(16, 64))),
    "8 bits": lambda: w8a16.W8A16Linear(small(draw(256, 128))),
    "act order": lambda: w4a16.W4A16Linear(in_act_order()),
}


def in_act_order() -> QuantizedWeight:
    return replace(small(draw(16, 128)), group_of=(torch.arange(NUM_IN) // 128)[torch.randperm(NUM_IN)])


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Kernels are plain torch; rows of each call with the activation in the kernel."""
    calls: list[int] = []

    def four(rows: Tensor, packed: Tensor, scales: Tensor, book: Tensor | None, swiglu: bool = False) -> Tensor:
        return run(rows, w4a16.unpack_weight(packed, scales, book), swiglu=swiglu)

    def eight(rows: Tensor, packed: Tensor, scales: Tensor, is_float: bool, swiglu: bool = False) -> Tensor:
        return run(rows, w8a16.unpack_weight(packed, scales, is_float=is_float), swiglu=swiglu)

    def run(rows: Tensor, weight: Tensor, *, swiglu: bool) -> Tensor:
        calls.extend([len(rows)] if swiglu else [])
        product = rows.float() @ weight.t()
        return activated(product).bfloat16() if swiglu else product.bfloat16()

    monkeypatch.setattr(w4a16, "w4a16", four)
    monkeypatch.setattr(w8a16, "w8a16", eight)
    monkeypatch.setattr(w4a16, "dequantize_w4", lambda *buffers: w4a16.unpack_weight(*buffers).bfloat16())
    monkeypatch.setattr(
        w8a16,
        "dequantize_w8",
        lambda packed, scales, is_float: w8a16.unpack_weight(packed, scales, is_float=is_float).bfloat16(),
    )
    return calls


@pytest.mark.parametrize("name", LAYERS)
def test_few_rows_go_through_the_kernel_and_more_do_not(name: str, fused_calls: list[int]) -> None:
    gate_up = MergedLinear(LAYERS[name](), None)
    for num_rows in (1, 16, MAX_SWIGLU_ROWS, MAX_SWIGLU_ROWS + 1):
        hidden = torch.randn(num_rows, NUM_IN).bfloat16()
        found, expected = swiglu(gate_up, hidden), activated(gate_up(hidden))
        assert found.shape == expected.shape
        assert float((found.double() != expected).double().mean()) < 0.01
    assert fused_calls == [1, 16, MAX_SWIGLU_ROWS]


def test_what_the_kernel_cannot_do_is_done_after_the_product(fused_calls: list[int]) -> None:
    plain = torch.randn(64, NUM_IN).bfloat16() / NUM_IN**0.5
    linears: list[nn.Module] = [
        # A bias comes between the product and the activation.
        MergedLinear(LAYERS["4 bits"](), torch.randn(64).bfloat16()),
        MergedLinear(DequantizeLinear(small(draw(16, 64))), None),
        MergedLinear(plain, None),
        SideBySide([nn.Linear(NUM_IN, 32, dtype=torch.bfloat16, bias=has_bias) for has_bias in (False, True)]),  # type: ignore[list-item]
    ]
    for gate_up in linears:
        hidden = torch.randn(5, NUM_IN).bfloat16()
        with torch.no_grad():
            found, expected = swiglu(gate_up, hidden), activated(gate_up(hidden))
        assert float((found.double() != expected).double().mean()) < 0.02
        assert torch.allclose(found.double(), expected, rtol=2**-6)
    assert fused_calls == []
