from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.engine.limits import PAGE_SIZE


@dataclass(frozen=True)
class PagedKV:
    keys: Tensor
    values: Tensor


def allocate_pages(num_layers, num_pages, kv_heads, head_dim, dtype, device):
    s = torch.zeros(num_layers, 2, num_pages, kv_heads, PAGE_SIZE, head_dim, dtype=dtype, device=device)
    return [PagedKV(l[0], l[1]) for l in s]


class PageAllocator:
    def __init__(self, num_pages):
        self.free = list(range(num_pages - 1, 0, -1))

    @property
    def num_free(self):
        return len(self.free)

    def allocate(self, n):
        assert n <= len(self.free)
        return [self.free.pop() for _ in range(n)]

    def release(self, pages):
        self.free += pages


def gather_kv(kv, table, length, dtype):
    n = -(-length // PAGE_SIZE)
    f = lambda x: x[table[:n].long()].transpose(1, 2).flatten(0, 1)[:length].to(dtype)
    return f(kv.keys), f(kv.values)
