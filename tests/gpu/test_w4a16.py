"""The W4A16 kernels on a card, against float64 on fresh values."""

from __future__ import annotations

import pytest
import torch

from tools import bench_linears

pytestmark = pytest.mark.gpu


def test_every_launch_agrees_with_float64_at_every_number_of_rows() -> None:
    bench_linears.check_kernels()


def test_many_rows_go_through_the_dequantised_weight() -> None:
    weight = bench_linears.random_weight(1024, 512, has_zeros=True)
    layer = bench_linears.own.W4A16Linear(weight)
    rows = torch.randn(200, 512, device="cuda", dtype=torch.bfloat16)
    expected = rows.double() @ weight.dequantize(torch.float64).t()
    assert torch.allclose(layer(rows).double(), expected, atol=float(expected.abs().mean()) * 0.05)


def test_the_kernel_is_captured_in_a_graph() -> None:
    layer = bench_linears.own.W4A16Linear(bench_linears.random_weight(1024, 512, has_zeros=False))
    rows = torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
    expected = layer(rows)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = layer(rows)
    output.fill_(float("nan"))
    graph.replay()
    assert torch.equal(output, expected)
