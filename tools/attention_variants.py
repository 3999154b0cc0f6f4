"""Launches of decode attention beside one another, each among the kernels of a layer: bench_attention.py --variants.

Microseconds of a layer of Llama-70B on two cards, and of its part from q/k/v to the output projection, in a CUDA graph,
with one kind of attention or another and without any: attention takes memory's time from what starts beside it, so that
only their sum says what it costs. Before, each is compared with float64, where the newest token's keys and values are
NaN until the kernel ahead writes them.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from parallel.engine.pages import PAGE_SIZE
from parallel.kernels import paged_attention as own
from parallel.kernels.attention_launch import Launch, choose_launch, choose_splits, in_clusters
from tools.bench_chain import HEAD_DIM, Chain, Layer, Shape, capture, time_graph

CASES = [(1, 640), (8, 640), (32, 640), (1, 4096), (8, 4096), (32, 4096)]
# An engine's page tables are as wide as its longest context, and splits follow from it.
MAX_CONTEXT = 8192
PART = ("qkv", "rotary", "attention", "o")
PASSES, ROUNDS, REPLAYS = 5, 3, 8
NAMES = ("before", "early", "clusters", "clusters8")
# Of rounding to bf16, in units of the mean size of a sequence's result; a wrong token gives 1 and more.
MAX_ERROR = 0.08
Choice = tuple[Launch, int]


def variants(rows: int, multiprocessors: int) -> dict[str, Choice]:
    """Launches by name, for `rows` sequences of Shape's heads."""
    shape = Shape()
    launch, wide = (
        choose_launch(HEAD_DIM, shape.heads // shape.kv_heads, torch.bfloat16, torch.bfloat16, warps=warps)
        for warps in (4, 8)
    )
    splits, wide_splits = (
        choose_splits(rows * shape.kv_heads, MAX_CONTEXT, multiprocessors, each.warps) for each in (launch, wide)
    )
    return {
        "before": (replace(launch, early=False), splits),
        "early": (launch, splits),
        "clusters": in_clusters(launch, splits),
        "clusters8": in_clusters(wide, wide_splits),
    }


class Attended(Chain):
    """The chain with `choice` for attention."""

    def __init__(self, rows: int, context: int) -> None:
        super().__init__(Shape(), rows, context)
        self.block_table = pad(self.block_table, (0, MAX_CONTEXT // PAGE_SIZE - self.block_table.shape[1]))
        self.choice: Choice | None = None
        # What attention was given and gave, call by call.
        self.queries: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def attend(self, layer: Layer) -> None:
        if self.choice is None:
            return
        tensors = (layer.keys, layer.values, self.block_table, self.lengths)
        self.queries.append(self.query)
        self.query = own.run_kernel(*self.choice, self.query, *tensors, HEAD_DIM**-0.5)
        self.outputs.append(self.query)

    def set_lengths(self, lengths: Tensor) -> None:
        """In place, for graphs that are captured."""
        newest = lengths.long() - 1
        pages = self.block_table.gather(1, newest[:, None] // PAGE_SIZE).squeeze(1).long()
        self.lengths.copy_(lengths)
        self.positions.copy_(newest)
        self.slots.copy_(pages * PAGE_SIZE + newest % PAGE_SIZE)

    def captured(self, choice: Choice | None, names: tuple[str, ...], passes: int) -> torch.cuda.CUDAGraph:
        self.choice = choice
        self.queries.clear()
        self.outputs.clear()
        return capture(partial(self.run, names, passes))

    def refill(self) -> None:
        """Random pages, with NaN from each sequence's newest token on, which the kernel ahead is to write."""
        for layer in self.layers:
            for stored in (layer.keys, layer.values):
                self.poison(stored.normal_())

    def poison(self, stored: Tensor) -> None:
        used = self.block_table[:, : len(stored) // len(self.lengths)].long()
        positions = torch.arange(used.shape[1] * PAGE_SIZE, device="cuda").view(1, -1, PAGE_SIZE)
        unwritten = positions >= self.lengths[:, None, None] - 1
        mask = torch.zeros(len(stored), PAGE_SIZE, dtype=torch.bool, device="cuda")
        mask[used] = unwritten.expand(*used.shape, PAGE_SIZE)
        stored.masked_fill_(mask[:, None, :, None], float("nan"))

    def exact(self, query: Tensor, layer: Layer) -> Tensor:
        """[rows, heads, HEAD_DIM] float64."""
        used = self.block_table[:, : len(layer.keys) // len(self.lengths)].long()
        present = torch.arange(used.shape[1] * PAGE_SIZE, device="cuda") < self.lengths[:, None]
        keys, values = (
            stored[used].movedim(2, 1).flatten(2, 3).double().masked_fill(~present[:, None, :, None], 0)
            for stored in (layer.keys, layer.values)
        )
        scores = query.double().unflatten(1, (self.shape.kv_heads, -1)) @ keys.mT * HEAD_DIM**-0.5
        weights = scores.masked_fill(~present[:, None, None], -torch.inf).softmax(-1)
        return (weights @ values).flatten(1, 2)


def check(chain: Attended, choice: Choice, context: int) -> float:
    """The largest error of a layer in a graph, at full and at ragged lengths; AssertionError where it is too large."""
    rows, num = len(chain.lengths), len(chain.layers)
    graph = chain.captured(choice, PART, 1)
    queries, outputs = chain.queries[-num:], chain.outputs[-num:]
    errors = []
    for lengths in (torch.full((rows,), context), torch.randint(1, context + 1, (rows,))):
        chain.set_lengths(lengths.int().cuda())
        chain.refill()
        graph.replay()
        errors += [error_of(*each) for each in zip(outputs, map(chain.exact, queries, chain.layers), strict=True)]
        before = torch.stack(outputs)
        graph.replay()
        assert torch.equal(torch.stack(outputs), before), f"{choice}: another result the second time"
    chain.set_lengths(torch.full((rows,), context, dtype=torch.int32, device="cuda"))
    chain.refill()
    graph.replay()
    # At once: where one never ends, the line that is missing says which.
    print(f"{rows} x {context}, {choice}: error {max(errors):.4f}", flush=True)
    assert max(errors) < MAX_ERROR, f"{choice} is off: {errors}"
    return max(errors)


def error_of(output: Tensor, exact: Tensor) -> float:
    """Of any sequence, in units of the mean size of its result; infinite where anything is not finite."""
    error = float(((output.double() - exact).abs().amax((1, 2)) / exact.abs().mean((1, 2))).max())
    return error if error == error else float("inf")


def time_variants(rows: int, context: int, names: Sequence[str]) -> dict[str, Any]:
    """Microseconds of the part and of the layer by variant, and errors."""
    chain = Attended(rows, context)
    known = variants(rows, torch.cuda.get_device_properties(0).multi_processor_count)
    choices: dict[str, Choice | None] = {"none": None, **{name: known[name] for name in names}}
    found: dict[str, Any] = {"rows": rows, "context": context}
    found["errors"] = {name: check(chain, known[name], context) for name in names}
    steps: dict[str, tuple[str, ...]] = {"part_us": PART, "layer_us": ()}
    for key, kernels in steps.items():
        graphs = {name: chain.captured(choice, kernels, PASSES) for name, choice in choices.items()}
        calls = PASSES * len(chain.layers)
        # In turn, so that a card that slows down slows all.
        rounds = [{name: time_graph(graph, REPLAYS) / calls for name, graph in graphs.items()} for _ in range(ROUNDS)]
        found[key] = {name: statistics.median(each[name] for each in rounds) for name in graphs}
    show(found, choices)
    return found


def show(found: dict[str, Any], choices: dict[str, Choice | None]) -> None:
    """Attention's cost, the difference to none, in the part and in the layer; 80 layers beside the first variant's."""
    part, layer = found["part_us"], found["layer_us"]
    first = layer[next(name for name, choice in choices.items() if choice)]
    for name, choice in choices.items():
        if choice is None:
            print(f"{found['rows']:2} x {found['context']}: without {part[name]:7.2f} us, layer {layer[name]:7.2f} us")
            continue
        launch, splits = choice
        print(f"  {name:9} {launch.warps}x{launch.depth}/{splits} cluster {launch.cluster}: "
              f"+{part[name] - part['none']:6.2f} us in the part, +{layer[name] - layer['none']:6.2f} us in the layer, "
              f"80 layers {(layer[name] - first) * 0.08:+.3f} ms, error {found['errors'][name]:.4f}",
              flush=True)  # fmt: skip


@torch.inference_mode()
def time_all(names: Sequence[str]) -> list[dict[str, Any]]:
    return [time_variants(*case, names) for case in CASES]
