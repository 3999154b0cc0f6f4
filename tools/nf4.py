"""Weights rounded to bitsandbytes' NF4: 16 numbers that halve the normal distribution into parts of equal weight.

Dettmers et al., QLoRA, 2023 (arXiv:2305.14314), section 3 and appendix E.
"""

import json
from typing import Any

import torch
from torch import Tensor

from parallel.checkpoint.formats.nf4 import STATE
from parallel.checkpoint.formats.scheme import NESTED_GROUP, TEXT_BYTES, Scheme

# Where the outermost quantiles are: the mean of 1 - 1/32 and 1 - 1/30, the outer halves of 16 and of 15 parts.
OUTERMOST = (2 - 1 / 32 - 1 / 30) / 2


def nf4_codebook() -> Tensor:
    """[16] float32, ascending, from -1 to 1: seven quantiles below zero, zero, eight above."""
    below = torch.special.ndtri(torch.linspace(OUTERMOST, 0.5, 8, dtype=torch.float64)[:-1])
    above = torch.special.ndtri(torch.linspace(OUTERMOST, 0.5, 9, dtype=torch.float64)[:-1])
    numbers = torch.cat([-below, torch.zeros(1, dtype=torch.float64), above.flip(0)])
    return (numbers / numbers.max()).float()


def nested_map() -> Tensor:
    """[256] float32: even steps. bitsandbytes has finer ones about zero; the file says which."""
    return torch.linspace(-1, 1, 256)


def pack_nf4(weight: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """The stored tensors of a linear, absmax quantised too; its inputs must fill blocks."""
    assert scheme.group_size is not None and scheme.nested_scales
    blocks = weight.unflatten(1, (-1, scheme.group_size))
    absmax = blocks.abs().amax(dim=2)
    offset = float(absmax.mean())
    nested, scales = nest(absmax, offset)
    codebook = nf4_codebook()
    values = nearest(blocks / scales.clamp(min=1e-12).unsqueeze(2), codebook).flatten()
    return nested | {
        "weight": ((values[::2] << 4) | values[1::2]).unsqueeze(1),
        "weight.quant_map": codebook,
        STATE: state_bytes(weight.shape, scheme, offset),
    }


def nest(absmax: Tensor, offset: float) -> tuple[dict[str, Tensor], Tensor]:
    """The stored tensors of [out, groups] scales, and the scales as they will be read."""
    flat = (absmax - offset).flatten()
    rows = torch.nn.functional.pad(flat, (0, -len(flat) % NESTED_GROUP)).unflatten(0, (-1, NESTED_GROUP))
    largest = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-12)
    index = nearest(rows / largest, nested_map())
    scales = (nested_map()[index.int()] * largest + offset).flatten()[: len(flat)].view_as(absmax)
    stored = {
        "weight.absmax": index.flatten()[: len(flat)],
        "weight.nested_absmax": largest.flatten(),
        "weight.nested_quant_map": nested_map(),
    }
    return stored, scales


def nearest(numbers: Tensor, table: Tensor) -> Tensor:
    """uint8: the index of the nearest entry of an ascending `table`."""
    return torch.bucketize(numbers, (table[1:] + table[:-1]) / 2, out_int32=True).to(torch.uint8)


def state_bytes(shape: tuple[int, ...], scheme: Scheme, offset: float) -> Tensor:
    """[TEXT_BYTES] uint8: JSON that ends in spaces, so that its length is known before the weights are."""
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": scheme.group_size,
        "dtype": "bfloat16",
        "shape": list(shape),
        "nested_blocksize": NESTED_GROUP,
        "nested_dtype": "float32",
        "nested_offset": offset,
    }
    return torch.tensor(list(json.dumps(state).encode().ljust(TEXT_BYTES)), dtype=torch.uint8)
