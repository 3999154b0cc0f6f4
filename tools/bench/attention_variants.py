"""Launches of decode attention beside one another, each among the kernels of a layer: attention.py --variants.

Microseconds of a layer of Llama-70B on two cards, and of its part from q/k/v to the output projection, in a CUDA graph,
with one launch of attention or another and without any: attention takes memory's time from what starts beside it, so
that only their sum says what it costs. Before, each is compared with float64, where the newest token's keys and values
are NaN until the kernel ahead writes them; and blocks as large as the launch's say where they are: two on a
multiprocessor while another has none take longer than one on each.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from parallel.kernels import paged_attention as own
from parallel.kernels.attention_launch import Launch, choose_launch, choose_splits, in_clusters
from parallel.kernels.binaries import read_or_compile
from parallel.kernels.launch import architecture, load_kernel, read_source
from parallel.kernels.limits import PAGE_SIZE
from tools.bench.chain import HEAD_DIM, Chain, Layer, Shape, capture, time_graph

CASES = [(1, 640), (8, 640), (32, 640), (8, 4096), (32, 4096)]
# An engine's page tables are as wide as its longest context, and splits follow from it.
MAX_CONTEXT = 8192
PART = ("qkv", "rotary", "attention", "o")
PASSES, ROUNDS, REPLAYS = 5, 3, 8
# Blocks wanted for a multiprocessor, warps, units of a ring; the first is the kernel's own choice. A multiprocessor has
# room for one block with 128 KiB of rings, two with 96, three with 64, four with 48.
LAUNCHES = {
    "x".join(map(str, each)): each
    for each in ((1, 4, 6), (1, 4, 8), (1, 8, 3), (1, 8, 4), (2, 4, 6), (2, 8, 3), (3, 4, 4), (4, 4, 3))
}
NAMES = tuple(LAUNCHES)
# Of rounding to bf16, in units of the mean size of a sequence's result; a wrong token gives 1 and more.
MAX_ERROR = 0.08
PLACES = Path(__file__).with_suffix(".cu")
# What a block has beside the rings, at most; and how long blocks stay for all to be there at once.
STATIC_BYTES = 5 * 1024
STAY_NS = 5000
Choice = tuple[Launch, int]


def choice_of(name: str, rows: int, multiprocessors: int) -> Choice:
    """For `rows` sequences of Shape's heads."""
    shape, (blocks, warps, depth) = Shape(), LAUNCHES[name]
    group = shape.heads // shape.kv_heads
    launch = replace(choose_launch(HEAD_DIM, group, torch.bfloat16, torch.bfloat16, warps=warps), depth=depth)
    return in_clusters(launch, choose_splits(rows * shape.kv_heads, MAX_CONTEXT, blocks * multiprocessors, warps))


def compile_all(launches: set[Launch]) -> None:
    """Beside one another, onto the disk."""
    source, arch = read_source(own.SOURCE), architecture(*torch.cuda.get_device_capability())
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda each: read_or_compile(source, "paged_attention", each.options(), arch), launches))


