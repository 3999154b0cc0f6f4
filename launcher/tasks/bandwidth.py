"""How near a decode step comes to the time in which its card could just read what the step must read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from launcher.plan.offload import OffloadPlan
from launcher.tasks.measure import cache_bytes, weights_bytes
from parallel.engine.engine import Engine
from parallel.kernels.limits import PAGE_SIZE
from parallel.kernels.pages import PagedKV


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
