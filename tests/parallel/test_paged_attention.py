"""Paged attention in plain torch against float64, and what of the kernel shows without a card."""

from __future__ import annotations

import pytest
import torch

from parallel.engine.pages import FP8
from parallel.kernels import paged_attention as own
from tests.parallel.paged import make_case

LENGTHS = [0, 1, 63, 64, 65, 130, 200]
# Rounding of the output, in units of the mean size of the result.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("fp8", [False, True])
def test_ragged_batch_agrees_with_float64(group: int, dtype: torch.dtype, fp8: bool) -> None:
    case = make_case(LENGTHS, 2, group, 16, dtype=dtype, kv_dtype=FP8 if fp8 else None)
    output = own.paged_attention(case.query, case.kv, case.block_table, case.lengths, case.scale)
    assert output.dtype == dtype
    assert output.is_contiguous()
    assert case.worst_error(output) < TOLERANCE[dtype]


def test_padding_rows_are_zeros() -> None:
    case = make_case([0, 0], 2, 2, 8, dtype=torch.bfloat16)
    output = own.paged_attention(case.query, case.kv, case.block_table, case.lengths, case.scale)
    assert torch.equal(output, torch.zeros_like(case.query))


def test_nan_among_the_tokens_of_a_sequence_is_not_hidden() -> None:
    case = make_case([70, 70], 1, 2, 8, dtype=torch.float32)
    case.kv.values[int(case.block_table[0, 1]), 0, 3] = float("nan")
    output = own.paged_attention(case.query, case.kv, case.block_table, case.lengths, case.scale)
    assert output[0].isnan().all()
    assert output[1].isfinite().all()


def test_the_operator_keeps_its_contract() -> None:
    case = make_case([3, 66], 2, 4, 16, dtype=torch.float32)
    arguments = (case.query, case.kv.keys, case.kv.values, case.block_table, case.lengths, case.scale)
    torch.library.opcheck(own.attend, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("pairs", "max_tokens"), [(1, 64), (4, 8192), (8, 131072), (64, 4096), (256, 32768), (4096, 64)]
)
@pytest.mark.parametrize("multiprocessors", [82, 128, 132])
def test_splits_are_no_more_than_rounds_or_a_wave(pairs: int, max_tokens: int, multiprocessors: int) -> None:
    splits = own.choose_splits(pairs, max_tokens, multiprocessors)
    assert 1 <= splits <= own.MAX_SPLITS
    assert (splits - 1) * own.TILE * own.WARPS < max_tokens
    assert splits == 1 or splits * pairs <= own.BLOCKS_PER_MULTIPROCESSOR * multiprocessors


@pytest.mark.parametrize("head_dim", own.HEAD_DIMS)
@pytest.mark.parametrize("column_tiles", [1, 2])
@pytest.mark.parametrize("fp8", [False, True])
def test_every_launch_fits_a_4090(head_dim: int, column_tiles: int, fp8: bool) -> None:
    launch = own.Launch(head_dim, column_tiles, False, fp8)
    static = 2 * own.WARPS * column_tiles * 8 * 4 + 16
    assert launch.shared_bytes() + static <= 99 * 1024
    assert launch.depth >= 3
    # Sums of the warps and weights of the splits take the place of the rings.
    assert launch.shared_bytes() >= own.WARPS * column_tiles * 8 * head_dim * 4


def test_what_the_kernel_cannot_take_is_refused_with_the_reason() -> None:
    case = make_case([3], 1, 2, 64, dtype=torch.bfloat16)
    assert own.refusal(case.query, case.kv.keys) == "not on a card of sm_80 or later"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "length"), [(1, 1), (70, 70), (1, 33), (17, 100), (64, 65)])
@pytest.mark.parametrize("group", [1, 4])
def test_prefill_sees_all_before_and_nothing_after(dtype: torch.dtype, tokens: int, length: int, group: int) -> None:
    query = torch.randn(tokens, 2 * group, 16).to(dtype)
    keys, values = torch.randn(2, length, 2, 16).to(dtype)
    output = own.prefill_attention(query, keys, values, 0.3)
    assert output.shape == query.shape
    assert output.dtype == dtype
    for at in range(tokens):
        seen = length - tokens + at + 1
        for head in range(2 * group):
            weights = (keys[:seen, head // group].double() @ query[at, head].double() * 0.3).softmax(0)
            exact = weights @ values[:seen, head // group].double()
            torch.testing.assert_close(output[at, head].double(), exact, rtol=0.02, atol=TOLERANCE[dtype])
