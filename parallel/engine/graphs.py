"""The decode step captured as CUDA graphs, one for each number of rows that is worth its memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from parallel.cuda_graph import record_graph
from parallel.engine.limits import graph_sizes, size_for

# Before a capture, the step runs this often outside of it: kernels are compiled and libraries set themselves up.
NUM_WARM_UPS = 2


class StepGraphs:
    """`run_step(num_rows)`, captured at once for all sizes. That runs it: the rows must hold no sequence."""

    def __init__(self, run_step: Callable[[int], None], max_rows: int, pool: Any = None) -> None:
        # The largest first: the others fit into its memory.
        sizes = sorted(graph_sizes(max_rows), reverse=True)
        self.graphs = {size: capture(partial(run_step, size), pool) for size in sizes}

    def run(self, num_rows: int) -> None:
        self.graphs[size_for(self.graphs, num_rows)].replay()


@torch.inference_mode()
def capture(run: Callable[[], None], pool: Any = None, num_warm_ups: int = NUM_WARM_UPS) -> torch.cuda.CUDAGraph:
    """What `run` does on the card, as a graph; it is run before, too."""
    for _ in range(num_warm_ups):
        run()
    torch.cuda.synchronize()
    return record_graph(run, pool)
