"""Kernels that start before the one ahead has ended give the bits of those that do not, in graphs replayed many times.

On a card below sm_90 nothing starts early, and both are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.kernels import fused
from parallel.kernels.limits import PAGE_SIZE
from parallel.kernels.w4a16 import w4a16
from parallel.transports.host_memory_norm import NormChannel
from tests.gpu.one_card import DEVICE
from tools.bench.chain import EPS, Chain, Shape, capture, random_weight, starting_early
from tools.bench.ranks_on_one_card import (
    RanksOnOneCard,
    dense_on_one_card,
    norm_on_one_card,
    ranks_on_one_card,
    two_step_on_one_card,
)

pytestmark = pytest.mark.gpu

SMALL = Shape(hidden=1024, heads=8, kv_heads=2, inner=1792)
CONTEXT = 700
POISON_NUMBERS = 64 * 1024 * 1024
# Of graphs with all-reduces.
HIDDEN, NUM_CALLS = 1024, 15


def test_cards_from_sm_90_on_start_kernels_early() -> None:
    assert fused.silu_kernel(DEVICE).waits == (torch.cuda.get_device_capability(DEVICE) >= (9, 0))


class Layers:
    """Layers, fresh inputs for each replay, and what they leave."""

    def __init__(self, shape: Shape, rows: int, bits: int, num_layers: int, *, separate: bool = False) -> None:
        self.chain = Chain(shape, rows, CONTEXT, num_layers=num_layers, bits=bits, separate=separate)
        self.pages = [pages for layer in self.chain.layers for pages in (layer.keys, layer.values)]
        self.stored = [pages.clone() for pages in self.pages]
        self.before, self.update = (torch.empty_like(self.chain.residual) for _ in range(2))
        self.result = torch.empty_like(self.update)

    def call(self) -> None:
        """Through all layers, torch's own kernels between some. What is allocated lies where there was NaN."""
        poison = torch.full((POISON_NUMBERS,), float("nan"), device=DEVICE, dtype=torch.bfloat16)
        del poison
        self.chain.update = self.update
        for i, layer in enumerate(self.chain.layers):
            for step in self.chain.steps().values():
                step(layer)
            if i % 3 == 2:
                self.chain.update = self.chain.update * 1
        self.result.copy_(self.chain.update)

    def draw(self) -> None:
        self.before.normal_()
        self.update.normal_()
        self.chain.positions.random_(0, CONTEXT)
        self.chain.lengths.copy_(self.chain.positions + 1)
        pages = self.chain.block_table.gather(1, (self.chain.positions // PAGE_SIZE).unsqueeze(1)).squeeze(1)
        self.chain.slots.copy_(pages * PAGE_SIZE + self.chain.positions % PAGE_SIZE)

    def run(self, graph: torch.cuda.CUDAGraph) -> list[Tensor]:
        """What the graph leaves, on what was drawn; keys and values of the newest tokens are NaN before."""
        for pages, stored in zip(self.pages, self.stored, strict=True):
            pages.copy_(stored)
            pages[self.chain.slots // PAGE_SIZE, :, self.chain.slots % PAGE_SIZE] = float("nan")
        self.chain.residual.copy_(self.before)
        self.result.fill_(float("nan"))
        graph.replay()
        return [each.clone() for each in (self.chain.residual, self.result, *self.pages)]


def count_different(found: list[Tensor], expected: list[Tensor]) -> Tensor:
    """On the card, so that replays follow one another."""
    pairs = zip(found, expected, strict=True)
    return torch.stack([(a.view(torch.int16) != b.view(torch.int16)).any() for a, b in pairs]).sum()


# The kernels of few rows and of many.
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize(("rows", "bits"), [(1, 4), (8, 4), (13, 4), (40, 4), (1, 8), (24, 8)])
@torch.inference_mode()
def test_layers_leave_the_same_bits(rows: int, bits: int, separate: bool) -> None:
    compare(Layers(SMALL, rows, bits, num_layers=12, separate=separate), replays=60)


@pytest.mark.parametrize("rows", [1, 8])
@torch.inference_mode()
def test_layers_that_fill_the_card_leave_the_same_bits(rows: int) -> None:
    compare(Layers(Shape(), rows, 4, num_layers=3), replays=40)


def compare(layers: Layers, replays: int) -> None:
    layers.draw()
    graphs = []
    for enabled in (False, True):
        with starting_early(enabled):
            graphs.append(capture(layers.call))
    plain, early = graphs
    different = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(replays):
        layers.draw()
        found, expected = layers.run(early), layers.run(plain)
        different += count_different(found, expected)
        assert all(bool(each.isfinite().all()) for each in (*found[:2], *expected[:2]))
    assert int(different) == 0


@torch.inference_mode()
def test_two_streams_that_fork_and_join_in_a_graph() -> None:
    weights = [random_weight(4, HIDDEN, HIDDEN) for _ in range(3)]
    norm = torch.randn(HIDDEN, device=DEVICE).bfloat16()
    rows, result = (torch.empty(4, HIDDEN, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    side = torch.cuda.Stream(DEVICE)

    def call() -> None:
        x = rows
        for _ in range(10):
            x = w4a16(fused.rms_norm(x, norm, EPS), *weights[0])
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                left = w4a16(x, *weights[1])
            right = w4a16(x, *weights[2])
            torch.cuda.current_stream().wait_stream(side)
            # Reads what both streams left.
            x = fused.add_rms_norm(left, right, norm, EPS)
        result.copy_(x)

    graphs = []
    for enabled in (False, True):
        with starting_early(enabled):
            graphs.append(capture(call))
    for _ in range(100):
        rows.normal_()
        found = []
        for graph in graphs:
            result.fill_(float("nan"))
            graph.replay()
            found.append(result.clone())
        assert found[0].isfinite().all()
        assert torch.equal(found[0].view(torch.int16), found[1].view(torch.int16))


class Ranks:
    """Products, sums over the ranks and norms in turn, for ranks that are streams of one card."""

    def __init__(self, world_size: int, rows: int) -> None:
        self.weights = [random_weight(4, HIDDEN, HIDDEN) for _ in range(world_size)]
        self.norm = torch.randn(HIDDEN, device=DEVICE).bfloat16()
        shape = (world_size, rows, HIDDEN)
        self.inputs, self.residuals, self.results = (
            torch.empty(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)
        )
        # Compiles the kernels: a rank that does so later lets its peers wait.
        fused.rms_norm(w4a16(self.inputs[0], *self.weights[0]), self.norm, EPS)

    def call(self, channel: Any) -> None:
        x = self.inputs[channel.rank]
        for _ in range(NUM_CALLS):
            x = w4a16(x, *self.weights[channel.rank])
            if isinstance(channel, NormChannel):
                output = torch.empty_like(x)
                channel.all_reduce_add_norm(x, self.residuals[channel.rank], self.norm, output, EPS)
                x = output
            else:
                channel.all_reduce(x, x)
                x = fused.rms_norm(x, self.norm, EPS)
        self.results[channel.rank].copy_(x)

    def run(self, ranks: RanksOnOneCard[Any], graphs: list[torch.cuda.CUDAGraph], residual: Tensor) -> list[Tensor]:
        self.residuals.copy_(residual)
        self.results.fill_(float("nan"))
        ranks.run(lambda channel: graphs[channel.rank].replay())
        ranks.check()
        return [self.results.clone(), self.residuals.clone()]


TRANSPORTS: dict[str, Callable[..., AbstractContextManager[RanksOnOneCard[Any]]]] = {
    "slots": ranks_on_one_card,
    "dense": dense_on_one_card,
    "norm": norm_on_one_card,
    "two steps": partial(two_step_on_one_card, piece_bytes=64 * 1024),
}


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("name", TRANSPORTS)
@torch.inference_mode()
def test_all_reduces_between_two_ranks(name: str, rows: int) -> None:
    case = Ranks(2, rows)
    with TRANSPORTS[name](2, DEVICE) as ranks:
        captured = []
        for enabled in (False, True):
            with starting_early(enabled):
                captured.append(ranks.capture(case.call))
        for _ in range(40):
            case.inputs.normal_()
            residual = torch.randn_like(case.residuals)
            plain, early = (case.run(ranks, graphs, residual) for graphs in captured)
            assert plain[0].isfinite().all()
            assert int(count_different(early, plain)) == 0
