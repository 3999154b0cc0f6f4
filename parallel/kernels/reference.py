"""What the operators of fused.py compute, in plain torch: what runs without a card, and what a card is checked by.

Roundings are those of transformers' modules, but for the rotation: it is in float32 and rounded once, where
transformers rounds the cosines, the sines and both products to the dtype of the model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3_MAX = 448.0


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    numbers = widen(hidden)
    normed = numbers * torch.rsqrt(numbers.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(hidden.dtype)


def add_rms_norm(hidden: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    residual += hidden
    return rms_norm(residual, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotary_and_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    heads: int,
    kv_heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    every = qkv.unflatten(-1, (heads + 2 * kv_heads, key_pages.shape[-1]))
    query, key, value = every.split([heads, kv_heads, kv_heads], dim=1)
    query = query if q_norm is None else rms_norm(query, q_norm, eps)
    key = key if k_norm is None else rms_norm(key, k_norm, eps)
    cos, sin = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    write_slots(key_pages, slots, rotate(key, cos, sin))
    write_slots(value_pages, slots, value)
    return rotate(query, cos, sin).to(qkv.dtype)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[tokens, heads, head_dim] by angles of [tokens, 1, head_dim / 2]: number i turns with number i + head_dim / 2."""
    first, second = widen(heads).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def write_slots(pages: Tensor, slots: Tensor, heads: Tensor) -> None:
    """[tokens, kv_heads, head_dim] into [num_pages, kv_heads, page_size, head_dim]; beyond e4m3's range to its ends."""
    stored = heads
    if pages.dtype == torch.float8_e4m3fn:
        # torch writes no float8 by index.
        stored = heads.clamp(-E4M3_MAX, E4M3_MAX).to(pages.dtype).view(torch.uint8)
        pages = pages.view(torch.uint8)
    pages[slots // pages.shape[2], :, slots % pages.shape[2]] = stored.to(pages.dtype)


def widen(numbers: Tensor) -> Tensor:
    """In float32; what is float64 stays that."""
    return numbers.to(torch.promote_types(numbers.dtype, torch.float32))
