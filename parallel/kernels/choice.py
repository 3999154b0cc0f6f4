"""Which multiplication a quantised weight gets: the first of `KERNELS` that takes it, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from parallel.footprint import MIN_FUSED_ROWS, OWN_KERNELS
from parallel.kernels import dequantize, host_int4, tinygemm, w4a16, w8a16
from parallel.quantized import QuantizedWeight


@dataclass(frozen=True)
class Kernel:
    """`refusal` says why a kernel cannot take a weight (None: it can); `build` packs the weight for it.

    Those of OWN_KERNELS are also built with `max_rows`.
    """

    refusal: Callable[[QuantizedWeight, torch.dtype], str | None]
    build: Callable[..., nn.Module]


# Fastest first; the last one takes everything. parallel/footprint.py predicts what each holds.
KERNELS = {
    "w4a16": Kernel(w4a16.refusal, w4a16.W4A16Linear),
    "w8a16": Kernel(w8a16.refusal, w8a16.W8A16Linear),
    "tinygemm": Kernel(tinygemm.refusal, tinygemm.TinygemmLinear),
    "dequantize": Kernel(dequantize.refusal, dequantize.DequantizeLinear),
}


def choose_kernel(weight: QuantizedWeight, dtype: torch.dtype) -> tuple[str, str]:
    """The name of the kernel for activations of `dtype`, and the reason."""
    refusals: list[str] = []
    for name, kernel in KERNELS.items():
        why_not = kernel.refusal(weight, dtype)
        if why_not is None:
            return name, "; ".join(refusals) or "the fastest"
        refusals.append(f"not {name}: {why_not}")
    raise AssertionError(f"no kernel takes {weight.bits} bits; there are {', '.join(KERNELS)}")


def pack_linear(
    weight: QuantizedWeight, dtype: torch.dtype, *, on_host: bool = False, fused_rows: int = MIN_FUSED_ROWS
) -> tuple[nn.Module, str]:
    """The module that multiplies by `weight`, and a line that says which kernel it is and why.

    Args:
        on_host: the host is to multiply by it, if it can.
        fused_rows: up to so many rows our own kernels multiply by the packed weight; for more it is dequantised.
    """
    if on_host and host_int4.refusal(weight, dtype) is None:
        return host_int4.HostInt4Linear(weight), "host_int4 (of a layer that the host computes)"
    name, reason = choose_kernel(weight, dtype)
    options = {"max_rows": fused_rows} if name in OWN_KERNELS else {}
    return KERNELS[name].build(weight, **options), f"{name} ({reason})"
