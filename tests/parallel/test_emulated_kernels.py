"""The kernels' own CUDA source, compiled for the CPU with its instructions emulated, against float64.

It shows layouts, decoding, indices and the ring of copies; not what a card's instructions do, nor races between warps.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parallel.kernels import w4a16, w8a16
from parallel.kernels.tiles import Launch
from parallel.quantized import QuantizedWeight

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

KERNELS = Path(w4a16.__file__).parent
HEADER = Path(__file__).parent / "emulated.h"
# Units that the warps do not share evenly, and more than the ring holds.
NUM_OUT, NUM_IN = 64, 640


def draw(num_values: int, group_size: int, *, zeros: bool = False) -> QuantizedWeight:
    groups = NUM_IN // group_size
    drawn = torch.randint(0, num_values, (NUM_OUT, groups), dtype=torch.uint8)
    values = torch.randint(0, num_values, (NUM_OUT, NUM_IN), dtype=torch.uint8)
    bits = num_values.bit_length() - 1
    return QuantizedWeight(values, bits, torch.rand(NUM_OUT, groups) + 0.01, drawn if zeros else None, group_size)


def float8() -> QuantizedWeight:
    values = torch.randint(0, 256, (NUM_OUT, NUM_IN), dtype=torch.uint8)
    values = torch.where((values & 0x7F) == 0x7F, values - 1, values).view(torch.float8_e4m3fn)
    return QuantizedWeight(values, 8, torch.rand(NUM_OUT, 1) + 0.01, None, NUM_IN)


def codebook() -> QuantizedWeight:
    plain = draw(16, 64)
    return QuantizedWeight(plain.values, 4, plain.scales, None, 64, codebook=torch.randn(16).bfloat16().float())


CASES = {
    "4 bits": (lambda: draw(16, 32, zeros=True), Launch(2, 2, 2, 2), 13),
    "codebook": (codebook, Launch(1, 1, 4, 2), 8),
    "int8": (lambda: draw(256, 128, zeros=True), Launch(1, 2, 2, 4), 3),
    "float8": (float8, Launch(4, 1, 2, 2), 31),
}


@pytest.mark.parametrize("eager", [False, True], ids=["late copies", "early copies"])
@pytest.mark.parametrize("name", CASES)
def test_the_source_computes_what_float64_does(tmp_path: Path, name: str, eager: bool) -> None:
    make, launch, num_rows = CASES[name]
    weight = make()
    layer = w4a16.W4A16Linear(weight) if weight.bits == 4 else w8a16.W8A16Linear(weight)
    library = compile_source(tmp_path, layer, launch, eager=eager)
    buffers = [pointer(layer.packed), pointer(layer.scales), pointer(getattr(layer, "codebook", None))]
    exact = weight.dequantize(torch.float64)

    rows = torch.randn(num_rows, NUM_IN).bfloat16()
    output = torch.full((num_rows, NUM_OUT), float("nan"), dtype=torch.bfloat16)
    library.run_multiply(*buffers, pointer(rows), pointer(output), NUM_OUT, NUM_IN, num_rows)
    expected = rows.double() @ exact.t()
    allowed = expected.abs() * 2**-8 + expected.abs().mean() * 2e-3
    assert ((output.double() - expected).abs() <= allowed).all()

    dequantized = torch.full((NUM_OUT, NUM_IN), float("nan"), dtype=torch.bfloat16)
    library.run_dequantize(*buffers, pointer(dequantized), NUM_OUT, NUM_IN)
    assert ((dequantized.double() - exact).abs() <= exact.abs() * (2**-8 + 2**-16)).all()


def compile_source(folder: Path, layer: torch.nn.Module, launch: Launch, *, eager: bool) -> ctypes.CDLL:
    if isinstance(layer, w4a16.W4A16Linear):
        size = w4a16.group_size(layer.packed, layer.scales)
        name, options = "w4", w4a16.kernel_options(launch, size, has_codebook=layer.codebook is not None)
    else:
        assert isinstance(layer, w8a16.W8A16Linear)
        grouped = w8a16.is_grouped(layer.scales)
        name, options = "w8", w8a16.kernel_options(launch, is_grouped=grouped, is_float=layer.is_float)
    names = [f'-DKERNEL_FILE="{KERNELS}/{name}a16.cu"', f"-DMULTIPLY={name}a16", f"-DDEQUANTIZE=dequantize_{name}"]
    target = folder / "kernel.so"
    command = ["g++", "-std=c++17", "-w", "-fPIC", "-shared", "-pthread", "-x", "c++", str(HEADER), "-o", str(target)]
    subprocess.run([*command, *names, f"-DEAGER={int(eager)}", *options], check=True)
    return ctypes.CDLL(str(target))


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())
