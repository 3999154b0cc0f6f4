"""A pass of many tokens in sections, so that the all-reduces of one go on while the card computes another.

In a layer, with > for a sum that is started and < for one that is waited for:
  each section, or neighbours joined: <norm, q k v, attention, o >, a sum for each section
  each section: <norm, gate and up, activation, down >
A section may attend to tokens of those before it, which are cached by then, never to those after it. Where weights have
to be dequantised, halves.py has another order, in which that is done once for all rows.

Why so: the sum of a section has the products of all others beside it, and the last ones of a layer those of the next.
A sum of o that comes first, and one of down that comes last, have little but an attention beside them: there a section
should be small, and the rest may attend at once, since products of more rows take less time a row and a host less.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from torch import Tensor

from parallel.engine.decoder import Attend, Decoder, Tokens
from parallel.engine.prefill.section_sizes import Sections
from parallel.engine.prefill.side_stream import SideStream, Sum, side_stream
from parallel.kernels.fused import add_rms_norm, add_rms_norm_into, rms_norm
from parallel.kernels.multiprocessors import sparing
from parallel.kernels.pages import PagedKV
from parallel.layers.merged import swiglu

ALL = slice(None)


@dataclass(frozen=True)
class Columns:
    """Neighbouring columns of a section's update: some rows of what is being summed up."""

    sum: Sum
    rows: slice

    def wait(self) -> Tensor:
        return self.sum.wait()[self.rows]


@dataclass
class Section:
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


@dataclass(frozen=True)
class Joined:
    """Neighbouring sections, perhaps one, that attend at once."""

    sections: Sequence[Section]
    tokens: Tokens
    rows: slice
    residual: Tensor

    def normed(self, weight: Tensor, eps: float) -> Tensor:
        """As of a section."""
        first, *others = self.sections
        if not others:
            return first.normed(weight, eps)
        if not first.update:
            return rms_norm(self.residual, weight, eps)
        normed = torch.empty_like(self.residual)
        for each, rows in zip(self.sections, self.split(normed), strict=True):
            add_rms_norm_into(each.take_update(), each.residual, weight, eps, rows)
        return normed

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Those of each section."""
        if len(self.sections) == 1:
            return (rows,)
        return rows.split([len(each.residual) for each in self.sections])


def cut_in_sections(tokens: Tokens, residual: Tensor, sizes: Sections) -> list[Joined]:
    """Sections of so many tokens, one after the other; `residual` [tokens, hidden]."""

    def cut(sizes: Iterable[int], start: int) -> list[slice]:
        return [slice(first, end) for first, end in pairwise(accumulate(sizes, initial=start))]

    found = []
    for rows, own in zip(cut(map(sum, sizes), 0), sizes, strict=True):
        sections = [Section(tokens[each], each, residual[each]) for each in cut(own, rows.start)]
        found.append(Joined(sections, tokens[rows], rows, residual[rows]))
    return found


class PassInSections:
    """A pass layer by layer. What it asks for is queued at once.

    Maps, not generator expressions: they keep nothing of a section while the next one is computed.
    """

    def __init__(self, decoder: Decoder, joined: Sequence[Joined]) -> None:
        self.decoder, self.joined = decoder, joined
        self.sections = [section for each in joined for section in each.sections]
        self.side: SideStream = side_stream(joined[0].residual.device)

    def run(self, attends: Sequence[Attend], caches: Sequence[PagedKV]) -> None:
        """All layers; `attends`: that of sections that are joined."""
        num_rows = sum(len(section.residual) for section in self.sections)
        try:
            with self.beside_sums():
                for layer, cache in zip(self.decoder.layers(num_rows), caches, strict=True):
                    attend_each = partial(self.attend, cache)
                    self.after_attention(layer, map(attend_each, attends, self.queries(layer, cache)))
            self.finish()
        finally:
            # Whatever was raised, memory that is still summed up must not be used again before that is done.
            self.side.join()

    def beside_sums(self) -> AbstractContextManager[None]:
        """Products that are started in this context leave sums the multiprocessors that they take."""
        largest = max(section.residual.nbytes for section in self.sections)
        return sparing(self.side.multiprocessors(self.decoder.communicator, largest))

    def attend(self, cache: PagedKV, attend: Attend, query: Tensor) -> Tensor:
        """[tokens, local heads * head_dim]"""
        return (attend(query, cache) if self.decoder.num_heads else query).flatten(1)

    def queries(self, layer: Any, cache: PagedKV) -> Iterator[Tensor]:
        """Of sections that are joined, once their keys and values are cached: [tokens, local heads, head_dim]."""

        def queries_of(each: Joined, normed: Tensor) -> Tensor:
            return self.decoder.queries_of_normed(layer, normed, each.tokens, cache)

        return map(queries_of, self.joined, self.normed(layer.input_layernorm, self.joined))

    def after_attention(self, layer: Any, attended: Iterable[Tensor]) -> None:
        """The rest of a layer, from [tokens, local heads * head_dim] of sections that are joined on."""
        output, down = layer.self_attn.o_proj, layer.mlp.down_proj
        updates = map(Joined.split, self.joined, map(output.multiply, attended))
        self.sum_updates(output, chain.from_iterable(updates))
        normed = self.normed(layer.post_attention_layernorm, self.sections)
        self.sum_updates(down, map(down.multiply, map(partial(swiglu, layer.mlp.gate_up), normed)))

    def finish(self) -> None:
        for section in self.sections:
            section.residual.add_(section.take_update())

    def normed(self, norm: Any, of: Sequence[Section | Joined]) -> Iterator[Tensor]:
        return (each.normed(norm.weight, self.decoder.eps) for each in of)

    def sum_updates(self, linear: Any, updates: Iterable[Tensor]) -> None:
        """Starts the sum of each section's rows of a row-parallel linear before the next section's are asked for."""
        for section, update in zip(self.sections, updates, strict=True):
            section.update = [Columns(self.side.start_all_reduce(linear.communicator, update), ALL)]
            section.bias = self.lasting(linear.bias)

    def lasting(self, bias: Tensor | None) -> Tensor | None:
        """A bias of a streamed layer, which is added in the next: another layer may lie in its place by then."""
        return bias if bias is None or self.decoder.streamer is None else bias.clone()
