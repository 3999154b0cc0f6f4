"""Rounds weights to 4 or 8 bits on the device they are on, one tensor at a time, while a checkpoint loads.

Every step is elementwise or exact, so that a group's result depends on nothing but the group: not on the shape of the
slice, the number of ranks, or the device. On a card one kernel takes the same steps (kernels/round_groups.cu).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.checkpoint.quantize_schemes import ROUNDED_AT_A_TIME
from parallel.formats.scheme import Box, Scheme
from parallel.kernels import round_groups
from parallel.kernels.round_groups import FLOAT8_MAX, LEAST_SCALE, RANGES
from parallel.quantized import QuantizedWeight

Rounded = tuple[Tensor, Tensor, Tensor | None]


def quantize_weight(weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    """[out, in] in any floating dtype -> its nearest weight in `scheme`, with bf16 scales, on the same device.

    The first group begins with the first input; the last one may be short.
    """
    num_out, num_in = weight.shape
    group_size = scheme.group_size or max(num_in, 1)
    num_groups = max(1, -(-num_in // group_size))
    dtype, device = torch.float8_e4m3fn if scheme.is_float else torch.uint8, weight.device
    values = torch.empty(num_out, num_in, dtype=dtype, device=device)
    scales = torch.empty(num_out, num_groups, dtype=torch.bfloat16, device=device)
    zeros = torch.empty(num_out, num_groups, dtype=torch.uint8, device=device) if scheme.has_zeros else None
    round_all = round_groups.run if round_groups.takes(weight, scheme) else round_by_blocks
    round_all(weight, values, scales, zeros, scheme)
    return QuantizedWeight(values, scheme.bits, scales, zeros, group_size)


def round_by_blocks(weight: Tensor, values: Tensor, scales: Tensor, zeros: Tensor | None, scheme: Scheme) -> None:
    """Fills what `quantize_weight` returns; what a block takes beside it is ROUNDING_BYTES for each weight."""
    num_in, num_groups = weight.shape[1], scales.shape[1]
    group_size = scheme.group_size or max(num_in, 1)
    for rows in row_blocks(len(weight), num_groups * group_size):
        groups = split_groups(weight[rows].float(), num_groups, group_size)
        levels, scale, zero = rounding_of(scheme)(groups, scheme.bits)
        values[rows] = levels.flatten(1)[:, :num_in].to(values.dtype)
        scales[rows] = scale.squeeze(-1).to(scales.dtype)
        if zeros is not None and zero is not None:
            zeros[rows] = zero.squeeze(-1).to(zeros.dtype)


def split_groups(rows: Tensor, num_groups: int, group_size: int) -> Tensor:
    """[rows, in] -> [rows, groups, size]; zeros in a short last group change neither its range nor its error."""
    missing = num_groups * group_size - rows.shape[1]
    padded = F.pad(rows, (0, missing)) if missing else rows
    return padded.reshape(len(rows), num_groups, group_size)


def row_blocks(num_rows: int, num_columns: int) -> Iterator[slice]:
    block = max(1, ROUNDED_AT_A_TIME // max(num_columns, 1))
    return (slice(start, min(start + block, num_rows)) for start in range(0, num_rows, block))


def rounding_of(scheme: Scheme) -> Callable[[Tensor, int], Rounded]:
    if scheme.is_float:
        return round_float8
    return round_with_zeros if scheme.has_zeros else round_symmetric


def round_with_zeros(groups: Tensor, bits: int) -> Rounded:
    """float32 [rows, groups, size] -> levels of the same shape, and scale and zero of each group.

    Of `RANGES`, each group takes the one with the least squared error.
    """
    low, high = groups.amin(-1, keepdim=True).clamp_(max=0), groups.amax(-1, keepdim=True).clamp_(min=0)
    best = grid(low, high, bits)
    least = squared_error(groups, *best, bits)
    for share in RANGES[1:]:
        scale, zero = grid(low * share, high * share, bits)
        error = squared_error(groups, scale, zero, bits)
        better = error < least
        best = torch.where(better, scale, best[0]), torch.where(better, zero, best[1])
        least = torch.where(better, error, least)
    return levels_of(groups, *best, bits), *best


def grid(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale, as bf16 holds it, and zero of 2**bits levels from `low` to `high`."""
    largest = 2**bits - 1
    scale = as_stored(divide(high - low, largest))
    return scale, (-low / scale).round_().clamp_(0, largest)


def divide(values: Tensor, by: float) -> Tensor:
    """The nearest quotients: by a number that is no tensor, cards multiply by its rounded inverse."""
    return values / torch.full_like(values, by)


def levels_of(groups: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return (groups / scale).add_(zero).round_().clamp_(0, 2**bits - 1)


def squared_error(groups: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """[rows, groups, 1]"""
    return halving_sum(levels_of(groups, scale, zero, bits).sub_(zero).mul_(scale).sub_(groups).square_())


def halving_sum(values: Tensor) -> Tensor:
    """Over the last dimension, in an order that depends on its size only; torch's own depends on the whole shape."""
    while values.shape[-1] > 1:
        half, odd = divmod(values.shape[-1], 2)
        sums = values[..., :half] + values[..., half : 2 * half]
        if odd:
            sums[..., :1] += values[..., -1:]
        values = sums
    return values


def round_symmetric(groups: Tensor, bits: int) -> Rounded:
    """Levels around a zero in the middle, as many on either side."""
    middle = 2 ** (bits - 1)
    scale = as_stored(divide(groups.abs().amax(-1, keepdim=True), middle - 1))
    return (groups / scale).round_().clamp_(1 - middle, middle - 1).add_(middle), scale, None


def round_float8(groups: Tensor, bits: int) -> Rounded:
    """The largest weight of a group becomes the largest e4m3 number."""
    scale = as_stored(divide(groups.abs().amax(-1, keepdim=True), FLOAT8_MAX))
    return (groups / scale).clamp_(-FLOAT8_MAX, FLOAT8_MAX), scale, None


def as_stored(scale: Tensor) -> Tensor:
    return scale.clamp_(min=LEAST_SCALE).bfloat16().float()


def cut_inputs(weight: QuantizedWeight, wide: Box, box: Box) -> QuantizedWeight:
    """The inputs of `box` out of a weight that has those of `wide`, which begins with a whole group."""
    if wide == box:
        return weight
    first, end = (edge - wide.inputs[0] for edge in box.inputs)
    group_of = weight.groups()[first:end]
    return QuantizedWeight(
        weight.values[:, first:end].contiguous(), weight.bits, weight.scales, weight.zeros, weight.group_size, group_of
    )
