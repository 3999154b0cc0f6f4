"""Sequences in shuffled pages among poison, and what attention over them is, in float64: an independent reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.engine.page_allocator import positions_and_slots
from parallel.kernels.limits import PAGE_SIZE
from parallel.kernels.pages import FP8, PagedKV, as_bits

# Where a page table has no page: reading there is out of bounds.
NO_PAGE = 2**30
# The largest e4m3 number; torch's cast turns what is beyond into NaN.
FP8_MAX = 448.0


@dataclass
class Case:
    """What `paged_attention` is given, and the storage before it was paged."""

    query: Tensor
    kv: PagedKV
    block_table: Tensor
    lengths: Tensor
    scale: float

    def expected(self) -> Tensor:
        """[batch, heads, head_dim] float64 by SDPA over one token at a time of a sequence's own pages."""
        return torch.stack([self.attend_one(row) for row in range(len(self.query))])

    def attend_one(self, row: int) -> Tensor:
        length = int(self.lengths[row])
        query = self.query[row].double()
        if length == 0:
            return torch.zeros_like(query)
        group = query.shape[0] // self.kv.keys.shape[1]
        keys, values = (gather(stored, self.block_table[row], length) for stored in (self.kv.keys, self.kv.values))
        scores = torch.stack([keys[head // group] @ query[head] for head in range(len(query))]) * self.scale
        weights = scores.softmax(-1)
        return torch.stack([weights[head] @ values[head // group] for head in range(len(query))])

    def worst_error(self, output: Tensor) -> float:
        """Of any sequence, in units of the mean size of its exact result; infinite where anything is not finite."""
        exact = self.expected()
        size = exact.abs().mean((1, 2)).clamp(min=1e-30)
        error = ((output.double() - exact).abs().amax((1, 2)) / size).max()
        return float(error) if error.isfinite() else math.inf


def gather(stored: Tensor, pages: Tensor, length: int) -> Tensor:
    """[kv_heads, length, head_dim] float64."""
    held = [stored[int(page)].float() for page in pages[: -(-length // PAGE_SIZE)]]
    return torch.cat(held, dim=1)[:, :length].double()


def make_case(
    lengths: list[int],
    kv_heads: int,
    group: int,
    head_dim: int,
    *,
    dtype: torch.dtype,
    kv_dtype: torch.dtype | None = None,
    max_pages: int | None = None,
    device: str = "cpu",
) -> Case:
    """Fresh normal keys, values and queries; every slot that no sequence fills holds NaN, every free entry NO_PAGE."""
    counts = [-(-length // PAGE_SIZE) for length in lengths]
    columns = max_pages or max(1, *counts) + 1
    order = torch.randperm(sum(counts) + 2).tolist()
    shape = (len(order), kv_heads, PAGE_SIZE, head_dim)
    table = torch.full((len(lengths), columns), NO_PAGE, dtype=torch.int32)
    filled = torch.zeros(len(order), 1, PAGE_SIZE, 1, dtype=torch.bool)
    for row, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        pages = [order.pop() for _ in range(count)]
        table[row, :count] = torch.tensor(pages, dtype=torch.int32)
        for index, page in enumerate(pages):
            filled[page, :, : length - index * PAGE_SIZE] = True
    stored = [torch.randn(shape, device=device).masked_fill(~filled.to(device), math.nan) for _ in range(2)]
    keys, values = (each.to(kv_dtype or dtype) for each in stored)
    # A slice of a wider row, as the projection's output is.
    query = torch.randn(len(lengths), kv_heads * (group + 2), head_dim, device=device).to(dtype)[:, : kv_heads * group]
    table, tokens = table.to(device), torch.tensor(lengths, dtype=torch.int32, device=device)
    return Case(query * 1.5, PagedKV(keys, values), table, tokens, head_dim**-0.5)


def slots_of(pages: Sequence[int], start: int, end: int) -> Tensor:
    """Slots of the tokens at positions start to end - 1 of a sequence with these pages: [end - start] int64, CPU."""
    return positions_and_slots([(pages, start, end)])[1]


def write_kv(kv: PagedKV, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """Stores [tokens, kv_heads, head_dim] keys and values at `slots` [tokens] int64, clamped where KV is fp8."""
    pages, places = slots // PAGE_SIZE, slots % PAGE_SIZE
    for stored, new in ((kv.keys, key), (kv.values, value)):
        as_bits(stored)[pages, :, places] = as_bits(to_stored(new, stored.dtype))


def to_stored(new: Tensor, dtype: torch.dtype) -> Tensor:
    """`new` in the dtype of the storage, saturating where that is fp8."""
    return (new.clamp(-FP8_MAX, FP8_MAX) if dtype == FP8 else new).to(dtype)
