"""What of the W4A16 kernel shows without a card: its layout, and that every launch it may choose can run."""

from __future__ import annotations

import pytest
import torch

from parallel.kernels import w4a16
from parallel.quantized import QuantizedWeight


def random_weight(num_out: int, num_in: int, *, zeros: bool = True) -> QuantizedWeight:
    groups = num_in // w4a16.GROUP_SIZE
    return QuantizedWeight(
        values=torch.randint(0, 16, (num_out, num_in), dtype=torch.uint8),
        bits=4,
        scales=torch.rand(num_out, groups) + 0.01,
        zeros=torch.randint(0, 16, (num_out, groups), dtype=torch.uint8) if zeros else None,
        group_size=w4a16.GROUP_SIZE,
    )


@pytest.mark.parametrize("zeros", [True, False])
def test_packed_weight_is_the_weight_up_to_the_last_bits_of_its_scales(zeros: bool) -> None:
    weight = random_weight(48, 384, zeros=zeros)
    layer = w4a16.W4A16Linear(weight)
    exact = weight.dequantize(torch.float64)
    assert ((w4a16.unpack_weight(layer.packed, layer.scales).double() - exact).abs() <= exact.abs() * 2**-19).all()


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
    assert w4a16.fits_groups(weight)
    layer = w4a16.W4A16Linear(weight)
    assert layer.order is not None
    restored = torch.empty(16, 256)
    restored[:, layer.order] = w4a16.unpack_weight(layer.packed, layer.scales)
    assert torch.allclose(restored, weight.dequantize(torch.float32), rtol=2**-19)


@pytest.mark.parametrize("num_rows", range(1, w4a16.MAX_ROWS + 1))
def test_every_launch_fits_its_block_and_its_weight(num_rows: int) -> None:
    for num_tiles in (1, 3, 65, 160, 320, 512, 896, 1792, 1848, 3584):
        launch = w4a16.choose_launch(num_rows, num_tiles)
        assert launch.token_tiles * w4a16.ROWS_PER_TILE >= num_rows
        assert num_tiles % launch.row_tiles == 0
        assert launch.shared_bytes() <= w4a16.MAX_SHARED_BYTES


def test_weights_that_the_kernel_cannot_take_are_refused_with_the_reason() -> None:
    assert w4a16.refusal(random_weight(16, 256), torch.bfloat16) == "not on a card of sm_80 or later"
    assert not w4a16.fits_groups(
        QuantizedWeight(torch.zeros(16, 256, dtype=torch.uint8), 4, torch.ones(16, 4), None, group_size=64)
    )
