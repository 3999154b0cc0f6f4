"""The kernel for many rows on a card: every launch there is, the products that go through it, and graphs of them."""

from __future__ import annotations

import pytest
import torch

from parallel.kernels import choice, wide
from parallel.kernels.held import MAX_NARROW_ROWS, MIN_FUSED_ROWS, WIDE_WORKSPACE_BYTES
from tools.linear_formats import FORMATS, check_launch, launches, rounded_codebook

pytestmark = pytest.mark.gpu
# One that many blocks share, and one of odd numbers of tiles and units.
SHAPES = ((2560, 8192), (1040, 384))
NUM_ROWS = (17, 24, 32, 48, 63, 96, 128, 130, 192, 255, 256)


@pytest.mark.parametrize("name", FORMATS)
def test_every_launch_that_is_chosen_agrees_with_float64_whatever_the_rows(name: str) -> None:
    own = FORMATS[name]
    for shape in SHAPES:
        weight = rounded_codebook(own.random_weight(*shape))
        exact, packed = weight.dequantize(torch.float64), own.pack(weight)
        for num_rows in NUM_ROWS:
            rows = torch.randn(num_rows, shape[1], device="cuda", dtype=torch.bfloat16)
            launch = own.choose(num_rows, shape[0] // 16)
            assert isinstance(launch, wide.Launch)
            check_launch(name, launch, rows, packed, rows.double() @ exact.t())


@pytest.mark.parametrize("name", ["w4", "nf4", "fp8"])
def test_rows_of_any_number_take_no_more_memory_than_is_planned(name: str) -> None:
    weight = FORMATS[name].random_weight(8192, 4096)
    layer, _ = choice.pack_linear(weight, torch.bfloat16)
    for num_rows in (MAX_NARROW_ROWS, 17, 100, MIN_FUSED_ROWS):
        rows = torch.randn(num_rows, 4096, device="cuda", dtype=torch.bfloat16)
        layer(rows)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = layer(rows)
        taken = torch.cuda.max_memory_allocated() - before - output.nbytes
        assert taken <= (0 if num_rows <= MAX_NARROW_ROWS else WIDE_WORKSPACE_BYTES)


@pytest.mark.parametrize("num_rows", [40, 200])
def test_a_graph_gives_the_same_sums_at_each_replay_beside_other_shapes(num_rows: int) -> None:
    """Blocks that share tiles count arrivals on the card: each launch must leave the counters as it found them."""
    layers = [
        FORMATS["w4"].layer(FORMATS["w4"].random_weight(*shape)) for shape in ((5120, 4096), (4096, 5120), (80, 4096))
    ]
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
    exact, packed = weight.dequantize(torch.float64), own.pack(weight)
    for num_rows in (16, 21, 32, 41, 64, 90, 120, 190, 250):
        rows = torch.randn(num_rows, 2048, device="cuda", dtype=torch.bfloat16)
        expected = rows.double() @ exact.t()
        for launch in launches(own, num_rows):
            if isinstance(launch, wide.Launch):
                check_launch("w4-zeros", launch, rows, packed, expected)
