"""One rank's part of a quantised linear, whatever format it came in: the form between readers and kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parallel.footprint import BLOCK_ELEMENTS


@dataclass(frozen=True)
class QuantizedWeight:
    """weight[o, i] = (values[o, i] - zeros[o, g]) * scales[o, g], where g is the group of input i.

    With a codebook, weight[o, i] = codebook[values[o, i]] * scales[o, g].

    Shapes and dtypes:
        values: [out, in], uint8 from 0 to 2**bits - 1; or float8_e4m3fn, which has no zeros.
        scales: [out, groups], floating point. One group may stand for all inputs.
        zeros: [out, groups] uint8; None means 2**(bits - 1) everywhere, the middle.
        group_of: [in] int64, each input's group; None means `group_size` neighbours from the first input on.
        codebook: [2**bits] float32; there are no zeros then.
    """

    values: Tensor
    bits: int
    scales: Tensor
    zeros: Tensor | None
    group_size: int
    group_of: Tensor | None = None
    codebook: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        num_out, num_in = self.values.shape
        return num_out, num_in

    @property
    def is_float(self) -> bool:
        return self.values.is_floating_point()

    def groups(self) -> Tensor:
        """[in] int64: the group of each input."""
        if self.group_of is not None:
            return self.group_of
        return torch.arange(self.shape[1], device=self.values.device) // self.group_size

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[out, in]: computed in float32 (or float64, if asked for) and rounded once, to `dtype`."""
        return by_blocks(self.shape, dtype, self.values.device, lambda rows: self[rows].whole(dtype))

    def __getitem__(self, rows: slice) -> QuantizedWeight:
        """Some of the outputs."""
        zeros = None if self.zeros is None else self.zeros[rows]
        return replace(self, values=self.values[rows], scales=self.scales[rows], zeros=zeros)

    def whole(self, dtype: torch.dtype) -> Tensor:
        """All at once, in float32 or, if `dtype` is that, float64."""
        wide = torch.promote_types(dtype, torch.float32)
        weight = self.centred(wide)
        weight *= self.spread(self.scales.to(wide))
        return weight

    def centred(self, dtype: torch.dtype) -> Tensor:
        """[out, in]: the weight before scales."""
        if self.codebook is not None:
            # int32 takes half of what int64 does.
            return self.codebook.to(dtype).index_select(0, self.values.flatten().int()).view(self.shape)
        weight = self.values.to(dtype)
        if self.zeros is not None:
            weight -= self.spread(self.zeros.to(dtype))
        elif not self.is_float:
            weight -= 2 ** (self.bits - 1)
        return weight

    def spread(self, per_group: Tensor) -> Tensor:
        """[rows, groups] -> [rows, in], or [rows, 1] where one group has all inputs."""
        if per_group.shape[1] == 1:
            return per_group
        num_in = self.shape[1]
        if self.group_of is None and num_in == per_group.shape[1] * self.group_size:
            return per_group.repeat_interleave(self.group_size, dim=1)
        return per_group[:, self.groups()]


def by_blocks(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, make: Callable[[slice], Tensor], step: int = 1
) -> Tensor:
    """[rows, columns] of `dtype`, filled by `make(rows)` a block of about BLOCK_ELEMENTS at a time.

    Args:
        step: blocks begin at multiples of this many rows.
    """
    filled = torch.empty(shape, dtype=dtype, device=device)
    for rows in row_blocks(*shape, step):
        filled[rows] = make(rows)
    return filled


def row_blocks(num_rows: int, num_columns: int, step: int = 1) -> Iterator[slice]:
    """Rows a block of about BLOCK_ELEMENTS at a time; each begins at a multiple of `step`."""
    block = max(1, BLOCK_ELEMENTS // max(num_columns * step, 1)) * step
    return (slice(start, min(start + block, num_rows)) for start in range(0, num_rows, block))
