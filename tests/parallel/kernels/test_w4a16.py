"""What of the W4A16 kernel shows without a card: its layout, and that every launch it may choose can run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from parallel.footprint import UNIT_INPUTS, W4A16_GROUP_SIZES
from parallel.kernels import tiles, w4a16
from parallel.kernels.packed_layout import Layout
from parallel.quantized import QuantizedWeight

LAYOUTS: list[Layout] = [
    w4a16.find_layout(size, width, dtype, has_codebook=False)
    for size in W4A16_GROUP_SIZES
    for width, dtype in ((16, torch.bfloat16), (20, torch.float16), (16, torch.float32))
]


def random_weight(
    num_out: int,
    num_in: int,
    *,
    zeros: bool = True,
    group_size: int = UNIT_INPUTS,
    codebook: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> QuantizedWeight:
    groups = num_in // group_size
    return QuantizedWeight(
        values=torch.randint(0, 16, (num_out, num_in), dtype=torch.uint8),
        bits=4,
        scales=(torch.rand(num_out, groups) + 0.01).to(dtype),
        zeros=torch.randint(0, 16, (num_out, groups), dtype=torch.uint8) if zeros else None,
        group_size=group_size,
        codebook=codebook,
    )


@pytest.mark.parametrize("group_size", W4A16_GROUP_SIZES)
@pytest.mark.parametrize("zeros", [True, False])
def test_packed_weight_is_the_weight_up_to_the_last_bits_of_its_scales(zeros: bool, group_size: int) -> None:
    weight = random_weight(48, 384, zeros=zeros, group_size=group_size)
    layer = w4a16.W4A16Linear(weight)
    exact = weight.dequantize(torch.float64)
    assert ((w4a16.unpack_weight(layer.packed, layer.scales).double() - exact).abs() <= exact.abs() * 2**-19).all()
    assert layer.scales.shape == (3, 384 // group_size, 16)
    assert layer.packed.nbytes == 48 * 384 // 2


@pytest.mark.parametrize("group_size", W4A16_GROUP_SIZES)
@pytest.mark.parametrize("dtype", w4a16.SHORT)
@pytest.mark.parametrize(("zeros", "bits"), [(True, 20), (False, 16)])
def test_scales_of_16_bits_stay_as_they_are(zeros: bool, bits: int, dtype: torch.dtype, group_size: int) -> None:
    weight = random_weight(48, 384, zeros=zeros, group_size=group_size, dtype=dtype)
    # Subnormal numbers and powers of two too.
    weight.scales[0, :3] = torch.tensor([3e-7, 2.0**-14, 1.0]).to(dtype)
    layer = w4a16.W4A16Linear(weight)
    assert torch.equal(w4a16.unpack_weight(layer.packed, layer.scales), weight.dequantize(torch.float32))
    assert layer.scales.nbytes * 8 == 48 * 384 // group_size * bits
    assert w4a16.layout_of(layer.packed, layer.scales, None).unit_bytes >= 1024 + 128 // group_size * 2 * bits


def test_zeros_of_a_group_follow_its_scales_two_outputs_to_a_byte() -> None:
    weight = random_weight(32, 256, dtype=torch.float16)
    assert weight.zeros is not None
    stored = w4a16.W4A16Linear(weight).scales.view(torch.uint8)
    for tile, group in ((0, 0), (1, 1), (0, 1)):
        zeros = weight.zeros[tile * 16 : tile * 16 + 16, group].tolist()
        scales = weight.scales[tile * 16 : tile * 16 + 16, group].contiguous().view(torch.uint8)
        assert stored[tile, group, 32:].tolist() == [zeros[g] + 16 * zeros[g + 8] for g in range(8)]
        assert torch.equal(stored[tile, group, :32], scales)


@pytest.mark.parametrize("group_size", W4A16_GROUP_SIZES)
def test_a_codebook_is_looked_up_in_bf16_and_its_scales_are_kept_whole(group_size: int) -> None:
    codebook = torch.randn(16)
    weight = random_weight(48, 384, zeros=False, group_size=group_size, codebook=codebook)
    layer = w4a16.W4A16Linear(weight)
    unpacked = w4a16.unpack_weight(layer.packed, layer.scales, layer.codebook)
    in_bf16 = codebook.bfloat16().float()[weight.values.int()] * weight.scales.repeat_interleave(group_size, dim=1)
    assert torch.equal(unpacked, in_bf16)
    # bf16 has 8 bits.
    exact = weight.dequantize(torch.float64)
    assert ((unpacked.double() - exact).abs() <= exact.abs() * 2**-8).all()


def test_a_codebooks_words_hold_its_low_bytes_before_its_high_bytes() -> None:
    codebook = torch.randn(16)
    bits = codebook.bfloat16().view(torch.int16).tolist()
    stored = w4a16.pack_codebook(codebook).view(torch.uint8).tolist()
    assert stored == [each & 255 for each in bits] + [each >> 8 & 255 for each in bits]


def test_with_a_codebook_the_two_values_of_a_pair_are_neighbours() -> None:
    values = torch.randint(0, 16, (32, 256), dtype=torch.uint8)
    packed = w4a16.pack_values(values, in_pairs=True)
    for tile, unit, half, lane, word in [(0, 0, 0, 0, 0), (1, 1, 1, 31, 3), (0, 1, 1, 6, 2), (1, 0, 0, 17, 1)]:
        bits = int(packed[tile, unit, half, lane, word]) & 0xFFFFFFFF
        g, c, step = lane // 4, lane % 4, 4 * half + word
        first = unit * 128 + 32 * (step // 2) + 8 * c + 4 * (step % 2)
        # The four registers of a fragment: rows g and g + 8 of two inputs, then of the next two.
        at = [(row, first + pair + odd) for pair in (0, 2) for row in (g, g + 8) for odd in (0, 1)]
        expected = [int(values[tile * 16 + row, column]) for row, column in at]
        assert [(bits >> 4 * nibble) & 15 for nibble in range(8)] == expected
    assert torch.equal(w4a16.unpack_values(packed, in_pairs=True), values.int())


def test_a_lane_holds_the_fragment_that_the_kernel_multiplies() -> None:
    values = torch.randint(0, 16, (32, 256), dtype=torch.uint8)
    packed = w4a16.pack_values(values)
    for tile, group, half, lane, word in [(0, 0, 0, 0, 0), (1, 1, 1, 31, 3), (0, 1, 1, 6, 2), (1, 0, 0, 17, 1)]:
        bits = int(packed[tile, group, half, lane, word]) & 0xFFFFFFFF
        g, c, step = lane // 4, lane % 4, 4 * half + word
        first = group * 128 + 32 * (step // 2) + 8 * c + 4 * (step % 2)
        # Rows g and g + 8 alternate; pairs of inputs sit 16 bits apart.
        rows = (g, g + 8, g, g + 8)
        inputs = (first, first, first + 2, first + 2)
        expected = [int(values[tile * 16 + row, at]) for row, at in zip(rows, inputs, strict=True)]
        expected += [int(values[tile * 16 + row, at + 1]) for row, at in zip(rows, inputs, strict=True)]
        assert [(bits >> 4 * nibble) & 15 for nibble in range(8)] == expected


def test_act_order_brings_the_inputs_of_a_group_together() -> None:
    plain = random_weight(16, 256)
    shuffle = torch.randperm(256)
    weight = QuantizedWeight(
        plain.values, 4, plain.scales, plain.zeros, plain.group_size, group_of=(torch.arange(256) // 128)[shuffle]
    )
    assert tiles.fits_groups(weight, 128)
    layer = w4a16.W4A16Linear(weight)
    assert layer.order is not None
    restored = torch.empty(16, 256)
    restored[:, layer.order] = w4a16.unpack_weight(layer.packed, layer.scales)
    assert torch.allclose(restored, weight.dequantize(torch.float32), rtol=2**-19)


@pytest.mark.parametrize("num_rows", range(1, max(w4a16.LAUNCHES) + 1))
def test_every_launch_fits_its_block_and_its_weight(num_rows: int) -> None:
    for num_tiles in (1, 3, 65, 160, 320, 512, 896, 1792, 1848, 3584):
        launch = tiles.choose_launch(w4a16.LAUNCHES, num_rows, num_tiles)
        assert launch.token_tiles * tiles.ROWS_PER_TILE >= num_rows
        assert num_tiles % launch.row_tiles == 0
        assert all(launch.shared_bytes(each.unit_bytes) <= tiles.MAX_SHARED_BYTES for each in LAYOUTS)


@pytest.mark.parametrize(("group_size", "found"), [(256, 128), (128, 128), (64, 64), (96, 32), (16, None)])
def test_groups_are_cut_into_a_size_that_the_kernel_knows(group_size: int, found: int | None) -> None:
    weight = QuantizedWeight(torch.zeros(16, 768, dtype=torch.uint8), 4, torch.ones(16, 48), None, group_size)
    assert w4a16.find_group_size(weight) == found


@pytest.mark.parametrize("group_size", [1, 16, 32, 48, 64, 96, 128, 256, 300, 768, 1000])
@pytest.mark.parametrize("tile", [32, 64, 128])
def test_groups_of_neighbours_fit_as_listed_ones_do(tile: int, group_size: int) -> None:
    """Of these no tensor is asked, which a card would be waited for."""
    values, groups = torch.zeros(16, 768, dtype=torch.uint8), -(-768 // group_size)
    neighbours = QuantizedWeight(values, 4, torch.ones(16, groups), None, group_size)
    listed = replace(neighbours, group_of=neighbours.groups())
    assert tiles.fits_groups(neighbours, tile) == tiles.fits_groups(listed, tile)


def test_weights_that_the_kernel_cannot_take_are_refused_with_the_reason() -> None:
    assert w4a16.refusal(random_weight(16, 256), torch.bfloat16) == "not on a card of sm_80 or later"
