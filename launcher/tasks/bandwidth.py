"""How near a decode step comes to the time in which its card could just read what the step must read."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from launcher.plan.offload import OffloadPlan
from launcher.tasks.measure import cache_bytes, weights_bytes
from parallel.engine.engine import Engine
from parallel.kernels.limits import PAGE_SIZE
from parallel.kernels.pages import PagedKV
from parallel.offload.disk_layers import DiskLayers
from parallel.units import MIB

# Far above the caches of any card (50 MB on an H200, 72 MB on an RTX 4090).
COPY_BYTES = 512 * MIB
NUM_COPIES = 10


def copy_bandwidth(device: torch.device) -> float | None:
    """Bytes a second that a card reads and writes while it copies memory, the median of some copies; None on a CPU."""
    if device.type == "cpu":
        return None
    source, target = torch.zeros(2, COPY_BYTES, dtype=torch.uint8, device=device)
    target.copy_(source)
    sec = statistics.median(timed_copy(source, target) for _ in range(NUM_COPIES))
    del source, target
    torch.cuda.empty_cache()
    return 2 * COPY_BYTES / sec


def pinned_copy_bandwidth(device: torch.device) -> float | None:
    """Bytes a second that a plain copy from torch's own pinned memory brings to a card, the median of some; None on a
    CPU."""
    if device.type == "cpu":
        return None
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target.copy_(source, non_blocking=True)
    sec = statistics.median(timed_copy(source, target) for _ in range(NUM_COPIES))
    del source, target
    torch.cuda.empty_cache()
    torch._C._host_emptyCache()
    return COPY_BYTES / sec


def timed_copy(source: torch.Tensor, target: torch.Tensor) -> float:
    """Seconds, by the card's own clock."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    target.copy_(source, non_blocking=True)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def step_bytes(engine: Engine, contexts: Sequence[int]) -> dict[str, int]:
    """Bytes that this rank must read in a step of sequences with `contexts` tokens: weights, keys and values, and both
    of a draft model for each draft."""
    speculator, num_tokens = engine.speculator, sum(contexts)
    found = {"weights": read_bytes(engine.model), "kv": token_bytes(engine, engine.caches) * num_tokens}
    if speculator is None:
        return found
    drafter = speculator.drafter
    once = sum(map(read_bytes, drafter.models)) + token_bytes(engine, drafter.caches) * num_tokens
    num_drafts = speculator.num_drafts if engine.plan is None else engine.plan.depth
    return found | {"drafts": num_drafts * once}


def read_bytes(model: PreTrainedModel) -> int:
    """Of the weights. Of the embedding a step reads a row a sequence, which is left out; a tied one is the head."""
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    return weights_bytes(model) - (0 if head is embedding else int(embedding.nbytes))


def token_bytes(engine: Engine, caches: Sequence[PagedKV]) -> int:
    """Keys and values of one token."""
    return cache_bytes(caches) // (engine.limits.num_pages * PAGE_SIZE)


def link_bytes(engine: Engine, num_rows: int, num_tokens: int) -> int:
    """What a pass of so many rows, of sequences with so many tokens, copies from host memory."""
    weights = 0 if engine.streamer is None else engine.streamer.pass_bytes(num_rows)
    return weights + kv_link_bytes(engine, num_tokens)


def kv_link_bytes(engine: Engine, num_tokens: int) -> int:
    """Of that, keys and values."""
    host_kv = engine.decoder.host_kv
    return 0 if host_kv is None else host_kv.pass_bytes(num_tokens)


