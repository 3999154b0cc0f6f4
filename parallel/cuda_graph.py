"""What a card was asked to do, as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def record_graph(run: Callable[[], object], pool: Any = None) -> torch.cuda.CUDAGraph:
    """What `run` does on the card, in the memory `pool`; it must have been run: kernels compiled, libraries set up."""
    graph = torch.cuda.CUDAGraph()
    # Other threads (the watchdog of NCCL) may talk to the card meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        run()
    return graph
