"""Rounding of one tensor: the best of its grids, group by group, and the same for every way to cut the tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from parallel.checkpoint import quantize
from parallel.checkpoint.quantize import cut_inputs, quantize_weight
from parallel.checkpoint.quantize_schemes import QUANTIZE_SCHEMES, ROUNDING_BYTES, widen
from parallel.formats.scheme import Box
from parallel.kernels.round_groups import RANGES
from parallel.quantized import QuantizedWeight
from tests.parallel.memory import peak_bytes

KINDS = tuple(QUANTIZE_SCHEMES)
SIZE = 128
each_kind = pytest.mark.parametrize("kind", KINDS)


def draw(num_out: int, num_in: int) -> Tensor:
    """Unlike any other; heavy tails, so that cutting them off pays, and some groups far from zero."""
    weight = torch.randn(num_out, num_in) * torch.rand(num_out, 1) * 0.1
    weight *= 1 + 4 * (torch.rand(num_out, num_in) < 0.01)
    weight[::5] += 0.3
    return weight


def bf16(value: float) -> np.float32:
    """Rounded to bf16, ties to even, by its bits."""
    bits = int(np.float32(value).view(np.uint32))
    return np.uint32((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)


def candidates(group: np.ndarray, kind: str) -> Iterator[tuple[np.float32, int]]:
    """Scale and zero of every grid that may be tried, in float32."""
    if kind == "int4":
        for share in RANGES:
            low, high = (np.float32(edge) * np.float32(share) for edge in (min(group.min(), 0), max(group.max(), 0)))
            scale = bf16(max((high - low) / np.float32(15), np.float32(1e-10)))
            yield scale, int(np.clip(np.rint(-low / scale), 0, 15))
    else:
        yield bf16(max(abs(group).max() / np.float32(127), np.float32(1e-10))), 128


def levels(group: np.ndarray, scale: np.float32, zero: int, kind: str) -> np.ndarray:
    least, most = (0, 15) if kind == "int4" else (1, 255)
    return np.clip(np.rint(group / scale) + zero if kind == "int8" else np.rint(group / scale + zero), least, most)


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_each_group_gets_the_grid_with_the_least_error(kind: str) -> None:
    weight = draw(24, 3 * SIZE)
    rounded = quantize_weight(weight, QUANTIZE_SCHEMES[kind])
    cut_off = 0
    for row in range(24):
        for index in range(3):
            columns = slice(index * SIZE, (index + 1) * SIZE)
            group = weight[row, columns].numpy()
            tried = list(candidates(group, kind))
            errors = [(((levels(group, s, z, kind) - z) * float(s) - group).astype(np.float64) ** 2).sum()
                      for s, z in tried]  # fmt: skip
            scale, zero = float(rounded.scales[row, index]), 128 if rounded.zeros is None else rounded.zeros[row, index]
            chosen = [(float(s), z) for s, z in tried].index((scale, int(zero)))
            assert errors[chosen] <= min(errors) * (1 + 1e-5)
            assert np.array_equal(rounded.values[row, columns], levels(group, *tried[chosen], kind))
            cut_off += chosen > 0
    assert cut_off > 10 or kind == "int8"


def test_fp8_is_the_nearest_e4m3_number() -> None:
    weight = draw(16, 2 * SIZE)
    rounded = quantize_weight(weight, QUANTIZE_SCHEMES["fp8"])
    scales = rounded.scales.double().repeat_interleave(SIZE, dim=1)
    # Every finite e4m3 number, from its bits.
    numbers = torch.arange(256).byte().view(torch.float8_e4m3fn).double()
    numbers = numbers[numbers.isfinite()]
    errors = (rounded.dequantize(torch.float64) - weight).abs()
    nearest = (numbers * scales.unsqueeze(-1) - weight.double().unsqueeze(-1)).abs().amin(-1)
    assert bool((errors <= nearest * (1 + 1e-6) + 1e-12).all())
    assert float(rounded.values.float().abs().max()) >= 440


@each_kind
def test_result_does_not_depend_on_how_the_tensor_is_cut(kind: str) -> None:
    scheme = QUANTIZE_SCHEMES[kind]
    # The last group is short.
    weight = draw(96, 5 * SIZE + 40).bfloat16()
    whole = quantize_weight(weight, scheme)
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    for _ in range(12):
        (top, bottom), (left, right) = (
            sorted(torch.randperm(size + 1, generator=generator)[:2].tolist()) for size in weight.shape
        )
        box = Box((top, bottom), (left, right))
        wide = widen(box, scheme, weight.shape[1])
        assert wide.inputs[0] % SIZE == 0 <= left - wide.inputs[0] < SIZE
        assert right <= wide.inputs[1] <= min(right + SIZE - 1, weight.shape[1])
        part = quantize_weight(weight[top:bottom, slice(*wide.inputs)].contiguous(), scheme)
        cut = cut_inputs(part, wide, box)
        expected = whole.dequantize(torch.float32)[top:bottom, left:right]
        assert torch.equal(cut.dequantize(torch.float32), expected)
        assert torch.equal(cut.values.view(torch.uint8), whole.values.view(torch.uint8)[top:bottom, left:right])
        assert cut.shape == box.shape


@each_kind
def test_result_does_not_depend_on_the_blocks_of_rows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = draw(37, 3 * SIZE)
    whole = quantize_weight(weight, QUANTIZE_SCHEMES[kind])
    monkeypatch.setattr(quantize, "ROUNDED_AT_A_TIME", 5 * 3 * SIZE)
    assert torch.equal(quantize_weight(weight, QUANTIZE_SCHEMES[kind]).dequantize(torch.float32),
                       whole.dequantize(torch.float32))  # fmt: skip


@each_kind
def test_types_and_shapes_are_those_that_kernels_take(kind: str) -> None:
    scheme = QUANTIZE_SCHEMES[kind]
    rounded = quantize_weight(draw(16, 300), scheme)
    assert (rounded.bits, rounded.group_size, rounded.group_of) == (scheme.bits, SIZE, None)
    assert rounded.values.dtype == (torch.float8_e4m3fn if kind == "fp8" else torch.uint8)
    assert (rounded.scales.dtype, rounded.scales.shape) == (torch.bfloat16, (16, 3))
    assert (rounded.zeros is not None) == scheme.has_zeros
    if not rounded.is_float:
        assert int(rounded.values.max()) < 2**scheme.bits


def extremes() -> Iterator[tuple[str, Tensor]]:
    yield "zero", torch.zeros(4, 256)
    yield "constant", torch.full((4, 256), 0.25)
    yield "below zero", -torch.rand(4, 256) - 0.5
    yield "one value", torch.zeros(4, 256).index_fill(1, torch.tensor([7]), 3.0)
    yield "tiny", torch.randn(4, 256) * 1e-30
    yield "huge", torch.randn(4, 256) * 1e30


@each_kind
@pytest.mark.parametrize(("name", "weight"), list(extremes()))
def test_extreme_groups_are_rounded_well(kind: str, name: str, weight: Tensor) -> None:
    back = quantize_weight(weight, QUANTIZE_SCHEMES[kind]).dequantize(torch.float32)
    reach = weight.clamp(min=0).amax(1) - weight.clamp(max=0).amin(1)
    share = {"int4": 1 / 15 + 0.2 * (name not in ("zero", "constant", "below zero")), "int8": 1 / 127, "fp8": 1 / 16}
    assert bool(((back - weight).abs() <= (reach * share[kind]).unsqueeze(1) + 1e-9).all())


@pytest.mark.parametrize("shape", [(0, 128), (8, 0)])
@each_kind
def test_rank_without_outputs_or_inputs_gets_an_empty_weight(kind: str, shape: tuple[int, int]) -> None:
    assert quantize_weight(torch.empty(shape), QUANTIZE_SCHEMES[kind]).shape == shape


def test_one_group_a_channel_can_be_asked_for() -> None:
    scheme = replace(QUANTIZE_SCHEMES["int8"], group_size=None)
    weight = draw(8, 200)
    rounded = quantize_weight(weight, scheme)
    assert rounded.scales.shape == (8, 1)
    steps = weight.abs().amax(1, keepdim=True) / 127
    assert bool(((rounded.dequantize(torch.float32) - weight).abs() <= steps * 0.51 + weight.abs() / 256).all())
    box = Box((0, 8), (3, 77))
    assert widen(box, scheme, 200) == box


@each_kind
def test_memory_is_that_of_the_result_and_a_block(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "ROUNDED_AT_A_TIME", 2**16)
    weight = draw(1024, 1024)
    results: list[QuantizedWeight] = []
    peak = peak_bytes(lambda: results.append(quantize_weight(weight, QUANTIZE_SCHEMES[kind])))
    assert peak <= weight.numel() * 1.05 + 2**16 * ROUNDING_BYTES
    assert math.prod(results[0].shape) == weight.numel()
