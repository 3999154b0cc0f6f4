"""Descriptions of tensors for the card's copies: what the driver is told. The copies themselves need a card."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from parallel.kernels import tensor_map
from parallel.kernels.tensor_map import ALIGNMENT, MAP_BYTES, describe_boxes


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []

    def encode(target: Any, kind: int, rank: int, address: Any, *others: Any) -> int:
        sizes, strides, box, steps, interleave, swizzle, _, fill = others
        assert target.value % ALIGNMENT == 0
        ctypes.memset(target, len(seen) + 1, MAP_BYTES)
        seen.append({"kind": kind, "address": address.value, "sizes": list(sizes), "strides": list(strides),
                     "box": list(box), "swizzle": swizzle})  # fmt: skip
        assert (rank, list(steps), interleave, fill) == (2, [1, 1], 0, 0)
        return 0

    monkeypatch.setattr(tensor_map, "open_driver", lambda: SimpleNamespace(cuTensorMapEncodeTiled=encode))
    tensor_map.encode.cache_clear()
    return seen


def test_columns_come_first_and_rows_are_as_far_apart_as_they_lie(calls: list[dict[str, Any]]) -> None:
    rows = torch.zeros(40, 256, dtype=torch.bfloat16)
    found = describe_boxes(rows, (32, 64), 2, swapped=True)
    assert found == bytes([1]) * MAP_BYTES
    kind, swizzle = 9, 3
    assert calls == [{"kind": kind, "address": rows.data_ptr(), "sizes": [256, 40], "strides": [512], "box": [64, 32],
                      "swizzle": swizzle}]  # fmt: skip


def test_all_dimensions_but_the_first_are_one_row(calls: list[dict[str, Any]]) -> None:
    packed = torch.zeros(5, 3, 2, 32, 4, dtype=torch.int32)
    describe_boxes(packed, (16, 128), 8)
    assert (calls[0]["sizes"], calls[0]["strides"], calls[0]["box"]) == ([3 * 128, 5], [3 * 1024], [128, 16])
    assert (calls[0]["kind"], calls[0]["swizzle"]) == (4, 0)


def test_the_driver_is_asked_once_for_each_tensor_and_box(calls: list[dict[str, Any]]) -> None:
    rows = torch.zeros(4, 64, dtype=torch.bfloat16)
    assert describe_boxes(rows, (8, 64), 2) == describe_boxes(rows, (8, 64), 2)
    assert describe_boxes(rows, (16, 64), 2) != describe_boxes(rows[:2], (8, 64), 2)
    assert len(calls) == 3


def test_tensors_that_the_card_cannot_copy_are_programming_errors() -> None:
    with pytest.raises(AssertionError):
        describe_boxes(torch.zeros(4, 128, dtype=torch.bfloat16)[:, :64], (8, 64), 2)
    with pytest.raises(AssertionError):
        describe_boxes(torch.zeros(5, dtype=torch.bfloat16)[1:].view(1, 4), (8, 4), 2)
