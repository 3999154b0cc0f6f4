"""The small operations of a decoder layer, each in one pass over memory: norms, rotation into the KV pages, SwiGLU.

On a card and in bf16 they run as kernels of fused_*.cu, else as the plain torch of reference.py.
"""

from __future__ import annotations

from functools import cache, lru_cache
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from parallel.kernels import reference
from parallel.kernels.launch import Kernel, has_tensor_cores, load_kernel, load_problem
from parallel.kernels.operators import operator
from parallel.kernels.rotations import ROPE_TYPES

FOLDER = Path(__file__).parent
# Kernels read and write 16 bytes at a time: a piece of 8 numbers in bf16.
PIECE = 8
PIECE_BYTES = 16
WARP = 32
MAX_THREADS = 1024
MAX_HIDDEN = 16384
# Pieces of a row that a thread of a norm holds: 2.30 us at 1 token, 2.54 at 32, 6.24 at 512; one takes 2.50, 2.68 and
# 6.36, four 2.35, 2.55 and 6.63 (add_rms_norm of H = 8192, H200, tools/bench/fused.py).
NORM_VECTORS = 2
SILU_THREADS = 256
ROTARY_THREADS = 128
HEAD_DIMS = range(64, 257, 16)


@operator(lambda hidden, weight, eps: hidden.new_empty(hidden.shape))
def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[tokens, H] by [H] -> [tokens, H]: hidden / sqrt(mean(hidden ** 2) + eps), rounded, times weight."""
    if not takes(hidden, weight) or hidden.shape[1] > MAX_HIDDEN:
        return reference.rms_norm(hidden, weight, eps)
    return launch_norm(NORM_VECTORS, hidden, None, weight, eps)


@operator(lambda hidden, residual, weight, eps: hidden.new_empty(hidden.shape), mutates=["residual"])
def add_rms_norm(hidden: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Adds [tokens, H] to `residual` in place, rounded; returns `rms_norm` of the sum."""
    if not takes(hidden, residual, weight) or hidden.shape[1] > MAX_HIDDEN:
        return reference.add_rms_norm(hidden, residual, weight, eps)
    return launch_norm(NORM_VECTORS, hidden, residual, weight, eps)


@operator(lambda hidden, residual, weight, eps, output: None, mutates=["residual", "output"])
def add_rms_norm_into(hidden: Tensor, residual: Tensor, weight: Tensor, eps: float, output: Tensor) -> None:
    """As `add_rms_norm`, the norm into `output` [tokens, H]."""
    if not takes(hidden, residual, weight, output) or hidden.shape[1] > MAX_HIDDEN:
        output.copy_(reference.add_rms_norm(hidden, residual, weight, eps))
    else:
        launch_norm(NORM_VECTORS, hidden, residual, weight, eps, output)


@operator(lambda gate_up: gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2))
def silu_mul(gate_up: Tensor) -> Tensor:
    """[tokens, 2 * I], gates before ups -> [tokens, I]: silu(gate), rounded, times up."""
    tokens, pieces = len(gate_up), gate_up.shape[1] // (2 * PIECE)
    if not takes(gate_up) or gate_up.shape[1] % (2 * PIECE):
        return reference.silu_mul(gate_up)
    output = gate_up.new_empty(tokens, pieces * PIECE)
    silu_kernel(gate_up.device)(
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
    shape, strides = key_pages.shape, (key_pages.stride(), value_pages.stride())
    aligned = (key_pages.data_ptr() | value_pages.data_ptr()) % PIECE_BYTES == 0
    dtypes = qkv.dtype, key_pages.dtype, value_pages.dtype
    if not (takes(qkv, *norms) and aligned and takes_pages(shape, *strides, *dtypes)):
        return reference.rotary_and_cache(
            qkv, cos, sin, positions, slots, key_pages, value_pages, heads, kv_heads, q_norm, k_norm, eps
        )
    query = qkv.new_empty(len(qkv), heads, shape[3])
    kernel, heads_per_block = rotary_kernel(shape[3], shape[2], key_pages.dtype, qkv.device)
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
        strides[0][0],
        strides[1][0],
        qkv.stride(0) // PIECE,
        heads,
        kv_heads,
        eps,
    )
    return query


