"""Trees of rows at the ends of paged sequences, and what attention over them is, in float64, row by row."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.kernels.attention_reference import TreeMask
from tests.parallel.paged import Case, gather, make_case


@dataclass
class TreeCase:
    """`case` has a query of its own for each sequence, which is not used."""

    case: Case
    query: Tensor
    parents: list[list[int | None]]
    tree: TreeMask

    def expected(self) -> Tensor:
        """[rows, heads, head_dim] float64, by following each row to the root."""
        return torch.cat([self.attend_one(sequence) for sequence in range(len(self.parents))])

    def attend_one(self, sequence: int) -> Tensor:
        """[rows of the sequence, heads, head_dim]"""
        rows, length = self.tree.rows_per_sequence, int(self.case.lengths[sequence])
        queries = self.query[sequence * rows :][:rows].double()
        exact = torch.zeros_like(queries)
        if length == 0:
            return exact
        pages = self.case.block_table[sequence]
        keys, values = (gather(each, pages, length) for each in (self.case.kv.keys, self.case.kv.values))
        for row in range(len(self.parents[sequence])):
            seen = self.seen_by(sequence, row)
            grouped = queries[row].view(len(keys), -1, queries.shape[2])
            weights = (torch.einsum("kgd,ktd->kgt", grouped, keys[:, seen]) * self.case.scale).softmax(-1)
            exact[row] = torch.einsum("kgt,ktd->kgd", weights, values[:, seen]).flatten(0, 1)
        return exact

    def seen_by(self, sequence: int, row: int) -> list[int]:
        start = int(self.tree.starts[sequence])
        seen = list(range(start))
        node: int | None = row
        while node is not None:
            seen.append(start + node)
            node = self.parents[sequence][node]
        return seen

    def worst_error(self, output: Tensor) -> float:
        """Of any row, in units of the mean size of its exact result; infinite where anything is not finite."""
        exact = self.expected()
        size = exact.abs().mean((1, 2)).clamp(min=1e-30)
        error = ((output.double() - exact).abs().amax((1, 2)) / size).max()
        return float(error) if error.isfinite() else math.inf


def make_tree_case(
    contexts: list[int],
    nodes: list[int],
    rows: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    *,
    chain: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    kv_dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> TreeCase:
    """Sequences of `contexts` tokens before trees of `nodes` nodes, at most `rows`; rows without a node are empty.

    A sequence of -1 tokens has none, and no length. A node's parent is any before it, or nothing but the context.
    """
    lengths = [max(0, context + num) for context, num in zip(contexts, nodes, strict=True)]
    case = make_case(lengths, kv_heads, group, head_dim, dtype=dtype, kv_dtype=kv_dtype, device=device)
    parents = [[draw_parent(node, chain=chain) for node in range(num)] for num in nodes]
    masks = [mask_of(each, row) if row < len(each) else 0 for each in parents for row in range(rows)]
    words = [words_of(mask, -(-rows // 64)) for mask in masks]
    starts = torch.tensor(contexts, dtype=torch.int32, device=device)
    heads = kv_heads * group
    query = torch.randn(len(masks), heads + 2, head_dim, device=device).to(dtype)[:, :heads] * 1.5
    tree = TreeMask(rows, starts, torch.tensor(words, device=device))
    return TreeCase(case, query, parents, tree)


def draw_parent(node: int, *, chain: bool) -> int | None:
    if node == 0:
        return None
    return node - 1 if chain else random.choice([None, *range(node)])


def mask_of(parents: list[int | None], row: int) -> int:
    parent = parents[row]
    return 1 << row | (0 if parent is None else mask_of(parents, parent))


def words_of(mask: int, num: int) -> list[int]:
    return [signed(mask >> 64 * word & 2**64 - 1) for word in range(num)]


def signed(bits: int) -> int:
    """Of 64 bits, the int64."""
    return bits - 2**64 if bits >> 63 else bits
