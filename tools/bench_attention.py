"""Times decode attention at the shapes of a 70B: `python -m tools.bench_attention [--tune]`, on a card.

For each number of KV heads a rank has (8, 4 and 2 at TP 1, 2 and 4), context, batch and type of KV: microseconds of one
layer, keys and values read over that time, and the share of the copy bandwidth measured in the same run. Calls cycle
through more layers than the L2 cache holds, in a CUDA graph, with shuffled pages and page tables for 8192 tokens or
more, as an engine has them. --tune also times every number of splits. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

from parallel.engine.pages import FP8, PAGE_SIZE, PagedKV, allocate_pages, pages_for
from parallel.kernels import paged_attention as own
from tools.bench_linears import measure_copy

GROUP = 8
HEAD_DIM = 128
KV_HEADS = {1: 8, 2: 4, 4: 2}
CONTEXTS = (512, 1024, 4096, 32768)
BATCHES = (1, 8, 32)
DTYPES = {"bf16": torch.bfloat16, "e4m3": FP8}
MAX_CONTEXT = 8192
SPLITS = (1, 2, 4, 8, 16, 32, 64, 128)
# Several times the 60 MB of L2 of an H200.
CYCLE_BYTES = 400e6
MAX_LAYERS = 64
Call = Callable[[], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="also time every number of splits")
    parser.add_argument("--tp", type=int, nargs="+", default=list(KV_HEADS), choices=KV_HEADS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    copy_gb_per_sec = measure_copy()
    result: dict[str, Any] = {"card": torch.cuda.get_device_name(), "torch": torch.__version__}
    result["copy_gb_per_sec"] = copy_gb_per_sec
    print(f"{result['card']}, copy {copy_gb_per_sec:.0f} GB/s")
    cases = product(arguments.tp, DTYPES, BATCHES, CONTEXTS)
    result["attention"] = [time_case(*case, copy_gb_per_sec, tune=arguments.tune) for case in cases]
    print(json.dumps(result))


class Step:
    """What one step attends to: layers of pages, one table, one query."""

    def __init__(self, kv_heads: int, dtype: torch.dtype, batch: int, context: int) -> None:
        self.num_bytes = batch * context * 2 * kv_heads * HEAD_DIM * dtype.itemsize
        num_layers = max(2, min(MAX_LAYERS, round(CYCLE_BYTES / self.num_bytes)))
        pages = pages_for(context)
        self.layers = allocate_pages(num_layers, batch * pages, kv_heads, HEAD_DIM, dtype, "cuda")
        for tensor in (tensor for layer in self.layers for tensor in (layer.keys, layer.values)):
            tensor.copy_(torch.randn(tensor.shape, dtype=torch.bfloat16, device="cuda"))
        self.query = torch.randn(batch, kv_heads * GROUP, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        table = torch.zeros(batch, max(pages, MAX_CONTEXT // PAGE_SIZE), dtype=torch.int32, device="cuda")
        table[:, :pages] = torch.randperm(batch * pages, device="cuda").view(batch, pages)
        self.block_table = table
        self.lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
        self.scale = HEAD_DIM**-0.5

    def calls(self, num_splits: int | None = None) -> list[Call]:
        def bind(kv: PagedKV) -> Call:
            tensors = (self.query, kv.keys, kv.values, self.block_table, self.lengths)
            if num_splits is None:
                return lambda: own.paged_attention(self.query, kv, self.block_table, self.lengths, self.scale)
            return lambda: own.run_kernel(num_splits, *tensors, self.scale)

        return [bind(kv) for kv in self.layers]

    def check(self) -> float:
        """The largest difference from plain torch, in units of the mean size of its result."""
        kv = self.layers[-1]
        tensors = (self.query, kv.keys, kv.values, self.block_table[:, : pages_for(int(self.lengths[0]))], self.lengths)
        expected = own.attend_gathered(*tensors, self.scale).float()
        error = float((self.calls()[-1]().float() - expected).abs().max() / expected.abs().mean())
        assert error < 0.1, f"the kernel is off by {error}"
        return error


def time_case(tp: int, dtype: str, batch: int, context: int, copy_gb_per_sec: float, *, tune: bool) -> dict[str, Any]:
    step = Step(KV_HEADS[tp], DTYPES[dtype], batch, context)
    # Plain torch holds all of it in float32.
    error = step.check() if step.num_bytes < 1e9 else None
    us = time_graph(step.calls())
    pairs = batch * KV_HEADS[tp]
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    gb_per_sec = step.num_bytes / us / 1e3
    row: dict[str, Any] = {
        "tp": tp,
        "kv_heads": KV_HEADS[tp],
        "kv_dtype": dtype,
        "batch": batch,
        "context": context,
        "splits": own.choose_splits(pairs, step.block_table.shape[1] * PAGE_SIZE, multiprocessors),
        "us": us,
        "gb_per_sec": gb_per_sec,
        "share_of_copy": gb_per_sec / copy_gb_per_sec,
        "error": error,
    }
    if tune:
        row["us_by_splits"] = {splits: time_graph(step.calls(splits)) for splits in SPLITS}
    print(f"TP{tp} {dtype} batch {batch:2} context {context:5}: {us:7.2f} us, {gb_per_sec:5.0f} GB/s "
          f"({row['share_of_copy']:4.0%} of copy), {row['splits']} splits {tuned_text(row)}")  # fmt: skip
    return row


def tuned_text(row: dict[str, Any]) -> str:
    return " ".join(f"{splits}:{us:.2f}" for splits, us in row.get("us_by_splits", {}).items())


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
    for _ in range(10):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[2:])


if __name__ == "__main__":
    main()
