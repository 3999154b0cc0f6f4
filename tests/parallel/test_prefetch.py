"""Every part of a decode step is told which weights come next, and nothing that it computes changes by it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from parallel.communicator import Communicator, ElidedAllReduce
from parallel.engine import decoder
from parallel.engine.ahead import begin
from parallel.engine.merged import PlainWeight
from parallel.kernels import choice, prefetch
from parallel.kernels.launch import read_source
from parallel.kernels.merge import merge
from parallel.kernels.prefetch import Ahead, beginning, beside
from parallel.kernels.w4a16 import W4A16Linear
from parallel.quantized import QuantizedWeight
from parallel.transports.channel import Channel
from parallel.transports.solo import Solo
from tests.parallel.quantized_models import write_pair
from tests.parallel.ranks import CPU, forced_logits, make_engine, run_on_ranks
from tests.parallel.small_models import prompts_of

FORCED = [[5, 6, 7], [8, 9, 10], [11, 12, 13], [14, 15, 16]]
# More than any weight of the small models, and less than a row of one.
WHOLE, LITTLE = 10**9, 100


@pytest.mark.parametrize("num_bytes", [0, 1, 100, 1088, 4000, 4352, 10**6])
def test_the_same_share_of_values_and_scales(num_bytes: int) -> None:
    values, scales = torch.arange(1024, dtype=torch.int32).view(4, 8, 32), torch.rand(4, 4, 4)
    found = beginning((values, scales), num_bytes)
    assert 0 <= min(num_bytes, 4352) - sum(piece.nbytes for piece in found) < 8
    for piece, whole in zip(found, (values, scales), strict=False):
        assert torch.equal(piece, whole.flatten()[: len(piece)])
        assert piece.data_ptr() == whole.data_ptr()
        assert abs(piece.nbytes - whole.nbytes * min(num_bytes / 4352, 1)) < 4


def test_nothing_is_begun_of_what_is_empty_or_has_gaps() -> None:
    assert beginning((), 100) == beginning((torch.empty(0, 4),), 100) == ()
    assert beginning((torch.rand(8, 8).T,), 100) == ()


def test_blocks_that_fetch_lie_above_those_that_work() -> None:
    piece, other = torch.zeros(3), torch.zeros(5, dtype=torch.uint8)
    assert beside((8, 1)) == beside((8, 1), None, None) == ((8, 1, 1), (None, None, 0, 0))
    assert beside((8, 2), piece) == ((8, 2, 1 + prefetch.FETCH_BLOCKS // 16), (piece, None, 12, 0))
    assert beside((1000, 1), piece, other) == ((1000, 1, 2), (piece, other, 12, 5))


def test_a_card_fetches_what_its_memory_delivers_and_its_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """An RTX 4090 (1008 GB/s, 72 MiB) and an H200 (4.9 TB/s, 50 MiB)."""
    cards = ((2_520_000, 10_501_000, 384, 72 * 2**20), (1_980_000, 3_201_000, 6144, 50 * 2**20))
    asked = (prefetch.CLOCK, prefetch.MEMORY_CLOCK, prefetch.BUS_WIDTH, prefetch.CACHE_BYTES)
    for index, card in enumerate(cards):
        known = dict(zip(asked, card, strict=True))
        monkeypatch.setattr(prefetch, "ask_card", lambda attribute, _, known=known: known[attribute])
        device = torch.device("cuda", 90 + index)
        cases = (("all_reduce", 1), ("all_reduce", 8), ("all_reduce", 32), ("activation", 1), ("activation", 8))
        found = [prefetch.idle_bytes(place, num_rows, device) / 1e6 for place, num_rows in cases]
        expected = ([6.05, 13.10, 25.17, 2.02, 2.02], [17.48, 17.48, 17.48, 9.83, 9.83])[index]
        assert found == pytest.approx(expected, abs=0.01)
        assert prefetch.options(index)[1] == f"-DBYTES_PER_CLOCK={(400, 2483)[index]}"
    assert prefetch.idle_bytes("all_reduce", 1, CPU) == 0


# What prefetch.cuh asks a card for is written down: an address and as many bytes.
EMULATED = """
#include <cstdio>
#include <cstdlib>
#define __device__
#define __forceinline__ inline
struct Index { int x, y, z; };
static Index gridDim, blockIdx, blockDim, threadIdx;
static long long now;
static long long clock64() { return now += 1000; }
static void __nanosleep(int) {}
static void note(unsigned long long at, unsigned bytes) { printf("%llu %u\\n", at, bytes); }
SOURCE
int main(int, char** given) {
  const void *ahead = (void*)atoll(given[1]), *more_ahead = (void*)atoll(given[2]);
  const int ahead_bytes = atoi(given[3]), more_ahead_bytes = atoi(given[4]);
  gridDim = {3, 2, 4}, blockDim = {64, 1, 1};
  for (int i = 0; i < 3 * 2 * 4 * 64; i++) {
    threadIdx.x = i % 64, blockIdx = {i / 64 % 3, i / 192 % 2, i / 384};
    if (FETCHES_AHEAD != (blockIdx.z > 0)) return 1;
  }
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize(("fetch", "architecture"), [(0, 890), (1, 890), (2, 890), (2, 900), (3, 900)])
def test_every_line_is_fetched_once_and_no_other(tmp_path: Path, fetch: int, architecture: int) -> None:
    """By the blocks above the first of z, whatever the pieces and the way."""
    source = read_source(Path(prefetch.__file__).parent / "prefetch.cuh")
    source = re.sub(r"asm volatile\(.*?\[%0\], %1.*\);", "note(at, bytes);", source)
    source = re.sub(r"asm volatile\(.*\);", "note(at, FETCH_BYTES);", source)
    (tmp_path / "fetch.cpp").write_text(EMULATED.replace("SOURCE", source))
    options = [f"-DFETCH={fetch}", "-DBYTES_PER_CLOCK=400", f"-D__CUDA_ARCH__={architecture}"]
    subprocess.run(["g++", *options, "fetch.cpp", "-o", "fetch"], cwd=tmp_path, check=True)
    for pieces in (((4099, 1), (2**33 + 128, 128)), ((2**40 + 127, 500_001), (64, 0)), ((0, 0), (2**35 + 8, 99_999))):
        arguments = [str(number) for number in (pieces[0][0], pieces[1][0], pieces[0][1], pieces[1][1])]
        found = subprocess.run([tmp_path / "fetch", *arguments], capture_output=True, text=True, check=True).stdout
        asked = [[int(number) for number in line.split()] for line in found.splitlines()]
        assert all(at % 16 == size % 16 == 0 for at, size in asked)
        sectors = sorted(at + start for at, size in asked for start in range(0, size, 32))
        lines = [range(at // 128, (at + size - 1) // 128 + 1) for at, size in pieces if size]
        assert sectors == sorted(line * 128 + start for each in lines for line in each for start in range(0, 128, 32))


class Recording(ElidedAllReduce):
    """Sums as the communicator it wraps, and keeps the weights that each sum was told of."""

    def __init__(self, inner: Communicator) -> None:
        super().__init__(inner)
        self.aheads: list[Ahead] = []

    def all_reduce(self, tensor: Tensor, ahead: Ahead = ()) -> Tensor:
        self.aheads.append(ahead)
        return self.inner.all_reduce(tensor, ahead)


def recording(function: Callable[..., Any], num_arguments: int, aheads: list[Ahead]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        aheads.append(arguments[num_arguments:])
        return function(*arguments)

    return call


Run = tuple[Tensor, list[list[str]], list[int]]


def run_recorded(communicator: Communicator, folder: Path, fetched_bytes: list[int]) -> list[Run]:
    return [run_one(communicator, folder, num_bytes) for num_bytes in fetched_bytes]


def run_one(communicator: Communicator, folder: Path, num_bytes: int) -> Run:
    """Logits; the names of the weights that sums, rotations and activations of a step were told of; their sizes."""
    wrapped = Recording(communicator)
    rotations: list[Ahead] = []
    activations: list[Ahead] = []
    engine = make_engine(wrapped, folder)
    with (
        patch.object(prefetch, "idle_bytes", lambda place, num_rows, device: num_bytes),
        patch.object(decoder, "silu_mul", recording(decoder.silu_mul, 1, activations)),
        patch.object(decoder, "rotary_and_cache", recording(decoder.rotary_and_cache, 12, rotations)),
    ):
        logits = forced_logits(engine, prompts_of("llama_with_biases"), FORCED)
    names = {tensor.data_ptr(): name for name, tensor in tensors_of(engine.model) if tensor.numel()}
    layers = engine.model.config.num_hidden_layers
    step = (wrapped.aheads[-2 * layers :], rotations[-layers:], activations[-layers:])
    told = [["+".join(names[piece.data_ptr()] for piece in ahead) for ahead in each] for each in step]
    return logits, told, [sum(piece.nbytes for piece in ahead) for each in step for ahead in each]


def tensors_of(model: torch.nn.Module) -> list[tuple[str, Tensor]]:
    short = lambda name: name.removeprefix("model.layers.").replace("self_attn.", "").replace("mlp.", "")  # noqa: E731
    return [(short(name), tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())]


@pytest.mark.parametrize("world_size", [1, 2])
def test_each_part_is_told_what_comes_next_and_computes_the_same(folders: dict[str, Path], world_size: int) -> None:
    folder = folders["llama_with_biases"]
    sums = ["0.gate_up.multiply.weight", "1.qkv.multiply.weight", "1.gate_up.multiply.weight", "lm_head.weight"]
    others = [[f"{i}.{name}.weight" for i in (0, 1)] for name in ("o_proj", "down_proj")]
    for plain, whole, little in run_on_ranks(run_recorded, world_size, folder, [0, WHOLE, LITTLE]):
        assert torch.isfinite(plain[0]).all()
        assert set(plain[2]) == {0}
        assert torch.equal(whole[0], plain[0]) and torch.equal(little[0], plain[0])
        assert whole[1] == little[1] == [sums, *others]
        assert min(whole[2]) > LITTLE and set(little[2]) == {LITTLE}


def test_packed_weights_are_told_with_their_scales(tmp_path: Path) -> None:
    write_pair("w4a16", tmp_path)
    ((_, told, sizes),) = run_on_ranks(run_recorded, 1, tmp_path / "quantized", [WHOLE])[0]
    assert told[1] == ["0.o_proj.packed.values+0.o_proj.packed.scales", "1.o_proj.packed.values+1.o_proj.packed.scales"]
    assert told[0][-2] == "1.gate_up.multiply.values+1.gate_up.multiply.scales"
    assert min(sizes) > 0


def test_a_rank_without_heads_has_nothing_to_fetch_there(folders: dict[str, Path]) -> None:
    found = [each for (each,) in run_on_ranks(run_recorded, 3, folders["llama_with_two_kv_heads"], [LITTLE])]
    assert all("0.gate_up.multiply.weight" in told[0] for _, told, _ in found)
    # Two KV heads on three ranks: one has no rotation.
    assert sorted(len(told[1]) for _, told, _ in found) == [0, 2, 2]


def test_nothing_is_fetched_of_what_lies_elsewhere() -> None:
    weight = PlainWeight(torch.rand(4, 4))
    assert [piece.nbytes for piece in begin(weight, 20, CPU)] == [20]
    assert begin(weight.to("meta"), 20, CPU) == begin(weight, 0, CPU) == ()


def test_what_the_own_kernels_read_in_the_order_they_read_it() -> None:
    weights = [
        QuantizedWeight(torch.randint(0, 16, (out, 256), dtype=torch.uint8), 4, torch.rand(out, 2), None, 128)
        for out in (64, 32)
    ]
    merged: Any = merge([W4A16Linear(weight) for weight in weights])
    assert [tuple(each.shape[:2]) for each in merged.stored()] == [(6, 2), (6, 2)]
    assert merged.stored()[0].data_ptr() == merged.packed.data_ptr()
    assert merged.stored()[0].nbytes == 96 * 256 // 2
    dequantized: Any = choice.KERNELS["dequantize"].build(weights[0])
    assert dequantized.stored()[0] is dequantized.values


@pytest.mark.parametrize("fetches", [False, True])
def test_a_channel_gives_blocks_that_fetch_only_to_kernels_that_know_them(fetches: bool) -> None:
    """Others would count them as arrived."""
    channel, calls, piece, message = object.__new__(Channel), [], torch.zeros(5), torch.ones(2)  # type: ignore[var-annotated]
    channel.region, channel.state, channel.rank = SimpleNamespace(device_address=7), torch.zeros(2), 1  # type: ignore[assignment]
    channel.fetches, channel.timeout_sec = fetches, 2.0
    channel.kernels = {"sum": lambda *arguments: calls.append(arguments)}  # type: ignore[dict-item]
    channel.launch("sum", message, message, 8, 64, 4, 256, (piece,))
    grid, threads, *arguments = calls[0]
    assert grid == (4, 1, 1 + prefetch.FETCH_BLOCKS // 4 * fetches) and threads == 256
    assert arguments[3:8] == [7, 8, 64, 1, 2000]
    assert arguments[8:] == ([piece, None, 20, 0] if fetches else [])


def test_transports_that_cannot_fetch_sum_all_the_same() -> None:
    tensor, ahead = torch.ones(3), (torch.zeros(2),)
    assert Solo(CPU).all_reduce(tensor, ahead) is tensor
    assert ElidedAllReduce(Solo(CPU)).all_reduce(tensor, ahead) is tensor
