"""A pass of many tokens in two halves, so that the all-reduces of one go on while the card computes the other.

The halves take turns in each layer: one is through attention, or the MLP, and its sum is on its way, while the other
goes through the same. Both are multiplied by the same dequantised block of a weight before the next is made.

In a layer, with A and B for the halves, > for a sum that is started and < for one that is waited for:
  make o and q, k, v; <A norm, q k v, attention, o >A; <B norm, q k v, attention, o >B
  for each block of gate and up: make it; <A norm, product A; <B norm, product B
  activation of both; for each block of down: make it; product A (the last >A); product B (the last >B)
B may attend to tokens in A, which are cached by then; A, whose tokens come first, never to those in B.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parallel.engine.decoder import Attend, Decoder, Tokens
from parallel.engine.pages import PagedKV
from parallel.engine.side_stream import SideStream, Sum, side_stream
from parallel.kernels.blocks import products
from parallel.kernels.fused import add_rms_norm, rms_norm, silu_mul


@dataclass
class Half:
    """Some tokens of a pass: their residual stream, and what is to be added to it."""

    tokens: Tokens
    attend: Attend
    residual: Tensor
    update: Sum | None = None
    # Added to the sum once, on each rank.
    bias: Tensor | None = None

    def normed(self, weight: Tensor, eps: float) -> Tensor:
        """Adds the update, when it has come; the norm of the sum."""
        if self.update is None:
            return rms_norm(self.residual, weight, eps)
        return add_rms_norm(self.take_update(), self.residual, weight, eps)

    def take_update(self) -> Tensor:
        assert self.update is not None
        update, self.update = self.update.wait(), None
        return update if self.bias is None else update.add_(self.bias)


def run_in_halves(decoder: Decoder, halves: Sequence[tuple[Tokens, Attend]], caches: Sequence[PagedKV]) -> Tensor:
    """[tokens, hidden]: what `decoder` gives for the tokens of all `halves`, one after the other."""
    residual: Tensor = decoder.model.model.embed_tokens(torch.cat([tokens.ids for tokens, _ in halves]))
    rows = residual.split([len(tokens.ids) for tokens, _ in halves])
    run = PassInHalves(decoder, [Half(*half, part) for half, part in zip(halves, rows, strict=True)])
    try:
        for layer, cache in zip(decoder.layers(), caches, strict=True):
            run.attention(layer, cache)
            run.mlp(layer)
        for half in run.halves:
            half.residual.add_(half.take_update())
    finally:
        # Whatever was raised, memory that is still summed up must not be used again before that is done.
        run.side.join()
    return residual


class PassInHalves:
    """Products are asked for, and so queued, one after the other as the next step of a half wants them."""

    def __init__(self, decoder: Decoder, halves: Sequence[Half]) -> None:
        self.decoder, self.halves = decoder, halves
        self.side: SideStream = side_stream(halves[0].residual.device)
        self.dtype = halves[0].residual.dtype

    def attention(self, layer: Any, cache: PagedKV) -> None:
        attention, normed = layer.self_attn, self.normed(layer.input_layernorm)
        if self.decoder.num_heads == 0:
            attended: Iterator[Tensor] = (rows.new_empty(len(rows), 0) for rows in normed)
        else:
            qkv = products(attention.qkv.blocks(self.dtype), normed)
            attended = (
                half.attend(self.decoder.rotate(attention, rows, half.tokens, cache), cache).flatten(1)
                for half, rows in zip(self.halves, qkv, strict=True)
            )
        self.start_sums(attention.o_proj, attended)

    def mlp(self, layer: Any) -> None:
        gate_up = products(layer.mlp.gate_up.blocks(self.dtype), self.normed(layer.post_attention_layernorm))
        # Not one by one as they are asked for: a block of down_proj would be held beside those of gate_up.
        self.start_sums(layer.mlp.down_proj, [silu_mul(rows) for rows in gate_up])

    def normed(self, norm: Any) -> Iterator[Tensor]:
        return (half.normed(norm.weight, self.decoder.eps) for half in self.halves)

    def start_sums(self, linear: Any, inputs: Iterable[Tensor]) -> None:
        """Multiplies each half's input by a row-parallel linear, and starts its sum at once."""
        for half, update in zip(self.halves, products(linear.blocks(self.dtype), inputs), strict=True):
            half.update = self.side.start_all_reduce(linear.communicator, update)
            half.bias = self.lasting(linear.bias)

    def lasting(self, bias: Tensor | None) -> Tensor | None:
        """A bias of a streamed layer, which is added in the next: another layer may lie in its place by then."""
        return bias if bias is None or self.decoder.streamer is None else bias.clone()
