"""Sizes that the attention kernels are compiled for; without torch, for plans."""

from __future__ import annotations

# Tokens of a page of the KV cache.
PAGE_SIZE = 64
# Tokens of a sequence that attention tells apart in one pass.
MAX_NODES = 256
