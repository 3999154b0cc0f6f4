"""The small operations of a decoder layer, each in one pass over memory: norms, rotation into the KV pages, SwiGLU.

On a card and in bf16 they run as kernels of fused_*.cu, else as the plain torch of reference.py.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from parallel.kernels import reference
from parallel.kernels.launch import Kernel, has_tensor_cores, load_kernel, load_problem
from parallel.kernels.operators import operator

FOLDER = Path(__file__).parent
# Kernels read and write 16 bytes at a time: a piece of 8 numbers in bf16.
PIECE = 8
PIECE_BYTES = 16
WARP = 32
MAX_THREADS = 1024
MAX_HIDDEN = 16384
# Up to so many rows, a thread holds as little of a row as can be, for latency; above, more of it, for throughput.
# About a card's multiprocessors; where the two cross has not been measured (tools/bench_fused.py times both).
FEW_ROWS = 128
MANY_ROWS_VECTORS = 4
SILU_THREADS = 256
ROTARY_THREADS = 128
HEAD_DIMS = range(64, 257, 16)


@operator(lambda hidden, weight, eps: hidden.new_empty(hidden.shape))
def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[tokens, H] by [H] -> [tokens, H]: hidden / sqrt(mean(hidden ** 2) + eps), rounded, times weight."""
    if not takes(hidden, weight) or hidden.shape[1] > MAX_HIDDEN:
        return reference.rms_norm(hidden, weight, eps)
    return launch_norm(norm_vectors(*hidden.shape), hidden, None, weight, eps)


