"""Decode attention over paged keys and values, of the newest tokens of sequences (paged_attention.cu).

What it reads is what must be read: keys and values once, for all query heads and all rows that share them.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from parallel.kernels.attention_launch import (
    MAX_COUNTERS,
    PARAMETERS,
    Launch,
    choose_launch,
    choose_splits,
    choose_splits_in_clusters,
    in_clusters,
    num_passes,
    takes_clusters,
)
from parallel.kernels.attention_reference import TreeMask, attend_gathered
from parallel.kernels.launch import Kernel, has_tensor_cores, load_kernel, load_problem
from parallel.kernels.limits import HEAD_DIMS, MAX_GROUP, MAX_NODES, PAGE_SIZE
from parallel.kernels.operators import operator
from parallel.kernels.pages import FP8, PagedKV, pages_for

SOURCE = Path(__file__).with_name("paged_attention.cu")
# Not cuDNN's, which builds a plan for each new length (launcher/rank/context.py has the measurement).
PREFILL_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def paged_attention(
    query: Tensor, kv: PagedKV, block_table: Tensor, lengths: Tensor, scale: float, tree: TreeMask | None = None
) -> Tensor:
    """softmax(scale * query @ keys) @ values of each row, in float32: [rows, heads, head_dim] in query's dtype.

    query [rows, heads, head_dim], heads a multiple of the KV heads, a row for each sequence or as `tree` says;
    block_table [sequences, max_pages] int32, of which the pages of `lengths` [sequences] int32 tokens are read, the
    newest tokens among them. A length of 0 gives zeros. It can be captured in a graph after a first call; a card's
    launches must follow one another, on one stream. The kernel right ahead must not write the table, the lengths, the
    tree's starts, or tokens but the newest of a sequence, with a tree those from `starts` on: they are read before it
    has ended. Where `refusal` has a reason, plain torch does the same, reading max_pages of every sequence.
    """
    if tree is None:
        return attend(query, kv.keys, kv.values, block_table, lengths, scale)
    rows = tree.rows_per_sequence
    assert 0 < rows <= MAX_NODES and len(query) == rows * len(lengths), f"{rows=} {len(query)=} {len(lengths)=}"
    return attend(query, kv.keys, kv.values, block_table, lengths, scale, tree.starts, tree.masks)


@operator(lambda query, *others: torch.empty_like(query, memory_format=torch.contiguous_format))
def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scale: float,
    starts: Tensor | None = None,
    masks: Tensor | None = None,
) -> Tensor:
    """`paged_attention` on tensors."""
    tree = (starts, masks)
    if not query.is_cuda:
        # Lengths can be read without waiting for a card.
        longest = int(lengths.max()) if len(lengths) else 0
        return attend_gathered(query, keys, values, block_table[:, : pages_for(longest)], lengths, scale, *tree)
    if refusal(query, keys) is not None:
        return attend_gathered(query, keys, values, block_table, lengths, scale, *tree)
    choice = choose(query, keys, len(lengths), block_table.shape[1] * PAGE_SIZE, tree=starts is not None)
    return run_kernel(*choice, query, keys, values, block_table, lengths, scale, *tree)


def choose(query: Tensor, keys: Tensor, sequences: int, max_tokens: int, *, tree: bool = False) -> tuple[Launch, int]:
    """The launch that `attend` takes for these, and its splits."""
    kv_heads = keys.shape[1]
    columns = len(query) // sequences * (query.shape[1] // kv_heads)
    launch = choose_launch(query.shape[2], columns, query.dtype, keys.dtype, tree=tree)
    card = torch.cuda.get_device_properties(query.device)
    pairs = sequences * kv_heads * num_passes(columns)
    sizes = pairs, max_tokens, card.multi_processor_count
    if takes_clusters(card.major, card.shared_memory_per_multiprocessor):
        return in_clusters(launch, choose_splits_in_clusters(*sizes, launch))
    return launch, choose_splits(*sizes, launch.warps)


def refusal(query: Tensor, keys: Tensor) -> str | None:
    """Why the kernel cannot take these, in a few words; None: it can."""
    return find_refusal(*query.shape[1:], keys.shape[1], query.dtype, keys.dtype, query.device)


@cache
def find_refusal(
    heads: int,
    head_dim: int,
    kv_heads: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    device: torch.device,
) -> str | None:
    group = heads // kv_heads
    checks = {
        "not on a card of sm_80 or later": has_tensor_cores(device),
        f"activations in {str(dtype).removeprefix('torch.')}": dtype in (torch.bfloat16, torch.float16),
        f"KV in {str(kv_dtype).removeprefix('torch.')}": kv_dtype in (dtype, FP8),
        f"heads of {head_dim}": head_dim in HEAD_DIMS,
        f"{group} query heads for a KV head": group <= MAX_GROUP,
    }
    failed = [reason for reason, passed in checks.items() if not passed]
    return failed[0] if failed else load_problem(load, choose_launch(head_dim, group, dtype, kv_dtype), device.index)


def run_kernel(
    launch: Launch,
    num_splits: int,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scale: float,
    starts: Tensor | None = None,
    masks: Tensor | None = None,
) -> Tensor:
    """The kernel, its workspace and its output."""
    assert block_table.dtype == lengths.dtype == torch.int32, f"{block_table.dtype=} {lengths.dtype=}"
    assert keys.is_contiguous() and values.is_contiguous() and block_table.stride(1) == 1
    query = query if has_aligned_rows(query) else query.contiguous()
    output = query.new_empty(query.shape)
    heads, kv_heads, rows = query.shape[1], keys.shape[1], len(query) // len(lengths)
    grid = (kv_heads * num_passes(rows * heads // kv_heads), num_splits, len(lengths))
    # Blocks that leave parts to one another count themselves.
    assert num_splits == launch.cluster or grid[0] * grid[2] * launch.cluster <= MAX_COUNTERS, f"{grid=} {launch=}"
    partial, maxima_sums = workspace(launch, grid, query)
    tensors = (query, keys, values, block_table, lengths, *tree_tensors(starts, masks), output, partial, maxima_sums)
    strides = (query.stride(0), block_table.stride(0))
    sizes = (block_table.shape[1], kv_heads, heads // kv_heads, rows, 0 if masks is None else masks.shape[1])
    kernel = load(launch, query.device.index)
    kernel(grid, launch.warps * 32, *tensors, scale * math.log2(math.e), *strides, *sizes)
    return output


def tree_tensors(starts: Tensor | None, masks: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if starts is None or masks is None:
        return None, None
    assert starts.dtype == torch.int32 and masks.dtype == torch.int64, f"{starts.dtype=} {masks.dtype=}"
    # A copy would be the kernel right ahead, which is not waited for to read `starts`.
    assert starts.is_contiguous()
    return starts, masks.contiguous()


def workspace(launch: Launch, grid: tuple[int, int, int], query: Tensor) -> tuple[Tensor, ...]:
    """What splits leave for the last of them, sums and then maxima; empty, and not touched, where there is one."""
    head_dim, parts = launch.head_dim, grid[1] // launch.cluster
    columns = (parts if parts > 1 else 0) * grid[0] * grid[2] * launch.column_tiles * 8
    # Clusters leave a pair for every four dimensions.
    pairs = 1 if launch.cluster == 1 else head_dim // 4
    numbers = columns * head_dim
    return query.new_empty(numbers + columns * pairs * 2, dtype=torch.float32).tensor_split([numbers])


def has_aligned_rows(query: Tensor) -> bool:
    """Whether the kernel can read 16 bytes at a time: a slice of the projection's output often is."""
    return query.stride()[1:] == (query.shape[2], 1) and query.stride(0) % 8 == 0 and query.data_ptr() % 16 == 0


