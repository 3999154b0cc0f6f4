"""Times linears at the shapes of a 70B: `python -m tools.bench.linears [--tune] [--tp 1 2 4]`, on a card.

For each kernel and number of rows: milliseconds of one rank's linears of 80 layers (q/k/v and gate/up merged), the
bytes they read over that time, and the share of the copy bandwidth measured in the same run. Each shape cycles through
more layers than the L2 cache holds, in a CUDA graph. The last line on stdout is JSON. Before any timing every launch of
our own kernels is checked against float64 on fresh values, its output filled with NaN beforehand.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.kernels.tiles import Launch
from parallel.kernels.tinygemm import TinygemmLinear
from tools.bench.linear_formats import FORMATS, AnyLaunch, Packed, compile_in_threads
from tools.bench.linear_launches import CHECKED_ROWS, check_format, launches

NUM_LAYERS = 80
# [out, in] of one rank: q/k/v, o, gate/up, down.
SHAPES = {
    1: ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)),
    2: ((5120, 8192), (8192, 4096), (28672, 8192), (8192, 14336)),
    4: ((2560, 8192), (8192, 2048), (14336, 8192), (8192, 7168)),
}
# The last is of odd numbers of tiles and units.
CHECKED_SHAPES = ((5120, 8192), (8192, 4096), (1040, 384))
NUM_ROWS = (1, 8, 16, 32, 64, 128, 256)
MOST_ROWS = 8192
# Several times the 60 MB of L2 of an H200.
CYCLE_BYTES = 600e6
# What is timed unless asked otherwise; all of FORMATS and of OTHERS may be.
DEFAULT_KERNELS = ("w4", "w4-zeros", "nf4", "int8", "fp8", "tinygemm", "dequantize", "bf16")
GEMLITE = {"gemlite-w4": "w4", "gemlite-int8": "int8", "gemlite-fp8": "fp8"}
Call = Callable[[Tensor], Tensor]


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    own = [name for name in arguments.kernels if name in FORMATS]
    compile_all(own, [*(arguments.rows if arguments.tune else []), *([] if arguments.skip_check else CHECKED_ROWS)])
    if not arguments.skip_check:
        check_kernels(own)
    result: dict[str, Any] = {"card": torch.cuda.get_device_name(), "torch": torch.__version__}
    result["copy_gb_per_sec"] = measure_copy()
    print(f"{result['card']}, copy {result['copy_gb_per_sec']:.0f} GB/s")
    if arguments.tune:
        result["tuning"] = [row for name in own for row in tune(name, arguments.tp, arguments.rows)]
    result["linears"] = [
        describe(tp, name, num_rows, times_us, result["copy_gb_per_sec"])
        for tp, name in product(arguments.tp, arguments.kernels)
        for num_rows, times_us in time_linears(tp, name, arguments.rows).items()
    ]
    print(json.dumps(result))


def parse_arguments() -> argparse.Namespace:
    installed = tuple(GEMLITE) if importlib.util.find_spec("gemlite") else ()
    parser = argparse.ArgumentParser(prog="python -m tools.bench.linears", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="time every launch configuration of our own kernels")
    parser.add_argument("--tp", type=int, nargs="+", default=[2], choices=SHAPES)
    parser.add_argument("--kernels", nargs="+", default=[*DEFAULT_KERNELS, *installed], choices=[*FORMATS, *OTHERS])
    parser.add_argument("--rows", type=int, nargs="+", default=list(NUM_ROWS))
    parser.add_argument("--skip-check", action="store_true", help="time without comparing with float64 first")
    return parser.parse_args()


def check_kernels(names: list[str] | None = None) -> None:
    """Every launch of these formats (all, if none are named) against float64."""
    for name, shape in product(names or FORMATS, CHECKED_SHAPES):
        check_format(name, shape)
    print("checked against float64")


def compile_all(names: list[str], row_counts: list[int]) -> None:
    compile_in_threads(
        (FORMATS[name], launch, False)
        for name, num_rows in product(names, row_counts)
        for launch in launches(FORMATS[name], num_rows, SHAPES[1][0][1])
    )


def tune(name: str, degrees: list[int], row_counts: list[int]) -> list[dict[str, Any]]:
    """Every configuration at every shape, fastest first, and where the one that is chosen stands."""
    found = []
    shapes = dict.fromkeys(shape for tp in degrees for shape in SHAPES[tp])
    for (num_out, num_in), num_rows in product(shapes, row_counts):
        usable = [each for each in launches(FORMATS[name], num_rows, num_in) if takes(each, num_out)]
        times = [(time_calls(own_calls(name, num_out, num_in, each), num_rows, num_in), each) for each in usable]
        times.sort(key=lambda item: item[0])
        chosen_us = time_calls(own_calls(name, num_out, num_in), num_rows, num_in)
        best = [{"us": us, "wide": not isinstance(each, Launch), **vars(each)} for us, each in times]
        found.append({"kernel": name, "out": num_out, "in": num_in, "rows": num_rows, "times": best,
                      "chosen_us": chosen_us})  # fmt: skip
        fastest = " ".join(f"{us:.1f}us {tuple(vars(each).values())}" for us, each in times[:4])
        print(f"{name} {num_out}x{num_in} rows {num_rows}: {fastest}; chosen {chosen_us:.1f}us", flush=True)
    print_best(found, row_counts)
    return [{**row, "times": row["times"][:4]} for row in found]


def takes(launch: AnyLaunch, num_out: int) -> bool:
    return not isinstance(launch, Launch) or num_out // 16 % launch.row_tiles == 0


def print_best(found: list[dict[str, Any]], row_counts: list[int]) -> None:
    """For each number of rows the configurations of least time over all shapes, as a share of each shape's best."""
    for num_rows in row_counts:
        shares: dict[tuple[Any, ...], list[float]] = {}
        for row in (row for row in found if row["rows"] == num_rows):
            for each in row["times"]:
                key = tuple(value for field, value in each.items() if field != "us")
                shares.setdefault(key, []).append(each["us"] / row["times"][0]["us"])
        most = max(len(each) for each in shares.values())
        means = sorted((statistics.mean(each), key) for key, each in shares.items() if len(each) == most)
        print(f"rows {num_rows}: " + ", ".join(f"{mean:.3f} {key[1:]}" for mean, key in means[:4]), flush=True)