def streaming(
    engine: Engine, contexts: Sequence[int], step_ms: float, copy_bytes_per_sec: float | None
) -> dict[str, Any] | None:
    """What decode steps of sequences with `contexts` tokens copy from host memory, and how fast a step of `step_ms` (0:
    none) brings it; None where nothing is streamed.

    Args:
        copy_bytes_per_sec: of plain copies from pinned memory; None on a CPU.
    """
    streamer = engine.streamer
    if streamer is None:
        return None
    disk, shared = streamer.disk, streamer.host_layers.shared
    num_bytes, kv_bytes = link_bytes(engine, step_rows(engine), sum(contexts)), kv_link_bytes(engine, sum(contexts))
    rate = num_bytes / step_ms * 1e3 if step_ms else None
    return {
        "resident_layers": engine.decoder.num_layers - len(streamer.layers) - (len(disk.indices) if disk else 0),
        "streamed_layers": sorted(streamer.places),
        "host_layers": sorted(streamer.on_host),
        "host_rows": shared.max_rows,
        "trial": None if shared.rates is None else shared.rates.report(),
        "bytes_per_pass": num_bytes,
        "kv_bytes_per_pass": kv_bytes,
        "bytes_per_prompt_pass": streamer.host_layers.streamed_bytes,
        "host_bytes": streamer.host_layers.num_bytes,
        "staging_bytes": streamer.buffers.nbytes,
        "step_ms": step_ms or None,
        "gb_per_sec": rate / 1e9 if rate else None,
        "copy_gb_per_sec": copy_bytes_per_sec / 1e9 if copy_bytes_per_sec else None,
        "floor_ms": num_bytes / copy_bytes_per_sec * 1e3 if copy_bytes_per_sec else None,
        "share_of_copy": rate / copy_bytes_per_sec if rate and copy_bytes_per_sec else None,
        "disk": None if disk is None else from_disk(disk, step_ms),
    }


def from_disk(disk: DiskLayers, step_ms: float) -> dict[str, Any]:
    """What this rank reads of the checkpoint in every pass; `drive_share`: of all passes so far, not from the page
    cache."""
    return {
        "layers": list(disk.indices),
        "bytes_per_pass": disk.bytes_per_pass,
        "ring_bytes": disk.ring_bytes,
        "gb_per_sec": disk.bytes_per_pass / step_ms / 1e6 if step_ms else None,
        "drive_share": disk.reads.drive_share,
    }


def step_rows(engine: Engine) -> int:
    """Of a decode step of all sequences; of trees that are chosen, as the last was."""
    speculator = engine.speculator
    rows = 1 if speculator is None else speculator.rows_per_sequence
    return engine.limits.batch_size * (rows if engine.plan is None else engine.plan.size)


def bandwidth(
    engine: Engine,
    contexts: Sequence[int],
    step_ms: float,
    copy_bytes_per_sec: float | None,
    streamed_ms: Sequence[float | None] = (),
) -> dict[str, Any]:
    """`bandwidth_share`: the time in which a copy would move the step's bytes, over that of the step; null on a CPU.

    Args:
        streamed_ms: of what goes on meanwhile and may take longer; see `streamed_floors`.
    """
    num_bytes = step_bytes(engine, contexts)
    card_ms = sum(num_bytes.values()) / copy_bytes_per_sec * 1e3 if copy_bytes_per_sec else None
    known_ms = [ms for ms in (card_ms, *streamed_ms) if ms is not None]
    floor_ms = max(known_ms) if len(known_ms) == 1 + len(streamed_ms) else None
    return {
        "bandwidth_share": floor_ms / step_ms if floor_ms else None,
        "bandwidth": {
            "copy_gb_per_sec": copy_bytes_per_sec / 1e9 if copy_bytes_per_sec else None,
            "step_bytes": num_bytes,
            "floor_ms": floor_ms,
        },
    }


def streamed_floors(found: dict[str, Any] | None, planned: OffloadPlan | None) -> list[float | None]:
    """Milliseconds in which plain copies would bring what a step streams, and in which the disk would give what its
    drive gave; None where that is not known. `found`: what `streaming` told of the run that was `planned`."""
    if found is None or planned is None:
        return []
    disk, rate = found["disk"], found["copy_gb_per_sec"]
    if disk is None:
        return [found["floor_ms"]]
    num_bytes = found["bytes_per_pass"] + disk["bytes_per_pass"]
    is_known = planned.disk_rate is not None and planned.disk_rate.is_measured
    # What never came from a drive, but from the page cache or over a network, came at a rate that nobody measured.
    drive_ms = (planned.disk_ms or 0.0) * disk["drive_share"] if is_known and disk["drive_share"] else None
    return [num_bytes / rate / 1e6 if rate else None, drive_ms]
