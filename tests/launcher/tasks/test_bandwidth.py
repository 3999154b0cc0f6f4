"""What a decode step must read, and how near its time comes to that of reading it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from launcher.tasks.bandwidth import bandwidth, step_bytes
from parallel.communicator import Communicator
from tests.parallel.ranks import make_engine, run_on_ranks
from tests.parallel.small_models import CONFIGS, write_model


def measured(communicator: Communicator, folder: Path) -> dict[str, Any]:
    engine = make_engine(communicator, folder)
    return {"bytes": step_bytes(engine, [10, 7]), "share": bandwidth(engine, [10, 7], 2.0, 1e9)}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_all_weights_are_read_but_an_embedding_that_is_no_head(tmp_path: Path, name: str) -> None:
    """Counted in the file: one rank, in float32."""
    folder = write_model(CONFIGS[name], tmp_path / name)
    with safe_open(folder / "model.safetensors", "pt") as file:
        sizes = {key: 4 * file.get_tensor(key).numel() for key in file.keys()}  # noqa: SIM118
    if not CONFIGS[name].tie_word_embeddings:
        del sizes["model.embed_tokens.weight"]
    config = CONFIGS[name]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 4 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    (found,) = run_on_ranks(measured, 1, folder)
    assert found["bytes"] == {"weights": sum(sizes.values()), "kv": 17 * per_token}
    # At a gigabyte a second, against 2 ms.
    floor_ms = (sum(sizes.values()) + 17 * per_token) / 1e6
    assert found["share"]["bandwidth_share"] == pytest.approx(floor_ms / 2)
    assert found["share"]["bandwidth"]["floor_ms"] == pytest.approx(floor_ms)
