"""A model beside its pages of keys and values: parts of prompts go through it, and rows of decode steps."""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from parallel.engine.decoder import Attend, Decoder, Tokens
from parallel.engine.limits import EngineLimits, choose_sections
from parallel.engine.pages import PagedKV, allocate_pages, positions_and_slots
from parallel.engine.part_attention import attend_parts
from parallel.engine.pass_graphs import PassGraphs
from parallel.engine.pass_order import run_pass
from parallel.engine.rows import Rows, to_device
from parallel.engine.sequence import Part as Part
from parallel.engine.tree_rows import TreeRows
from parallel.kernels.paged_attention import paged_attention
from parallel.kernels.ranges_attention import refusal
from parallel.offload.host_layers import HostLayers
from parallel.offload.sharing import open_streamer


@dataclass(frozen=True)
class PagedModel:
    """A decoder and the pages of each of its layers. Models of one engine give a sequence the same page numbers.

    `graphs`: passes of prompts that are captured. `max_keys`: tokens that parts of prompts attend to at once.
    """

    decoder: Decoder
    caches: list[PagedKV]
    max_keys: int = 0
    graphs: PassGraphs | None = None

    def part_states(self, parts: Ordered[Part]) -> Tensor:
        """[tokens, hidden] of all tokens of `parts`, one part after the other, until the next pass; they are cached."""
        columns = part_tokens(parts, self.caches[0].keys.device)
        if self.graphs is not None and columns.shape[1] <= self.graphs.max_rows:
            places = [(part.start, part.end) for part in parts]
            return self.graphs.run(columns, places, self._attend_parts(parts))
        tokens = Tokens(*columns)
        sections = choose_sections(len(tokens.ids), self.decoder.world_size, self.decoder.dequantizes)
        attends = [self._attend_parts(each) for each in split_parts(parts, sections)]
        return run_pass(self.decoder, tokens, sections, attends, self.caches)

    def row_states(self, rows: Rows | TreeRows) -> Tensor:
        """[rows, hidden] of each row's token, which is cached. Rows of one sequence see each other by position, or as
        their tree says."""
        tables, lengths, tree = rows.sequence_tables(), rows.sequence_lengths(), rows.tree()

        def attend(query: Tensor, cache: PagedKV) -> Tensor:
            return paged_attention(query, cache, tables, lengths, self.decoder.scale, tree)

        return self.decoder(rows.inputs(), attend, self.caches)

    def _attend_parts(self, parts: Ordered[Part]) -> Attend:
        return attend_parts(parts, self.decoder.scale, self.max_keys)


def part_tokens(parts: Ordered[Part], device: torch.device) -> Tensor:
    """[3, tokens] int64: ids, positions and slots."""
    ids = torch.tensor([token for part in parts for token in part.sequence.prompt[part.start : part.end]])
    positions, slots = positions_and_slots([(part.sequence.pages, part.start, part.end) for part in parts])
    return to_device(torch.stack([ids, positions, slots]), device)


def split_parts(parts: Ordered[Part], sections: Ordered[int]) -> list[list[Part]]:
    """Those of each section of so many tokens; a part with tokens in several is cut."""
    found: list[list[Part]] = []
    left = list(parts)
    for size in sections:
        found.append([])
        while size > 0:
            part = left.pop(0)
            middle = min(part.start + size, part.end)
            found[-1].append(replace(part, end=middle))
            left[:0] = [replace(part, start=middle)] if middle < part.end else []
            size -= middle - part.start
    return found


def open_paged(
    model: PreTrainedModel,
    limits: EngineLimits,
    kv_dtype: torch.dtype | None,
    device: torch.device,
    host_layers: HostLayers | None = None,
) -> PagedModel:
    """Takes over a loaded model (see Decoder) and allocates its pages, in the model's own dtype by default.

    A layer that stands in the model more than once has its pages once.
    """
    if device.type == "cuda":
        # What the load left makes room for the cache.
        torch.cuda.empty_cache()
    decoder = Decoder(model, limits.max_context, None if host_layers is None else open_streamer(host_layers))
    heads = (decoder.num_kv_heads, decoder.head_dim)
    dtype = kv_dtype or model.lm_head.weight.dtype
    layers = list(dict.fromkeys(model.model.layers))
    pages = dict(zip(layers, allocate_pages(len(layers), limits.num_pages, *heads, dtype, device), strict=True))
    takes_ranges = refusal(decoder.num_heads, decoder.head_dim, model.lm_head.weight.dtype, device) is None
    return PagedModel(
        decoder, [pages[layer] for layer in model.model.layers], limits.gathered_keys if takes_ranges else 0
    )
