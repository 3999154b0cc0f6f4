"""Ranks in bf16, of models of random shapes: as near to float32 as transformers' own bf16 is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.parallel.random_shapes import PLAIN, SMALL, error, random_config, rank_logits, whole_logits, write_bf16
from tests.parallel.ranks import CPU, run_on_ranks


@pytest.mark.parametrize(("seed", "world_size"), [(0, 1), (1, 2), (2, 3), (3, 4), (4, 2)])
def test_logits_are_as_near_to_float32_as_those_of_transformers(tmp_path: Path, seed: int, world_size: int) -> None:
    folder = write_bf16(random_config(seed, SMALL), tmp_path / "model", CPU)
    for kind in (PLAIN, "int4"):
        exact, theirs = (whole_logits(folder, kind, SMALL, CPU, dtype) for dtype in (torch.float32, torch.bfloat16))
        allowed = 1.25 * error(theirs, exact)
        assert 0 < allowed < 0.1
        for ours in run_on_ranks(rank_logits, world_size, folder, kind, SMALL, CPU):
            assert error(ours, exact) < allowed
