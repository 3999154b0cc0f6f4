"""Times kernels of decoder layers one after the other, each started when the one before has ended, and early.

`python -m tools.bench.chain`, on a card of sm_90 or later: layers of Llama-70B on two cards, with random weights, and a
kernel that only waits in place of each all-reduce. Microseconds of a layer and of its parts, in replays of a CUDA
graph; parallel/kernels/programmatic.cuh says what starting early is. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.kernels import fused, launch
from parallel.kernels.limits import PAGE_SIZE
from parallel.kernels.paged_attention import attend
from parallel.kernels.w4a16 import w4a16
from parallel.kernels.w8a16 import w8a16

SOURCE = Path(__file__).with_suffix(".cu")
EPS, GROUP = 1e-5, 128
HEAD_DIM = 128
# Of one pass; their weights are several times the L2 cache.
NUM_LAYERS = 4
# In a graph.
PASSES = 5
Call = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    """Of one card's share of a model."""

    hidden: int = 8192
    heads: int = 32
    kv_heads: int = 4
    inner: int = 14336

    @property
    def attended(self) -> int:
        return self.heads * HEAD_DIM

    def linears(self) -> dict[str, tuple[int, int]]:
        """[out, in]"""
        qkv = (self.heads + 2 * self.kv_heads) * HEAD_DIM
        return {
            "qkv": (qkv, self.hidden),
            "o": (self.hidden, self.attended),
            "gate_up": (2 * self.inner, self.hidden),
            "down": (self.hidden, self.inner),
        }


class Layer:
    """Random packed weights, norms and pages. Products are about as large as what they are of."""

    def __init__(self, shape: Shape, bits: int, rows: int, num_pages: int) -> None:
        self.bits = bits
        self.weights = {name: random_weight(bits, *sizes) for name, sizes in shape.linears().items()}
        self.norms = torch.randn(2, shape.hidden, device="cuda").bfloat16()
        pages = torch.randn(2, rows * num_pages, shape.kv_heads, PAGE_SIZE, HEAD_DIM, device="cuda").bfloat16()
        self.keys, self.values = pages.unbind()

    def multiply(self, name: str, rows: Tensor, *, swiglu: bool = False) -> Tensor:
        packed, scales = self.weights[name]
        if self.bits == 4:
            return w4a16(rows, packed, scales, None, swiglu)
        return w8a16(rows, packed, scales, False, swiglu)


def random_weight(bits: int, num_out: int, num_in: int) -> tuple[Tensor, Tensor]:
    tiles, units = num_out // 16, num_in // GROUP
    size = (tiles, units, 2, 32, 4) if bits == 4 else (tiles, units, 4, 32, 4)
    packed = torch.randint(-(2**31), 2**31, size, dtype=torch.int32, device="cuda")
    scales = (torch.rand(tiles, units, 16, device="cuda") + 0.5) * num_in**-0.5 / 2 ** (bits - 2)
    # The last bits of a float32 scale are the zero of 8 bits.
    return packed, scales.bfloat16() if bits == 4 else ((scales.view(torch.int32) & ~255) | 128).view(torch.float32)


