"""Paged attention on a card, against float64 on fresh inputs among poison; a failure names its case and its error."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from parallel.kernels import paged_attention as own
from parallel.kernels.attention_launch import MAX_COUNTERS, choose_launch
from parallel.kernels.fused import rotary_and_cache
from parallel.kernels.limits import PAGE_SIZE
from parallel.kernels.pages import FP8, PagedKV, allocate_pages, as_bits
from parallel.kernels.ranges_attention import keys_at, rows_of
from tests.parallel.paged import Case, gather, make_case, slots_of, write_kv
from tests.parallel.trees import TreeCase, make_tree_case

pytestmark = pytest.mark.gpu

BF16, F16 = torch.bfloat16, torch.float16
# dtype of the query, of KV, and the error allowed: rounding of weights and output; a wrong layout gives 1 and more.
KINDS = {
    "bf16": (BF16, None, 0.08),
    "e4m3": (BF16, FP8, 0.08),
    "fp16": (F16, None, 0.02),
    "fp16-e4m3": (F16, FP8, 0.02),
}
GROUPS = (1, 4, 5, 7, 8, 16)


def batches() -> dict[str, list[int]]:
    return {
        "ragged": [0, 1, 63, 64, 65, 127, 128, 129, 511, 4096],
        "32k": [32768],
        "nothing": [0, 0],
        "one token": [1],
        "512": [512],
        "32 sequences": some_lengths(32),
        # Of two KV heads, a block for each, or two.
        "50 sequences": some_lengths(50),
    }


def some_lengths(num: int) -> list[int]:
    return [random.choice((0, random.randrange(1, 700), random.randrange(1, 3000))) for _ in range(num)]


def attend(case: Case) -> Tensor:
    poison_memory()
    return own.paged_attention(case.query, case.kv, case.block_table, case.lengths, case.scale)


def poison_memory() -> None:
    """Outputs and workspaces to come find NaN."""
    poison = [torch.full((size,), float("nan"), device="cuda") for size in (4 * 1024**2, 1024**2, 64 * 1024, 4096)]
    del poison


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("head_dim", own.HEAD_DIMS)
def test_agrees_with_float64(head_dim: int, group: int, kind: str) -> None:
    dtype, kv_dtype, allowed = KINDS[kind]
    failures = []
    for name, lengths in batches().items():
        case = make_case(lengths, 2, group, head_dim, dtype=dtype, kv_dtype=kv_dtype, device="cuda")
        problem = own.refusal(case.query, case.kv.keys)
        assert problem is None, problem
        first = attend(case)
        error = case.worst_error(first)
        if not error < allowed:
            failures.append(f"{name} {lengths}: error {error:.4f}, {worst_rows(case, first)}")
        if not torch.equal(first, attend(case)):
            failures.append(f"{name}: another result the second time")
    assert not failures, "\n".join(failures)


def worst_rows(case: Case, output: Tensor) -> str:
    """Which sequences and query heads are off, by how much: enough to tell a bad split from a bad layout."""
    exact = case.expected()
    off = (output.double() - exact).abs().amax(-1) / exact.abs().mean((1, 2)).clamp(min=1e-30).unsqueeze(1)
    rows = {int(case.lengths[row]): [round(float(e), 3) for e in off[row]] for row in range(min(len(off), 10))}
    return f"by length, each head: {rows}"


@pytest.mark.parametrize("warps", [4, 8])
@pytest.mark.parametrize("kind", ["bf16", "e4m3"])
def test_every_number_of_splits_gives_the_same(kind: str, warps: int) -> None:
    dtype, kv_dtype, allowed = KINDS[kind]
    case = make_case([5000, 1, 0, 700, 129], 1, 8, 128, dtype=dtype, kv_dtype=kv_dtype, device="cuda")
    launch = choose_launch(128, 8, dtype, case.kv.keys.dtype, warps=warps)
    errors = {}
    for splits in (1, 2, 3, 7, 9, 33, 40, 64):
        poison_memory()
        tensors = (case.query, case.kv.keys, case.kv.values, case.block_table, case.lengths)
        errors[splits] = case.worst_error(own.run_kernel(launch, splits, *tensors, case.scale))
    assert max(errors.values()) < allowed, errors


@pytest.mark.parametrize("cluster", [2, 4, 8])
@pytest.mark.parametrize("kind", ["bf16", "e4m3"])
def test_splits_of_clusters_give_the_same(kind: str, cluster: int) -> None:
    needs_clusters()
    dtype, kv_dtype, allowed = KINDS[kind]
    case = make_case([5000, 1, 0, 700, 129], 1, 8, 128, dtype=dtype, kv_dtype=kv_dtype, device="cuda")
    errors = {}
    for warps in (4, 8):
        launch = replace(choose_launch(128, 8, dtype, case.kv.keys.dtype, warps=warps), cluster=cluster)
        for splits in (cluster, 2 * cluster, 5 * cluster, 8 * cluster):
            poison_memory()
            tensors = (case.query, case.kv.keys, case.kv.values, case.block_table, case.lengths)
            first, again = (own.run_kernel(launch, splits, *tensors, case.scale) for _ in range(2))
            errors[warps, splits] = case.worst_error(first)
            assert torch.equal(first, again)
    assert max(errors.values()) < allowed, errors


def needs_clusters() -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no clusters")


@pytest.mark.parametrize("cluster", [1, 4, 8])
@pytest.mark.parametrize("kind", ["bf16", "e4m3"])
@pytest.mark.parametrize("rows", [1, 5])
def test_the_newest_tokens_are_those_the_kernel_ahead_writes(rows: int, kind: str, cluster: int) -> None:
    if cluster > 1:
        needs_clusters()
    dtype, kv_dtype, allowed = KINDS[kind]
    held = make_tree_case(
        [0, 1, 62, 63, 700, 3100],
        [rows] * 6,
        rows,
        2,
        8,
        128,
        chain=True,
        dtype=dtype,
        kv_dtype=kv_dtype,
        device="cuda",
    )
    case, starts = held.case, held.tree.starts
    positions = (starts[:, None] + torch.arange(rows, device="cuda")).flatten().long()
    pages = case.block_table.repeat_interleave(rows, 0).gather(1, positions[:, None] // PAGE_SIZE).squeeze(1).long()
    places = positions % PAGE_SIZE
    newest = [stored.to(BF16)[pages, :, places] for stored in (case.kv.keys, case.kv.values)]
    qkv, slots = torch.cat([held.query, *newest], 1).flatten(1), pages * PAGE_SIZE + places
    # No rotation.
    ones = torch.ones(int(positions.max()) + 1, 64, device="cuda")
    tables = (ones, 0 * ones, positions, slots)
    launch = choose_launch(128, 8 * rows, dtype, case.kv.keys.dtype, tree=rows > 1)
    tree = (starts, held.tree.masks) if rows > 1 else ()

    def step() -> Tensor:
        query = rotary_and_cache(qkv, *tables, case.kv.keys, case.kv.values, 16, 2, None, None, 1e-5)
        tensors = (query, case.kv.keys, case.kv.values, case.block_table, case.lengths)
        return own.run_kernel(replace(launch, cluster=cluster), 2 * cluster, *tensors, case.scale, *tree)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    for stored in (case.kv.keys, case.kv.values):
        as_bits(stored)[pages, :, places] = 255 if kv_dtype else math.nan
    output.fill_(math.nan)
    graph.replay()
    assert (error := held.worst_error(output)) < allowed, f"{error}: {worst_nodes(held, output)}"


# Rows, and query heads of a KV head: one to four tiles of columns, several passes, and groups that no tile divides.
TREES = ((1, 8), (2, 8), (3, 8), (4, 8), (5, 8), (8, 8), (13, 5), (33, 4), (64, 8), (64, 1), (7, 16), (65, 4), (256, 8))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", own.HEAD_DIMS)
@pytest.mark.parametrize("chain", [False, True], ids=["tree", "chain"])
def test_rows_of_a_tree_agree_with_float64(chain: bool, head_dim: int, kind: str) -> None:
    dtype, kv_dtype, allowed = KINDS[kind]
    failures = []
    for rows, group in TREES:
        contexts = [0, 1, 62, 63, 64, -1, 700, random.randrange(1, 3000)]
        nodes = [rows, rows, min(rows, 2), rows, 1, 0, random.randrange(1, rows + 1), rows]
        held = make_tree_case(
            contexts, nodes, rows, 2, group, head_dim, chain=chain, dtype=dtype, kv_dtype=kv_dtype, device="cuda"
        )
        assert own.refusal(held.query, held.case.kv.keys) is None
        first = attend_tree(held)
        if not (error := held.worst_error(first)) < allowed:
            failures.append(
                f"{rows} rows, group {group}, {contexts} and {nodes}: error {error:.4f}, {worst_nodes(held, first)}"
            )
        if not torch.equal(first, attend_tree(held)):
            failures.append(f"{rows} rows, group {group}: another result the second time")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_many_trees_agree_with_float64(kind: str) -> None:
    """More than there are counters, which only splits need."""
    dtype, kv_dtype, allowed = KINDS[kind]
    contexts, nodes = [random.randrange(0, 200) for _ in range(20)], [256, 1] * 10
    held = make_tree_case(contexts, nodes, 256, 8, 2, 64, dtype=dtype, kv_dtype=kv_dtype, device="cuda")
    assert len(held.query) * 8 > MAX_COUNTERS
    assert own.refusal(held.query, held.case.kv.keys) is None
    first = attend_tree(held)
    assert (error := held.worst_error(first)) < allowed, f"{error}: {worst_nodes(held, first)}"


def attend_tree(held: TreeCase) -> Tensor:
    poison_memory()
    case = held.case
    return own.paged_attention(held.query, case.kv, case.block_table, case.lengths, case.scale, held.tree)


def worst_nodes(held: TreeCase, output: Tensor) -> str:
    """The error of each row of the first sequences."""
    off = (output.double() - held.expected()).abs().amax((1, 2)).view(-1, held.tree.rows_per_sequence)
    return f"each row: {[[round(float(e), 3) for e in each[:16]] for each in off]}"


def test_a_graph_of_a_tree_follows_lengths_and_masks() -> None:
    first, later = (
        make_tree_case([1200, 40], nodes, 5, 2, 8, 128, device="cuda", chain=chain)
        for nodes, chain in (([5, 5], True), ([3, 5], False))
    )
    num_pages = max(len(each.case.kv.keys) for each in (first, later))
    held = make_static(first.case, num_pages)
    query, tree = (
        first.query.clone(),
        replace(first.tree, starts=first.tree.starts.clone(), masks=first.tree.masks.clone()),
    )
    own.paged_attention(query, held.kv, held.block_table, held.lengths, held.scale, tree)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = own.paged_attention(query, held.kv, held.block_table, held.lengths, held.scale, tree)
    for each in (first, later, first):
        load(held, each.case)
        for to, new in ((query, each.query), (tree.starts, each.tree.starts), (tree.masks, each.tree.masks)):
            to.copy_(new)
        output.fill_(float("nan"))
        graph.replay()
        assert (error := each.worst_error(output)) < 0.08, f"{error}: {worst_nodes(each, output)}"


@pytest.mark.parametrize("kind", ["bf16", "e4m3"])
def test_a_captured_graph_follows_lengths_and_pages(kind: str) -> None:
    dtype, kv_dtype, allowed = KINDS[kind]
    case = make_case([300, 0, 64, 9], 2, 8, 128, dtype=dtype, kv_dtype=kv_dtype, max_pages=80, device="cuda")
    # A later case brings its own pages; the storage must be as large.
    later = [make_case(each, 2, 8, 128, dtype=dtype, kv_dtype=kv_dtype, max_pages=80, device="cuda")
             for each in ([301, 1, 65, 10], [0, 0, 0, 0], [5000, 128, 129, 4095], [1, 2, 3, 4])]  # fmt: skip
    num_pages = max(len(each.kv.keys) for each in (case, *later))
    held = make_static(case, num_pages)
    attend(held)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = own.paged_attention(held.query, held.kv, held.block_table, held.lengths, held.scale)
    failures = []
    for each in (case, *later, case):
        load(held, each)
        output.fill_(float("nan"))
        graph.replay()
        if not (error := each.worst_error(output)) < allowed:
            failures.append(f"{each.lengths.tolist()}: error {error:.4f}, {worst_rows(each, output)}")
    assert not failures, "\n".join(failures)


def make_static(case: Case, num_pages: int) -> Case:
    shape = (num_pages, *case.kv.keys.shape[1:])
    stored = [torch.full(shape, float("nan"), device="cuda").to(case.kv.keys.dtype) for _ in range(2)]
    held = Case(case.query.clone(), PagedKV(*stored), case.block_table.clone(), case.lengths.clone(), case.scale)
    load(held, case)
    return held


def load(held: Case, case: Case) -> None:
    for name in ("query", "block_table", "lengths"):
        getattr(held, name).copy_(getattr(case, name))
    for to, new in ((held.kv.keys, case.kv.keys), (held.kv.values, case.kv.values)):
        to.fill_(float("nan"))
        to[: len(new)].copy_(new)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_what_the_kernel_refuses_is_attended_all_the_same(dtype: torch.dtype) -> None:
    case = make_case([0, 1, 300], 2, 3, 48, dtype=dtype, device="cuda")
    assert own.refusal(case.query, case.kv.keys) is not None
    assert case.worst_error(attend(case)) < 0.05


@pytest.mark.parametrize("dtype", [BF16, FP8])
def test_pages_on_a_card_hold_what_is_written(dtype: torch.dtype) -> None:
    kv = allocate_pages(2, 6, 2, 128, dtype, "cuda")[1]
    keys, values = torch.randn(2, 150, 2, 128, device="cuda").to(dtype).to(BF16)
    keys[7, 1, 3] = 1000
    write_kv(kv, keys, values, slots_of([4, 1, 3], 0, 150).cuda())
    found = keys_at(kv, rows_of(slots_of([4, 1, 3], 0, 150).cuda(), 2), BF16)
    keys[7, 1, 3] = 448 if dtype == FP8 else 1000
    assert torch.equal(torch.stack(found), torch.stack([keys, values]))
    assert torch.equal(gather(kv.keys, torch.tensor([4, 1, 3]), 150).transpose(0, 1), keys.double())


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize(("tokens", "length"), [(1, 1), (512, 512), (333, 1111), (2048, 8192), (1, 700)])
def test_prefill_agrees_with_float64_and_builds_no_square_of_tokens(
    dtype: torch.dtype, tokens: int, length: int
) -> None:
    query = torch.randn(tokens, 16, 128, device="cuda").to(dtype)
    keys, values = torch.randn(2, length, 2, 128, device="cuda").to(dtype)
    own.prefill_attention(query[-1:], keys[:1], values[:1], 0.1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = own.prefill_attention(query, keys, values, 0.1)
    used = torch.cuda.max_memory_allocated() - before
    # Output, sums of exponents, and in float32 keys and values for every query head.
    assert used < 4 * output.nbytes + 3 * 16 * length * 128 * 4 + 16 * 1024**2, f"{used / 2**20:.1f} MiB"
    errors = []
    for at in {0, tokens // 2, tokens - 1}:
        seen = length - tokens + at + 1
        grouped = query[at].double().view(2, 8, 128)
        weights = (torch.einsum("gjd,tgd->gjt", grouped, keys[:seen].double()) * 0.1).softmax(-1)
        exact = torch.einsum("gjt,tgd->gjd", weights, values[:seen].double()).reshape(16, 128)
        errors.append(float((output[at].double() - exact).abs().max() / exact.abs().mean()))
    # Of each: a number that is none is not the largest.
    assert all(error < 0.08 for error in errors), errors
