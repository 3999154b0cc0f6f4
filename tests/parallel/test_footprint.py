"""What kernels are predicted to hold, against what their packed weights do."""

from __future__ import annotations

import pytest
import torch

from parallel.footprint import (
    DEQUANTIZED_AT_A_TIME,
    WIDE_WORKSPACE_BYTES,
    held_bits,
    may_dequantize,
    predict_kernel,
    product_bytes,
    sure_fused_rows,
)
from parallel.formats.scheme import Scheme
from parallel.kernels.w4a16 import W4A16Linear
from parallel.kernels.w8a16 import W8A16Linear
from parallel.quantized import QuantizedWeight

SHAPE = (64, 768)
LINEARS = {"w4a16": W4A16Linear, "w8a16": W8A16Linear}


@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize(
    ("bits", "group_size", "kernel"),
    [(4, 128, "w4a16"), (4, 64, "w4a16"), (4, 32, "w4a16"), (4, 96, "w4a16"), (4, 256, "w4a16"), (4, None, "w4a16"),
     (8, 128, "w8a16"), (8, 256, "w8a16"), (8, None, "w8a16")],
)  # fmt: skip
def test_predicted_bits_are_those_that_our_kernels_hold(
    bits: int, group_size: int | None, kernel: str, has_zeros: bool
) -> None:
    scheme = Scheme("any", "any", bits, group_size, has_zeros=has_zeros)
    assert predict_kernel(scheme, "cuda", "bfloat16") == kernel
    scales = torch.rand(SHAPE[0], scheme.num_groups(SHAPE[1])).bfloat16()
    zeros = torch.zeros_like(scales, dtype=torch.uint8) if has_zeros else None
    weight = QuantizedWeight(torch.zeros(SHAPE, dtype=torch.uint8), bits, scales, zeros, group_size or SHAPE[1])
    held = sum(buffer.nbytes for buffer in LINEARS[kernel](weight).buffers())
    assert held * 8 / (SHAPE[0] * SHAPE[1]) == held_bits(scheme, "cuda", "bfloat16", SHAPE[1])
    # Up to 8 rows take nothing, up to 256 may leave parts of sums; of more the card decides whether they do, or
    # dequantise the weight, some of it at a time, into the result alone.
    for numel, most in ((1000, WIDE_WORKSPACE_BYTES), (2**25, 2**26), (2**26, 2 * DEQUANTIZED_AT_A_TIME)):
        taken = {rows: product_bytes(scheme, "cuda", "bfloat16", 2, rows, numel) for rows in (1, 8, 9, 256, 257, 9999)}
        assert taken == {1: 0, 8: 0, 9: WIDE_WORKSPACE_BYTES, 256: WIDE_WORKSPACE_BYTES, 257: most, 9999: most}
        # Where it is known that it multiplies more rows by packed weights.
        known = {rows: product_bytes(scheme, "cuda", "bfloat16", 2, rows, numel, 2048) for rows in (8, 257, 2048, 2049)}
        assert known == {8: 0, 257: WIDE_WORKSPACE_BYTES, 2048: WIDE_WORKSPACE_BYTES, 2049: most}


def test_only_what_was_measured_is_sure_to_stay_packed() -> None:
    w4a16, w8a16, tinygemm = (Scheme("any", "any", *each) for each in ((4, 128), (8, None), (4, 16)))
    found = {
        (scheme.bits, scheme.group_size, capability): sure_fused_rows(scheme, "cuda", "bfloat16", capability)
        for scheme in (w4a16, w8a16, tinygemm)
        for capability in (None, (8, 9), (9, 0), (10, 0))
    }
    assert {key for key, rows in found.items() if rows != 256} == {(4, 128, (9, 0))}
    assert found[4, 128, (9, 0)] == 2048
    # Beyond its own few rows, tinygemm's weight is dequantised whatever is known of other kernels.
    assert [may_dequantize(tinygemm, "cuda", "bfloat16", rows, 2048) for rows in (16, 17)] == [False, True]
    assert may_dequantize(w4a16, "cpu", "bfloat16", 1, 2048)


@pytest.mark.parametrize(("bits", "group_size", "kernel"), [(4, 16, "tinygemm"), (8, 64, "dequantize")])
def test_groups_that_our_kernels_do_not_know_go_elsewhere(bits: int, group_size: int, kernel: str) -> None:
    assert predict_kernel(Scheme("any", "any", bits, group_size), "cuda", "bfloat16") == kernel


def test_without_a_card_or_in_float32_weights_are_dequantised() -> None:
    scheme = Scheme("any", "any", 8, None)
    assert {predict_kernel(scheme, "cpu", "bfloat16"), predict_kernel(scheme, "cuda", "float32")} == {"dequantize"}
