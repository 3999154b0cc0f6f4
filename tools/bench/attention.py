"""Times decode attention at the shapes of a 70B: `python -m tools.bench.attention [--tune]`, on a card.

For each number of KV heads a rank has (8, 4 and 2 at TP 1, 2 and 4), context, batch and type of KV: microseconds of one
layer, keys and values read once over that time, and the share of the copy bandwidth measured in the same run. Calls
cycle through more layers than the L2 cache holds, in a CUDA graph, with shuffled pages and page tables for 8192 tokens
or more, as an engine has them. Rows of a sequence that check drafts are timed too, and what a row each would take.
--variants compares launches among the kernels around them, from sm_90 on, in under 40 s (attention_variants.py).
--tune times launches of other warps, rings and splits instead (TP2, under a minute), written 4x6/33: warps, units of a
ring, splits. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from parallel.kernels import paged_attention as own
from parallel.kernels.attention_launch import (
    MAX_DEPTH,
    MAX_SPLITS,
    TILE,
    Launch,
    in_clusters,
    takes_clusters,
    unit_bytes,
)
from parallel.kernels.attention_reference import TreeMask, attend_gathered
from parallel.kernels.limits import PAGE_SIZE
from parallel.kernels.node_bits import chain_masks
from parallel.kernels.pages import FP8, PagedKV, allocate_pages, pages_for
from tools.bench.attention_variants import NAMES, time_all
from tools.bench.linears import measure_copy

GROUP = 8
HEAD_DIM = 128
KV_HEADS = {1: 8, 2: 4, 4: 2}
CONTEXTS = (576, 4128, 32768)
BATCHES = (1, 8, 32)
DTYPES = {"bf16": torch.bfloat16, "e4m3": FP8}
MAX_CONTEXT = 8192
# Rows of a sequence that checks so many drafts and one.
ROWS = (2, 4, 5, 8, 16)
# Of --tune: KiB of a block's rings, and blocks for each multiprocessor.
RINGS = (48, 96)
BLOCKS = (0.5, 1, 2, 4)
# Several times the 60 MB of L2 of an H200.
CYCLE_BYTES = 400e6
MAX_LAYERS = 64
NUM_REPLAYS = 10
Call = Callable[[], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.attention", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--tune", action="store_true", help="time other launches, and print the best of each case")
    parser.add_argument(
        "--variants", nargs="*", choices=NAMES, help="time these launches, or all, among a layer's kernels"
    )
    parser.add_argument("--tp", type=int, nargs="+", default=list(KV_HEADS), choices=KV_HEADS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.variants is not None:
        print(json.dumps({"card": torch.cuda.get_device_name(), "variants": time_all(arguments.variants or NAMES)}))
        return
    copy_gb_per_sec = measure_copy()
    result: dict[str, Any] = {"card": torch.cuda.get_device_name(), "torch": torch.__version__}
    result["copy_gb_per_sec"] = copy_gb_per_sec
    print(f"{result['card']}, copy {copy_gb_per_sec:.0f} GB/s")
    if arguments.tune:
        result["tuned"] = [tune_case(*case) for case in product(DTYPES, BATCHES, CONTEXTS)]
    else:
        cases = product(arguments.tp, DTYPES, BATCHES, CONTEXTS)
        result["attention"] = [time_case(*case, copy_gb_per_sec) for case in cases]
        result["rows"] = [time_rows(*case) for case in product(DTYPES, (1, 8), CONTEXTS[:2], ROWS)]
    print(json.dumps(result))


class Step:
    """What one step attends to: layers of pages, one table, `rows` queries of each of `batch` sequences."""

    def __init__(self, kv_heads: int, dtype: torch.dtype, batch: int, context: int, rows: int = 1) -> None:
        self.num_bytes = batch * context * 2 * kv_heads * HEAD_DIM * dtype.itemsize
        num_layers = max(2, min(MAX_LAYERS, round(CYCLE_BYTES / self.num_bytes)))
        pages = pages_for(context)
        self.layers = allocate_pages(num_layers, batch * pages, kv_heads, HEAD_DIM, dtype, "cuda")
        for tensor in (tensor for layer in self.layers for tensor in (layer.keys, layer.values)):
            tensor.copy_(torch.randn(tensor.shape, dtype=torch.bfloat16, device="cuda"))
        self.query = torch.randn(batch * rows, kv_heads * GROUP, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        table = torch.zeros(batch, max(pages, MAX_CONTEXT // PAGE_SIZE), dtype=torch.int32, device="cuda")
        table[:, :pages] = torch.randperm(batch * pages, device="cuda").view(batch, pages)
        self.block_table = table
        self.lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
        self.scale = HEAD_DIM**-0.5
        self.tree: TreeMask | None = None
        if rows > 1:
            self.tree = TreeMask(rows, self.lengths - rows, chain_masks(rows, table.device).repeat(batch, 1))

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.block_table, self.lengths

    def calls(self) -> list[Call]:
        def bind(kv: PagedKV) -> Call:
            return lambda: own.paged_attention(self.query, kv, *self.tensors, self.scale, self.tree)

        return [bind(kv) for kv in self.layers]

    def launched(self, launch: Launch, num_splits: int) -> list[Call]:
        """One row a sequence, with this launch."""

        def bind(kv: PagedKV) -> Call:
            return lambda: own.run_kernel(launch, num_splits, self.query, kv.keys, kv.values, *self.tensors, self.scale)

        return [bind(kv) for kv in self.layers]

    def apart(self) -> list[Call]:
        """As many rows, each a sequence of its own that reads the same pages."""
        assert self.tree is not None
        rows = self.tree.rows_per_sequence
        table, lengths = self.block_table.repeat_interleave(rows, 0), self.lengths.repeat_interleave(rows)

        def bind(kv: PagedKV) -> Call:
            return lambda: own.paged_attention(self.query, kv, table, lengths, self.scale)

        return [bind(kv) for kv in self.layers]

    def error(self) -> float:
        """The largest difference from plain torch, in units of the mean size of its result."""
        kv, tree = self.layers[-1], self.tree
        table = self.block_table[:, : pages_for(int(self.lengths[0]))]
        nodes = (None, None) if tree is None else (tree.starts, tree.masks)
        expected = attend_gathered(self.query, kv.keys, kv.values, table, self.lengths, self.scale, *nodes).float()
        error = float((self.calls()[-1]().float() - expected).abs().max() / expected.abs().mean())
        assert error < 0.1, f"the kernel is off by {error}"
        return error


def time_case(tp: int, dtype: str, batch: int, context: int, copy_gb_per_sec: float) -> dict[str, Any]:
    step = Step(KV_HEADS[tp], DTYPES[dtype], batch, context)
    # Plain torch holds all of it in float32.
    error = step.error() if step.num_bytes < 1e9 else None
    us = time_graph(step.calls())
    gb_per_sec = step.num_bytes / us / 1e3
    row: dict[str, Any] = {
        "tp": tp,
        "kv_heads": KV_HEADS[tp],
        "kv_dtype": dtype,
        "batch": batch,
        "context": context,
        "splits": chosen(step)[1],
        "us": us,
        "gb_per_sec": gb_per_sec,
        "share_of_copy": gb_per_sec / copy_gb_per_sec,
        "error": error,
    }
    print(f"TP{tp} {dtype} batch {batch:2} context {context:5}: {us:7.2f} us, {gb_per_sec:5.0f} GB/s "
          f"({row['share_of_copy']:4.0%} of copy), {row['splits']} splits")  # fmt: skip
    return row


def time_rows(dtype: str, batch: int, context: int, rows: int) -> dict[str, Any]:
    """At TP2, beside as many rows that each read everything."""
    step = Step(KV_HEADS[2], DTYPES[dtype], batch, context, rows)
    found = {"kv_dtype": dtype, "batch": batch, "context": context, "rows": rows, "error": step.error()}
    found |= {"us": time_graph(step.calls()), "us_apart": time_graph(step.apart())}
    print(f"TP2 {dtype} batch {batch} context {context:5}, {rows:2} rows of each sequence: {found['us']:7.2f} us, "
          f"apart {found['us_apart']:7.2f}")  # fmt: skip
    return found


def tune_case(dtype: str, batch: int, context: int) -> dict[str, Any]:
    """The best launch at TP2 and the one that is chosen, with the microseconds of all that were tried."""
    kv_heads = KV_HEADS[2]
    step = Step(kv_heads, DTYPES[dtype], batch, context)
    present = chosen(step)
    tried = dict.fromkeys((present, *candidates(step, kv_heads)))
    us = {each: time_graph(step.launched(*each)) for each in tried}
    best = min(us, key=lambda each: us[each])
    print(f"{dtype} batch {batch:2} context {context:5}: best {text_of(best)} {us[best]:7.2f} us, "
          f"chosen {text_of(present)} {us[present]:7.2f}, its bytes {step.num_bytes / 1e6:.1f} MB")  # fmt: skip
    found = {"kv_dtype": dtype, "batch": batch, "context": context, "best": text_of(best), "chosen": text_of(present)}
    return found | {"us": {text_of(each): round(value, 2) for each, value in us.items()}}


def text_of(choice: tuple[Launch, int]) -> str:
    launch, splits = choice
    return f"{launch.warps}x{launch.depth}/{splits}"


def chosen(step: Step) -> tuple[Launch, int]:
    """What `paged_attention` takes for one row a sequence."""
    return own.choose(step.query, step.layers[0].keys, len(step.lengths), step.block_table.shape[1] * PAGE_SIZE)


def candidates(step: Step, kv_heads: int) -> list[tuple[Launch, int]]:
    present, _ = chosen(step)
    unit = unit_bytes(HEAD_DIM, kv_fp8=present.kv_fp8)
    card = torch.cuda.get_device_properties(0)
    multiprocessors = card.multi_processor_count
    clusters = takes_clusters(card.major, card.shared_memory_per_multiprocessor)
    found = []
    for warps, ring, blocks in product((4, 8), RINGS, BLOCKS):
        depth = min(2 * MAX_DEPTH, ring * 1024 // warps // unit)
        most = min(MAX_SPLITS, -(-step.block_table.shape[1] * PAGE_SIZE // (TILE * warps)))
        splits = max(1, min(most, int(blocks * multiprocessors / len(step.lengths) / kv_heads)))
        # Two units in flight beside the one that is multiplied.
        if depth >= 3:
            launch = replace(present, warps=warps, depth=depth)
            found.append(in_clusters(launch, splits) if clusters else (launch, splits))
    return found


def time_graph(calls: list[Call]) -> float:
    """Microseconds of one call, the median over replays of a graph of all."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(NUM_REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[2:])


if __name__ == "__main__":
    main()
