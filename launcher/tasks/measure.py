"""What a rank measures of its own generation: latencies, the share of communication, memory."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from launcher.rank import RankContext
from parallel.communicator import ElidedAllReduce
from parallel.engine.engine import Engine
from parallel.engine.generate import BatchResult, time_steps
from parallel.linear import ShardedLayer, swapped_communicator
from parallel.timing import p99


def latencies(batches: Sequence[BatchResult]) -> dict[str, Any]:
    """Medians over batches (first token) and over all further steps; null where there was no such step."""
    steps = [ms for batch in batches for ms in batch.step_ms]
    return {
        "ttft_ms": statistics.median(batch.ttft_ms for batch in batches),
        "tpot_ms": {"p50": statistics.median(steps) if steps else None, "p99": p99(steps) if steps else None},
    }


def communication(context: RankContext, engine: Engine, batches: Sequence[BatchResult]) -> dict[str, Any]:
    """Share of a decode step that its all-reduces take: the same step timed with them and without."""
    num_steps = context.job.run.engine.comm_share_steps
    if context.communicator.world_size == 1:
        return {"comm_share": 0.0}
    if num_steps == 0:
        return {"comm_share": None}
    tokens, times = batches[-1].last_tokens, {}
    for name, communicator in (("with", context.communicator), ("without", ElidedAllReduce(context.communicator))):
        context.communicator.barrier()
        with swapped_communicator(engine.model, communicator):
            # The first steps after a change of path are slower.
            times[name] = statistics.median(time_steps(engine, tokens, num_steps + 2)[2:])
    share = max(0.0, 1 - times["without"] / times["with"])
    return {"comm_share": share, "decode_step_ms": {"measured": times["with"], "without_all_reduce": times["without"]}}


def memory(device: torch.device, engine: Engine) -> dict[str, Any]:
    """Bytes that this rank holds, as the allocator counts them (null on a CPU, which has no such count)."""
    weights = sum(p.nbytes for p in {id(p): p for p in engine.model.parameters()}.values())
    packed = [layer.packed for layer in engine.model.modules() if isinstance(layer, ShardedLayer) and layer.packed]
    weights += sum(buffer.nbytes for kernel in packed for buffer in kernel.buffers())
    on_card = device.type == "cuda"
    return {
        "weights_bytes": weights,
        "kv_cache_bytes": engine.cache.num_bytes(),
        "allocated_peak_bytes": torch.cuda.max_memory_allocated(device) if on_card else None,
        "reserved_peak_bytes": torch.cuda.max_memory_reserved(device) if on_card else None,
    }
