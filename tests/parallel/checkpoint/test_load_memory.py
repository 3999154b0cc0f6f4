"""What a plan says the load of a linear takes, against what torch allocates for it on a CPU."""

from __future__ import annotations

import pytest
import torch

from parallel.checkpoint.load_memory import PACK_BLOCK_BYTES, load_bytes
from parallel.checkpoint.quantize import quantize_weight
from parallel.checkpoint.quantize_schemes import QUANTIZE_SCHEMES, ROUNDED_AT_A_TIME, ROUNDING_BYTES
from parallel.formats.registry import format_of
from parallel.formats.scheme import Box
from parallel.kernels import w4a16, w8a16
from parallel.kernels.choice import KERNELS, pack_linear
from tests.parallel.memory import peak_bytes
from tools.checkpoint.quantization import WRITERS

NUM_OUT, NUM_IN = 1024, 2048
NUMEL = NUM_OUT * NUM_IN


def held_bytes(weight: torch.nn.Module) -> int:
    return sum(buffer.nbytes for buffer in weight.buffers())


@pytest.mark.parametrize("name", ["awq", "gptq", "w4a16", "w8a16", "fp8"])
def test_decoding_and_packing_take_what_is_predicted(name: str) -> None:
    writer = WRITERS[name]
    stored = writer.stored(torch.randn(NUM_OUT, NUM_IN))
    packed: list[torch.nn.Module] = []

    def load() -> None:
        weight = format_of(writer.scheme).decode(stored, writer.scheme, Box((0, NUM_OUT), (0, NUM_IN)))
        packed.append(pack_linear(weight, torch.float32)[0])

    measured = peak_bytes(load) + sum(tensor.nbytes for tensor in stored.values()) - held_bytes(packed[0])
    predicted = load_bytes(writer.scheme, "cpu", "float32", 4, NUM_IN, NUMEL)
    # Values of 8 bits may be those of the file, which their number is predicted not to be.
    most = 1.1 * measured + (writer.scheme.bits == 8) * NUMEL
    assert 0.98 * measured <= predicted <= most


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", QUANTIZE_SCHEMES)
def test_rounding_takes_what_is_predicted(kind: str, dtype: torch.dtype) -> None:
    scheme = QUANTIZE_SCHEMES[kind]
    packed: list[torch.nn.Module] = []
    stored = [torch.randn(NUM_OUT, NUM_IN).to(dtype)]
    stored_bytes = stored[0].nbytes
    assert NUMEL < ROUNDED_AT_A_TIME
    peak = peak_bytes(lambda: packed.append(pack_linear(quantize_weight(stored.pop(), scheme), torch.float32)[0]))
    measured = peak + stored_bytes - held_bytes(packed[0])
    predicted = load_bytes(scheme, "cpu", "float32", dtype.itemsize, NUM_IN, NUMEL)
    # Float32 needs no copy in float32; a block is small beside the tensors that decide.
    assert measured <= predicted <= measured + ROUNDING_BYTES * NUMEL


# Less than a block of weights, and more than one.
@pytest.mark.parametrize("num_out", [NUM_OUT, 6 * NUM_OUT])
@pytest.mark.parametrize("name", ["awq", "gptq_act_order", "w4a16", "w8a16", "fp8"])
def test_packing_for_the_own_kernels_takes_what_is_predicted(name: str, num_out: int) -> None:
    """Their layouts are made by torch alone, on any device."""
    scheme, numel = WRITERS[name].scheme, num_out * NUM_IN
    stored = WRITERS[name].stored(torch.randn(num_out, NUM_IN))
    packed: list[torch.nn.Module] = []

    def load() -> None:
        weight = format_of(scheme).decode(stored, scheme, Box((0, num_out), (0, NUM_IN)))
        packed.append(w4a16.W4A16Linear(weight) if scheme.bits == 4 else w8a16.W8A16Linear(weight))

    measured = peak_bytes(load) + sum(tensor.nbytes for tensor in stored.values()) - held_bytes(packed[0])
    predicted = load_bytes(scheme, "cuda", "bfloat16", 2, NUM_IN, numel)
    # As above, of 8 bits.
    assert 0.98 * measured <= predicted <= 1.05 * measured + (scheme.bits == 8) * numel


def test_large_linears_take_little_beside_their_values() -> None:
    """The gate and up projections of Llama-70B on one of two ranks."""
    scheme, numel = WRITERS["w4a16"].scheme, 2 * 14336 * 8192
    assert load_bytes(scheme, "cuda", "bfloat16", 2, 8192, numel) < 2 * numel


def test_kernels_are_those_whose_packing_is_known() -> None:
    assert set(KERNELS) - set(PACK_BLOCK_BYTES) == {"tinygemm", "dequantize"}
