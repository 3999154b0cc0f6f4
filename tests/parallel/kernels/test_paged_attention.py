"""Paged attention in plain torch against float64, and what of the kernel shows without a card."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from parallel.kernels import paged_attention as own
from parallel.kernels.attention_launch import (
    CLUSTER_ROOM_BYTES,
    MAX_CLUSTER,
    MAX_COUNTERS,
    MAX_SPLITS,
    TILE,
    choose_launch,
    choose_splits,
    choose_splits_in_clusters,
    in_clusters,
    num_passes,
    takes_clusters,
)
from parallel.kernels.attention_reference import TreeMask
from parallel.kernels.node_bits import chain_masks
from parallel.kernels.pages import FP8
from tests.parallel.paged import make_case
from tests.parallel.trees import make_tree_case

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


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 64, 200])
def test_rows_of_a_tree_agree_with_float64(rows: int, dtype: torch.dtype, fp8: bool) -> None:
    contexts, nodes = [0, 63, 64, 65, 130, -1, 1], [rows, rows, min(rows, 2), 1, rows, 0, 0]
    held = make_tree_case(contexts, nodes, rows, 2, 3, 16, dtype=dtype, kv_dtype=FP8 if fp8 else None)
    case = held.case
    output = own.paged_attention(held.query, case.kv, case.block_table, case.lengths, case.scale, held.tree)
    assert output.dtype == dtype
    assert held.worst_error(output) < TOLERANCE[dtype]


def test_a_chain_is_rows_of_growing_lengths() -> None:
    case = make_case([75], 2, 2, 16, dtype=torch.float32)
    query = torch.randn(7, 4, 16)
    tree = TreeMask(7, torch.tensor([68], dtype=torch.int32), chain_masks(7, query.device))
    output = own.paged_attention(query, case.kv, case.block_table, case.lengths, case.scale, tree)
    lengths = torch.arange(69, 76, dtype=torch.int32)
    apart = own.paged_attention(query, case.kv, case.block_table.expand(7, -1), lengths, case.scale)
    torch.testing.assert_close(output, apart, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num", [1, 64, 65, 256])
def test_masks_of_a_chain_fill_their_words(num: int) -> None:
    masks = [
        sum(word % 2**64 << 64 * at for at, word in enumerate(mask.tolist()))
        for mask in chain_masks(num, torch.device("cpu"))
    ]
    assert masks == [2 ** (node + 1) - 1 for node in range(num)]


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
    tree = (torch.tensor([2, 65], dtype=torch.int32), torch.ones(2, 1, dtype=torch.int64))
    torch.library.opcheck(own.attend, (*arguments, *tree), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("pairs", "max_tokens"), [(1, 64), (4, 8192), (8, 131072), (64, 4096), (256, 32768), (4096, 64)]
)
@pytest.mark.parametrize("multiprocessors", [82, 128, 132])
@pytest.mark.parametrize("warps", [4, 8])
def test_splits_are_no_more_than_rounds_or_a_wave(
    pairs: int, max_tokens: int, multiprocessors: int, warps: int
) -> None:
    splits = choose_splits(pairs, max_tokens, multiprocessors, warps)
    assert 1 <= splits <= MAX_SPLITS
    assert (splits - 1) * TILE * warps < max_tokens
    assert splits == 1 or splits * pairs <= multiprocessors


@pytest.mark.parametrize("multiprocessors", [82, 128, 132, 188])
def test_blocks_that_count_one_another_are_few_however_many_rows_there_are(multiprocessors: int) -> None:
    """Those of splits: where a card is full without any, a step may have any number of sequences and of their rows."""
    for pairs, columns in product([1, 2, 7, 41, 66, 82, 94, 188, 189, 4096, 32 * 8 * 64], [8, 16, 32]):
        launch = choose_launch(128, columns, torch.bfloat16, torch.bfloat16)
        alone = launch, choose_splits(pairs, 131072, multiprocessors, launch.warps)
        clusters = in_clusters(launch, choose_splits_in_clusters(pairs, 131072, multiprocessors, launch))
        for chosen, splits in (alone, clusters):
            assert splits == chosen.cluster or pairs * chosen.cluster <= MAX_COUNTERS // 8


@pytest.mark.parametrize("pairs", [1, 4, 66, 67, 100, 132, 133, 256])
@pytest.mark.parametrize("max_tokens", [1, 64, 65, 8192])
def test_single_splits_are_halved_where_both_halves_have_room(pairs: int, max_tokens: int) -> None:
    splits = choose_splits(pairs, max_tokens, 132, 4)
    few, many = (choose_launch(128, columns, torch.bfloat16, torch.bfloat16) for columns in (8, 32))
    assert choose_splits_in_clusters(pairs, max_tokens, 132, many) == splits
    halved = choose_splits_in_clusters(pairs, max_tokens, 132, few)
    assert halved == (2 if splits == 1 and pairs <= 132 and max_tokens > TILE * 4 else splits)


@pytest.mark.parametrize("splits", range(1, MAX_SPLITS + 1))
def test_splits_fill_clusters_and_their_groups(splits: int) -> None:
    launch, whole = in_clusters(choose_launch(128, 8, torch.bfloat16, torch.bfloat16), splits)
    assert splits / 2 < whole <= splits
    assert whole % launch.cluster == 0
    assert launch.cluster in (1, 2, 4, 8)
    assert whole // launch.cluster <= (MAX_SPLITS // MAX_CLUSTER if launch.cluster == MAX_CLUSTER else 1)


# Capability, and KiB of shared memory on a multiprocessor: RTX 4090, A100, H100, RTX 5090, B200.
@pytest.mark.parametrize(
    ("major", "kib", "takes"), [(8, 100, False), (8, 164, False), (9, 228, True), (12, 100, False), (10, 228, True)]
)
def test_clusters_run_where_there_is_room(major: int, kib: int, takes: bool) -> None:
    assert takes_clusters(major, kib * 1024) == takes


@pytest.mark.parametrize("head_dim", own.HEAD_DIMS)
@pytest.mark.parametrize("columns", [1, 8, 9, 16, 24, 40, 64, 512, 1024])
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize("warps", [0, 4])
def test_every_launch_fits_a_4090(head_dim: int, columns: int, kv_dtype: torch.dtype, warps: int) -> None:
    launch = choose_launch(head_dim, columns, torch.bfloat16, kv_dtype, warps=warps)
    static = 2 * launch.warps * launch.column_tiles * 8 * 4 + 64 * 8 + 16
    assert launch.shared_bytes() + static <= 99 * 1024
    assert launch.depth >= 3
    # In a cluster, also sums, and pairs of each block and column; a KiB is the system's.
    shares = launch.column_tiles * 8 * (head_dim * 4 + MAX_CLUSTER * 8) + 8
    assert launch.shared_bytes() + static + shares + 1024 <= CLUSTER_ROOM_BYTES
    # Sums of the warps take the place of the rings.
    assert launch.shared_bytes() >= launch.warps * launch.column_tiles * 8 * head_dim * 4
    # All columns have a pass, and no pass is without any.
    held = launch.column_tiles * 8
    assert (num_passes(columns) - 1) * held < columns <= num_passes(columns) * held


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
