"""Times products of many rows at the shapes of a 70B on two cards: `python -m tools.bench.dequantize`, on a card.

First dequantising packed weights: checked against plain torch, then GB/s read and written, and the share of a copy's.
Then dequantising and multiplying, for each number of rows and of weights that are dequantised at a time; beside it
cuBLAS alone, and the kernel that multiplies by the packed weights. All in CUDA graphs over more layers than the L2
cache holds. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from parallel.kernels import grouping
from parallel.kernels.grouping import output_blocks
from parallel.kernels.tiles import tiles_of
from tools.bench.linear_formats import FORMATS, Packed
from tools.bench.linears import NUM_LAYERS, SHAPES, cycle, measure_copy, time_on_card

MI = 1024**2
AT_A_TIME = (8 * MI, 16 * MI, 32 * MI, 64 * MI, 256 * MI)
NUM_ROWS = (128, 192, 256, 512, 1024, 2048)
CHECKED_SHAPE = (1040, 384)


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    result: dict[str, Any] = {"card": torch.cuda.get_device_name(), "torch": torch.__version__}
    result["copy_gb_per_sec"] = measure_copy()
    print(f"{result['card']}, copy {result['copy_gb_per_sec']:.0f} GB/s", flush=True)
    result["dequantize"] = [time_format(name, result["copy_gb_per_sec"]) for name in arguments.formats]
    result["products"] = [row for name in arguments.products for row in time_products(name)]
    print(json.dumps(result))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.dequantize", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--formats", nargs="*", default=["w4", "w4-zeros", "nf4", "int8", "fp8"], choices=FORMATS)
    parser.add_argument("--products", nargs="*", default=["w4"], choices=FORMATS, help="of which products are timed")
    return parser.parse_args()


# Dequantising


def time_format(name: str, copy_gb_per_sec: float) -> dict[str, Any]:
    check_format(name)
    times_us = [time_shape(name, shape) for shape in SHAPES[2]]
    num_bytes = sum(math.prod(shape) * (2 + FORMATS[name].held_bits(shape[1]) / 8) for shape in SHAPES[2])
    row: dict[str, Any] = {"format": name, "us": times_us, "ms_80_layers": sum(times_us) * NUM_LAYERS / 1e3}
    row["gb_per_sec"] = num_bytes / sum(times_us) / 1e3
    row["share_of_copy"] = row["gb_per_sec"] / copy_gb_per_sec
    print(f"{name:9} {row['gb_per_sec']:5.0f} GB/s, {row['share_of_copy']:.0%} of a copy, "
          f"80 layers {row['ms_80_layers']:.1f} ms {[round(us, 1) for us in times_us]}", flush=True)  # fmt: skip
    return row


def check_format(name: str) -> None:
    """Against plain torch on fresh values: the very same numbers, whatever the memory held before."""
    own = FORMATS[name]
    weight = own.pack(own.random_weight(*CHECKED_SHAPE))
    torch.full(CHECKED_SHAPE, float("nan"), dtype=torch.bfloat16, device="cuda")
    assert torch.equal(own.dequantize(weight), own.unpack(weight).bfloat16()), name


def time_shape(name: str, shape: tuple[int, int]) -> float:
    return time_calls([partial(dequantize, name, each, shape) for each in cycle(name, *shape)])


def dequantize(name: str, weight: Packed, shape: tuple[int, int]) -> None:
    for outputs in output_blocks(*shape):
        FORMATS[name].dequantize(part_of(weight, outputs))


def part_of(weight: Packed, outputs: slice) -> Packed:
    tiles = tiles_of(outputs)
    return Packed(weight.packed[tiles], weight.scales[tiles], weight.codebook)


# Dequantising and multiplying


def time_products(name: str) -> list[dict[str, Any]]:
    """Milliseconds of 80 layers, by what is timed, number of rows, and weights at a time."""
    sums: dict[tuple[str, int, int], float] = {}
    for shape, num_rows in product(SHAPES[2], NUM_ROWS):
        for (what, at_a_time), us in time_product(name, shape, num_rows).items():
            key = what, num_rows, at_a_time
            sums[key] = sums.get(key, 0) + us * NUM_LAYERS / 1e3
    found = []
    for (what, num_rows, at_a_time), ms in sorted(sums.items(), key=lambda item: (item[0][1], item[1])):
        found.append({"format": name, "what": what, "rows": num_rows, "mi_at_a_time": at_a_time // MI, "ms": ms})
        print(f"{name} rows {num_rows:4}, {at_a_time // MI:3} Mi at a time: {ms:6.1f} ms  {what}", flush=True)
    return found


def time_product(name: str, shape: tuple[int, int], num_rows: int) -> dict[tuple[str, int], float]:
    """Microseconds, by what is timed and weights at a time: none for the kernel that takes them packed."""
    weights, own = cycle(name, *shape), FORMATS[name]
    rows = torch.randn(num_rows, shape[1], device="cuda", dtype=torch.bfloat16)
    output, plain = rows.new_empty(num_rows, shape[0]), torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    launch = own.choose(num_rows, shape)
    times = {("packed", 0): time_calls([partial(own.run, launch, rows, each, output) for each in weights])}
    for at_a_time in AT_A_TIME:
        with patch.object(grouping, "DEQUANTIZED_AT_A_TIME", at_a_time):
            calls = [partial(multiply, name, each, rows, output) for each in weights]
            times["dequantised", at_a_time] = time_calls(calls)
            times["cuBLAS alone", at_a_time] = time_calls([partial(multiply_plain, plain, rows, output)] * len(weights))
    return times


def multiply(name: str, weight: Packed, rows: Tensor, output: Tensor) -> None:
    """As GroupedLinear does."""
    for outputs in output_blocks(output.shape[1], rows.shape[1]):
        torch.mm(rows, FORMATS[name].dequantize(part_of(weight, outputs)).t(), out=output[:, outputs])


def multiply_plain(weight: Tensor, rows: Tensor, output: Tensor) -> None:
    """By one block of the weight again and again, which cost nothing to make."""
    for outputs in output_blocks(output.shape[1], rows.shape[1]):
        torch.mm(rows, weight[: outputs.stop - outputs.start].t(), out=output[:, outputs])


def time_calls(calls: Sequence[Callable[[], object]]) -> float:
    """Microseconds of one call, the median over replays of a graph of all."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return time_on_card(graph.replay) * 1e3 / len(calls)


if __name__ == "__main__":
    main()
