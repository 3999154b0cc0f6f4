"""A model beside its pages of keys and values: parts of prompts go through it, and rows of decode steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from parallel.engine.decoder import Attend, Decoder, Tokens
from parallel.engine.limits import EngineLimits
from parallel.engine.page_allocator import positions_and_slots
from parallel.engine.prefill.graphs import PassGraphs
from parallel.engine.prefill.order import run_pass
from parallel.engine.prefill.part_attention import attend_parts
from parallel.engine.prefill.section_sizes import JOINED_ROWS, choose_sections
from parallel.engine.prefill.side_stream import side_stream
from parallel.engine.rows import Rows, to_device
from parallel.engine.sequence import Part
from parallel.engine.tree_rows import TreeRows
from parallel.kernels.paged_attention import paged_attention
from parallel.kernels.pages import PagedKV, allocate_pages, pages_for
from parallel.kernels.ranges_attention import refusal
from parallel.offload.host_kv import HostKV
from parallel.offload.host_layers import HostLayers
from parallel.offload.sharing import open_streamer


@dataclass(frozen=True)
class PagedModel:
    """A decoder and the pages of each of its layers. Models of one engine give a sequence the same page numbers.

    `graphs`: passes of prompts that are captured. `max_keys`: tokens that parts of prompts attend to at once. `joins`:
    whether sections of a pass may attend several at once, see choose_sections.
    """

    decoder: Decoder
    caches: list[PagedKV]
    max_keys: int = 0
    graphs: PassGraphs | None = None
    joins: bool = True

    @property
    def stored(self) -> list[list[PagedKV]]:
        """The layers' pages as they stay between passes; those that were allocated together in a list each."""
        host_kv = self.decoder.host_kv
        if host_kv is None:
            return [self.caches]
        here = [cache for index, cache in enumerate(self.caches) if index not in host_kv.places]
        return [here, host_kv.stored] if here else [host_kv.stored]

    def part_states(self, parts: Sequence[Part]) -> Tensor:
        """[tokens, hidden] of all tokens of `parts`, one part after the other, until the next pass; they are cached."""
        columns = part_tokens(parts, self.caches[0].keys.device)
        if self.graphs is not None and columns.shape[1] <= self.graphs.max_rows:
            places = [(part.start, part.end) for part in parts]
            return self.graphs.run(columns, places, self._attend_parts(parts))
        tokens = Tokens(*columns)
        if self.decoder.host_kv is not None:
            self.decoder.host_kv.begin(past_pages(parts), tokens.slots)
        sections = choose_sections(len(tokens.ids), self.decoder.hides_sums, self.decoder.dequantizes, joins=self.joins)
        attends = [self._attend_parts(each) for each in split_parts(parts, list(map(sum, sections)))]
        return run_pass(self.decoder, tokens, sections, attends, self.caches)

    def row_states(self, rows: Rows | TreeRows, past: Iterable[int] = ()) -> Tensor:
        """[rows, hidden] of each row's token, which is cached. Rows of one sequence see each other by position, or as
        their tree says.

        Args:
            past: the pages in which the sequences have tokens, for pages in host memory.
        """
        inputs = rows.inputs()
        if self.decoder.host_kv is not None:
            self.decoder.host_kv.begin(past, inputs.slots)
        tables, lengths, tree = rows.sequence_tables(), rows.sequence_lengths(), rows.tree()

        def attend(query: Tensor, cache: PagedKV) -> Tensor:
            return paged_attention(query, cache, tables, lengths, self.decoder.scale, tree)

        return self.decoder(inputs, attend, self.caches)

    def _attend_parts(self, parts: Sequence[Part]) -> Attend:
        return attend_parts(parts, self.decoder.scale, self.max_keys)


def part_tokens(parts: Sequence[Part], device: torch.device) -> Tensor:
    """[3, tokens] int64: ids, positions and slots."""
    ids = torch.tensor([token for part in parts for token in part.sequence.prompt[part.start : part.end]])
    positions, slots = positions_and_slots([(part.sequence.pages, part.start, part.end) for part in parts])
    return to_device(torch.stack([ids, positions, slots]), device)


def past_pages(parts: Sequence[Part]) -> list[int]:
    """Those that have the tokens before each of `parts`."""
    return [page for part in parts for page in part.sequence.pages[: pages_for(part.start)]]


def split_parts(parts: Sequence[Part], sections: Sequence[int]) -> list[list[Part]]:
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

    A layer that stands in the model more than once has its pages once. `host_layers` may have those of its layers.
    """
    if device.type == "cuda":
        # What the load left makes room for the cache.
        torch.cuda.empty_cache()
    decoder = Decoder(model, limits.max_context, None if host_layers is None else open_streamer(host_layers))
    decoder.hides_sums &= limits.hides_sums
    dtype = kv_dtype or model.lm_head.weight.dtype
    size = (limits.num_pages, decoder.num_kv_heads, decoder.head_dim, dtype, device)
    hosted = {}
    if host_layers is not None and host_layers.with_kv and host_layers.streamed:
        decoder.host_kv = HostKV(host_layers.streamed, *size)
        hosted = decoder.host_kv.caches
    layers = list(dict.fromkeys(layer for index, layer in enumerate(model.model.layers) if index not in hosted))
    pages = dict(zip(layers, allocate_pages(len(layers), *size), strict=True))
    caches = [hosted.get(index) or pages[layer] for index, layer in enumerate(model.model.layers)]
    takes_ranges = refusal(decoder.head_dim, model.lm_head.weight.dtype, device) is None
    message_bytes = JOINED_ROWS * model.config.hidden_size * model.lm_head.weight.element_size()
    joins = side_stream(device).multiprocessors(decoder.communicator, message_bytes) == 0
    return PagedModel(decoder, caches, limits.gathered_keys if takes_ranges else 0, joins=joins)
