"""Packed linears of one input (q, k and v; gate and up) joined into one, for one launch instead of several."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from parallel.kernels.dequantize import DequantizeLinear
from parallel.kernels.host_int4 import HostInt4Linear
from parallel.kernels.tinygemm import TinygemmLinear
from parallel.kernels.w4a16 import W4A16Linear
from parallel.kernels.w8a16 import W8A16Linear

# Of each class the buffers that hold outputs, and the dimension they lie along; all else must be alike.
JOINED: dict[type[nn.Module], dict[str, int]] = {
    W4A16Linear: {"packed": 0, "scales": 0},
    W8A16Linear: {"packed": 0, "scales": 0},
    TinygemmLinear: {"packed": 0, "scales_and_shifts": 1},
    HostInt4Linear: {"packed": 0, "scales_and_shifts": 1},
    DequantizeLinear: {"values": 0, "scales": 0, "zeros": 0},
}
# Plain attributes that a sum replaces.
SUMMED = ("num_out",)


def merge(layers: list[nn.Module]) -> nn.Module | None:
    """One linear whose outputs are those of `layers`, one after the other; None where they cannot be joined.

    They can where they are of one class and take their inputs in one order and in equal groups. The originals stay as
    they are; the joined one holds copies, so that both exist until the originals are dropped.
    """
    first = layers[0]
    joined = JOINED.get(type(first))
    if joined is None or not all(joinable(first, layer, joined) for layer in layers[1:]):
        return None
    merged = copy.copy(first)
    # A shallow copy of a module shares its dict of buffers.
    merged._buffers = {name: join_buffers(layers, name, joined.get(name)) for name in first._buffers}
    for name in SUMMED:
        if name in vars(first):
            setattr(merged, name, sum(getattr(layer, name) for layer in layers))
    return merged


def joinable(first: nn.Module, other: nn.Module, joined: dict[str, int]) -> bool:
    if type(first) is not type(other) or settings(first) != settings(other):
        return False
    return all(same_buffer(first._buffers[name], other._buffers[name], joined.get(name)) for name in first._buffers)


def settings(layer: nn.Module) -> dict[str, Any]:
    """What a layer was given beside its buffers."""
    return {name: value for name, value in vars(layer).items() if not name.startswith("_") and name not in SUMMED}


def same_buffer(first: Tensor | None, other: Tensor | None, dim: int | None) -> bool:
    """Alike but for the length along `dim`; where there is none, equal."""
    if first is None or other is None:
        return first is other
    if dim is None:
        return torch.equal(first, other)
    shapes = [[*tensor.shape[:dim], *tensor.shape[dim + 1 :]] for tensor in (first, other)]
    return shapes[0] == shapes[1] and first.dtype == other.dtype


def join_buffers(layers: list[nn.Module], name: str, dim: int | None) -> Tensor | None:
    tensors = [layer._buffers[name] for layer in layers]
    if dim is None or tensors[0] is None:
        return tensors[0]
    return torch.cat([tensor for tensor in tensors if tensor is not None], dim)
