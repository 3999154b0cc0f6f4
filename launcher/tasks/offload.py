"""What passes copy from host memory where layers, or keys and values, lie there, and how fast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from parallel.engine.engine import Engine
from parallel.offload.disk_layers import DiskLayers


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


def link_bytes(engine: Engine, num_rows: int, num_tokens: int) -> int:
    """What a pass of so many rows, of sequences with so many tokens, copies from host memory."""
    weights = 0 if engine.streamer is None else engine.streamer.pass_bytes(num_rows)
    return weights + kv_link_bytes(engine, num_tokens)


def kv_link_bytes(engine: Engine, num_tokens: int) -> int:
    """Of that, keys and values."""
    host_kv = engine.decoder.host_kv
    return 0 if host_kv is None else host_kv.pass_bytes(num_tokens)


def step_rows(engine: Engine) -> int:
    """Of a decode step of all sequences; of trees that are chosen, as the last was."""
    speculator = engine.speculator
    rows = 1 if speculator is None else speculator.rows_per_sequence
    return engine.limits.batch_size * (rows if engine.plan is None else engine.plan.size)
