"""The kernel for many rows on a card: every launch there is, the products that go through it, and graphs of them."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from parallel.checkpoint.quantize_schemes import QUANTIZE_SCHEMES
from parallel.footprint import MAX_NARROW_ROWS, MIN_FUSED_ROWS, product_bytes
from parallel.kernels import choice, wide
from parallel.kernels.multiprocessors import sparing
from tools.bench.linear_formats import (
    FORMATS,
    Expected,
    assert_close,
    check_launch,
    compile_in_threads,
    rounded_codebook,
    rounds_weights,
)
from tools.bench.linear_launches import launches

pytestmark = pytest.mark.gpu
# One that many blocks share, one of odd numbers of tiles and units, and one of more tiles than there are blocks.
SHAPES = ((2560, 8192), (1040, 384), (28672, 512))
NUM_ROWS = (17, 24, 32, 48, 63, 96, 128, 130, 192, 255, 256, 257, 512, 1000, 2048)


@pytest.mark.parametrize("name", FORMATS)
def test_every_launch_that_is_chosen_agrees_with_float64_whatever_the_rows(name: str) -> None:
    own = FORMATS[name]
    compile_in_threads((own, own.choose(num_rows, shape), False) for shape, num_rows in product(SHAPES, NUM_ROWS))
    for shape in SHAPES:
        weight = own.random_weight(*shape)
        packed = own.pack(rounded_codebook(weight))
        for num_rows in NUM_ROWS:
            rows = torch.randn(num_rows, shape[1], device="cuda", dtype=torch.bfloat16)
            launch = own.choose(num_rows, shape)
            assert isinstance(launch, wide.AnyLaunch)
            check_launch(name, launch, rows, packed, Expected.of(own, rows, weight, packed))


@pytest.mark.parametrize("counted", [False, True], ids=["one launch", "launches of 256 rows"])
@pytest.mark.parametrize("num_rows", [257, 512, 1000, 2048])
@pytest.mark.parametrize("name", ["w4", "w4-zeros", "nf4", "int8", "fp8-block"])
def test_a_linear_multiplies_many_rows_by_its_packed_weight(
    monkeypatch: pytest.MonkeyPatch, name: str, num_rows: int, counted: bool
) -> None:
    own, num_out, num_in = FORMATS[name], 5120, 4096
    weight = rounded_codebook(own.random_weight(num_out, num_in))
    layer, _ = choice.pack_linear(weight, torch.bfloat16, fused_rows=2048)
    assert not layer.dequantizes(2048) and layer.dequantizes(2049)
    monkeypatch.setattr(layer, "dequantize", lambda outputs: pytest.fail("the weight was dequantised"))
    launch = own.choose(256, (num_out, num_in))
    assert isinstance(launch, wide.AnyLaunch)
    if counted:
        monkeypatch.setattr(wide, "MAX_TILES", num_out // (16 * launch.tiles) * 256 // launch.tokens)
        assert wide.most_rows(launch, num_out // 16) == 256
    rows = torch.randn(num_rows, num_in, device="cuda", dtype=torch.bfloat16)
    # What the output and the parts of sums are made in.
    poison = [torch.full((size,), float("nan"), device="cuda") for size in (num_rows * num_out // 2, 6 * 2**20)]
    del poison
    output = layer(rows)
    expected = Expected.of(own, rows, weight, own.pack(weight))
    assert_close(output, expected, name, rounded=rounds_weights(own, launch))
    assert torch.equal(layer(rows), output)


@pytest.mark.parametrize("fused_rows", [MIN_FUSED_ROWS, 2048])
@pytest.mark.parametrize("name", ["w4", "nf4", "fp8"])
def test_rows_of_any_number_take_no_more_memory_than_is_planned(name: str, fused_rows: int) -> None:
    weight = FORMATS[name].random_weight(8192, 4096)
    layer, _ = choice.pack_linear(weight, torch.bfloat16, fused_rows=fused_rows)
    scheme = QUANTIZE_SCHEMES["int4" if weight.bits == 4 else "int8"]
    for num_rows in (MAX_NARROW_ROWS, 17, 100, MIN_FUSED_ROWS, 257, 2048, 2049):
        rows = torch.randn(num_rows, 4096, device="cuda", dtype=torch.bfloat16)
        layer(rows)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = layer(rows)
        taken = torch.cuda.max_memory_allocated() - before - output.nbytes
        # cuBLAS takes a mebibyte for itself.
        is_dequantized = layer.dequantizes(num_rows)
        assert taken <= product_bytes(scheme, "cuda", "bfloat16", 2, num_rows, 8192 * 4096) + is_dequantized * 2**20


@pytest.mark.parametrize("num_rows", [40, 100, 200, 2000])
def test_a_graph_gives_the_same_sums_at_each_replay_beside_other_shapes(num_rows: int) -> None:
    """Blocks that share tiles count arrivals on the card: each launch must leave the counters as it found them."""
    layers = [
        FORMATS["w4"].layer(FORMATS["w4"].random_weight(*shape)) for shape in ((5120, 4096), (4096, 5120), (80, 4096))
    ]
    for layer in layers:
        layer.max_rows = 2048
    rows = torch.randn(num_rows, 4096, device="cuda", dtype=torch.bfloat16)

    def run() -> list[torch.Tensor]:
        first = layers[0](rows)
        return [first, layers[1](first), layers[2](rows)]

    expected = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    for _ in range(20):
        for output in outputs:
            output.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(*pair) for pair in zip(outputs, expected, strict=True))


def test_every_configuration_that_may_be_tuned_agrees_with_float64() -> None:
    own = FORMATS["w4-zeros"]
    weight = own.random_weight(1552, 2048)
    packed = own.pack(weight)
    for num_rows in (16, 21, 32, 41, 64, 90, 120, 190, 250):
        rows = torch.randn(num_rows, 2048, device="cuda", dtype=torch.bfloat16)
        expected = Expected.of(own, rows, weight, packed)
        for launch in launches(own, num_rows, 2048):
            if isinstance(launch, wide.AnyLaunch):
                check_launch("w4-zeros", launch, rows, packed, expected)


@pytest.mark.parametrize("num_rows", [100, 200, 2000])
def test_products_that_leave_multiprocessors_free_give_the_same(num_rows: int) -> None:
    """Parts of sums fall elsewhere, so not to the bit."""
    layer = FORMATS["w4"].layer(FORMATS["w4"].random_weight(5120, 8192))
    layer.max_rows = 2048
    rows = torch.randn(num_rows, 8192, device="cuda", dtype=torch.bfloat16)
    with sparing(16):
        found = layer(rows)
    torch.testing.assert_close(found, layer(rows), rtol=2**-7, atol=0.01)