# Calls of each kernel that go through more layers than the cache holds

_CYCLES: dict[tuple[str, int, int], list[Packed]] = {}


def cycle_length(num_out: int, num_in: int, bits: float) -> int:
    return max(2, round(CYCLE_BYTES / (num_out * num_in * bits / 8)))


def cycle(name: str, num_out: int, num_in: int) -> list[Packed]:
    key = name, num_out, num_in
    if key not in _CYCLES:
        _CYCLES.clear()
        count = cycle_length(num_out, num_in, FORMATS[name].bits)
        _CYCLES[key] = [FORMATS[name].random_packed(num_out, num_in) for _ in range(count)]
    return _CYCLES[key]


def own_calls(name: str, num_out: int, num_in: int, launch: AnyLaunch | None = None) -> list[Call]:
    own = FORMATS[name]

    def call(weight: Packed, rows: Tensor) -> Tensor:
        output = rows.new_empty(len(rows), num_out)
        own.run(launch or own.choose(len(rows), (num_out, num_in)), rows, weight, output)
        return output

    return [partial(call, weight) for weight in cycle(name, num_out, num_in)]


def dequantize_calls(num_out: int, num_in: int) -> list[Call]:
    """What more rows than the kernel takes go through."""
    own = FORMATS["w4"]
    return [lambda rows, w=weight: F.linear(rows, own.dequantize(w)) for weight in cycle("w4", num_out, num_in)]


def tinygemm_calls(num_out: int, num_in: int) -> list[Call]:
    first = TinygemmLinear(FORMATS["w4"].random_weight(num_out, num_in))
    layers = [first, *(deepcopy(first) for _ in range(cycle_length(num_out, num_in, 4) - 1))]
    return [layer.multiply for layer in layers]


