"""Times 4-bit linears at the shapes of a 70B: `python -m tools.bench_linears [--tune]`, on a card.

For each kernel and number of rows: milliseconds of one rank's linears of 80 layers (q/k/v and gate/up merged), the
bytes they read over that time, and the share of the copy bandwidth measured in the same run. Each shape cycles through
more layers than the L2 cache holds, in a CUDA graph. The last line on stdout is JSON. Before any timing every kernel is
checked against float64 on fresh values, its output filled with NaN beforehand.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import torch
from torch import Tensor

from parallel.kernels import w4a16 as own
from parallel.kernels.tinygemm import TinygemmLinear
from parallel.quantized import QuantizedWeight

NUM_LAYERS = 80
# [out, in] of one rank: q/k/v, o, gate/up, down.
SHAPES = {
    1: ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)),
    2: ((5120, 8192), (8192, 4096), (28672, 8192), (8192, 14336)),
    4: ((2560, 8192), (8192, 2048), (14336, 8192), (8192, 7168)),
}
NUM_ROWS = (1, 2, 4, 8, 16, 32, 64, 512)
# Several times the 60 MB of L2 of an H200.
CYCLE_BYTES = 600e6
Call = Callable[[Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="time every launch configuration of the own kernel")
    parser.add_argument("--tp", type=int, nargs="+", default=[2], choices=SHAPES)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    compile_all()
    check_kernels()
    result: dict[str, Any] = {"card": torch.cuda.get_device_name(), "torch": torch.__version__}
    result["copy_gb_per_sec"] = measure_copy()
    print(f"{result['card']}, copy {result['copy_gb_per_sec']:.0f} GB/s")
    if arguments.tune:
        result["tuning"] = tune()
    result["linears"] = [row for tp in arguments.tp for row in time_linears(tp, result["copy_gb_per_sec"])]
    print(json.dumps(result))


def random_weight(num_out: int, num_in: int, *, has_zeros: bool) -> QuantizedWeight:
    groups = num_in // own.GROUP_SIZE
    return QuantizedWeight(
        values=torch.randint(0, 16, (num_out, num_in), dtype=torch.uint8, device="cuda"),
        bits=4,
        scales=torch.rand(num_out, groups, device="cuda") * 0.01 + 0.001,
        zeros=torch.randint(0, 16, (num_out, groups), dtype=torch.uint8, device="cuda") if has_zeros else None,
        group_size=own.GROUP_SIZE,
    )


def check_kernels() -> None:
    """Every kernel against float64; the error allowed is that of rounding the result to bf16."""
    for (num_out, num_in), has_zeros in product(((5120, 8192), (8192, 4096), (1040, 384)), (False, True)):
        weight = random_weight(num_out, num_in, has_zeros=has_zeros)
        exact = weight.dequantize(torch.float64)
        layer = own.W4A16Linear(weight)
        rounded = own.dequantize_w4(layer.packed, layer.scales)
        # Half a unit in the last place of bf16, and the lost bits of the scale.
        assert ((rounded.double() - exact).abs() <= exact.abs() * (2**-8 + 2**-18)).all()
        for num_rows in (1, 3, 8, 9, 16, 31, 64):
            rows = torch.randn(num_rows, num_in, device="cuda", dtype=torch.bfloat16)
            expected = rows.double() @ exact.t()
            for launch in launches(num_rows):
                output = torch.full((num_rows, num_out), float("nan"), device="cuda", dtype=torch.bfloat16)
                if num_out // own.OUTPUTS_PER_TILE % launch.row_tiles:
                    continue
                own.run_kernel(launch, rows, layer.packed, layer.scales, output)
                error = ((output.double() - expected).abs() / expected.abs().mean()).max().item()
                assert error < 0.03, f"{launch} {num_out}x{num_in} rows={num_rows}: {error}"
    print("checked against float64")


def launches(num_rows: int) -> list[own.Launch]:
    """Configurations worth a try for this many rows."""
    tiles = next(tiles for tiles in (1, 2, 4, 8) if num_rows <= tiles * own.ROWS_PER_TILE)
    options = product((1, 2, 4), (4, 8, 16), (2, 4, 8))
    every = [own.Launch(tiles, *option) for option in options]
    return [launch for launch in every if launch.shared_bytes() <= own.MAX_SHARED_BYTES and fits_registers(launch)]


def fits_registers(launch: own.Launch) -> bool:
    """Partial sums and totals take 8 registers a pair of tiles, of 255."""
    return launch.token_tiles * launch.row_tiles <= 16


def compile_all() -> None:
    every = {launch for num_rows in NUM_ROWS[:-1] for launch in launches(num_rows)}

    def compile_in_thread(launch: own.Launch) -> None:
        # Makes the card's context current in this thread, which the driver asks for.
        torch.zeros((), device="cuda")
        own.compile_kernel("w4a16", launch, 0)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(compile_in_thread, every))


def tune() -> list[dict[str, Any]]:
    """Every configuration at every shape of TP 2 and TP 1, fastest first."""
    found = []
    for (num_out, num_in), num_rows in product((*SHAPES[2], *SHAPES[1][2:]), (1, 8, 16, 32, 64)):
        times = []
        for launch in launches(num_rows):
            calls = own_calls(num_out, num_in, launch)
            times.append((time_calls(calls, num_rows, num_in), launch))
        times.sort(key=lambda item: item[0])
        best = [{"us": us, **vars(launch)} for us, launch in times[:4]]
        found.append({"out": num_out, "in": num_in, "rows": num_rows, "best": best, "worst_us": times[-1][0]})
        print(num_out, num_in, num_rows, " ".join(f"{us:.1f}us {tuple(vars(ln).values())}" for us, ln in times[:4]))
    return found


_CYCLES: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}


def cycle(num_out: int, num_in: int) -> list[tuple[Tensor, Tensor]]:
    """Random packed layers, as many as exceed the cache; any bits are a valid weight."""
    if (num_out, num_in) not in _CYCLES:
        _CYCLES.clear()
        count = max(2, round(CYCLE_BYTES / (num_out * num_in / 2)))
        shape = (num_out // own.OUTPUTS_PER_TILE, num_in // own.GROUP_SIZE)
        _CYCLES[num_out, num_in] = [
            (
                torch.randint(-(2**31), 2**31 - 1, (*shape, 2, 32, 4), dtype=torch.int32, device="cuda"),
                torch.rand(*shape, own.OUTPUTS_PER_TILE, device="cuda"),
            )
            for _ in range(count)
        ]
    return _CYCLES[num_out, num_in]


def own_calls(num_out: int, num_in: int, launch: own.Launch | None) -> list[Call]:
    def bind(packed: Tensor, scales: Tensor) -> Call:
        def call(rows: Tensor) -> Tensor:
            output = rows.new_empty(len(rows), num_out)
            own.run_kernel(launch or own.choose_launch(len(rows), len(packed)), rows, packed, scales, output)
            return output

        return call

    return [bind(packed, scales) for packed, scales in cycle(num_out, num_in)]


def dequantize_calls(num_out: int, num_in: int) -> list[Call]:
    """What more rows than the kernel takes go through."""

    def bind(packed: Tensor, scales: Tensor) -> Call:
        return lambda rows: torch.nn.functional.linear(rows, own.dequantize_w4(packed, scales))

    return [bind(packed, scales) for packed, scales in cycle(num_out, num_in)]


def tinygemm_calls(num_out: int, num_in: int) -> list[Call]:
    count = max(2, round(CYCLE_BYTES / (num_out * num_in / 2)))
    first = TinygemmLinear(random_weight(num_out, num_in, has_zeros=False))

    def bind(packed: Tensor) -> Call:
        return lambda rows: torch.ops.aten._weight_int4pack_mm(rows, packed, first.group_size, first.scales_and_shifts)

    return [bind(first.packed.clone()) for _ in range(count)]


def bf16_calls(num_out: int, num_in: int) -> list[Call]:
    weights = [torch.randn(num_out, num_in, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    return [lambda rows, w=weight: torch.nn.functional.linear(rows, w) for weight in weights]


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
    times = []
    for _ in range(8):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[2:])


def time_linears(tp: int, copy_gb_per_sec: float) -> list[dict[str, Any]]:
    found = []
    kernels: dict[str, Callable[[int, int], list[Call]]] = {
        "w4a16": lambda num_out, num_in: own_calls(num_out, num_in, None),
        "tinygemm": tinygemm_calls,
        "dequantize": dequantize_calls,
        "bf16": bf16_calls,
    }
    for (name, make), num_rows in product(kernels.items(), NUM_ROWS):
        if num_rows > own.MAX_ROWS and name in ("w4a16", "tinygemm"):
            continue
        times_us = [time_calls(make(*shape), num_rows, shape[1]) for shape in SHAPES[tp]]
        bits = 16 if name == "bf16" else 4.25
        num_bytes = sum(num_out * num_in * bits / 8 for num_out, num_in in SHAPES[tp])
        gb_per_sec = num_bytes / sum(times_us) / 1e3
        row = {
            "tp": tp,
            "kernel": name,
            "rows": num_rows,
            "us": times_us,
            "ms_80_layers": sum(times_us) * NUM_LAYERS / 1e3,
            "gb_per_sec": gb_per_sec,
            "share_of_copy": gb_per_sec / copy_gb_per_sec,
        }
        found.append(row)
        print(f"TP{tp} {name:9} rows {num_rows:3}: {row['ms_80_layers']:.2f} ms for 80 layers, {gb_per_sec:.0f} GB/s "
              f"({row['share_of_copy']:.0%} of copy) {[round(us, 1) for us in times_us]}")  # fmt: skip
    return found


def measure_copy() -> float:
    """GB/s of a device-to-device copy, bytes read and written."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(8):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return 2 * source.nbytes / statistics.median(times[2:]) / 1e6


if __name__ == "__main__":
    main()
