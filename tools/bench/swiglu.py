"""Times gate and up of a 70B with their activation: `python -m tools.bench.swiglu [--tp 1 2 4] [--tune]`, on a card.

Microseconds of a layer in replays of a CUDA graph: the product and the activation as two kernels, as one, and what that
saves; each cycles through more layers than the L2 cache holds. With --tune, of every launch for few rows. The last line
on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from parallel.footprint import MAX_NARROW_ROWS
from parallel.kernels.fused import silu_mul
from tools.bench.linear_formats import FORMATS, AnyLaunch, Packed, compile_in_threads
from tools.bench.linear_launches import narrow_launches
from tools.bench.linears import NUM_LAYERS, SHAPES, Call, cycle, own_calls, takes, time_calls

NUM_ROWS = (1, 8, 16, 32, 64)
# In a graph, so that its start is small beside them.
LEAST_CALLS = 40


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    compile_all(arguments.tp, arguments.kernels, arguments.rows)
    rows = [time_one(*case) for case in product(arguments.tp, arguments.kernels, arguments.rows)]
    if arguments.tune:
        few = [num_rows for num_rows in arguments.rows if num_rows <= 2 * MAX_NARROW_ROWS]
        rows += [tune(*case) for case in product(arguments.tp, arguments.kernels, few)]
    print(json.dumps({"card": torch.cuda.get_device_name(), "torch": torch.__version__, "swiglu": rows}))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.swiglu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2, 4], choices=SHAPES)
    parser.add_argument("--kernels", nargs="+", default=["w4", "int8", "fp8"], choices=FORMATS)
    parser.add_argument("--rows", type=int, nargs="+", default=list(NUM_ROWS))
    parser.add_argument("--tune", action="store_true", help="time every launch of up to 16 rows")
    return parser.parse_args()


def compile_all(degrees: list[int], names: list[str], row_counts: list[int]) -> None:
    compile_in_threads(
        (FORMATS[name], FORMATS[name].choose(num_rows, SHAPES[tp][2], swiglu=swiglu), swiglu)
        for tp, name, num_rows, swiglu in product(degrees, names, row_counts, (False, True))
    )


def time_one(tp: int, name: str, num_rows: int) -> dict[str, Any]:
    num_out, num_in = SHAPES[tp][2]
    products = own_calls(name, num_out, num_in)
    product_us = time_many(products, num_rows, num_in)
    apart_us = time_many([partial(activated, call) for call in products], num_rows, num_in)
    fused_us = time_many(fused_calls(name, num_out, num_in), num_rows, num_in)
    print(f"TP{tp} {name:8} rows {num_rows:3}: product {product_us:.2f} us, with activation {apart_us:.2f}, in one "
          f"{fused_us:.2f}: {(apart_us - fused_us) * NUM_LAYERS / 1e3:.3f} ms less for {NUM_LAYERS} layers",
          flush=True)  # fmt: skip
    return {"tp": tp, "kernel": name, "rows": num_rows, "product_us": product_us, "apart_us": apart_us,
            "fused_us": fused_us}  # fmt: skip


def tune(tp: int, name: str, num_rows: int) -> dict[str, Any]:
    num_out, num_in = SHAPES[tp][2]
    usable = [each for each in narrow_launches(FORMATS[name], num_rows) if each.row_tiles > 1 and takes(each, num_out)]
    compile_in_threads((FORMATS[name], each, True) for each in usable)
    times = [(time_many(fused_calls(name, num_out, num_in, each), num_rows, num_in), each) for each in usable]
    times.sort(key=lambda item: item[0])
    print(f"TP{tp} {name} rows {num_rows}: "
          + " ".join(f"{us:.2f}us {tuple(vars(each).values())}" for us, each in times[:4]), flush=True)  # fmt: skip
    return {"tp": tp, "kernel": name, "rows": num_rows, "times": [{"us": us, **vars(each)} for us, each in times[:4]]}


def activated(call: Call, rows: Tensor) -> Tensor:
    return silu_mul(call(rows))


def fused_calls(name: str, num_out: int, num_in: int, launch: AnyLaunch | None = None) -> list[Call]:
    own = FORMATS[name]

    def call(weight: Packed, rows: Tensor) -> Tensor:
        output = rows.new_empty(len(rows), num_out // 2)
        chosen = launch or own.choose(len(rows), (num_out, num_in), swiglu=True)
        own.run(chosen, rows, weight, output, swiglu=True)
        return output

    return [partial(call, weight) for weight in cycle(name, num_out, num_in)]


def time_many(calls: list[Call], num_rows: int, num_in: int) -> float:
    """Microseconds of one call."""
    return time_calls(calls * -(-LEAST_CALLS // len(calls)), num_rows, num_in)


if __name__ == "__main__":
    main()
