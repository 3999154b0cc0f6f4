"""What of the W8A16 kernel shows without a card: its layouts, its decoding, and that every launch can run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parallel.kernels import tiles, w8a16
from parallel.quantized import QuantizedWeight


def random_bytes(num_out: int, num_in: int) -> Tensor:
    return torch.randint(0, 256, (num_out, num_in), dtype=torch.uint8)


def random_floats(num_out: int, num_in: int) -> Tensor:
    """Any e4m3 but NaN."""
    values = random_bytes(num_out, num_in)
    return torch.where((values & 0x7F) == 0x7F, values - 1, values).view(torch.float8_e4m3fn)


def random_weight(num_out: int, num_in: int, groups: int, *, zeros: bool = False) -> QuantizedWeight:
    scales = torch.rand(num_out, groups) + 0.01
    drawn = torch.randint(0, 256, (num_out, groups), dtype=torch.uint8)
    return QuantizedWeight(random_bytes(num_out, num_in), 8, scales, drawn if zeros else None, num_in // groups)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("zeros", [True, False])
def test_packed_integers_are_the_weight_up_to_the_last_bits_of_its_scales(zeros: bool, groups: int) -> None:
    weight = random_weight(48, 384, groups, zeros=zeros)
    layer = w8a16.W8A16Linear(weight)
    exact = weight.dequantize(torch.float64)
    unpacked = w8a16.unpack_weight(layer.packed, layer.scales, is_float=False)
    # float32 has 24 bits, of which 16 are kept and rounded to; then the product is.
    assert ((unpacked.double() - exact).abs() <= exact.abs() * (2**-16 + 2**-23)).all()
    assert layer.packed.nbytes == 48 * 384
    assert layer.scales.shape == (3, groups, 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_that_come_in_16_bits_are_kept_exactly(dtype: torch.dtype) -> None:
    weight = random_weight(16, 256, 2, zeros=True)
    # Subnormal in float16, too.
    scales = (weight.scales * torch.tensor([1.0, 1e-6])).to(dtype)
    weight = QuantizedWeight(weight.values, 8, scales, weight.zeros, 128)
    layer = w8a16.W8A16Linear(weight)
    unpacked = w8a16.unpack_weight(layer.packed, layer.scales, is_float=False)
    assert torch.equal(unpacked, weight.dequantize(torch.float32))


@pytest.mark.parametrize("groups", [1, 2])
def test_packed_floats_are_the_weight_itself(groups: int) -> None:
    weight = QuantizedWeight(random_floats(32, 256), 8, torch.rand(32, groups), None, 256 // groups)
    layer = w8a16.W8A16Linear(weight)
    unpacked = w8a16.unpack_weight(layer.packed, layer.scales, is_float=True)
    assert torch.equal(unpacked, weight.dequantize(torch.float32))
    assert layer.packed.nbytes == 32 * 256


def rows_and_inputs(lane: int, unit: int, quarter: int, index: int) -> list[tuple[int, int]]:
    """Of a word the four weights: rows g and g + 8 of one input, then of the next."""
    first = unit * 128 + 32 * quarter + 8 * (lane % 4) + 2 * index
    return [(lane // 4 + row, first + odd) for odd in (0, 1) for row in (0, 8)]


@pytest.mark.parametrize("place", [(0, 0, 0, 0, 0), (1, 1, 3, 31, 3), (0, 1, 2, 6, 2), (1, 0, 1, 17, 1)])
def test_a_lane_holds_the_fragment_that_the_kernel_multiplies(place: tuple[int, ...]) -> None:
    values = random_bytes(32, 256)
    word = int(w8a16.pack_values(values)[place]) & 0xFFFFFFFF
    tile, unit, quarter, lane, index = place
    expected = [int(values[tile * 16 + row, at]) for row, at in rows_and_inputs(lane, unit, quarter, index)]
    assert [word >> 8 * byte & 255 for byte in range(4)] == expected


@pytest.mark.parametrize("place", [(0, 0, 0, 0, 0), (1, 1, 3, 31, 3), (0, 1, 2, 6, 2), (1, 0, 1, 17, 1)])
def test_bits_of_floats_lie_where_bf16_has_them(place: tuple[int, ...]) -> None:
    """The masks and shifts of w8a16.cu, applied to a word: bf16 numbers whose exponents begin 120 lower."""
    values = random_floats(32, 256)
    word = int(w8a16.pack_values(values)[place]) & 0xFFFFFFFF
    tile, unit, quarter, lane, index = place
    upper, lower = word & 0x87F087F0, (word << 4) & 0x80F080F0 | (word >> 4) & 0x07000700
    decoded = [bf16(pair >> shift & 0xFFFF) * 2.0**120 for shift in (0, 16) for pair in (upper, lower)]
    expected = [float(values[tile * 16 + row, at]) for row, at in rows_and_inputs(lane, unit, quarter, index)]
    assert decoded == expected


def bf16(bits: int) -> float:
    return float(torch.tensor([bits], dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).double())


def test_every_byte_read_as_bf16_is_that_many_times_the_smallest_number() -> None:
    """What the decoding of integers rests on: bf16 is linear up to the byte's last bit, subnormal numbers included."""
    assert [bf16(byte) * 2.0**127 for byte in range(256)] == [byte / 64 for byte in range(256)]
    # A zero's negative, in 64ths, is a bf16 too, and so is each difference.
    differences = torch.arange(-255, 256) / 64
    assert torch.equal(differences.bfloat16().float(), differences)


def test_act_order_brings_the_inputs_of_a_group_together() -> None:
    plain = random_weight(16, 256, 2)
    shuffled = (torch.arange(256) // 128)[torch.randperm(256)]
    weight = QuantizedWeight(plain.values, 8, plain.scales, None, 128, group_of=shuffled)
    assert w8a16.values_refusal(weight) is None
    layer = w8a16.W8A16Linear(weight)
    assert layer.order is not None
    restored = torch.empty(16, 256)
    restored[:, layer.order] = w8a16.unpack_weight(layer.packed, layer.scales, is_float=False)
    assert torch.allclose(restored, weight.dequantize(torch.float32), rtol=2**-16)


@pytest.mark.parametrize("num_rows", range(1, max(w8a16.LAUNCHES) + 1))
def test_every_launch_fits_its_block_and_its_weight(num_rows: int) -> None:
    for num_tiles in (1, 3, 65, 160, 320, 512, 896, 1792, 1848, 3584):
        launch = tiles.choose_launch(w8a16.LAUNCHES, num_rows, num_tiles)
        assert launch.token_tiles * tiles.ROWS_PER_TILE >= num_rows
        assert num_tiles % launch.row_tiles == 0
        unit_bytes = w8a16.wide_layout(is_grouped=True, is_float=False).unit_bytes
        assert launch.shared_bytes(unit_bytes) <= tiles.MAX_SHARED_BYTES


def test_weights_that_the_kernel_cannot_take_are_refused_with_the_reason() -> None:
    weight = random_weight(16, 256, 2)
    assert w8a16.refusal(weight, torch.bfloat16) == "not on a card of sm_80 or later"
    assert w8a16.values_refusal(weight) is None
    assert w8a16.values_refusal(random_weight(16, 256, 4)) == "groups of other than 128"
    other = QuantizedWeight(weight.values.view(torch.float8_e5m2), 8, weight.scales, None, 128)
    assert w8a16.values_refusal(other) == "values in float8_e5m2"
    book = QuantizedWeight(weight.values, 8, weight.scales, None, 128, codebook=torch.randn(256))
    assert w8a16.values_refusal(book) == "a codebook of 8 bits"