def bf16_calls(num_out: int, num_in: int) -> list[Call]:
    weights = [torch.randn(num_out, num_in, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    return [lambda rows, w=weight: F.linear(rows, w) for weight in weights]


def gemlite_calls(name: str, num_out: int, num_in: int) -> list[Call]:
    """GemLite, where it is installed (pip install gemlite: numpy, tqdm and triton beside torch)."""
    from gemlite.helper import A16W8_FP8, A16W8_INT8, A16Wn

    weight = FORMATS[name].random_weight(num_out, num_in)
    scales = weight.scales.bfloat16()
    if name == "w4":
        zeros = torch.full_like(scales, 8)
        first = A16Wn(dtype=torch.bfloat16).from_weights(weight.values, scales, zeros, 4, weight.group_size)
    elif name == "int8":
        signed = (weight.values.int() - 128).to(torch.int8)
        first = A16W8_INT8(dtype=torch.bfloat16).from_weights(signed, scales=scales)
    else:
        first = A16W8_FP8(dtype=torch.bfloat16).from_weights(weight.values, scales=scales)
    check_gemlite(name, first, weight.dequantize(torch.float32))
    return [first, *(deepcopy(first) for _ in range(cycle_length(num_out, num_in, FORMATS[name].bits) - 1))]


def check_gemlite(name: str, layer: Call, weight: Tensor) -> None:
    """That it was given the weight in the form it takes: a comparison with it is worth nothing else.

    It adds up its splits in bfloat16, so that it is 0.13 of the spread off where one rounding of the result is 0.02;
    zeros that are one off would show as about 1.
    """
    rows = torch.randn(4, weight.shape[1], device="cuda", dtype=torch.bfloat16)
    expected = rows.float() @ weight.t()
    error = (layer(rows).float() - expected).abs().max() / expected.std()
    assert error < 0.3, f"gemlite {name}: {error}"


# By name: bits of a weight, the most rows worth timing, and the calls.
OTHERS: dict[str, tuple[float, int, Callable[[int, int], list[Call]]]] = {
    "tinygemm": (4.25, 64, tinygemm_calls),
    "dequantize": (4.125, MOST_ROWS, dequantize_calls),
    "bf16": (16, MOST_ROWS, bf16_calls),
    "gemlite-w4": (4.25, MOST_ROWS, partial(gemlite_calls, "w4")),
    "gemlite-int8": (8, MOST_ROWS, partial(gemlite_calls, "int8")),
    "gemlite-fp8": (8, MOST_ROWS, partial(gemlite_calls, "fp8")),
}


def time_calls(calls: list[Call], num_rows: int, num_in: int) -> float:
    """Microseconds of one call, the median over replays of a graph of all."""
    rows = torch.randn(num_rows, num_in, device="cuda", dtype=torch.bfloat16)
    for call in calls[:2]:
        call(rows)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call(rows)
    return time_on_card(graph.replay) * 1e3 / len(calls)


def time_on_card(run: Callable[[], object]) -> float:
    """Milliseconds, the median of six after two."""
    times = []
    for _ in range(8):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[2:])


def time_linears(tp: int, name: str, row_counts: list[int]) -> dict[int, list[float]]:
    """Microseconds of each of the shapes, by number of rows; without those that the kernel does not take."""
    most_rows, make = (MOST_ROWS, partial(own_calls, name)) if name in FORMATS else OTHERS[name][1:]
    times: dict[int, list[float]] = {num_rows: [] for num_rows in row_counts if num_rows <= most_rows}
    for num_out, num_in in SHAPES[tp]:
        calls = make(num_out, num_in)
        for num_rows, times_us in times.items():
            times_us.append(time_calls(calls, num_rows, num_in))
    return times


def describe(tp: int, name: str, num_rows: int, times_us: list[float], copy_gb_per_sec: float) -> dict[str, Any]:
    """One line of the table, printed too."""
    sizes = [num_out * num_in * held_bits(name, num_in) / 8 for num_out, num_in in SHAPES[tp]]
    gb_per_sec = sum(sizes) / sum(times_us) / 1e3
    row = {
        "tp": tp,
        "kernel": name,
        "rows": num_rows,
        "us": times_us,
        "ms_80_layers": sum(times_us) * NUM_LAYERS / 1e3,
        "gb_per_sec": gb_per_sec,
        "share_of_copy": gb_per_sec / copy_gb_per_sec,
    }
    print(f"TP{tp} {name:12} rows {num_rows:3}: {row['ms_80_layers']:.2f} ms for 80 layers, {gb_per_sec:.0f} GB/s "
          f"({row['share_of_copy']:.0%} of copy) {[round(us, 1) for us in times_us]}", flush=True)  # fmt: skip
    return row


def held_bits(name: str, num_in: int) -> float:
    """Bits of a weight that must be read, with its share of scales."""
    return FORMATS[name].held_bits(num_in) if name in FORMATS else OTHERS[name][0]


def measure_copy() -> float:
    """GB/s of a device-to-device copy, bytes read and written."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / time_on_card(lambda: target.copy_(source)) / 1e6


if __name__ == "__main__":
    main()
