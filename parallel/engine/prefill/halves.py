"""A pass in two halves, each dequantised block of a weight made once for both.

The halves take turns in each layer: one is through attention, or the MLP, and its sum is on its way, while the other
goes through the same.

In a layer, with A and B for the halves, > for a sum that is started and < for one that is waited for:
  make o and q, k, v; <A norm, q k v, attention, o >A; <B norm, q k v, attention, o >B
  gate and up: make a block; <A norm, product A; more blocks and products A, while B's sum is on its way (`num_ahead`);
    <B norm, product B; each other block: make it, product of both; those that A had alone again: make, product B
  activation of both
  down, of few rows: each block but the last: make it, product of both, >both; the last: make it, product A >A, B >B
  down, of many: each block: make it, product A >A, product B; then >B

Why so: sums of o have nothing beside them but products that need them, hence what A does ahead; those of down, whose
columns are ready one block after the other, go on beside the blocks after them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from parallel.engine.decoder import Decoder
from parallel.engine.prefill.overlap import ALL, Columns, Joined, PassInSections
from parallel.engine.prefill.side_stream import Sum
from parallel.kernels.blocks import products, products_ahead, products_at_once
from parallel.kernels.fused import silu_mul
from parallel.kernels.pages import PagedKV

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


class PassInHalves(PassInSections):
    """Products are asked for, and so queued, one after the other as the next step of a half wants them."""

    def __init__(self, decoder: Decoder, joined: Sequence[Joined]) -> None:
        super().__init__(decoder, joined)
        first, second = self.sections
        residual = first.residual
        self.row_counts = len(residual), len(second.residual)
        self.dtype, self.num_ahead = residual.dtype, num_ahead(residual.device, len(residual))

    def queries(self, layer: Any, cache: PagedKV) -> Iterator[Tensor]:
        attention, normed = layer.self_attn, self.normed(layer.input_layernorm, self.sections)
        if self.decoder.num_heads == 0:
            return (rows.new_empty(len(rows), 0, self.decoder.head_dim) for rows in normed)
        qkv = products_at_once(attention.qkv.blocks(self.dtype), normed)
        return (
            self.decoder.queries_of_qkv(attention, rows, half.tokens, cache)
            for half, rows in zip(self.sections, qkv, strict=True)
        )

    def after_attention(self, layer: Any, attended: Iterable[Tensor]) -> None:
        output = layer.self_attn.o_proj
        self.sum_updates(output, products(output.blocks(self.dtype), attended))
        normed = self.normed(layer.post_attention_layernorm, self.sections)
        gate_up = products_ahead(layer.mlp.gate_up.blocks(self.dtype), normed, self.row_counts, self.num_ahead)
        self.start_column_sums(layer.mlp.down_proj, silu_mul(gate_up))

    def start_column_sums(self, linear: Any, rows: Tensor) -> None:
        """Multiplies `rows` of both halves by a row-parallel linear; starts each sum once its columns are there."""
        start = partial(self.side.start_all_reduce, linear.communicator)
        if self.row_counts[0] >= MIN_ROWS_APART:
            self.start_sums_apart(linear, rows, start)
        else:
            self.start_sums_at_once(linear, rows, start)
        for half in self.sections:
            half.bias = self.lasting(linear.bias)

    def start_sums_apart(self, linear: Any, rows: Tensor, start: Callable[[Tensor], Sum]) -> None:
        """Those of the second half after those of the first."""
        first, second = self.sections
        output = torch.empty_like(second.residual)
        for block in linear.blocks(self.dtype):
            weight = block.weight()
            first.update.append(Columns(start(block.product(rows[first.rows], weight)), ALL))
            block.multiply(rows[second.rows], weight, output)
            del weight
        second.update = [Columns(start(output), ALL)]

    def start_sums_at_once(self, linear: Any, rows: Tensor, start: Callable[[Tensor], Sum]) -> None:
        """Those of both halves together, but for the last columns."""
        *blocks, last = linear.blocks(self.dtype)
        sums = [start(block.product(rows, block.weight())) for block in blocks]
        weight = last.weight()
        for half in self.sections:
            own = start(last.product(rows[half.rows], weight))
            half.update = [*(Columns(each, half.rows) for each in sums), Columns(own, ALL)]
