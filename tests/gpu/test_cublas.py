"""What torch gives cuBLAS on a card, beside what plans count for it."""

from __future__ import annotations

import pytest
import torch

from launcher.memory.layer import cublas_bytes

pytestmark = pytest.mark.gpu


def test_a_stream_takes_what_plans_count() -> None:
    weight = torch.randn(512, 512, dtype=torch.bfloat16, device="cuda")
    product = torch.empty_like(weight)
    with torch.cuda.stream(torch.cuda.Stream()):
        before = torch.cuda.memory_allocated()
        torch.mm(weight, weight, out=product)
        taken = torch.cuda.memory_allocated() - before
    capability = torch.cuda.get_device_capability()
    counted = cublas_bytes([capability])
    # Versions of torch differ in what they give later cards.
    assert taken == counted if capability <= (9, 0) else 0 < taken <= counted
