"""To what weights are rounded."""

from __future__ import annotations

from enum import Enum


class QuantizeKind(str, Enum):
    """To what the linears of a bf16, fp16 or fp32 checkpoint are rounded while it loads."""

    none = "none"
    int4 = "int4"
    int8 = "int8"
    fp8 = "fp8"
