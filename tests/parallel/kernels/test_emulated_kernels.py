"""The kernels' own CUDA source, compiled for the CPU with its instructions emulated, against float64.

It shows layouts, decoding, indices and the ring of copies; not what a card's instructions do, nor races between warps.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parallel.kernels import pack_eight_bits, pack_four_bits, w4a16, w8a16
from parallel.kernels.dequantize_packed import count_blocks
from parallel.kernels.host_int4 import OUTPUTS_PER_BLOCK, pack_values
from parallel.kernels.packed_layout import Layout
from parallel.kernels.tiles import Launch
from parallel.kernels.tinygemm import scales_and_shifts
from parallel.quantized import QuantizedWeight

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

KERNELS = Path(w4a16.__file__).parent
HEADER = Path(__file__).parent / "emulated.h"
# Units that the warps do not share evenly, and more than the ring holds.
NUM_OUT, NUM_IN = 64, 640


def draw(
    num_values: int,
    group_size: int,
    *,
    zeros: bool = False,
    dtype: torch.dtype = torch.float32,
    num_out: int = NUM_OUT,
) -> QuantizedWeight:
    groups = NUM_IN // group_size
    drawn = torch.randint(0, num_values, (num_out, groups), dtype=torch.uint8)
    values = torch.randint(0, num_values, (num_out, NUM_IN), dtype=torch.uint8)
    bits = num_values.bit_length() - 1
    scales = (torch.rand(num_out, groups) + 0.01).to(dtype)
    return QuantizedWeight(values, bits, scales, drawn if zeros else None, group_size)


def float8() -> QuantizedWeight:
    values = torch.randint(0, 256, (NUM_OUT, NUM_IN), dtype=torch.uint8)
    values = torch.where((values & 0x7F) == 0x7F, values - 1, values).view(torch.float8_e4m3fn)
    return QuantizedWeight(values, 8, torch.rand(NUM_OUT, 1) + 0.01, None, NUM_IN)


def codebook() -> QuantizedWeight:
    plain = draw(16, 64)
    return QuantizedWeight(plain.values, 4, plain.scales, None, 64, codebook=torch.randn(16).bfloat16().float())


CASES = {
    "4 bits": (lambda: draw(16, 32, zeros=True), Launch(2, 2, 2, 2), 13),
    "bf16 scales": (lambda: draw(16, 128, dtype=torch.bfloat16), Launch(1, 2, 4, 2), 5),
    "float16 scales": (lambda: draw(16, 64, dtype=torch.float16), Launch(2, 1, 2, 4), 16),
    "float16 scales, zeros": (lambda: draw(16, 128, zeros=True, dtype=torch.float16), Launch(1, 4, 2, 2), 7),
    "bf16 scales, zeros": (lambda: draw(16, 32, zeros=True, dtype=torch.bfloat16), Launch(1, 1, 4, 2), 2),
    "codebook": (codebook, Launch(1, 1, 4, 2), 8),
    "int8": (lambda: draw(256, 128, zeros=True), Launch(1, 2, 2, 4), 3),
    "float8": (float8, Launch(4, 1, 2, 2), 31),
}


@pytest.mark.parametrize("early", [False, True], ids=["late copies", "early copies"])
@pytest.mark.parametrize("name", CASES)
def test_the_source_computes_what_float64_does(name: str, early: bool) -> None:
    make, launch, num_rows = CASES[name]
    weight = make()
    layer, layout = layer_and_layout(weight)
    file = f"w{weight.bits}a16"
    options = [option for option in layout.options if not option.startswith("-DBITS")]
    library = compile_source(f"{file}.cu", [f"-DMULTIPLY={file}", *launch.options(), *options], early=early)
    rows = torch.randn(num_rows, NUM_IN).bfloat16()
    output = torch.full((num_rows, NUM_OUT), float("nan"), dtype=torch.bfloat16)
    library.run_multiply(*buffers_of(layer), pointer(rows), pointer(output), NUM_OUT, NUM_IN, num_rows)
    expected = rows.double() @ weight.dequantize(torch.float64).t()
    allowed = expected.abs() * 2**-8 + expected.abs().mean() * 2e-3
    assert ((output.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("name", CASES)
def test_the_source_dequantises_to_the_nearest_bf16(name: str) -> None:
    layer, layout = layer_and_layout(CASES[name][0]())
    library = compile_source("dequantize_packed.cu", ["-DRUN_DEQUANTIZE", *layout.options])
    if isinstance(layer, w4a16.W4A16Linear):
        expected = w4a16.unpack_weight(layer.packed, layer.scales, layer.codebook)
    else:
        expected = w8a16.unpack_weight(layer.packed, layer.scales, is_float=layer.is_float)
    # With an odd number of units, a warp has one less than the others.
    for tiles in (NUM_OUT // 16 - 1, NUM_OUT // 16):
        dequantized = torch.full((NUM_OUT, NUM_IN), float("nan"), dtype=torch.bfloat16)
        units = NUM_IN // 128
        library.run_dequantize(*buffers_of(layer), pointer(dequantized), tiles, units, count_blocks(tiles, units))
        assert torch.equal(dequantized[: tiles * 16], expected[: tiles * 16].bfloat16())
        assert dequantized[tiles * 16 :].isnan().all()


@pytest.mark.parametrize("block", OUTPUTS_PER_BLOCK)
@pytest.mark.parametrize("group_size", [32, 128])
def test_the_source_dequantises_what_is_packed_for_the_host(block: int, group_size: int) -> None:
    """The outputs from the second block on, of which no more are written."""
    weight = draw(16, group_size, zeros=True, dtype=torch.bfloat16, num_out=3 * block)
    packed = pack_values(weight.values, block)
    scales = scales_and_shifts(weight, torch.arange(NUM_IN // group_size))
    library = compile_source("dequantize_host.cu", [f"-DBLOCK={block}", "-DRUN_DEQUANTIZE_HOST"])
    found = torch.full((NUM_IN + 1, 2 * block), float("nan"), dtype=torch.bfloat16)
    # Views lie in memory that the whole keeps.
    first, first_scales = packed[block:], scales[:, block:]
    library.run_dequantize_host(
        pointer(first), pointer(first_scales), pointer(found), NUM_IN, 2 * block, len(packed), group_size
    )
    factors, shifts = (part.t().repeat_interleave(group_size, dim=1)[block:] for part in scales.double().unbind(-1))
    expected = (weight.values[block:].double() - 8) * factors + shifts
    assert torch.equal(found[:NUM_IN].t(), expected.bfloat16())
    assert found[NUM_IN].isnan().all()


@pytest.mark.parametrize("in_pairs", [False, True])
def test_the_source_packs_as_plain_torch_does(in_pairs: bool) -> None:
    library = compile_source("pack_four_bits.cu", ["-DRUN_PACK", f"-DIN_PAIRS={int(in_pairs)}"])
    # Halves of units that the warps of a block do not share evenly.
    values = torch.randint(0, 16, (48, 384), dtype=torch.uint8)
    packed = torch.full((3, 3, 2, 32, 4), -1, dtype=torch.int32)
    library.run_pack(pointer(values), pointer(packed), 3, 17, pack_four_bits.count_blocks(3, 3))
    expected = w4a16.pack_values(values, in_pairs=in_pairs)
    assert torch.equal(packed.flatten(0, 2)[:17], expected.flatten(0, 2)[:17])
    assert (packed.flatten(0, 2)[17:] == -1).all()
    library.run_pack(pointer(values), pointer(packed), 3, 18, pack_four_bits.count_blocks(3, 3))
    assert torch.equal(packed, expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_the_source_packs_eight_bits_as_plain_torch_does(dtype: torch.dtype) -> None:
    library = compile_source("pack_eight_bits.cu", ["-DRUN_PACK_EIGHT", f"-DE4M3={int(dtype.is_floating_point)}"])
    values = torch.randint(0, 256, (48, 384), dtype=torch.uint8).view(dtype)
    packed = torch.full((3, 3, 4, 32, 4), -1, dtype=torch.int32)
    blocks = pack_eight_bits.count_blocks(3, 3)
    # Quarters of units that the warps of a block do not share evenly.
    library.run_pack(pointer(values), pointer(packed), 3, 35, blocks)
    expected = w8a16.pack_values(values)
    assert torch.equal(packed.flatten(0, 2)[:35], expected.flatten(0, 2)[:35])
    assert (packed.flatten(0, 2)[35:] == -1).all()
    library.run_pack(pointer(values), pointer(packed), 3, 36, blocks)
    assert torch.equal(packed, expected)


def layer_and_layout(
    weight: QuantizedWeight, *, swiglu: bool = False
) -> tuple[w4a16.W4A16Linear | w8a16.W8A16Linear, Layout]:
    if weight.bits == 4:
        four = w4a16.W4A16Linear(weight)
        return four, w4a16.layout_of(four.packed, four.scales, four.codebook, swiglu=swiglu)
    eight = w8a16.W8A16Linear(weight)
    is_grouped = w8a16.is_grouped(eight.scales)
    return eight, w8a16.wide_layout(is_grouped=is_grouped, is_float=eight.is_float, swiglu=swiglu)


def compile_source(file: str, options: Sequence[str], *, early: bool = False) -> ctypes.CDLL:
    """`early`: when asynchronous copies arrive; otherwise as late as they may."""
    library = compile_once(file, tuple(options))
    library.copy_early(early)
    return library


@cache
def compile_once(file: str, options: tuple[str, ...]) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        target = f"{folder}/kernel.so"
        command = ["g++", "-std=c++17", "-w", "-fPIC", "-shared", "-pthread", "-x", "c++", str(HEADER), "-o", target]
        subprocess.run([*command, f'-DKERNEL_FILE="{KERNELS}/{file}"', *options], check=True)
        return ctypes.CDLL(target)


def buffers_of(layer: torch.nn.Module) -> list[ctypes.c_void_p]:
    """The weight, its scales, and its codebook if it has one."""
    return [pointer(getattr(layer, name, None)) for name in ("packed", "scales", "codebook")]


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())
