"""Weights rounded to bitsandbytes' NF4, absmax quantised too."""

import json
from typing import Any

import torch
from torch import Tensor

from parallel.formats.nf4 import STATE, nf4_codebook
from parallel.formats.scheme import NESTED_GROUP, TEXT_BYTES, Scheme


def nested_map() -> Tensor:
    """[256] float32: even steps. bitsandbytes has finer ones about zero; the file says which."""
    return torch.linspace(-1, 1, 256)


def pack_nf4(weight: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """The stored tensors of a linear, whose inputs must fill blocks."""
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
