"""Products of several inputs with one weight that is made some outputs at a time: each block of it is made once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """Some outputs of a linear. `weight` makes their numbers, [outputs, in].

    `order` [in]: the input that each column multiplies; None where that is its own. `bias` [outputs], or None.
    """

    outputs: slice
    weight: Callable[[], Tensor]
    order: Tensor | None = None
    bias: Tensor | None = None

    def multiply(self, rows: Tensor, weight: Tensor, output: Tensor) -> None:
        """Writes the product of `rows` [m, in] with `weight`, as it was made, into its columns of `output` [m, out]."""
        part = output[:, self.outputs]
        torch.mm(rows if self.order is None else rows[:, self.order], weight.t(), out=part)
        if self.bias is not None:
            part.add_(self.bias)

    def product(self, rows: Tensor, weight: Tensor) -> Tensor:
        """[m, outputs] by itself."""
        num_out = len(weight)
        output = rows.new_empty(len(rows), num_out)
        replace(self, outputs=slice(0, num_out)).multiply(rows, weight, output)
        return output


def whole(weight: Tensor) -> list[Block]:
    """The block of a weight [out, in] that is at hand."""
    return [Block(slice(0, len(weight)), lambda: weight)]


def with_bias(blocks: Sequence[Block], bias: Tensor | None) -> list[Block]:
    """`bias` [out] added to the outputs."""
    return [replace(block, bias=None if bias is None else bias[block.outputs]) for block in blocks]


def side_by_side(linears: Iterable[Sequence[Block]]) -> list[Block]:
    """The outputs of one linear after those of another."""
    joined: list[Block] = []
    for blocks in linears:
        start = joined[-1].outputs.stop if joined else 0
        moved = (slice(start + block.outputs.start, start + block.outputs.stop) for block in blocks)
        joined += [replace(block, outputs=outputs) for block, outputs in zip(blocks, moved, strict=True)]
    return joined


def products(blocks: Sequence[Block], inputs: Iterable[Tensor]) -> Iterator[Tensor]:
    """The product of each of `inputs` [m, in] with a weight: [m, out] each, in their order.

    An input is asked for once the first block is made, and its product given as soon as the last block is queued: what
    is queued to compute an input, or with a product, comes before the products of the inputs after it. One block is
    held at a time.
    """
    num_out = blocks[-1].outputs.stop
    pending: Iterable[tuple[Tensor, Tensor]] = ((rows, rows.new_empty(len(rows), num_out)) for rows in inputs)
    for block in blocks[:-1]:
        pending = list(multiply_each(block, pending))
    for _, output in multiply_each(blocks[-1], pending):
        yield output


def multiply_each(block: Block, pending: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Writes the block's outputs of each (input, product), and gives them on."""
    weight = block.weight()
    for rows, output in pending:
        block.multiply(rows, weight, output)
        yield rows, output


def products_at_once(blocks: Sequence[Block], inputs: Iterable[Tensor]) -> Iterator[Tensor]:
    """As `products`, but each input is asked for after the product of the one before is given: all blocks are held."""
    weights = [block.weight() for block in blocks]
    for rows in inputs:
        output = rows.new_empty(len(rows), blocks[-1].outputs.stop)
        for block, weight in zip(blocks, weights, strict=True):
            block.multiply(rows, weight, output)
        yield output


def products_ahead(
    blocks: Sequence[Block], inputs: Iterable[Tensor], row_counts: tuple[int, int], num_ahead: int
) -> Tensor:
    """The products of two inputs, of `row_counts` rows, with a weight, one after the other: [sum of rows, out].

    The first input is asked for once a block is made, the second once the first is multiplied by `num_ahead` blocks.
    All of these but the last are then made a second time. Two blocks are never held at a time.
    """
    ahead, others = blocks[:num_ahead], blocks[num_ahead:]
    waiting = iter(inputs)
    weight = ahead[0].weight()
    first = next(waiting)
    output = first.new_empty(sum(row_counts), blocks[-1].outputs.stop)
    upper, lower = output.split(row_counts)
    for block, following in pairwise(ahead):
        block.multiply(first, weight, upper)
        del weight
        weight = following.weight()
    ahead[-1].multiply(first, weight, upper)
    second = next(waiting)
    ahead[-1].multiply(second, weight, lower)
    del weight
    if others:
        both = torch.cat([first, second])
        for block in others:
            block.multiply(both, block.weight(), output)
    for block in ahead[:-1]:
        block.multiply(second, block.weight(), lower)
    return output
