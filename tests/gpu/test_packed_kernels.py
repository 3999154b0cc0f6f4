"""The kernels of packed weights on a card, against float64 on fresh values."""

from __future__ import annotations

import pytest
import torch

from parallel.kernels import choice, merge
from parallel.kernels.w8a16 import W8A16Linear
from parallel.quantized import QuantizedWeight
from tools.bench.linear_formats import FORMATS, rounded_codebook
from tools.bench.linear_launches import CHECKED_ROWS, check_format
from tools.bench.linears import CHECKED_SHAPES, compile_all

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", FORMATS)
def test_every_launch_agrees_with_float64_at_every_number_of_rows(name: str) -> None:
    compile_all([name], list(CHECKED_ROWS))
    for shape in CHECKED_SHAPES:
        check_format(name, shape)


@pytest.mark.parametrize("name", FORMATS)
def test_few_rows_and_many_multiply_by_the_weight_that_was_given(name: str) -> None:
    """Through the choice of kernels: few rows, more, and so many that the weight is dequantised."""
    weight = rounded_codebook(FORMATS[name].random_weight(1024, 512))
    layer, line = choice.pack_linear(weight, torch.bfloat16)
    assert line == f"w{weight.bits}a16 (the fastest)" or line.startswith(f"w{weight.bits}a16 (not ")
    for num_rows in (5, 200, 300):
        rows = torch.randn(num_rows, 512, device="cuda", dtype=torch.bfloat16)
        expected = rows.double() @ weight.dequantize(torch.float64).t()
        assert torch.allclose(layer(rows).double(), expected, rtol=2**-7, atol=float(expected.abs().mean()) * 0.05)


def test_every_byte_of_float8_is_decoded_exactly() -> None:
    """Subnormal numbers too: each output is one weight times one."""
    bytes_ = torch.arange(256, dtype=torch.uint8, device="cuda")
    bytes_ = bytes_[(bytes_ & 0x7F) != 0x7F]
    values = torch.zeros(256, 128, dtype=torch.uint8, device="cuda")
    values[: len(bytes_)] = bytes_[:, None]
    values = values.view(torch.float8_e4m3fn)
    layer = W8A16Linear(QuantizedWeight(values, 8, torch.ones(256, 1, device="cuda"), None, 128))
    identity = torch.eye(128, device="cuda", dtype=torch.bfloat16)[:64]
    assert torch.equal(layer(identity).t().float(), values[:, :64].float())
    assert torch.equal(layer.dequantize(slice(0, 256)).float(), values.float())


@pytest.mark.parametrize("name", FORMATS)
def test_merged_linears_give_the_same_outputs_in_one_launch(name: str) -> None:
    layers = [FORMATS[name].layer(FORMATS[name].random_weight(num_out, 1024)) for num_out in (1024, 128, 128)]
    merged = merge.merge(layers)
    assert merged is not None
    for num_rows in (1, 17, 100, 300):
        rows = torch.randn(num_rows, 1024, device="cuda", dtype=torch.bfloat16)
        apart = torch.cat([layer(rows) for layer in layers], dim=-1)
        # Launches of another shape add up in another order.
        assert torch.allclose(merged(rows).float(), apart.float(), rtol=2**-7, atol=0.02 * float(apart.std()))


@pytest.mark.parametrize("name", FORMATS)
def test_the_kernel_is_captured_in_a_graph(name: str) -> None:
    layer = FORMATS[name].layer(FORMATS[name].random_weight(1024, 512))
    rows = torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
    expected = layer(rows)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = layer(rows)
    output.fill_(float("nan"))
    graph.replay()
    assert torch.equal(output, expected)