@operator(lambda hidden, residual, weight, eps: hidden.new_empty(hidden.shape), mutates=["residual"])
def add_rms_norm(hidden: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Adds [tokens, H] to `residual` in place, rounded; returns `rms_norm` of the sum."""
    if not takes(hidden, residual, weight) or hidden.shape[1] > MAX_HIDDEN:
        return reference.add_rms_norm(hidden, residual, weight, eps)
    return launch_norm(norm_vectors(*hidden.shape), hidden, residual, weight, eps)


@operator(lambda gate_up: gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2))
def silu_mul(gate_up: Tensor) -> Tensor:
    """[tokens, 2 * I], gates before ups -> [tokens, I]: silu(gate), rounded, times up."""
    tokens, pieces = len(gate_up), gate_up.shape[1] // (2 * PIECE)
    if not takes(gate_up) or gate_up.shape[1] % (2 * PIECE):
        return reference.silu_mul(gate_up)
    output = gate_up.new_empty(tokens, pieces * PIECE)
    silu_kernel(gate_up.device.index)(
        (tokens, -(-pieces // SILU_THREADS), 1),
        SILU_THREADS,
        gate_up,
        output,
        pieces,
        gate_up.stride(0) // PIECE,
    )
    return output


@operator(
    lambda qkv, cos, sin, positions, slots, key_pages, value_pages, heads, *others: qkv.new_empty(
        len(qkv), heads, key_pages.shape[3]
    ),
    mutates=["key_pages", "value_pages"],
)
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
    """Rotates queries and keys of [tokens, (heads + 2 * kv_heads) * head_dim] (q, k, v) and stores keys and values.

    Returns the queries, [tokens, heads, head_dim]. `cos`, `sin`: [max_positions, head_dim / 2] float32, from
    `rotary_tables`. `positions`, `slots`: [tokens] int64; slot = page * PAGE_SIZE + place in it, below 2**32. Pages:
    [num_pages, kv_heads, PAGE_SIZE, head_dim], of the dtype of `qkv` or e4m3 (numbers beyond +-448 become that).
    `q_norm`, `k_norm`: [head_dim], weights of an RMS norm of each head before it is rotated.
    """
    assert cos.shape[1] * 2 == key_pages.shape[3], f"{cos.shape=} is for another head than that of {key_pages.shape=}"
    assert cos.dtype == sin.dtype == torch.float32 and positions.dtype == slots.dtype == torch.int64
    norms = [norm for norm in (q_norm, k_norm) if norm is not None]
    if not (takes(qkv, *norms) and takes_pages(key_pages, qkv.dtype) and takes_pages(value_pages, key_pages.dtype)):
        return reference.rotary_and_cache(
            qkv, cos, sin, positions, slots, key_pages, value_pages, heads, kv_heads, q_norm, k_norm, eps
        )
    page_size, head_dim = key_pages.shape[2:]
    query = qkv.new_empty(len(qkv), heads, head_dim)
    kernel, heads_per_block = rotary_kernel(head_dim, page_size, key_pages.dtype, qkv.device.index)
    kernel(
        (len(qkv), -(-(heads + 2 * kv_heads) // heads_per_block), 1),
        ROTARY_THREADS,
        qkv,
        cos,
        sin,
        positions,
        slots,
        key_pages,
        value_pages,
        query,
        q_norm,
        k_norm,
        key_pages.stride(0),
        value_pages.stride(0),
        qkv.stride(0) // PIECE,
        heads,
        kv_heads,
        eps,
    )
    return query


def rotary_tables(rotary: nn.Module, max_positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines for positions from 0 on, [max_positions, head_dim / 2] float32, by a model's `rotary_emb`.

    ValueError for rotations whose frequencies depend on the length of the sequence.
    """
    kind = getattr(rotary, "rope_type", "default")
    if not isinstance(kind, str) or "dynamic" in kind or kind == "longrope":
        raise ValueError(
            f"rope_type {kind!r} of the model: its frequencies depend on the layer or on the length, and no one table "
            "holds them. Models with rope_type default, linear, llama3 or yarn can be run."
        )
    frequencies = rotary.get_buffer("inv_freq").float()
    angles = torch.arange(max_positions, device=frequencies.device).float()[:, None] * frequencies
    scaling = cast(float, rotary.attention_scaling)
    return angles.cos() * scaling, angles.sin() * scaling


def takes(*tensors: Tensor) -> bool:
    """Whether kernels can read these, [n] or [tokens, n], piece by piece."""
    first = tensors[0]
    if not first.is_cuda or not first.numel() or problem(first.device.index):
        return False
    return all(
        t.dtype == torch.bfloat16
        and t.shape[-1] % PIECE == 0
        and t.stride(-1) == 1
        and (t.dim() == 1 or t.stride(0) % PIECE == 0)
        and t.data_ptr() % PIECE_BYTES == 0
        for t in tensors
    )


def takes_pages(pages: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernel can write these; what lies inside a page has no gaps."""
    page_size, head_dim = pages.shape[2:]
    return (
        pages.dtype in (dtype, torch.float8_e4m3fn)
        and head_dim in HEAD_DIMS
        and pages.stride()[1:] == (page_size * head_dim, head_dim, 1)
        and pages.stride(0) % PIECE == 0
        and pages.data_ptr() % PIECE_BYTES == 0
    )


@cache
def problem(device_index: int) -> str | None:
    """Why a card has no kernels, so that plain torch computes; None: it has."""
    if not has_tensor_cores(torch.device("cuda", device_index)):
        return "older than sm_80"
    return load_problem(silu_kernel, device_index)


def norm_vectors(tokens: int, hidden_size: int) -> int:
    """Pieces of a row that a thread holds."""
    least = -(-hidden_size // (PIECE * MAX_THREADS))
    return least if tokens <= FEW_ROWS else max(least, MANY_ROWS_VECTORS)


def launch_norm(vectors: int, hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    tokens, hidden_size = hidden.shape
    pieces = hidden_size // PIECE
    output = hidden.new_empty(tokens, hidden_size)
    norm_kernel(vectors, hidden.device.index)(
        (tokens, 1, 1),
        -(-pieces // (vectors * WARP)) * WARP,
        hidden,
        residual,
        weight,
        output,
        pieces,
        hidden.stride(0) // PIECE,
        0 if residual is None else residual.stride(0) // PIECE,
        eps,
    )
    return output


@cache
def norm_kernel(vectors: int, device_index: int) -> Kernel:
    most = min(MAX_THREADS, MAX_HIDDEN // (PIECE * vectors))
    options = (f"-DVECTORS={vectors}", f"-DMAX_THREADS={most}")
    return load_kernel(FOLDER / "fused_norm.cu", "rms_norm", options, "PPPPiiif", device_index)


@cache
def silu_kernel(device_index: int) -> Kernel:
    return load_kernel(FOLDER / "fused_silu.cu", "silu_mul", (), "PPii", device_index)


@cache
def rotary_kernel(head_dim: int, page_size: int, dtype: torch.dtype, device_index: int) -> tuple[Kernel, int]:
    """The kernel, and how many heads a block of it takes."""
    lanes = 4 if head_dim <= 64 else 8 if head_dim <= 128 else 16
    options = (f"-DHEAD_DIM={head_dim}", f"-DPAGE_SIZE={page_size}", f"-DE4M3={int(dtype == torch.float8_e4m3fn)}")
    kernel = load_kernel(FOLDER / "fused_rotary.cu", "rotary_and_cache", options, "PPPPPPPPPPqqiiif", device_index)
    return kernel, ROTARY_THREADS // lanes
