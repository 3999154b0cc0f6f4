"""How near a decode step comes to the time in which its card could just read what the step must read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

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
    streamed_ms: float | None = None,
) -> dict[str, Any]:
    """`bandwidth_share`: the time in which a copy would move the step's bytes, over that of the step; null on a CPU.

    Args:
        streamed_ms: in which a plain copy would bring what is streamed, if that takes longer.
    """
    num_bytes = step_bytes(engine, contexts)
    floor_ms = sum(num_bytes.values()) / copy_bytes_per_sec * 1e3 if copy_bytes_per_sec else None
    if floor_ms and streamed_ms:
        floor_ms = max(floor_ms, streamed_ms)
    return {
        "bandwidth_share": floor_ms / step_ms if floor_ms else None,
        "bandwidth": {
            "copy_gb_per_sec": copy_bytes_per_sec / 1e9 if copy_bytes_per_sec else None,
            "step_bytes": num_bytes,
            "floor_ms": floor_ms,
        },
    }
