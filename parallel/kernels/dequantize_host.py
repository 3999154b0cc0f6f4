"""Weights packed for the host (host_int4.py) in bf16 on a card (dequantize_host.cu)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from parallel.kernels.launch import Kernel, load_kernel, load_problem
from parallel.kernels.tiles import FOLDER

# Of a block, as in the source.
THREADS = 256
# The weight, its scales, the result; inputs, outputs, all outputs that have scales, inputs of a group.
PARAMETERS = "PPPiiii"


def run(packed: Tensor, scales_and_shifts: Tensor, outputs: slice, group_size: int, block: int) -> Tensor:
    """[outputs, in] bf16, in which outputs lie side by side; `packed` and `scales_and_shifts` are of all outputs."""
    num_in, num_out = packed.shape[1] * 2, outputs.stop - outputs.start
    weight = torch.empty(num_in, num_out, dtype=torch.bfloat16, device=packed.device)
    kernel = compile_kernel(block, packed.device.index)
    grid = (num_out // block, num_in // group_size, 1)
    first = scales_and_shifts[:, outputs]
    kernel(grid, THREADS, packed[outputs], first, weight, num_in, num_out, len(packed), group_size)
    return weight.t()


def problem(block: int, device_index: int) -> str | None:
    """Why it cannot be; None: it can."""
    return load_problem(compile_kernel, block, device_index)


@cache
def compile_kernel(block: int, device_index: int) -> Kernel:
    options = (f"-DBLOCK={block}",)
    return load_kernel(FOLDER / "dequantize_host.cu", "dequantize_host", options, PARAMETERS, device_index)
