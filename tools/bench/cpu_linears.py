"""Whether the host gains by computing some of the layers that are streamed: `python -m tools.bench.cpu_linears`.

Without a card it shows what products of few rows reach on this CPU, bytes of weights a second, by rows and threads:
torch's int4 operator, its int8 operator and plain bf16; and how fast memory is read and copied. With a card also the
link alone and beside the int4 operator at the shapes of a 70B, the way of rows to the host and back, and what a pass
with `--offloaded` of 80 layers would take, streamed and shared: predicted from the rates of both at once.
ATEN_CPU_CAPABILITY=avx2 shows the operator of a CPU without AVX-512. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.kernels.host_int4 import host_int4, layout_problem
from parallel.offload.exchange import exchange_with
from parallel.offload.host_trial import GROUP_SIZE, HostTrial, blank_weight, threads
from parallel.offload.split import PassCosts, choose_num_on_host

NUM_ROWS = (1, 2, 4, 8, 16, 32, 64)
# q/k/v, o, gate/up and down of a 70B.
SHAPES = ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672))
NUM_LAYERS = 80
WIDTH = 8192
# Of each kind of weight, beyond caches.
CYCLE_BYTES = 512 * 1024**2
MEMORY_BYTES = 1024**3
REPEATS = 5
MEASURE_SEC = 0.2


def main() -> None:
    args = parse_arguments()
    result: dict[str, Any] = {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}
    result["layout_problem"] = layout_problem()
    print(f"torch {result['torch']}, {result['cpu']}, layout: {result['layout_problem'] or 'known'}", flush=True)
    result["memory"] = [memory_rates(number) for number in args.threads]
    result["products"] = [row for number in args.threads for row in time_products(number, args.rows)]
    if torch.cuda.is_available():
        result |= measure_card(args)
    print(json.dumps(result))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.cpu_linears", description=(__doc__ or "").splitlines()[0]
    )
    cores = torch.get_num_threads()
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, max(1, cores // 2), cores}))
    parser.add_argument("--rows", type=int, nargs="+", default=list(NUM_ROWS))
    parser.add_argument("--offloaded", type=int, default=40, help="layers of 80 that are in host memory")
    parser.add_argument("--card-gb-per-sec", type=float, default=0.0, help="of card memory; 0: measured on this card")
    return parser.parse_args()


# The host alone


def memory_rates(num_threads: int) -> dict[str, float]:
    """GB/s read by a sum, and read and written by a copy."""
    source, target = (torch.ones(MEMORY_BYTES // 8, dtype=torch.int64) for _ in range(2))
    with threads(num_threads):
        read = MEMORY_BYTES / median_sec([source.sum]) / 1e9
        copied = 2 * MEMORY_BYTES / median_sec([lambda: target.copy_(source)]) / 1e9
    print(f"{num_threads:3} threads: memory read {read:6.1f} GB/s, copied {copied:6.1f} (both ways)", flush=True)
    return {"threads": num_threads, "read": read, "copied": copied}


def time_products(num_threads: int, row_counts: Sequence[int]) -> list[dict[str, Any]]:
    found = []
    for name, make in PRODUCTS.items():
        weights = make()
        for num_rows in row_counts:
            rows = torch.ones(num_rows, WIDTH, dtype=torch.bfloat16)
            with threads(num_threads):
                sec = median_sec([partial(multiply, rows) for multiply, _ in weights])
            rate = weights[0][1] / sec / 1e9
            found.append({"kind": name, "threads": num_threads, "rows": num_rows, "gb_per_sec": rate})
        line = ", ".join(f"{each['rows']}: {each['gb_per_sec']:.1f}" for each in found[-len(row_counts) :])
        print(f"{num_threads:3} threads, {name:5} GB/s of weights by rows  {line}", flush=True)
    return found


# What multiplies by a weight, and the weight's bytes.
Product = tuple[Callable[[Tensor], Tensor], int]


def int4_products() -> list[Product]:
    weights = [blank_weight((WIDTH, WIDTH)) for _ in range(CYCLE_BYTES * 2 // WIDTH**2)]
    multiply = partial(host_int4, group_size=GROUP_SIZE)
    return [
        (partial(multiply, packed=packed, scales_and_shifts=scales), packed.nbytes + scales.nbytes)
        for packed, scales in weights
    ]


def int8_products() -> list[Product]:
    scales = torch.ones(WIDTH, dtype=torch.bfloat16)
    weights = [torch.ones(WIDTH, WIDTH, dtype=torch.int8) for _ in range(CYCLE_BYTES // WIDTH**2)]
    return [(partial(multiply_int8, weight, scales), weight.nbytes) for weight in weights]


def multiply_int8(weight: Tensor, scales: Tensor, rows: Tensor) -> Tensor:
    product: Tensor = torch.ops.aten._weight_int8pack_mm(rows, weight, scales)
    return product


def plain_products() -> list[Product]:
    weights = [torch.ones(WIDTH, WIDTH, dtype=torch.bfloat16) for _ in range(CYCLE_BYTES // 2 // WIDTH**2)]
    return [(partial(F.linear, weight=weight), weight.nbytes) for weight in weights]


PRODUCTS: dict[str, Callable[[], list[Product]]] = {
    "int4": int4_products,
    "int8": int8_products,
    "bf16": plain_products,
}


@torch.inference_mode()
def median_sec(calls: Sequence[Callable[[], Tensor]]) -> float:
    """Seconds of one of `calls`, which are made in turn."""
    for call in calls:
        call()
    times, begin = [], time.perf_counter()
    while len(times) < REPEATS or time.perf_counter() - begin < MEASURE_SEC:
        call = calls[len(times) % len(calls)]
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


# Beside the link of a card


def measure_card(args: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cuda", 0)
    card_rate = args.card_gb_per_sec * 1e9 or copy_rate(device)
    found: dict[str, Any] = {"card": torch.cuda.get_device_name(device), "card_gb_per_sec": card_rate / 1e9}
    trial = HostTrial(SHAPES, device)
    found["way_us"] = measure_way(trial, device)
    shared = [share(trial, args, card_rate, rows, number) for number in args.threads for rows in args.rows]
    return found | {"shared": shared}


def copy_rate(device: torch.device) -> float:
    """Bytes a second read and written within the card."""
    source, target = torch.zeros(2, CYCLE_BYTES, dtype=torch.uint8, device=device)

    def copy() -> Tensor:
        target.copy_(source)
        torch.cuda.synchronize(device)
        return target

    return 2 * CYCLE_BYTES / median_sec([copy])


@torch.inference_mode()
def measure_way(trial: HostTrial, device: torch.device) -> dict[str, float]:
    """Microseconds of a linear of no work: one row to the host and back; the link alone, and while it copies."""
    rows, product = (
        torch.ones(1, WIDTH, dtype=torch.bfloat16, device=device),
        torch.ones(1, 57344, dtype=torch.bfloat16),
    )

    def way() -> Tensor:
        return exchange_with(device).multiply(rows, product.shape[1], lambda rows: product)

    alone = median_sec([way])
    busy = trial.link.beside(way)[0]
    print(f"a row to the host and 57344 numbers back: {alone * 1e6:.0f} us, beside copies {busy * 1e6:.0f}", flush=True)
    return {"alone": alone * 1e6, "beside_copies": busy * 1e6}


def share(
    trial: HostTrial, args: argparse.Namespace, card_rate: float, num_rows: int, num_threads: int
) -> dict[str, Any]:
    rates = trial.measure(num_rows, num_threads)
    size = rates.layer_bytes
    card_sec, copy_secs = size / card_rate, (size / rates.link, size / rates.link_alone)
    costs = PassCosts(NUM_LAYERS, args.offloaded, rates.layer_sec, *copy_secs, card_sec)
    number = choose_num_on_host(costs)
    streamed, shared = costs.pass_sec(0), costs.pass_sec(number)
    print(
        f"{num_threads:3} threads, {num_rows:2} rows: host {rates.host / 1e9:5.1f} GB/s, link {rates.link / 1e9:5.1f} "
        f"(alone {rates.link_alone / 1e9:5.1f}); {number} of {args.offloaded} layers on the host: "
        f"{streamed * 1e3:.0f} -> {shared * 1e3:.0f} ms a pass, {1 - shared / streamed:.0%} less",
        flush=True,
    )
    return asdict(rates) | {"num_on_host": number, "streamed_ms": streamed * 1e3, "shared_ms": shared * 1e3}


if __name__ == "__main__":
    main()
