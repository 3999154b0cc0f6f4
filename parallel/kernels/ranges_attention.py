"""Causal attention of neighbouring ranges of rows at once, whose bounds the device alone knows: a graph can have it."""

from __future__ import annotations

import torch
from torch import Tensor

from parallel.kernels.launch import has_tensor_cores
from parallel.kernels.limits import PAGE_SIZE
from parallel.kernels.paged_attention import prefill_attention
from parallel.kernels.pages import PagedKV, as_bits

# Of torch's flash attention.
DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256


def ranges_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    query_bounds: Tensor,
    key_bounds: Tensor,
    scale: float,
    longest: tuple[int, int] | None = None,
) -> Tensor:
    """Each range of rows attends to the range of keys of its number, of which it is the last rows: as `query`.

    query [rows, heads, head_dim]; keys and values [length, kv_heads, head_dim] of its dtype. Bounds [ranges + 1] int32:
    range n is from bound n to bound n + 1, and may be empty. Rows in no range come out undefined. `longest`: rows, and
    keys, of a range at most, where the host knows; fewer blocks are launched for nothing.
    """
    if query.is_cuda:
        most_rows, most_keys = longest or (len(query), len(keys))
        # The kernel lays single rows out in another way, which empty ranges would break.
        lengths = max(most_rows, 2), most_keys
        found = torch.ops.aten._flash_attention_forward(
            query, keys, values, query_bounds, key_bounds, *lengths, 0.0, True, False, scale=scale
        )
        attended: Tensor = found[0]
        return attended
    output = torch.full_like(query, torch.nan)
    places = zip(*(bounds.unfold(0, 2, 1).tolist() for bounds in (query_bounds, key_bounds)), strict=True)
    for (start, end), (first, last) in places:
        if end > start:
            output[start:end] = prefill_attention(query[start:end], keys[first:last], values[first:last], scale)
    return output


def range_attention(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """As ranges_attention, of one range of all rows and all keys. Torch's choice of a kernel is left out, which takes a
    host 50 us (one core of a server); the kernel for bounds on the device takes a card a third longer."""
    if not query.is_cuda:
        return prefill_attention(query, keys, values, scale)
    one_each = (each.unsqueeze(0) for each in (query, keys, values))
    lengths = query.shape[0], keys.shape[0]
    found = torch.ops.aten._flash_attention_forward(*one_each, None, None, *lengths, 0.0, True, False, scale=scale)
    attended: Tensor = found[0][0]
    return attended


def refusal(head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a card cannot do this, in a few words; None: it can, and a CPU always.

    Whatever heads a rank has, or none: where ranks took different ways, one would replay sums that another queues,
    which may go by other transports.
    """
    if device.type == "cpu":
        return None
    checks = {
        "not on a card of sm_80 or later": has_tensor_cores(device),
        f"activations in {str(dtype).removeprefix('torch.')}": dtype in DTYPES,
        f"heads of {head_dim}": head_dim <= MAX_HEAD_DIM and head_dim % 8 == 0,
        "torch without flash attention": torch.backends.cuda.is_flash_attention_available(),
    }
    return next((reason for reason, passed in checks.items() if not passed), None)


def rows_of(slots: Tensor, kv_heads: int) -> Tensor:
    """[n, kv_heads] int64: where among all rows of a layer's pages the tokens in `slots` [n] have their keys."""
    pages, places = slots // PAGE_SIZE, slots % PAGE_SIZE
    heads = torch.arange(kv_heads, device=slots.device)
    return (pages.unsqueeze(1) * kv_heads + heads) * PAGE_SIZE + places.unsqueeze(1)


def keys_at(kv: PagedKV, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values of the tokens with `rows` [n, kv_heads], as of rows_of: [n, kv_heads, head_dim], in `dtype`."""
    keys, values = (as_bits(stored).flatten(0, 2)[rows].view(stored.dtype).to(dtype) for stored in (kv.keys, kv.values))
    return keys, values