@cache
def load(launch: Launch, device_index: int) -> Kernel:
    """The kernel of paged_attention.cu, compiled for the card of this process."""
    return load_kernel(SOURCE, "paged_attention", launch.options(), PARAMETERS, device_index, launch.shared_bytes())


def prefill_attention(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Causal attention of the newest tokens of one sequence, the last of `keys`: [tokens, heads, head_dim].

    query [tokens, heads, head_dim]; keys and values [length, kv_heads, head_dim] of the same dtype, tokens <= length.
    """
    repeats = query.shape[1] // keys.shape[1] if needs_all_heads(query) else 1
    q, k, v = (each.transpose(0, 1).unsqueeze(0) for each in (query, *repeat_heads(repeats, keys, values)))
    square = len(query) == len(keys)
    mask = None if square else lower_right_mask(len(query), len(keys), query.device)
    with sdpa_kernel(PREFILL_BACKENDS):
        attended = scaled_dot_product_attention(q, k, v, mask, is_causal=square, scale=scale, enable_gqa=repeats == 1)
    return attended[0].transpose(0, 1)


def needs_all_heads(query: Tensor) -> bool:
    """Whether this runs where only the kernel that wants as many KV heads as query heads needs no square of tokens."""
    return query.is_cuda and query.dtype == torch.float32


def repeat_heads(repeats: int, *each: Tensor) -> list[Tensor]:
    return [tensor.repeat_interleave(repeats, dim=1) for tensor in each] if repeats > 1 else list(each)


def lower_right_mask(tokens: int, length: int, device: torch.device) -> Tensor:
    """Which of `length` keys the last `tokens` of them see: on cards a bound that kernels know, elsewhere the mask."""
    if device.type == "cuda":
        return causal_lower_right(tokens, length)
    return torch.ones(tokens, length, dtype=torch.bool).tril(length - tokens)
