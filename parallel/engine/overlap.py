"""A pass of many tokens in two halves, so that the all-reduces of one go on while the card computes the other.

The halves take turns in each layer: one is through attention, or the MLP, and its sum is on its way, while the other
goes through the same. Both are multiplied by the same dequantised block of a weight before the next is made.

In a layer, with A and B for the halves, > for a sum that is started and < for one that is waited for:
  make o and q, k, v; <A norm, q k v, attention, o >A; <B norm, q k v, attention, o >B
  gate and up: make a block; <A norm, product A; more blocks and products A, while B's sum is on its way (`num_ahead`);
    <B norm, product B; each other block: make it, product of both; those that A had alone again: make, product B
  activation of both
  down, of few rows: each block but the last: make it, product of both, >both; the last: make it, product A >A, B >B
  down, of many: each block: make it, product A >A, product B; then >B
B may attend to tokens in A, which are cached by then; A, whose tokens come first, never to those in B.

Why so: sums of o have nothing beside them but products that need them, hence what A does ahead; those of down, whose
columns are ready one block after the other, go on beside the blocks after them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from parallel.engine.decoder import Attend, Decoder, Tokens
from parallel.engine.pages import PagedKV
from parallel.engine.side_stream import SideStream, Sum, side_stream
from parallel.kernels.blocks import products, products_ahead, products_at_once
from parallel.kernels.fused import add_rms_norm, rms_norm, silu_mul

# (rows of the first half, blocks of gate and up that it is multiplied by before the sum of the second is waited for).
# Where memory is stacked on the chip, products and dequantising are so fast, and the link between cards so slow beside
# them, that some blocks take no longer than the sum. By the rates of an H200, in a 70B in 4 bits at TP2, a block of 33
# million weights takes 23 us to dequantise and 19, 36 and 70 us to multiply by 256, 512 and 1024 rows, whose sums take
# 140, 280 and 520. On an RTX 4090, at 160 us to dequantise and 110 us for 256 rows, one block is best.
AHEAD = ((256, 3), (512, 4))
MOST_AHEAD = 5
# From so many rows of the first half on, its columns are summed up before all of the second's. Below, both halves are
# multiplied by a block of down, and summed up, at once, which costs less.
MIN_ROWS_APART = 512
STACKED_MEMORY = ((8, 0), (9, 0), (10, 0), (10, 3))


@cache
def num_ahead(device: torch.device, num_rows: int) -> int:
    """Of AHEAD, on this device."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) not in STACKED_MEMORY:
        return 1
    return next((blocks for most, blocks in AHEAD if num_rows <= most), MOST_AHEAD)


@dataclass(frozen=True)
class Columns:
    """Neighbouring columns of a half's update: some rows of what is being summed up."""

    sum: Sum
    rows: slice

    def wait(self) -> Tensor:
        return self.sum.wait()[self.rows]


@dataclass
class Half:
    """Some tokens of a pass: their rows, their residual stream, and what is to be added to it, left to right."""

    tokens: Tokens
    rows: slice
    residual: Tensor
    update: list[Columns] = field(default_factory=list)
    # Added to the sum once, on each rank.
    bias: Tensor | None = None

    def normed(self, weight: Tensor, eps: float) -> Tensor:
        """Adds the update, when it has come; the norm of the sum."""
        if not self.update:
            return rms_norm(self.residual, weight, eps)
        return add_rms_norm(self.take_update(), self.residual, weight, eps)

    def take_update(self) -> Tensor:
        assert self.update
        columns = [each.wait() for each in self.update]
        self.update = []
        update = torch.cat(columns, dim=1) if len(columns) > 1 else columns[0]
        return update if self.bias is None else update.add_(self.bias)


def cut_in_halves(tokens: Tokens, residual: Tensor, cut: int) -> list[Half]:
    """The first `cut` tokens, and the others; `residual` [tokens, hidden]."""
    parts = slice(0, cut), slice(cut, len(residual))
    return [Half(tokens[rows], rows, residual[rows]) for rows in parts]


