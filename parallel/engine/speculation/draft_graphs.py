"""Drafts of a small model as CUDA graphs, where the passes that check them are not: over layers that are streamed.

Launch by launch a tree of six depths of an 8B takes 66 ms to draft on a host that queues a kernel in 13 us, of which
an H200 works 13. The copies for what the next pass begins with hide two streamed layers, 16 ms there: no more. With
such graphs in between, the host has queued a pass long before its turn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import Tensor

from parallel.engine.graphs import capture
from parallel.engine.limits import graph_sizes, size_for
from parallel.engine.rows import Rows
from parallel.engine.speculation.token_tree import TokenTree

# Row by row.
Drafts = TypeVar("Drafts", Tensor, TokenTree)
# What does again what was recorded, in a pool of memory; and what that gives, in the same place each time.
Record = Callable[[Callable[[], Drafts], Any], tuple[Callable[[], object], Drafts]]


def captured(draft: Callable[[], Drafts], pool: Any) -> tuple[Callable[[], object], Drafts]:
    """As a graph."""
    found: list[Drafts] = []

    def run() -> None:
        found[:] = [draft()]

    return capture(run, pool).replay, found[0]


class DraftGraphs(Generic[Drafts]):
    """`draft`, of the first of `rows`, which stay where they are: each number of them is recorded once it is asked for.

    That runs it, and rows that it reads may hold sequences: drafts change nothing that lasts.
    """

    def __init__(
        self, draft: Callable[[Rows], Drafts], rows: Rows, pool: Any = None, record: Record[Drafts] = captured
    ) -> None:
        self.draft: Callable[[Rows], Drafts] = draft
        self.record: Record[Drafts] = record
        self.rows, self.pool = rows, pool
        self.sizes = graph_sizes(len(rows.tokens))
        self.recorded: dict[int, tuple[Callable[[], object], Drafts]] = {}

    def run(self, num_rows: int) -> Drafts:
        """Those of the first rows, until the next run."""
        replay, drafts = self._recorded(size_for(self.sizes, num_rows))
        replay()
        return drafts[:num_rows]

    def prepare(self) -> None:
        """Records all now. The largest first: the others fit into its memory."""
        for size in sorted(self.sizes, reverse=True):
            self._recorded(size)

    def anew(self) -> DraftGraphs[Drafts]:
        """With the communicator that layers talk through when they are asked for."""
        return DraftGraphs(self.draft, self.rows, self.pool, self.record)

    def _recorded(self, size: int) -> tuple[Callable[[], object], Drafts]:
        if size not in self.recorded:
            self.recorded[size] = self.record(lambda: self.draft(self.rows.first(size)), self.pool)
        return self.recorded[size]
