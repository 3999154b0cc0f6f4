"""Rounds weights on a card in one launch (round_groups.cu), where plain torch takes 164 for each 4 Mi of them."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from parallel.formats.scheme import Scheme
from parallel.kernels.launch import Kernel, has_tensor_cores, load_kernel, load_problem
from parallel.kernels.tiles import FOLDER, WARP

# Of a block, and inputs of a group, as in the source.
WARPS = 8
GROUP_SIZE = 128
# The numbers by which the source knows what weights may be stored in.
STORED = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
# The weight, its levels, scales and zeros; inputs, groups of a row, groups.
PARAMETERS = "PPPPiii"

# Shares of a group's range that are tried, the whole first: outliers are cut off where that lowers the squared error.
RANGES = (1.0, 0.95, 0.9, 0.85, 0.8)
FLOAT8_MAX = 448.0
# Scales of groups without a value above it.
LEAST_SCALE = 1e-10


def takes(weight: Tensor, scheme: Scheme) -> bool:
    """Whether weights of this kind can be rounded here."""
    if not has_tensor_cores(weight.device) or weight.dtype not in STORED or scheme.group_size != GROUP_SIZE:
        return False
    return weight.numel() > 0 and load_problem(compile_kernel, *kind_of(weight, scheme)) is None


def run(weight: Tensor, values: Tensor, scales: Tensor, zeros: Tensor | None, scheme: Scheme) -> None:
    """Fills what checkpoint/quantize.py returns: values [out, in], scales and zeros [out, groups]."""
    num_in, (num_out, groups_in_row) = weight.shape[1], scales.shape
    num_groups = num_out * groups_in_row
    kernel = compile_kernel(*kind_of(weight, scheme))
    sizes = num_in, groups_in_row, num_groups
    kernel((count_blocks(num_groups), 1, 1), WARPS * WARP, weight.contiguous(), values, scales, zeros, *sizes)


def count_blocks(num_groups: int) -> int:
    return -(-num_groups // WARPS)


def kind_of(weight: Tensor, scheme: Scheme) -> tuple[Scheme, torch.dtype, int]:
    return scheme, weight.dtype, weight.device.index


@cache
def compile_kernel(scheme: Scheme, stored: torch.dtype, device_index: int) -> Kernel:
    return load_kernel(FOLDER / "round_groups.cu", "round_groups", options_of(scheme, stored), PARAMETERS, device_index)


def options_of(scheme: Scheme, stored: torch.dtype) -> tuple[str, ...]:
    defined = {
        "BITS": scheme.bits,
        "HAS_ZEROS": int(scheme.has_zeros),
        "IS_FLOAT": int(scheme.is_float),
        "STORED": STORED[stored],
        "RANGES": ",".join(f"{share}f" for share in RANGES),
        "LEAST_SCALE": f"{LEAST_SCALE}f",
        "FLOAT8_MAX": f"{FLOAT8_MAX}f",
    }
    return tuple(f"-D{name}={value}" for name, value in defined.items())