def run_in_halves(
    decoder: Decoder, tokens: Tokens, cut: int, attends: Sequence[Attend], caches: Sequence[PagedKV]
) -> Tensor:
    """[tokens, hidden]: what `decoder` gives. `attends`: that of the first `cut` tokens, and of the others."""
    residual: Tensor = decoder.model.model.embed_tokens(tokens.ids)
    run = PassInHalves(decoder, cut_in_halves(tokens, residual, cut))
    try:
        for layer, cache in zip(decoder.layers(len(residual)), caches, strict=True):
            attended = (
                attend(query, cache) if decoder.num_heads else query
                for attend, query in zip(attends, run.queries(layer, cache), strict=True)
            )
            run.after_attention(layer, (each.flatten(1) for each in attended))
        run.finish()
    finally:
        # Whatever was raised, memory that is still summed up must not be used again before that is done.
        run.side.join()
    return residual


class PassInHalves:
    """Products are asked for, and so queued, one after the other as the next step of a half wants them."""

    def __init__(self, decoder: Decoder, halves: Sequence[Half]) -> None:
        self.decoder, self.halves = decoder, halves
        residual = halves[0].residual
        self.side: SideStream = side_stream(residual.device)
        self.dtype, self.num_ahead = residual.dtype, num_ahead(residual.device, len(residual))

    def queries(self, layer: Any, cache: PagedKV) -> Iterator[Tensor]:
        """Of each half, once its keys and values are cached: [tokens, local heads, head_dim]."""
        attention, normed = layer.self_attn, self.normed(layer.input_layernorm)
        if self.decoder.num_heads == 0:
            return (rows.new_empty(len(rows), 0, self.decoder.head_dim) for rows in normed)
        qkv = products_at_once(attention.qkv.blocks(self.dtype), normed)
        return (
            self.decoder.rotate(attention, rows, half.tokens, cache)
            for half, rows in zip(self.halves, qkv, strict=True)
        )

    def after_attention(self, layer: Any, attended: Iterable[Tensor]) -> None:
        """The rest of a layer, from [tokens, local heads * head_dim] of each half on."""
        self.start_sums(layer.self_attn.o_proj, attended)
        normed = self.normed(layer.post_attention_layernorm)
        first, second = (len(half.residual) for half in self.halves)
        gate_up = products_ahead(layer.mlp.gate_up.blocks(self.dtype), normed, (first, second), self.num_ahead)
        self.start_column_sums(layer.mlp.down_proj, silu_mul(gate_up))

    def finish(self) -> None:
        for half in self.halves:
            half.residual.add_(half.take_update())

    def normed(self, norm: Any) -> Iterator[Tensor]:
        return (half.normed(norm.weight, self.decoder.eps) for half in self.halves)

    def start_sums(self, linear: Any, inputs: Iterable[Tensor]) -> None:
        """Multiplies each half's input by a row-parallel linear, and starts its sum at once."""
        for half, update in zip(self.halves, products(linear.blocks(self.dtype), inputs), strict=True):
            half.update = [Columns(self.side.start_all_reduce(linear.communicator, update), slice(None))]
            half.bias = self.lasting(linear.bias)

    def start_column_sums(self, linear: Any, rows: Tensor) -> None:
        """Multiplies `rows` of both halves by a row-parallel linear; starts each sum once its columns are there."""
        start = partial(self.side.start_all_reduce, linear.communicator)
        if len(self.halves[0].residual) >= MIN_ROWS_APART:
            self.start_sums_apart(linear, rows, start)
        else:
            self.start_sums_at_once(linear, rows, start)
        for half in self.halves:
            half.bias = self.lasting(linear.bias)

    def start_sums_apart(self, linear: Any, rows: Tensor, start: Callable[[Tensor], Sum]) -> None:
        """Those of the second half after those of the first."""
        first, second = self.halves
        output = torch.empty_like(second.residual)
        for block in linear.blocks(self.dtype):
            weight = block.weight()
            first.update.append(Columns(start(block.product(rows[first.rows], weight)), slice(None)))
            block.multiply(rows[second.rows], weight, output)
            del weight
        second.update = [Columns(start(output), slice(None))]

    def start_sums_at_once(self, linear: Any, rows: Tensor, start: Callable[[Tensor], Sum]) -> None:
        """Those of both halves together, but for the last columns."""
        *blocks, last = linear.blocks(self.dtype)
        sums = [start(block.product(rows, block.weight())) for block in blocks]
        weight = last.weight()
        for half in self.halves:
            own = start(last.product(rows[half.rows], weight))
            half.update = [*(Columns(each, half.rows) for each in sums), Columns(own, slice(None))]

    def lasting(self, bias: Tensor | None) -> Tensor | None:
        """A bias of a streamed layer, which is added in the next: another layer may lie in its place by then."""
        return bias if bias is None or self.decoder.streamer is None else bias.clone()
