"""Packed linears joined: outputs side by side, for every kernel, and what cannot be joined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from parallel.kernels import tinygemm, w4a16, w8a16
from parallel.kernels.choice import KERNELS
from parallel.kernels.dequantize import DequantizeLinear
from parallel.kernels.host_int4 import HostInt4Linear
from parallel.kernels.merge import JOINED, merge
from parallel.quantized import QuantizedWeight
from tests.parallel.kernels.test_kernels import lane_words

NUM_IN = 256


def weight_of(num_out: int, bits: int = 4, *, groups: int = 2, **fields: Tensor) -> QuantizedWeight:
    values = torch.randint(0, 2**bits, (num_out, NUM_IN), dtype=torch.uint8)
    scales = (torch.rand(num_out, groups) + 0.01).half().float()
    return replace(QuantizedWeight(values, bits, scales, None, NUM_IN // groups), **fields)


def with_zeros(weight: QuantizedWeight) -> QuantizedWeight:
    return replace(weight, zeros=torch.randint(0, 2**weight.bits, weight.scales.shape, dtype=torch.uint8))


def as_float8(weight: QuantizedWeight) -> QuantizedWeight:
    return replace(weight, values=(weight.values & 0x77).view(torch.float8_e4m3fn))


CASES: dict[str, tuple[type[nn.Module], Callable[[int], QuantizedWeight]]] = {
    "w4a16": (w4a16.W4A16Linear, lambda num_out: with_zeros(weight_of(num_out))),
    "w4a16 in 64s": (w4a16.W4A16Linear, lambda num_out: weight_of(num_out, groups=4)),
    "w4a16 of a codebook": (w4a16.W4A16Linear, lambda num_out: weight_of(num_out, codebook=torch.arange(16) / 8 - 1)),
    "w8a16": (w8a16.W8A16Linear, lambda num_out: with_zeros(weight_of(num_out, 8))),
    "w8a16 by output": (w8a16.W8A16Linear, lambda num_out: weight_of(num_out, 8, groups=1)),
    "w8a16 of float8": (w8a16.W8A16Linear, lambda num_out: as_float8(weight_of(num_out, 8))),
    "tinygemm": (tinygemm.TinygemmLinear, lambda num_out: with_zeros(weight_of(num_out))),
    "dequantize": (DequantizeLinear, lambda num_out: with_zeros(weight_of(num_out))),
    "dequantize 8 bits": (DequantizeLinear, lambda num_out: weight_of(num_out, 8)),
    "dequantize float8": (DequantizeLinear, lambda num_out: as_float8(weight_of(num_out, 8))),
}


@pytest.fixture(autouse=True)
def without_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels multiply by their packed weight as plain torch reads it; tinygemm's packing is its layout, by hand."""
    monkeypatch.setattr(w4a16.W4A16Linear, "dequantize", lambda self, some: unpacked_w4(self)[some].bfloat16())
    monkeypatch.setattr(w8a16.W8A16Linear, "dequantize", lambda self, some: unpacked_w8(self)[some].bfloat16())
    for kind in (w4a16.W4A16Linear, w8a16.W8A16Linear, tinygemm.TinygemmLinear):
        monkeypatch.setattr(kind, "multiply", lambda self, rows: rows @ self.dequantize(slice(0, self.num_out)).t())

    def pack(pairs: Tensor, tiles: int) -> Tensor:
        return lane_words(torch.stack([pairs >> 4, pairs & 15], dim=-1).flatten(1), tiles)

    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", pack, raising=False)


def unpacked_w4(layer: w4a16.W4A16Linear) -> Tensor:
    return w4a16.unpack_weight(layer.packed, layer.scales, layer.codebook)


def unpacked_w8(layer: w8a16.W8A16Linear) -> Tensor:
    return w8a16.unpack_weight(layer.packed, layer.scales, is_float=layer.is_float)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("num_rows", [2, 70])
def test_outputs_of_the_joined_linear_are_those_of_its_parts_side_by_side(name: str, num_rows: int) -> None:
    kind, make = CASES[name]
    layers = [kind(make(num_out)) for num_out in (32, 16, 16)]
    before = [{key: tensor.clone() for key, tensor in layer.named_buffers()} for layer in layers]
    merged = merge(layers)
    assert merged is not None
    hidden = torch.randn(1, num_rows, NUM_IN).bfloat16()
    apart = torch.cat([layer(hidden) for layer in layers], dim=-1)
    torch.testing.assert_close(merged(hidden), apart, rtol=2**-7, atol=0.05)
    assert merged(hidden).shape == (1, num_rows, 64)
    # The parts are as they were.
    for layer, buffers in zip(layers, before, strict=True):
        assert all(torch.equal(tensor, buffers[key]) for key, tensor in layer.named_buffers())


@pytest.mark.parametrize("name", CASES)
def test_the_joined_linear_holds_what_one_of_the_joined_weight_would(name: str) -> None:
    kind, make = CASES[name]
    weights = [make(num_out) for num_out in (32, 16)]
    zeros = [each.zeros for each in weights if each.zeros is not None]
    whole = replace(
        weights[0],
        values=torch.cat([each.values.view(torch.uint8) for each in weights]).view(weights[0].values.dtype),
        scales=torch.cat([each.scales for each in weights]),
        zeros=torch.cat(zeros) if zeros else None,
    )
    merged, direct = merge([kind(each) for each in weights]), kind(whole)
    assert merged is not None
    buffers = dict(direct.named_buffers())
    assert dict(merged.named_buffers()).keys() == buffers.keys()
    for key, tensor in merged.named_buffers():
        assert torch.equal(as_bits(tensor), as_bits(buffers[key])), key


def as_bits(tensor: Tensor) -> Tensor:
    """Comparable even where a float is no number."""
    return tensor.contiguous().view(torch.uint8)


def test_every_kernel_has_a_way_of_being_joined() -> None:
    assert {HostInt4Linear, *(kernel.build for kernel in KERNELS.values())} == set(JOINED)


def test_what_differs_in_more_than_its_outputs_is_not_joined() -> None:
    four, eight = w4a16.W4A16Linear(weight_of(16)), w8a16.W8A16Linear(weight_of(16, 8))
    assert merge([four, eight]) is None
    assert merge([four, w4a16.W4A16Linear(weight_of(16, groups=4))]) is None
    assert merge([eight, w8a16.W8A16Linear(as_float8(weight_of(16, 8)))]) is None
    assert merge([eight, w8a16.W8A16Linear(weight_of(16, 8, groups=1))]) is None
    books = [w4a16.W4A16Linear(weight_of(16, codebook=torch.randn(16))) for _ in range(2)]
    assert merge(books) is None
    assert merge([four, books[0]]) is None
    assert merge([DequantizeLinear(weight_of(16)), DequantizeLinear(with_zeros(weight_of(16)))]) is None
    assert merge([nn.Linear(4, 4), nn.Linear(4, 4)]) is None


def test_inputs_in_another_order_are_not_joined() -> None:
    order = (torch.arange(NUM_IN) // 128)[torch.randperm(NUM_IN)]
    first, same = (w4a16.W4A16Linear(weight_of(16, group_of=order)) for _ in range(2))
    assert merge([first, same]) is not None
    assert merge([first, w4a16.W4A16Linear(weight_of(16, group_of=order.flip(0)))]) is None
    assert merge([first, w4a16.W4A16Linear(weight_of(16))]) is None