def rotary_tables(rotary: nn.Module, max_positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines for positions from 0 on, [max_positions, head_dim / 2] float32, by a model's `rotary_emb`.

    ValueError for rotations other than ROPE_TYPES.
    """
    kind = getattr(rotary, "rope_type", "default")
    if kind not in ROPE_TYPES:
        raise ValueError(
            f"rope_type {kind!r} of the model: its frequencies depend on the layer or on the length, and no one table "
            f"holds them. Models with rope_type {', '.join(ROPE_TYPES)} can be run."
        )
    frequencies = rotary.get_buffer("inv_freq").float()
    angles = torch.arange(max_positions, device=frequencies.device).float()[:, None] * frequencies
    scaling = cast(float, rotary.attention_scaling)
    return angles.cos() * scaling, angles.sin() * scaling


def takes(*tensors: Tensor) -> bool:
    """Whether kernels can read these, [n] or [tokens, n], piece by piece."""
    # A list takes half the time of a generator.
    return all([t.data_ptr() % PIECE_BYTES == 0 and fits(t.dtype, t.shape, t.stride(), t.device) for t in tensors])  # noqa: C419


# As many layouts as a few prompts have lengths.
@lru_cache(maxsize=4096)
def fits(dtype: torch.dtype, shape: torch.Size, strides: tuple[int, ...], device: torch.device) -> bool:
    return (
        dtype == torch.bfloat16
        and shape.numel() > 0
        and shape[-1] % PIECE == 0
        and strides[-1] == 1
        and all(stride % PIECE == 0 for stride in strides[:-1])
        and problem(device) is None
    )


@cache
def takes_pages(
    shape: torch.Size,
    key_strides: tuple[int, ...],
    value_strides: tuple[int, ...],
    dtype: torch.dtype,
    *page_dtypes: torch.dtype,
) -> bool:
    """Whether the kernel can write pages of keys and of values; what lies inside a page has no gaps."""
    page_size, head_dim = shape[2:]
    return (
        head_dim in HEAD_DIMS
        and page_dtypes[0] == page_dtypes[1]
        and page_dtypes[0] in (dtype, torch.float8_e4m3fn)
        and all(strides[1:] == (page_size * head_dim, head_dim, 1) for strides in (key_strides, value_strides))
        and all(strides[0] % PIECE == 0 for strides in (key_strides, value_strides))
    )


@cache
def problem(device: torch.device) -> str | None:
    """Why a device has no kernels, so that plain torch computes; None: it has."""
    if not has_tensor_cores(device):
        return "not on a card of sm_80 or later"
    return load_problem(silu_kernel, device)


def refusal(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why tensors of this kind go through plain torch, in a few words; None: kernels take them, where sizes fit."""
    return problem(device) or (
        None if dtype == torch.bfloat16 else f"activations in {str(dtype).removeprefix('torch.')}"
    )


def norm_refusal(hidden_size: int) -> str | None:
    fits_threads = hidden_size % PIECE == 0 and hidden_size <= MAX_HIDDEN
    return None if fits_threads else f"rows of {hidden_size}"


def rotary_refusal(head_dim: int) -> str | None:
    return None if head_dim in HEAD_DIMS else f"heads of {head_dim}"


def launch_norm(
    vectors: int, hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float, output: Tensor | None = None
) -> Tensor:
    """`output`: contiguous; a new one if None."""
    tokens, hidden_size = hidden.shape
    output = hidden.new_empty(tokens, hidden_size) if output is None else output
    kernel, pieces, threads = norm_kernel(vectors, hidden_size, hidden.device)
    strides = hidden.stride(0) // PIECE, 0 if residual is None else residual.stride(0) // PIECE
    kernel((tokens, 1, 1), threads, hidden, residual, weight, output, pieces, *strides, eps)
    return output


@cache
def norm_kernel(vectors: int, hidden_size: int, device: torch.device) -> tuple[Kernel, int, int]:
    """The kernel, the pieces of a row, and the threads of a block."""
    pieces = hidden_size // PIECE
    vectors = max(vectors, -(-pieces // MAX_THREADS))
    options = (f"-DVECTORS={vectors}", f"-DMAX_THREADS={min(MAX_THREADS, MAX_HIDDEN // (PIECE * vectors))}")
    kernel = load_kernel(FOLDER / "fused_norm.cu", "rms_norm", options, "PPPPiiif", device.index)
    return kernel, pieces, -(-pieces // (vectors * WARP)) * WARP


@cache
def silu_kernel(device: torch.device) -> Kernel:
    return load_kernel(FOLDER / "fused_silu.cu", "silu_mul", (), "PPii", device.index)


@cache
def rotary_kernel(head_dim: int, page_size: int, dtype: torch.dtype, device: torch.device) -> tuple[Kernel, int]:
    """The kernel, and how many heads a block of it takes."""
    lanes = 4 if head_dim <= 64 else 8 if head_dim <= 128 else 16
    options = (f"-DHEAD_DIM={head_dim}", f"-DPAGE_SIZE={page_size}", f"-DE4M3={int(dtype == torch.float8_e4m3fn)}")
    kernel = load_kernel(FOLDER / "fused_rotary.cu", "rotary_and_cache", options, "PPPPPPPPPPqqiiif", device.index)
    return kernel, ROTARY_THREADS // lanes
