"""Ranks on a card in bf16, of large models of random shapes: as near to float32 as transformers' own bf16 is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import PretrainedConfig

from tests.gpu.one_card import DEVICE, run_on_one_card
from tests.parallel.random_shapes import (
    LARGE,
    PLAIN,
    config_of,
    error,
    random_config,
    rank_logits,
    whole_logits,
    write_bf16,
)

pytestmark = pytest.mark.gpu
LLAMA_70B = config_of(
    "llama",
    hidden_size=8192,
    intermediate_size=28672,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=32_000,
)


@pytest.mark.parametrize(
    ("config", "world_size"),
    [(LLAMA_70B, 2), *((random_config(seed, LARGE), world_size) for seed, world_size in enumerate((1, 2, 3, 4)))],
    ids=["llama_70b", "1_rank", "2_ranks", "3_ranks", "4_ranks"],
)
@pytest.mark.parametrize("kind", [PLAIN, "int4", "fp8"])
def test_logits_are_as_near_to_float32_as_those_of_transformers(
    tmp_path: Path, kind: str, config: PretrainedConfig, world_size: int
) -> None:
    folder = write_bf16(config, tmp_path / "model", DEVICE)
    exact, theirs = (whole_logits(folder, kind, LARGE, DEVICE, dtype) for dtype in (torch.float32, torch.bfloat16))
    # Ranks are other processes.
    torch.cuda.empty_cache()
    found = run_on_one_card(rank_logits, world_size, tmp_path, folder, kind, LARGE, DEVICE)
    shutil.rmtree(folder)
    ours, allowed = max(error(each, exact) for each in found), 1.25 * error(theirs, exact)
    print(f"{config.model_type} {kind} on {world_size}: {ours:.5f} of {allowed:.5f}")
    # Random weights of these sizes leave much to rounding; logits of another model would be 1.4 away.
    assert ours < allowed < 0.5
