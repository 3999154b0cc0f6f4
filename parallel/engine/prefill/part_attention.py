"""Attention of parts of prompts to all that the cache has of their sequences, of many parts at once.

Each launch costs a host some microseconds, 13 on a slow one: part by part, a pass of many prompts would wait for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from parallel.engine.decoder import Attend
from parallel.engine.page_allocator import positions_and_slots
from parallel.engine.rows import to_device
from parallel.engine.sequence import Part
from parallel.kernels.paged_attention import prefill_attention
from parallel.kernels.pages import PagedKV
from parallel.kernels.ranges_attention import keys_at, range_attention, ranges_attention, rows_of


@dataclass(frozen=True)
class Group:
    """Neighbouring parts of a pass that attend at once; one part alone where that cannot be.

    `key_rows` as of rows_of: all tokens of each part's sequence, up to the part's end, one sequence after the other.
    Bounds as of ranges_attention; `longest`: most tokens of a part, and most that one attends to.
    """

    in_ranges: bool
    num_parts: int
    num_tokens: int
    key_rows: Tensor
    query_bounds: Tensor
    key_bounds: Tensor
    longest: tuple[int, int]

    @classmethod
    def open(cls, parts: Sequence[Part], kv_heads: int, device: torch.device, in_ranges: bool) -> Group:
        lengths, ends = [len(part) for part in parts], [part.end for part in parts]
        _, slots = positions_and_slots([(part.sequence.pages, 0, part.end) for part in parts])
        queries, keys = (
            to_device(torch.tensor([0, *accumulate(each)], dtype=torch.int32), device) for each in (lengths, ends)
        )
        key_rows = rows_of(to_device(slots, device), kv_heads)
        return cls(in_ranges, len(parts), sum(lengths), key_rows, queries, keys, (max(lengths), max(ends)))

    def attend(self, query: Tensor, cache: PagedKV, scale: float) -> Tensor:
        keys, values = keys_at(cache, self.key_rows, query.dtype)
        if not self.in_ranges:
            return prefill_attention(query, keys, values, scale)
        if self.num_parts == 1:
            return range_attention(query, keys, values, scale)
        return ranges_attention(query, keys, values, self.query_bounds, self.key_bounds, scale, self.longest)


def attend_parts(parts: Sequence[Part], scale: float, max_keys: int) -> Attend:
    """Attention of the tokens of `parts`, one part after the other, all in the cache by then.

    Args:
        max_keys: tokens that are attended to at once; parts whose own are more attend by themselves, as all do with 0.
    """
    groups: list[Group] = []

    def attend(query: Tensor, cache: PagedKV) -> Tensor:
        if not groups:
            open_group = partial(Group.open, kv_heads=cache.keys.shape[1], device=query.device, in_ranges=max_keys > 0)
            groups.extend(map(open_group, group_parts(parts, max_keys)))
        chunks = zip(groups, query.split([group.num_tokens for group in groups]), strict=True)
        attended = [group.attend(chunk, cache, scale) for group, chunk in chunks]
        return torch.cat(attended) if len(attended) > 1 else attended[0]

    return attend


def group_parts(parts: Iterable[Part], max_keys: int) -> list[list[Part]]:
    """Neighbours together for as long as all that they attend to is no more than `max_keys` tokens."""
    groups, num_keys = list[list[Part]](), 0
    for part in parts:
        num_keys += part.end
        if not groups or num_keys > max_keys:
            groups.append([])
            num_keys = part.end
        groups[-1].append(part)
    return groups