class Attended(Chain):
    """The chain with `attention` in place of its own; None: without any."""

    def __init__(self, rows: int, context: int) -> None:
        super().__init__(Shape(), rows, context)
        self.block_table = pad(self.block_table, (0, MAX_CONTEXT // PAGE_SIZE - self.block_table.shape[1]))
        self.attention: Callable[[Layer], None] | None = None
        # What attention was given and gave, call by call.
        self.queries: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def attend(self, layer: Layer) -> None:
        if self.attention is not None:
            self.attention(layer)

    def launch(self, choice: Choice, layer: Layer) -> None:
        tensors = (layer.keys, layer.values, self.block_table, self.lengths)
        self.queries.append(self.query)
        self.query = own.run_kernel(*choice, self.query, *tensors, HEAD_DIM**-0.5)
        self.outputs.append(self.query)

    def note_places(self, choice: Choice, layer: Layer) -> None:
        """The multiprocessor of each block, to outputs."""
        launch, splits = choice
        grid = (self.shape.kv_heads, splits, len(self.lengths))
        places = torch.empty(grid, dtype=torch.int32, device="cuda")
        options, shared_bytes = (f"-DCLUSTER={launch.cluster}",), launch.shared_bytes() + STATIC_BYTES
        kernel = load_kernel(PLACES, "note_places", options, "Pi", torch.cuda.current_device(), shared_bytes)
        kernel(grid, launch.warps * 32, places, STAY_NS)
        self.outputs.append(places)

    def set_lengths(self, lengths: Tensor) -> None:
        """In place, for graphs that are captured."""
        newest = lengths.long() - 1
        pages = self.block_table.gather(1, newest[:, None] // PAGE_SIZE).squeeze(1).long()
        self.lengths.copy_(lengths)
        self.positions.copy_(newest)
        self.slots.copy_(pages * PAGE_SIZE + newest % PAGE_SIZE)

    def captured(
        self, attention: Callable[[Layer], None] | None, names: tuple[str, ...], passes: int
    ) -> torch.cuda.CUDAGraph:
        self.attention = attention
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


def check(chain: Attended, name: str, choice: Choice) -> float:
    """The largest error of a layer in a graph, at full and at ragged lengths; AssertionError where it is too large."""
    rows, num, context = len(chain.lengths), len(chain.layers), int(chain.lengths[0])
    graph = chain.captured(partial(chain.launch, choice), PART, 1)
    queries, outputs = chain.queries[-num:], chain.outputs[-num:]
    errors = []
    for lengths in (torch.full((rows,), context), torch.randint(1, context + 1, (rows,))):
        chain.set_lengths(lengths.int().cuda())
        chain.refill()
        graph.replay()
        errors += [error_of(*each) for each in zip(outputs, map(chain.exact, queries, chain.layers), strict=True)]
        before = torch.stack(outputs)
        graph.replay()
        assert torch.equal(torch.stack(outputs), before), f"{name}: another result the second time"
    chain.set_lengths(torch.full((rows,), context, dtype=torch.int32, device="cuda"))
    chain.refill()
    graph.replay()
    # At once: where one never ends, the line that is missing says which.
    print(f"{rows} x {context}, {name}, {choice[1]} splits: error {max(errors):.4f}", flush=True)
    assert max(errors) < MAX_ERROR, f"{name} is off: {errors}"
    return max(errors)


def error_of(output: Tensor, exact: Tensor) -> float:
    """Of any sequence, in units of the mean size of its result; infinite where anything is not finite."""
    error = float(((output.double() - exact).abs().amax((1, 2)) / exact.abs().mean((1, 2))).max())
    return error if error == error else float("inf")


def crowd(chain: Attended, choice: Choice) -> tuple[int, int]:
    """The most blocks of a launch that shared a multiprocessor, and the fewest multiprocessors that had any."""
    graph = chain.captured(partial(chain.note_places, choice), (), 1)
    noted = chain.outputs[-len(chain.layers) :]
    graph.replay()
    graph.replay()
    blocks = [places.flatten().bincount() for places in noted]
    return max(int(each.max()) for each in blocks), min(int((each > 0).sum()) for each in blocks)


def time_variants(rows: int, context: int, choices: dict[str, Choice]) -> dict[str, Any]:
    """Microseconds that each adds to the part and to the layer, its error, and how its blocks share multiprocessors."""
    chain = Attended(rows, context)
    found: dict[str, Any] = {"rows": rows, "context": context}
    found["error"] = {name: round(check(chain, name, choice), 4) for name, choice in choices.items()}
    found["crowd"] = {name: crowd(chain, choice) for name, choice in choices.items()}
    kinds = {"none": None, **{name: partial(chain.launch, choice) for name, choice in choices.items()}}
    steps: dict[str, tuple[str, ...]] = {"part_us": PART, "layer_us": ()}
    for key, kernels in steps.items():
        graphs = {name: chain.captured(kind, kernels, PASSES) for name, kind in kinds.items()}
        calls = PASSES * len(chain.layers)
        # In turn, so that a card that slows down slows all.
        rounds = [{name: time_graph(graph, REPLAYS) / calls for name, graph in graphs.items()} for _ in range(ROUNDS)]
        us = {name: statistics.median(each[name] for each in rounds) for name in graphs}
        found[key] = {name: round(us[name] - us["none"], 2) for name in choices}
        found[f"{key}_without"] = round(us["none"], 2)
    return found


def show(cases: list[dict[str, Any]], names: Sequence[str]) -> None:
    print("\nus that attention adds to the part / to the layer (most blocks on a multiprocessor, how many have any)")
    titles = [f"{case['rows']} x {case['context']}" for case in cases]
    print(f"{'launch':8}" + "".join(f"{title:>24}" for title in titles))
    for name in names:
        print(f"{name:8}" + "".join(f"{cell_of(case, name):>24}" for case in cases), flush=True)


def cell_of(case: dict[str, Any], name: str) -> str:
    most, used = case["crowd"][name]
    return f"{case['part_us'][name]:.1f} /{case['layer_us'][name]:6.1f} ({most}, {used})"


@torch.inference_mode()
def time_all(names: Sequence[str]) -> list[dict[str, Any]]:
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    choices = {(rows, name): choice_of(name, rows, multiprocessors) for (rows, _), name in product(CASES, names)}
    compile_all({launch for launch, _ in choices.values()})
    cases = [time_variants(*case, {name: choices[case[0], name] for name in names}) for case in CASES]
    show(cases, names)
    return cases
