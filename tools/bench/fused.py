"""Times a layer's fused operations at the shapes of Llama-70B on two cards: `python -m tools.bench.fused`, on a card.

For each operation and number of tokens: microseconds of a call in replays of a CUDA graph, the same of plain torch, and
microseconds of the host for a call outside a graph. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from parallel.kernels import fused, reference

NUM_TOKENS = (1, 8, 32, 512, 2048)
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, PAGE_SIZE = 8192, 32, 4, 128, 14336, 64
MAX_POSITIONS = 4096
EPS = 1e-5
CALLS = 20
Call = Callable[[], Any]


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    rows = [row for tokens in arguments.tokens for row in time_tokens(tokens)]
    print(json.dumps({"card": torch.cuda.get_device_name(), "torch": torch.__version__, "calls": rows}))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.fused", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=list(NUM_TOKENS), help="of a call (%(default)s)")
    return parser.parse_args()


def time_tokens(tokens: int) -> list[dict[str, Any]]:
    found = []
    for name, (call, plain, num_bytes) in make_calls(tokens).items():
        us = time_call(call)
        row = {"name": name, "tokens": tokens, "us": us, "gb_per_sec": num_bytes / us / 1e3}
        row |= {"host_us": time_host(call), "torch_us": time_call(plain) if plain else None}
        found.append(row)
        print(f"{tokens:5} {name:28} {us:7.2f} us {row['gb_per_sec']:5.0f} GB/s, host {row['host_us']:.1f} us, "
              f"torch {row['torch_us'] or float('nan'):.1f} us", flush=True)  # fmt: skip
    return found


def make_calls(tokens: int) -> dict[str, tuple[Call, Call | None, int]]:
    """The operation, plain torch's, and the bytes that must be read and written."""
    numbers = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    hidden, residual, weight = numbers(tokens, HIDDEN), numbers(tokens, HIDDEN), numbers(HIDDEN)
    gate_up = numbers(tokens, 2 * INNER)
    norm, add = (hidden, weight, EPS), (hidden, residual, weight, EPS)
    found: dict[str, tuple[Call, Call | None, int]] = {
        "rms_norm": (partial(fused.rms_norm, *norm), partial(reference.rms_norm, *norm), 2 * hidden.nbytes),
        "add_rms_norm": (partial(fused.add_rms_norm, *add), partial(reference.add_rms_norm, *add), 4 * hidden.nbytes),
        "silu_mul": (partial(fused.silu_mul, gate_up), partial(reference.silu_mul, gate_up), gate_up.nbytes * 3 // 2),
    }
    for vectors in (1, 2, 4, 8):
        call = partial(fused.launch_norm, vectors, hidden, residual, weight, EPS)
        found[f"add_rms_norm, {vectors} a thread"] = (call, None, 4 * hidden.nbytes)
    for name, dtype, has_norms in (
        ("rotary_and_cache", torch.bfloat16, False),
        ("rotary_and_cache, e4m3", torch.float8_e4m3fn, False),
        ("rotary_and_cache, head norms", torch.bfloat16, True),
    ):
        arguments = rotation(tokens, dtype, has_norms=has_norms)
        written = tokens * (HEADS * HEAD_DIM * 2 + 2 * KV_HEADS * HEAD_DIM * dtype.itemsize)
        calls = partial(fused.rotary_and_cache, *arguments), partial(reference.rotary_and_cache, *arguments)
        found[name] = (*calls, arguments[0].nbytes + written)
    return found


def rotation(tokens: int, dtype: torch.dtype, *, has_norms: bool) -> list[Any]:
    """Arguments of rotary_and_cache."""
    numbers = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    angles = torch.rand(MAX_POSITIONS, HEAD_DIM // 2, device="cuda")
    num_pages = -(-tokens // PAGE_SIZE) + 1
    pages = [torch.zeros(num_pages, KV_HEADS, PAGE_SIZE, HEAD_DIM, device="cuda").to(dtype) for _ in range(2)]
    positions = torch.arange(tokens, device="cuda")
    norms = [numbers(HEAD_DIM) if has_norms else None for _ in range(2)]
    qkv = numbers(tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    return [qkv, angles.cos(), angles.sin(), positions, positions.clone(), *pages, HEADS, KV_HEADS, *norms, EPS]


def time_call(call: Call) -> float:
    """Microseconds of a call, the median over replays of a graph of `CALLS`."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    times = []
    for _ in range(12):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / CALLS)
    return statistics.median(times[2:])


def time_host(call: Call) -> float:
    """Microseconds until a call returns, while the card has none of them waiting."""
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - begin) * 1e6 / CALLS)
    return statistics.median(times[2:])


if __name__ == "__main__":
    main()
