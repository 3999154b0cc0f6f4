"""What a rank measures of its own generation: latencies, the share of communication, memory."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from launcher.rank.context import RankContext
from parallel.communicator import ElidedAllReduce
from parallel.engine.engine import Engine
from parallel.engine.generate import Result
from parallel.engine.step_timer import time_steps
from parallel.kernels.pages import PagedKV
from parallel.kernels.status import LayerSizes, kernel_status
from parallel.timing import p50_p99


def latencies(result: Result) -> dict[str, Any]:
    """Medians over prompts (first token) and over all later tokens, among which the time of a step that gave an answer
    several is divided; null where there was no such token."""
    return {"ttft_ms": statistics.median(result.ttft_ms), "tpot_ms": p50_p99(result.token_ms)}


def reuse(result: Result) -> dict[str, int]:
    """Tokens of all prompts, and how many of them the cache had."""
    return {"prompt_tokens": result.prompt_tokens, "reused_tokens": result.reused_tokens}


def communication(context: RankContext, engine: Engine, contexts: Sequence[int]) -> dict[str, Any]:
    """Share of a decode step that its all-reduces take: the same step timed with them and without.

    Args:
        contexts: tokens of the sequences that the step is timed with; the first ones that an engine has rows for.
    """
    num_steps = context.job.run.engine.comm_share_steps
    if context.communicator.world_size == 1:
        return {"comm_share": 0.0}
    if num_steps == 0:
        return {"comm_share": None}
    contexts, times = contexts[: engine.limits.batch_size], {}
    for name, communicator in (("with", context.communicator), ("without", ElidedAllReduce(context.communicator))):
        context.communicator.barrier()
        times[name] = statistics.median(time_steps(engine, contexts, num_steps, communicator))
    share = max(0.0, 1 - times["without"] / times["with"])
    return {"comm_share": share, "decode_step_ms": {"measured": times["with"], "without_all_reduce": times["without"]}}


def kernels(engine: Engine) -> dict[str, Any]:
    """Which operations of a layer run as own kernels on this rank, and why the others do not (see kernel_status)."""
    decoder, cache = engine.decoder, engine.caches[0]
    sizes = LayerSizes(engine.model.config.hidden_size, decoder.num_heads, decoder.num_kv_heads, decoder.head_dim)
    return kernel_status(sizes, engine.dtype, cache.keys.dtype, engine.device)


def memory(device: torch.device, engine: Engine) -> dict[str, Any]:
    """Bytes that this rank holds, as the allocator counts them (null on a CPU, which has no such count)."""
    on_card, drafter = device.type == "cuda", engine.speculator and engine.speculator.drafter
    streamer, host_kv = engine.streamer, engine.decoder.host_kv
    hosted_kv = 0 if host_kv is None else host_kv.num_bytes
    on_host = 0 if streamer is None else streamer.host_layers.num_bytes
    on_disk = 0 if streamer is None or streamer.disk is None else streamer.disk.packed_bytes
    return {
        "weights_bytes": weights_bytes(engine.model) - on_host - on_disk,
        "host_weights_bytes": on_host,
        "staging_bytes": 0 if streamer is None else streamer.buffers.nbytes,
        "kv_cache_bytes": sum(map(cache_bytes, engine.target.stored)) - hosted_kv,
        "kv_staging_bytes": 0 if host_kv is None else host_kv.staging.nbytes,
        "host_kv_bytes": hosted_kv,
        "draft_weights_bytes": sum(map(weights_bytes, drafter.models)) if drafter else 0,
        "draft_kv_cache_bytes": cache_bytes(drafter.caches) if drafter else 0,
        "allocated_peak_bytes": torch.cuda.max_memory_allocated(device) if on_card else None,
        "reserved_peak_bytes": torch.cuda.max_memory_reserved(device) if on_card else None,
    }


def weights_bytes(model: PreTrainedModel) -> int:
    return sum(tensor.nbytes for tensor in weight_tensors(model))


def cache_bytes(caches: Sequence[PagedKV]) -> int:
    return sum(cache.keys.nbytes + cache.values.nbytes for cache in caches)


def weight_tensors(model: PreTrainedModel) -> list[Tensor]:
    """Parameters and buffers, each once; the rotary frequencies are no weights."""
    buffers = (buffer for name, buffer in model.named_buffers() if "rotary_emb" not in name)
    return list({id(tensor): tensor for tensor in (*model.parameters(), *buffers)}.values())
