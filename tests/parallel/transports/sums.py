"""What every rank must get of an all-reduce."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def ordered_sum(values: Sequence[Tensor]) -> Tensor:
    """The sum that every rank must get, bit for bit: in float32, in rank order, rounded once."""
    total = values[0].float()
    for value in values[1:]:
        total = total + value.float()
    return total.to(values[0].dtype)
