"""Sizes that the attention kernels are compiled for; without torch, for plans."""

from __future__ import annotations

# Tokens of a page of the KV cache.
PAGE_SIZE = 64
# Tokens of a sequence that attention tells apart in one pass.
MAX_NODES = 256
# Of heads, and query heads for one of keys and values, that the kernel of steps takes; others attend in plain torch.
HEAD_DIMS = (64, 128)
MAX_GROUP = 16
