"""The source that rounds on a card, run on the CPU, against rounding by plain torch: every bit of it."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from parallel.checkpoint.quantize import quantize_weight
from parallel.checkpoint.quantize_schemes import QUANTIZE_SCHEMES
from parallel.formats.scheme import Scheme
from parallel.kernels import round_groups
from parallel.quantized import QuantizedWeight
from tests.parallel.kernels.test_emulated_kernels import compile_source, pointer

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

SCHEMES = {
    **QUANTIZE_SCHEMES,
    "4 bits without zeros": replace(QUANTIZE_SCHEMES["int4"], has_zeros=False),
    "8 bits with zeros": replace(QUANTIZE_SCHEMES["int8"], has_zeros=True),
}
# How weights are stored concerns nothing but how they are read.
KINDS = [*((name, torch.bfloat16) for name in SCHEMES), ("int4", torch.float16), ("int4", torch.float32)]


def round_by_source(weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    options = round_groups.options_of(scheme, weight.dtype)
    library = compile_source("round_groups.cu", ["-DRUN_ROUND", *options])
    num_out, num_in = weight.shape
    groups = -(-num_in // 128)
    # One row more of each, which must stay.
    values = torch.full((num_out + 1, num_in), 77, dtype=torch.uint8)
    scales = torch.full((num_out + 1, groups), -1, dtype=torch.bfloat16)
    zeros = torch.full((num_out + 1, groups), 77, dtype=torch.uint8) if scheme.has_zeros else None
    blocks = round_groups.count_blocks(num_out * groups)
    buffers = (pointer(each) for each in (weight.contiguous(), values, scales, zeros))
    library.run_round(*buffers, num_in, groups, num_out * groups, blocks)
    assert (values[-1] == 77).all() and (scales[-1] == -1).all() and (zeros is None or (zeros[-1] == 77).all())
    kept = values[:-1].view(torch.float8_e4m3fn) if scheme.is_float else values[:-1]
    return QuantizedWeight(kept, scheme.bits, scales[:-1], None if zeros is None else zeros[:-1], 128)


def assert_same(weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    found, expected = round_by_source(weight, scheme), quantize_weight(weight, scheme)
    assert torch.equal(found.scales.view(torch.int16), expected.scales.view(torch.int16))
    assert expected.zeros is None or torch.equal(found.zeros, expected.zeros)  # type: ignore[arg-type]
    assert torch.equal(found.values.view(torch.uint8), expected.values.view(torch.uint8))
    return found


@pytest.mark.parametrize(("name", "dtype"), KINDS)
def test_drawn_weights(name: str, dtype: torch.dtype) -> None:
    """Heavy tails, groups far from zero, a short last group, and warps without one."""
    weight = torch.randn(43, 3 * 128 + 72) * 10 ** torch.empty(43, 1).uniform_(-4, 2)
    weight *= 1 + 6 * (torch.rand(weight.shape) < 0.02)
    weight[::5] += 0.3
    rounded = assert_same(weight.to(dtype), SCHEMES[name])
    assert rounded.zeros is None or len(rounded.zeros.unique()) > 4


@pytest.mark.parametrize("num_in", [1, 31, 128, 129])
@pytest.mark.parametrize("name", SCHEMES)
def test_narrow_weights(name: str, num_in: int) -> None:
    assert_same(torch.randn(3, num_in).bfloat16(), SCHEMES[name])


def extremes() -> Tensor:
    """A row of one group each: of any numbers that float32 has, the largest too, and of few."""
    sparse = torch.zeros(128).index_fill(0, torch.tensor([7]), 3.0)
    # Right between two levels, for every scale that is a power of two.
    ties = (torch.arange(128) - 64) / 2
    signs = torch.tensor([1.0, -1.0]).repeat(64)
    powers = torch.tensor([2.0**exponent for exponent in (-149, -140, -126, -100, -30, 0, 60, 126, 127)])
    rows = [torch.zeros(128), -torch.zeros(128), torch.full((128,), 0.25), -torch.rand(128) - 0.5, sparse, -sparse]
    rows += [torch.full((128,), float(edge)) * signs for edge in (3e38, 1e-10, 1e-40)]
    rows += [ties, ties + 64, -ties - 64, *(power * torch.randn(128).clamp(-1, 1) for power in powers)]
    rows += [signs * 2.0 ** torch.empty(128).uniform_(-40, 3) for _ in range(20)]
    return torch.stack(rows)


@pytest.mark.parametrize(("name", "dtype"), KINDS)
def test_extreme_groups(name: str, dtype: torch.dtype) -> None:
    weight = extremes()
    if dtype == torch.float16:
        weight = weight.clamp(-65504, 65504)
    weight = weight.to(dtype)
    assert weight.isfinite().all()
    assert_same(weight, SCHEMES[name])


@pytest.mark.parametrize(("name", "dtype"), KINDS)
def test_a_weight_that_is_no_number_leaves_no_numbers_in_its_group(name: str, dtype: torch.dtype) -> None:
    """As with plain torch: damaged files must be seen in what the model gives."""
    weight = torch.randn(3, 3 * 128).to(dtype)
    weight[0, 5] = weight[1, 255] = weight[2, 128:256] = torch.nan
    found, expected = round_by_source(weight, SCHEMES[name]), quantize_weight(weight, SCHEMES[name])
    assert torch.equal(found.scales.isnan(), expected.scales.isnan())
    assert found.scales.isnan().sum() == 3
    whole = ~found.scales.isnan().repeat_interleave(128, 1)
    assert torch.equal(found.dequantize(dtype)[whole], expected.dequantize(dtype)[whole])


def undecided() -> Tensor:
    """[groups, 128] float32, of which two grids have errors so close that the order of their sums decides.

    Between two values of one weight of which each has another grid, the values are halved until none is left.
    """
    weight = torch.randn(2000, 128)
    ends = [torch.full((len(weight),), value) for value in (-1.0, 1.0)]

    def scale_with(values: Tensor) -> Tensor:
        weight[:, 5] = values
        return quantize_weight(weight, SCHEMES["int4"]).scales[:, 0]

    first = scale_with(ends[0])
    for _ in range(30):
        middle = (ends[0] + ends[1]) / 2
        stays = scale_with(middle) == first
        ends = [torch.where(stays, middle, ends[0]), torch.where(stays, ends[1], middle)]
    weight[:, 5] = ends[0]
    return weight[scale_with(ends[1]) != first]


def test_errors_are_summed_in_one_order() -> None:
    weight = undecided()
    assert len(weight) > 50
    steps = torch.arange(-8, 9, dtype=torch.int32).view(-1, 1)
    near = weight[:50].repeat(len(steps), 1).view(len(steps), 50, 128)
    near[:, :, 5] = (near[:, :, 5].view(torch.int32) + steps).view(torch.float32)
    assert_same(near.view(-1, 128), SCHEMES["int4"])


@pytest.mark.parametrize("sign", [1, -1])
def test_every_bf16_number_becomes_the_e4m3_number_that_torch_takes(sign: int) -> None:
    """Beside the largest, which makes the scale 1."""
    numbers = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    numbers = numbers[numbers <= 448]
    weight = torch.full((-(-len(numbers) // 127), 128), 448.0, dtype=torch.bfloat16)
    weight[:, 1:].copy_(torch.cat([numbers, numbers.new_zeros(weight[:, 1:].numel() - len(numbers))]).view(-1, 127))
    rounded = assert_same(sign * weight, SCHEMES["fp8"])
    assert (rounded.scales == 1).all()
    assert len(rounded.values.view(torch.uint8).unique()) == 127


def test_cards_take_what_the_source_is_for() -> None:
    """Groups of its size, of numbers that it knows."""
    assert not round_groups.takes(torch.zeros(4, 128), QUANTIZE_SCHEMES["int4"])
    assert {scheme.group_size for scheme in QUANTIZE_SCHEMES.values()} == {round_groups.GROUP_SIZE}
