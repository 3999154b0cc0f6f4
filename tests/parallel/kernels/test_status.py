"""What a run says of its kernels, on a CPU and on cards that are made up."""

from __future__ import annotations

import pytest
import torch

from parallel.kernels import fused, paged_attention
from parallel.kernels.status import LayerSizes, kernel_status

LLAMA = LayerSizes(hidden_size=8192, heads=32, kv_heads=4, head_dim=128)
CARD = torch.device("cuda", 0)
EVERY = ["norms", "activation", "rotation", "attention"]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """One where everything compiles."""
    monkeypatch.setattr(fused, "problem", lambda device: None)
    monkeypatch.setattr(paged_attention, "has_tensor_cores", lambda device: True)
    monkeypatch.setattr(paged_attention, "load_problem", lambda load, *arguments: None)
    monkeypatch.setattr(paged_attention, "find_refusal", paged_attention.find_refusal.__wrapped__)


def test_a_cpu_has_no_kernels() -> None:
    status = kernel_status(LLAMA, torch.bfloat16, torch.bfloat16, torch.device("cpu"))
    assert status["own"] == []
    assert status["plain_torch"] == dict.fromkeys(EVERY, "not on a card of sm_80 or later")


@pytest.mark.usefixtures("card")
def test_every_operation_of_a_llama_has_its_kernel() -> None:
    for kv_dtype in (torch.bfloat16, torch.float8_e4m3fn):
        assert kernel_status(LLAMA, torch.bfloat16, kv_dtype, CARD) == {"own": EVERY, "plain_torch": {}}


@pytest.mark.usefixtures("card")
def test_what_no_kernel_takes_is_named() -> None:
    odd = LayerSizes(hidden_size=16392, heads=3, kv_heads=1, head_dim=80)
    status = kernel_status(odd, torch.bfloat16, torch.bfloat16, CARD)
    assert status == {"own": ["activation", "rotation"], "plain_torch": {
        "norms": "rows of 16392", "attention": "heads of 80"
    }}  # fmt: skip
    wide = kernel_status(LLAMA, torch.float32, torch.float32, CARD)
    assert wide["own"] == [] and set(wide["plain_torch"].values()) == {"activations in float32"}


@pytest.mark.usefixtures("card")
def test_a_step_of_any_number_of_rows_has_its_attention() -> None:
    """Trees of many sequences: in plain torch they would take memory that nobody has counted on."""
    query, keys = torch.empty(32 * 256, 8, 64, dtype=torch.bfloat16), torch.empty(1, 8, 64, 64, dtype=torch.bfloat16)
    assert paged_attention.refusal(query, keys) is None


@pytest.mark.usefixtures("card")
def test_a_rank_without_heads_has_no_attention() -> None:
    assert kernel_status(LayerSizes(8192, 0, 0, 128), torch.bfloat16, torch.bfloat16, CARD) == {
        "own": ["norms", "activation"],
        "plain_torch": {},
    }
