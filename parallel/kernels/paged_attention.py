"""Decode attention over paged keys and values: one new token a sequence (paged_attention.cu), plain torch elsewhere.

What it reads is what must be read: keys and values once, for all query heads that share them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from parallel.engine.pages import FP8, PAGE_SIZE, PagedKV, as_bits, pages_for
from parallel.kernels.launch import Kernel, has_tensor_cores, load_kernel, load_problem
from parallel.kernels.operators import operator

SOURCE = Path(__file__).with_name("paged_attention.cu")
PARAMETERS = "PPPPPPPPfiiiii"
HEAD_DIMS = (64, 128)
MAX_GROUP = 16
WARPS = 8
TILE = 16
MAX_SPLITS = 128
# Sequences times KV heads of one launch.
MAX_COUNTERS = 16384
# Rings of 96 KiB: one block on a multiprocessor of an RTX 4090 (100 KiB), two on that of an H200.
RING_BYTES = 12 * 1024
MAX_DEPTH = 6
# Blocks worth starting for each multiprocessor, where contexts are long enough.
BLOCKS_PER_MULTIPROCESSOR = 2
# Not cuDNN's, which builds a plan for each new length (launcher/rank.py has the measurement).
PREFILL_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def paged_attention(query: Tensor, kv: PagedKV, block_table: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """softmax(scale * query @ keys) @ values of each sequence, in float32: [batch, heads, head_dim] in query's dtype.

    query [batch, heads, head_dim], heads a multiple of the KV heads; block_table [batch, max_pages] int32, of which the
    pages of `lengths` [batch] int32 tokens are read, the newest token among them. A length of 0 gives zeros. It can be
    captured in a graph after a first call; a card's launches must follow one another, on one stream. Where `refusal`
    has a reason, plain torch does the same, reading max_pages of every sequence.
    """
    return attend(query, kv.keys, kv.values, block_table, lengths, scale)


@dataclass(frozen=True)
class Launch:
    """How the kernel is compiled."""

    head_dim: int
    # Of 8 query heads of a KV head.
    column_tiles: int
    query_f16: bool
    kv_fp8: bool

    @property
    def unit_bytes(self) -> int:
        """Keys, or values, of a tile of 16 tokens."""
        return TILE * self.head_dim * (1 if self.kv_fp8 else 2)

    @property
    def depth(self) -> int:
        return min(MAX_DEPTH, RING_BYTES // self.unit_bytes)

    def shared_bytes(self) -> int:
        """Shared memory of a block: the rings of its warps, later their sums, then the weights of the splits."""
        columns = self.column_tiles * 8
        ring, sums = self.depth * self.unit_bytes, columns * self.head_dim * 4
        return max(WARPS * ring, WARPS * sums, MAX_SPLITS * columns * 4)

    def options(self) -> tuple[str, ...]:
        values = {
            "HEAD_DIM": self.head_dim,
            "PAGE_SIZE": PAGE_SIZE,
            "NT": self.column_tiles,
            "WARPS": WARPS,
            "DEPTH": self.depth,
            "MAX_SPLITS": MAX_SPLITS,
            "MAX_COUNTERS": MAX_COUNTERS,
            "QUERY_F16": int(self.query_f16),
            "KV_FP8": int(self.kv_fp8),
        }
        return tuple(f"-D{name}={value}" for name, value in values.items())


@operator(lambda query, *others: torch.empty_like(query, memory_format=torch.contiguous_format))
def attend(query: Tensor, keys: Tensor, values: Tensor, block_table: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """`paged_attention` on tensors."""
    if not query.is_cuda:
        # Lengths can be read without waiting for a card.
        longest = int(lengths.max()) if len(lengths) else 0
        return attend_gathered(query, keys, values, block_table[:, : pages_for(longest)], lengths, scale)
    if refusal(query, keys) is not None:
        return attend_gathered(query, keys, values, block_table, lengths, scale)
    multiprocessors = torch.cuda.get_device_properties(query.device).multi_processor_count
    pairs = len(query) * keys.shape[1]
    num_splits = choose_splits(pairs, block_table.shape[1] * PAGE_SIZE, multiprocessors)
    return run_kernel(num_splits, query, keys, values, block_table, lengths, scale)


def attend_gathered(
    query: Tensor, keys: Tensor, values: Tensor, block_table: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """`paged_attention` in plain torch, on any device and for any dtype, over all pages of `block_table`."""
    positions = torch.arange(block_table.shape[1] * PAGE_SIZE, device=query.device)
    # Unused slots may hold anything: as masked values they would still be multiplied by a weight of zero.
    absent = (positions >= lengths.unsqueeze(1))[:, None, :, None]
    pages = block_table.masked_fill(absent[:, 0, ::PAGE_SIZE, 0], 0).long()

    def gather(stored: Tensor) -> Tensor:
        paged = as_bits(stored)[pages].view(stored.dtype).movedim(2, 1)
        return paged.flatten(2, 3).to(torch.float32).masked_fill(absent, 0)

    grouped = query.unflatten(1, (keys.shape[1], -1)).to(torch.float32)
    scores = (grouped @ gather(keys).transpose(2, 3) * scale).masked_fill(absent.transpose(2, 3), -torch.inf)
    attended = (scores.softmax(-1) @ gather(values)).flatten(1, 2)
    return attended.masked_fill((lengths <= 0)[:, None, None], 0).to(query.dtype)


def refusal(query: Tensor, keys: Tensor) -> str | None:
    """Why the kernel cannot take these, in a few words; None: it can."""
    return find_refusal(*query.shape, keys.shape[1], query.dtype, keys.dtype, query.device)


@cache
def find_refusal(
    batch: int,
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
        f"{batch} sequences": batch * kv_heads <= MAX_COUNTERS,
    }
    failed = [reason for reason, passed in checks.items() if not passed]
    return failed[0] if failed else load_problem(load, launch_for(head_dim, group, dtype, kv_dtype), device.index)


def launch_for(head_dim: int, group: int, dtype: torch.dtype, kv_dtype: torch.dtype) -> Launch:
    return Launch(head_dim, -(-group // 8), dtype == torch.float16, kv_dtype == FP8)


def choose_splits(pairs: int, max_tokens: int, multiprocessors: int) -> int:
    """Into how many blocks each of `pairs` sequences times KV heads is split, for contexts of up to `max_tokens`.

    Never from the lengths, which a graph finds on the card when it is replayed: shorter sequences leave splits idle.
    """
    wanted = BLOCKS_PER_MULTIPROCESSOR * multiprocessors // max(1, pairs)
    return max(1, min(wanted, -(-max_tokens // (TILE * WARPS)), MAX_SPLITS))


def run_kernel(
    num_splits: int, query: Tensor, keys: Tensor, values: Tensor, block_table: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """The kernel, its workspace and its output."""
    assert block_table.dtype == lengths.dtype == torch.int32, f"{block_table.dtype=} {lengths.dtype=}"
    assert keys.is_contiguous() and values.is_contiguous() and block_table.stride(1) == 1
    batch, heads, head_dim = query.shape
    kv_heads = keys.shape[1]
    query = query if has_aligned_rows(query) else query.contiguous()
    output = query.new_empty(query.shape)
    # What splits leave for the last of them; not touched where there is one.
    workspace = query.new_empty(
        (num_splits if num_splits > 1 else 0) * batch * heads * (head_dim + 2), dtype=torch.float32
    )
    partial, maxima_sums = workspace.tensor_split([workspace.numel() // (head_dim + 2) * head_dim])
    tensors = (query, keys, values, block_table, lengths, output, partial, maxima_sums)
    strides = (query.stride(0), block_table.stride(0))
    sizes = (block_table.shape[1], kv_heads, heads // kv_heads)
    launch = launch_for(head_dim, heads // kv_heads, query.dtype, keys.dtype)
    kernel = load(launch, query.device.index)
    kernel((kv_heads, num_splits, batch), WARPS * 32, *tensors, scale * math.log2(math.e), *strides, *sizes)
    return output


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
