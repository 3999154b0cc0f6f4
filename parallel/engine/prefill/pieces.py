"""A pass of prompts cut at its attentions: what lies between two of them has the same shapes whatever the prompts are.

So each piece can be captured as a graph (graphs.py). Attention, whose shapes depend on the length of every prompt,
is queued launch by launch between them, through buffers that stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.engine.decoder import Decoder, Tokens
from parallel.engine.prefill.order import open_pass
from parallel.engine.prefill.section_sizes import GRAPHED_HALVED_ROWS, choose_sections
from parallel.kernels.pages import PagedKV
from parallel.layers.linear import Update


@dataclass(frozen=True)
class PassBuffers:
    """What the pieces of a pass and its attentions hand to one another.

    `tokens` [3, rows] int64: ids, positions and slots; `residual` [rows, hidden]; `queries` [rows, local heads,
    head_dim]; `attended` [rows, local heads * head_dim].
    """

    tokens: Tensor
    residual: Tensor
    queries: Tensor
    attended: Tensor

    @classmethod
    def empty(cls, decoder: Decoder, num_rows: int) -> PassBuffers:
        head, heads = decoder.model.lm_head.weight, decoder.num_heads * decoder.head_dim
        tokens = torch.zeros(3, num_rows, dtype=torch.int64, device=head.device)
        residual, attended, queries = (
            torch.zeros(num_rows, size, dtype=head.dtype, device=head.device)
            for size in (decoder.model.config.hidden_size, heads, heads)
        )
        return cls(tokens, residual, queries.view(num_rows, decoder.num_heads, decoder.head_dim), attended)

    def first(self, num_rows: int) -> PassBuffers:
        """A view of the first rows."""
        return PassBuffers(
            self.tokens[:, :num_rows], *(each[:num_rows] for each in (self.residual, self.queries, self.attended))
        )

    def put(self, tokens: Tensor) -> None:
        """Takes [3, tokens], as many as there are rows or fewer. The rows beyond write to page 0, which is nobody's."""
        num_tokens = tokens.shape[1]
        self.tokens[:, :num_tokens] = tokens
        self.tokens[:, num_tokens:] = 0


class Pieces:
    """A pass over all rows of `buffers`: piece 0 comes before the attention of the first layer, the last after that of
    the last. Each reads and writes the buffers, and nothing of the host."""

    def __init__(self, decoder: Decoder, caches: Sequence[PagedKV], buffers: PassBuffers) -> None:
        assert decoder.streamer is None, "the weights of a graph stay where they are"
        self.decoder, self.caches, self.buffers = decoder, caches, buffers
        self.layers = list(decoder.model.model.layers)
        self.tokens = Tokens(*buffers.tokens)
        num_rows = len(buffers.residual)
        self.sections = choose_sections(num_rows, decoder.hides_sums, decoder.dequantizes, GRAPHED_HALVED_ROWS)

    def __len__(self) -> int:
        return len(self.layers) + 1

    def run(self, place: int) -> None:
        if place == 0:
            self.buffers.residual.copy_(self.decoder.model.model.embed_tokens(self.tokens.ids))
        if len(self.sections) == 1:
            self._run_whole(place)
        else:
            self._run_sections(place)

    def _run_whole(self, place: int) -> None:
        decoder, buffers = self.decoder, self.buffers
        update: Update | None = None
        if place > 0:
            before = self.layers[place - 1]
            update = decoder.mlp(before, buffers.residual, before.self_attn.o_proj.update(buffers.attended))
        if place < len(self.layers):
            layer, cache = self.layers[place], self.caches[place]
            buffers.queries.copy_(decoder.queries(layer, buffers.residual, update, self.tokens, cache))
        elif update is not None:
            buffers.residual.add_(update.total())

    def _run_sections(self, place: int) -> None:
        """All sums that a piece starts, it waits for."""
        run = open_pass(self.decoder, self.tokens, self.buffers.residual, self.sections)
        with run.beside_sums():
            if place > 0:
                attended = (self.buffers.attended[each.rows] for each in run.joined)
                run.after_attention(self.layers[place - 1], attended)
            if place < len(self.layers):
                queries = run.queries(self.layers[place], self.caches[place])
                for each, rows in zip(run.joined, queries, strict=True):
                    self.buffers.queries[each.rows] = rows
            else:
                run.finish()