class Chain:
    """The kernels of layers, at one step of `rows` sequences with `context` tokens; on `residual` [rows, hidden].

    `separate`: the activation has a kernel of its own.
    """

    def __init__(
        self,
        shape: Shape,
        rows: int,
        context: int,
        *,
        num_layers: int = NUM_LAYERS,
        bits: int = 4,
        stall_us: float = 0,
        separate: bool = False,
    ) -> None:
        pages = -(-context // PAGE_SIZE)
        self.shape, self.stall_us, self.separate = shape, stall_us, separate
        self.layers = [Layer(shape, bits, rows, pages) for _ in range(num_layers)]
        self.block_table = torch.randperm(rows * pages, device="cuda").int().view(rows, pages)
        self.lengths = torch.full((rows,), context, dtype=torch.int32, device="cuda")
        self.positions = self.lengths.long() - 1
        self.slots = self.block_table[:, -1].long() * PAGE_SIZE + self.positions % PAGE_SIZE
        angles = torch.rand(context, HEAD_DIM // 2, device="cuda")
        self.cos, self.sin = angles.cos(), angles.sin()
        numbers = partial(torch.randn, rows, device="cuda", dtype=torch.bfloat16)
        self.residual, self.update, self.normed = (numbers(shape.hidden) for _ in range(3))
        self.qkv, self.query = numbers((shape.heads + 2 * shape.kv_heads) * HEAD_DIM), numbers(shape.heads, HEAD_DIM)
        self.activated = numbers(shape.inner)
        self.kernel = launch.load_kernel(SOURCE, "stall", (), "i", torch.cuda.current_device())

    def norm(self, layer: Layer, which: int) -> None:
        self.normed = fused.add_rms_norm(self.update, self.residual, layer.norms[which], EPS)
        if self.stall_us:
            self.kernel((1, 1, 1), 512, round(self.stall_us * 1000))

    def rotate(self, layer: Layer) -> None:
        self.query = fused.rotary_and_cache(
            self.qkv,
            self.cos,
            self.sin,
            self.positions,
            self.slots,
            layer.keys,
            layer.values,
            self.shape.heads,
            self.shape.kv_heads,
            None,
            None,
            EPS,
        )

    def attend(self, layer: Layer) -> None:
        scale = HEAD_DIM**-0.5
        self.query = attend(self.query, layer.keys, layer.values, self.block_table, self.lengths, scale)

    def multiply_qkv(self, layer: Layer) -> None:
        self.qkv = layer.multiply("qkv", self.normed)

    def multiply_o(self, layer: Layer) -> None:
        self.update = layer.multiply("o", self.query.flatten(1))

    def multiply_gate_up(self, layer: Layer) -> None:
        product = layer.multiply("gate_up", self.normed, swiglu=not self.separate)
        self.activated = fused.silu_mul(product) if self.separate else product

    def multiply_down(self, layer: Layer) -> None:
        self.update = layer.multiply("down", self.activated)

    def steps(self) -> dict[str, Callable[[Layer], None]]:
        """A layer, in order."""
        return {
            "norm": partial(self.norm, which=0),
            "qkv": self.multiply_qkv,
            "rotary": self.rotate,
            "attention": self.attend,
            "o": self.multiply_o,
            "second norm": partial(self.norm, which=1),
            "gate/up": self.multiply_gate_up,
            "down": self.multiply_down,
        }

    def run(self, names: tuple[str, ...] = (), passes: int = 1) -> None:
        """All layers, so many times; of each, these steps only, if there are any."""
        steps = self.steps()
        for layer in self.layers * passes:
            for name in names or steps:
                steps[name](layer)


@contextmanager
def starting_early(enabled: bool) -> Iterator[None]:
    """Whether kernels captured meanwhile start early."""
    before, launch.ENABLED = launch.ENABLED, enabled
    try:
        yield
    finally:
        launch.ENABLED = before


def capture(call: Call) -> torch.cuda.CUDAGraph:
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def time_graph(graph: torch.cuda.CUDAGraph, replays: int = 20) -> float:
    """Microseconds of a replay, the median; replays follow one another."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    for event in events:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) * 1e3 for a, b in pairwise(events))


PARTS = {
    "layer": (),
    "norm, qkv": ("norm", "qkv"),
    "rotary, attention, o": ("rotary", "attention", "o"),
    "norm, gate/up, down": ("norm", "gate/up", "down"),
}


def time_parts(rows: int, context: int, bits: int, stall_us: float) -> list[dict[str, Any]]:
    """Of a layer and of its parts, each of which is repeated by itself."""
    chain = Chain(Shape(), rows, context, bits=bits, stall_us=stall_us)
    found = []
    for name, part in PARTS.items():
        row: dict[str, Any] = {"part": name, "rows": rows, "context": context, "bits": bits, "stall_us": stall_us}
        for key, enabled in (("us", False), ("early_us", True)):
            with starting_early(enabled):
                graph = capture(partial(chain.run, part, PASSES))
                row[key] = time_graph(graph) / (PASSES * NUM_LAYERS)
        found.append(row)
        print(f"{rows:3} rows, {bits} bits, waits of {stall_us:g} us: {name:21} {row['us']:7.2f} us, "
              f"early {row['early_us']:7.2f} us, {row['us'] - row['early_us']:6.2f} less", flush=True)  # fmt: skip
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.chain", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--bits", type=int, nargs="+", default=[4], choices=(4, 8))
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--waits", type=float, nargs="+", default=[0, 4], metavar="US", help="of each all-reduce")
    args = parser.parse_args()
    torch.manual_seed(0)
    calls = [
        row
        for rows in args.rows
        for bits in args.bits
        for wait in args.waits
        for row in time_parts(rows, args.context, bits, wait)
    ]
    print(json.dumps({"card": torch.cuda.get_device_name(), "torch": torch.__version__, "calls": calls}))


if __name__ == "__main__":
    main()
