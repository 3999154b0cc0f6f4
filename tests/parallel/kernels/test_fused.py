"""The fused operations of a layer, as plain torch computes them, against transformers' own modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from parallel.kernels import fused

DTYPES = [torch.float32, torch.bfloat16]
HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, NUM_PAGES, TOKENS, EPS = 6, 2, 64, 16, 5, 9, 1e-5
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def random_norm(size: int, dtype: torch.dtype, kind: Any = LlamaRMSNorm) -> nn.Module:
    norm = kind(size, EPS).to(dtype)
    nn.init.normal_(norm.weight, 1.0, 0.3)
    return norm.requires_grad_(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_size", [8, 136, 1024])
def test_norm_is_bit_for_bit_that_of_transformers(dtype: torch.dtype, hidden_size: int) -> None:
    norm = random_norm(hidden_size, dtype)
    hidden = torch.randn(5, hidden_size).to(dtype) * 3
    assert torch.equal(fused.rms_norm(hidden, norm.weight, EPS), norm(hidden))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_a_sum_leaves_the_rounded_sum_in_the_residual(dtype: torch.dtype) -> None:
    norm = random_norm(64, dtype)
    hidden, residual = torch.randn(5, 64).to(dtype), 9 * torch.randn(5, 64).to(dtype)
    total = residual + hidden
    normed = fused.add_rms_norm(hidden, residual, norm.weight, EPS)
    assert torch.equal(residual, total)
    assert torch.equal(normed, norm(total))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_a_sum_goes_into_some_rows(dtype: torch.dtype) -> None:
    weight = random_norm(64, dtype).weight
    hidden, residual, output = (torch.randn(9, 64).to(dtype) for _ in range(3))
    before, total = output.clone(), residual.clone()
    normed = fused.add_rms_norm(hidden[2:7], total[2:7], weight, EPS)
    fused.add_rms_norm_into(hidden[2:7], residual[2:7], weight, EPS, output[2:7])
    assert torch.equal(residual, total) and torch.equal(output[2:7], normed)
    assert all(torch.equal(output[rows], before[rows]) for rows in (slice(2), slice(7, 9)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_activation_is_bit_for_bit_that_of_transformers(dtype: torch.dtype) -> None:
    mlp = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=32, hidden_act="silu")).to(dtype)
    identity = torch.eye(32, dtype=dtype)
    for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        linear.weight = nn.Parameter(identity, requires_grad=False)
    same = torch.randn(7, 32).to(dtype) * 4
    assert torch.equal(fused.silu_mul(torch.cat([same, same], dim=1)), mlp(same))
    gate, up = torch.randn(2, 7, 32).to(dtype)
    assert torch.equal(fused.silu_mul(torch.cat([gate, up], dim=1)), mlp.act_fn(gate) * up)


def rotary_module(rope: dict[str, Any] | None = None) -> LlamaRotaryEmbedding:
    rope = rope or {"rope_type": "default", "rope_theta": 10000.0}
    return LlamaRotaryEmbedding(
        LlamaConfig(hidden_size=HEADS * HEAD_DIM, num_attention_heads=HEADS, head_dim=HEAD_DIM, rope_parameters=rope)
    )


def rotated_by_transformers(
    qkv: Tensor, positions: Tensor, rope: Any, q_norm: nn.Module | None, k_norm: nn.Module | None
) -> tuple[Tensor, Tensor, Tensor]:
    """[tokens, heads, head_dim] queries, keys and values, each by the steps of transformers' attention."""
    sizes = [HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM]
    query, key, value = (part.reshape(1, len(qkv), -1, HEAD_DIM) for part in qkv.split(sizes, dim=1))
    query = (query if q_norm is None else q_norm(query)).transpose(1, 2)
    key = (key if k_norm is None else k_norm(key)).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key, *rope(qkv, positions[None]))
    return query[0].transpose(0, 1), key[0].transpose(0, 1), value[0]


