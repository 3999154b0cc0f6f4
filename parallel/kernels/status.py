"""Which operations of a decoder layer run as own kernels on a device, and why the others do not: for a run's report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from parallel.kernels import fused, paged_attention


@dataclass(frozen=True)
class LayerSizes:
    """Of this rank: `hidden_size` is that of the model, heads are those it has; 0 where others have them all."""

    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int


def kernel_status(sizes: LayerSizes, dtype: torch.dtype, kv_dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """`own`: operations that run as own kernels; `plain_torch`: the others, each with the reason in a few words.

    Linears are not among them: theirs depends on each weight (parallel/kernels/choice.py).
    """
    common = fused.refusal(dtype, device)
    found = {"norms": common or fused.norm_refusal(sizes.hidden_size), "activation": common}
    if sizes.heads:
        found["rotation"] = common or fused.rotary_refusal(sizes.head_dim)
        found["attention"] = paged_attention.find_refusal(
            sizes.heads, sizes.head_dim, sizes.kv_heads, dtype, kv_dtype, device
        )
    return {
        "own": [name for name, why_not in found.items() if why_not is None],
        "plain_torch": {name: why_not for name, why_not in found.items() if why_not is not None},
    }
