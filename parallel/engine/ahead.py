"""Which weights each part of a layer may bring into the cache for the linear after it, in a decode step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from parallel.kernels import prefetch
from parallel.kernels.prefetch import Ahead


@dataclass(frozen=True)
class LayerAhead:
    """The beginnings of the output projection, gate and up, down, and of what follows the layer."""

    output: Ahead = ()
    gate_up: Ahead = ()
    down: Ahead = ()
    following: Ahead = ()


def look_ahead(layers: Sequence[Any], head: nn.Module, num_rows: int, device: torch.device) -> Iterator[LayerAhead]:
    """One for each of a model's merged layers, whose last is followed by `head`, in a step of `num_rows`.

    On a card only while a step is captured: passes that are not have many rows, and their time is the host's.
    """
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        yield from (LayerAhead() for _ in layers)
        return
    following = [*(layer.self_attn.qkv for layer in layers[1:]), head]
    sizes = {place: prefetch.idle_bytes(place, num_rows, device) for place in prefetch.IDLE_US}
    for layer, after in zip(layers, following, strict=True):
        yield LayerAhead(
            output=begin(layer.self_attn.o_proj, sizes["rotation"], device),
            gate_up=begin(layer.mlp.gate_up, sizes["all_reduce"], device),
            down=begin(layer.mlp.down_proj, sizes["activation"], device),
            following=begin(after, sizes["all_reduce"], device),
        )


def begin(linear: Any, num_bytes: int, device: torch.device) -> Ahead:
    """Nothing of what lies elsewhere than on `device`."""
    weight = linear.stored() if num_bytes else ()
    return prefetch.beginning(weight, num_bytes) if all(each.device == device for each in weight) else ()