def run_rotary(qkv: Tensor, positions: Tensor, rope: Any, norms: Any, page_dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Queries, and what is in the slots of keys and values afterwards; every other slot must stay as it was."""
    slots = torch.randperm(NUM_PAGES * PAGE_SIZE)[: len(qkv)]
    pages = [torch.full((NUM_PAGES, KV_HEADS, PAGE_SIZE, HEAD_DIM), 7.0).to(page_dtype) for _ in range(2)]
    weights = [None if norm is None else norm.weight for norm in norms]
    cos, sin = fused.rotary_tables(rope, 200)
    query = fused.rotary_and_cache(qkv, cos, sin, positions, slots, *pages, HEADS, KV_HEADS, *weights, EPS)
    flat = [page.float().transpose(1, 2).flatten(0, 1) for page in pages]
    others = [slot for slot in range(NUM_PAGES * PAGE_SIZE) if slot not in slots]
    assert all(bool((stored[others] == 7).all()) for stored in flat)
    return query, *(stored[slots] for stored in flat)


@pytest.mark.parametrize("rope", [None, LLAMA3], ids=["default", "llama3"])
@pytest.mark.parametrize("has_norms", [False, True], ids=["llama", "qwen3"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_and_storage_agree_with_transformers(rope: Any, has_norms: bool, dtype: torch.dtype) -> None:
    module = rotary_module(rope)
    norms = [random_norm(HEAD_DIM, dtype, Qwen3RMSNorm) if has_norms else None for _ in range(2)]
    # Rows of a wider tensor, as those of a linear that holds more.
    qkv = torch.randn(TOKENS, (HEADS + 2 * KV_HEADS) * HEAD_DIM + 32).to(dtype)[:, :-32]
    positions = torch.randint(0, 200, (TOKENS,))
    expected = rotated_by_transformers(qkv, positions, module, *norms)
    found = run_rotary(qkv, positions, module, norms, dtype)
    # transformers rounds cosines, sines and both products to bf16, half a unit of 2**-8 each.
    tolerance = 1e-6 if dtype == torch.float32 else 2**-6
    for name, mine, theirs in zip(("query", "key", "value"), found, expected, strict=True):
        error = float((mine.double() - theirs.double()).abs().max())
        assert error <= tolerance * float(theirs.abs().max()), f"{name}: {error}"
    assert torch.equal(found[2], expected[2].float())


def test_bf16_rotation_is_rounded_once() -> None:
    module = rotary_module()
    qkv = torch.randn(TOKENS, (HEADS + 2 * KV_HEADS) * HEAD_DIM).bfloat16()
    positions = torch.randint(0, 200, (TOKENS,))
    exact = rotated_by_transformers(qkv.double(), positions, module.double(), None, None)
    query, key, _ = run_rotary(qkv, positions, module.float(), (None, None), torch.bfloat16)
    for mine, theirs in ((query, exact[0]), (key, exact[1])):
        assert bool(((mine.double() - theirs).abs() <= theirs.abs() * 2**-8 + 1e-5).all())


def test_e4m3_pages_hold_the_nearest_numbers_and_saturate() -> None:
    module = rotary_module()
    qkv = torch.randn(TOKENS, (HEADS + 2 * KV_HEADS) * HEAD_DIM) * 300
    qkv[0, -1], qkv[1, -1] = float("inf"), -1e30
    positions = torch.randint(0, 200, (TOKENS,))
    expected = rotated_by_transformers(qkv, positions, module, None, None)
    _, *found = run_rotary(qkv, positions, module, (None, None), torch.float8_e4m3fn)
    for mine, theirs in zip(found, expected[1:], strict=True):
        clamped = theirs.clamp(-448, 448)
        # Three bits of mantissa; 2**-9 is the step below 2**-6.
        assert bool(((mine - clamped).abs() <= clamped.abs() * 2**-4 * 1.0001 + 2**-10).all())
    assert found[1][0, -1, -1] == 448 and found[1][1, -1, -1] == -448


def test_tables_are_those_of_the_model() -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    for rope in (None, LLAMA3, yarn):
        module = rotary_module(rope)
        cos, sin = fused.rotary_tables(module, 300)
        theirs = module(torch.zeros(1), torch.arange(300)[None])
        assert torch.equal(torch.cat([cos, cos], 1), theirs[0][0]) and torch.equal(
            torch.cat([sin, sin], 1), theirs[1][0]
        )


def test_rotations_that_depend_on_the_length_are_refused() -> None:
    module = rotary_module()
    for kind in ("dynamic", "longrope", {"full_attention": "default"}):
        module.rope_type = kind
        with pytest.raises(ValueError, match="rope_type"):
            fused.rotary_tables(module, 10)


def test_the_dispatcher_knows_shapes_and_what_is_written() -> None:
    hidden, weight = torch.randn(3, 16), torch.randn(16)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(fused.rms_norm, (hidden, weight, EPS), test_utils=checks)
    torch.library.opcheck(fused.add_rms_norm, (hidden, hidden.clone(), weight, EPS), test_utils=checks)
    into = hidden, hidden.clone(), weight, EPS, hidden.clone()
    torch.library.opcheck(fused.add_rms_norm_into, into, test_utils=checks)
    torch.library.opcheck(fused.silu_mul, (hidden,), test_utils=checks)
    qkv = torch.randn(TOKENS, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    pages = [torch.zeros(NUM_PAGES, KV_HEADS, PAGE_SIZE, HEAD_DIM) for _ in range(2)]
    places = torch.arange(TOKENS)
    tables = fused.rotary_tables(rotary_module(), 20)
    norms = (torch.ones(HEAD_DIM), None)
    arguments = (qkv, *tables, places, places, *pages, HEADS, KV_HEADS, *norms, EPS)
    torch.library.opcheck(fused.rotary_and_cache, arguments, test_utils=checks)


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_no_tokens_are_no_trouble(num_tokens: int) -> None:
    assert fused.rms_norm(torch.randn(num_tokens, 16), torch.ones(16), EPS).shape == (num_tokens, 16)
    assert fused.silu_mul(torch.randn(num_tokens, 16)).shape == (num_tokens, 8)


def test_a_block_of_a_norm_holds_a_whole_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "load_kernel", lambda path, name, options, *others: options)
    for hidden_size in range(fused.PIECE, fused.MAX_HIDDEN + 1, fused.PIECE):
        options, pieces, threads = fused.norm_kernel.__wrapped__(fused.NORM_VECTORS, hidden_size, torch.device("cpu"))
        vectors, most = (int(option.split("=")[1]) for option in options)
        assert pieces * fused.PIECE == hidden_size and threads % fused.WARP == 0
        assert pieces <= vectors * threads and threads <= most <= 1024


def test_pages_that_the_kernel_can_write() -> None:
    def takes(keys: Tensor, values: Tensor) -> bool:
        return fused.takes_pages(keys.shape, keys.stride(), values.stride(), torch.bfloat16, keys.dtype, values.dtype)

    pages = torch.zeros(5, 2, 16, 64, dtype=torch.bfloat16)
    halves = torch.zeros(5, 2, 2, 16, 64, dtype=torch.bfloat16).unbind(1)
    assert takes(pages, pages) and takes(*halves) and takes(pages, halves[0])
    assert takes(pages.to(torch.float8_e4m3fn), pages.to(torch.float8_e4m3fn))
    assert not takes(pages, pages.to(torch.float8_e4m3fn)) and not takes(pages.half(), pages.half())
    assert not takes(pages[..., :40], pages[..., :40]) and not takes(pages, pages.transpose(1, 2))
    assert not takes(pages[:, :, :8], pages[:, :, :8])
