"""One rank's model, cache and rows: chunks of prompts in, then a token a step for every row, without waiting for any.

All ranks make the same calls in the same order, on the same tokens; nothing else keeps them together.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from parallel.communicator import Communicator
from parallel.engine.decoder import Attend, Decoder, Tokens
from parallel.engine.graphs import StepGraphs
from parallel.engine.limits import PAGE_SIZE, EngineLimits
from parallel.engine.pages import PageAllocator, PagedKV, allocate_pages, gather_kv
from parallel.engine.prefix_cache import PrefixCache
from parallel.engine.rows import Rows, to_device
from parallel.engine.sampling import Sampler, SamplingParams, VocabularyShards
from parallel.engine.sequence import Sequence
from parallel.kernels.paged_attention import paged_attention, prefill_attention


@dataclass(frozen=True)
class Part:
    """Some neighbouring tokens of a prompt, `start` to `end`, all before them in the cache or in earlier parts."""

    sequence: Sequence
    start: int
    end: int


class Engine:
    """Runs a loaded, sharded model; it takes over the model's weights (see Decoder)."""

    def __init__(
        self,
        model: PreTrainedModel,
        communicator: Communicator,
        device: torch.device,
        limits: EngineLimits,
        *,
        sampling: SamplingParams | None = None,
        kv_dtype: torch.dtype | None = None,
        prefix_cache: bool = True,
    ) -> None:
        self.model, self.device, self.limits = model, device, limits
        self.decoder = Decoder(model, limits.max_context)
        self.dtype = model.lm_head.weight.dtype
        if device.type == "cuda":
            # What the load left makes room for the cache.
            torch.cuda.empty_cache()
        heads = (self.decoder.num_kv_heads, self.decoder.head_dim)
        self.caches = allocate_pages(self.decoder.num_layers, limits.num_pages, *heads, kv_dtype or self.dtype, device)
        self.pages = (PrefixCache if prefix_cache else PageAllocator)(limits.num_pages)
        shards = VocabularyShards(tuple(model.lm_head._partition_sizes))
        self.sampler = Sampler(sampling or SamplingParams(), shards, communicator)
        self.rows = Rows.empty(limits.batch_size, limits.pages_per_sequence, device)
        self.order: list[Sequence] = []
        # The first tokens of answers whose sequences wait for a row.
        self.fresh: dict[Sequence, Tensor] = {}
        self.run_step = self.step_rows if device.type == "cpu" else StepGraphs(self.step_rows, limits.batch_size).run

    @property
    def communicator(self) -> Communicator:
        return self.sampler.communicator

    @torch.inference_mode()
    def prefill(self, parts: Ordered[Part]) -> Tensor:
        """Takes parts of prompts through the model; returns logits [n, local vocabulary] after those now complete.

        The parts follow what is in the cache, or parts before them, and their sequences have pages. Each layer writes
        the keys and values of all parts before any part attends to them.
        """
        hidden = self.hidden_states(parts)
        for part in parts:
            part.sequence.num_prefilled = part.end
        ends = torch.tensor([part.end - part.start for part in parts]).cumsum(0) - 1
        whole = [row for row, part in enumerate(parts) if part.sequence.is_prefilled]
        return self.decoder.logits(hidden[to_device(ends[whole], self.device)])

    @torch.inference_mode()
    def hidden_states(self, parts: Ordered[Part]) -> Tensor:
        """[tokens, hidden] of all tokens of `parts`, one part after the other; their keys and values are cached."""
        return self.decoder(self._tokens(parts), self._attend(parts), self.caches)

    @torch.inference_mode()
    def start_answers(self, sequences: Ordered[Sequence], logits: Tensor) -> Tensor:
        """Draws the first token of each answer from `logits` [n, local vocabulary]: [n]. They join at the next step."""
        keys, positions = torch.tensor([[s.key, len(s.prompt)] for s in sequences]).unbind(1)
        tokens = self.sampler(logits, to_device(keys, self.device), to_device(positions, self.device))
        for sequence, token in zip(sequences, tokens.unbind(), strict=True):
            sequence.num_sampled = 1
            self.fresh[sequence] = token
        return tokens

    @torch.inference_mode()
    def step(self, sequences: Ordered[Sequence]) -> Tensor:
        """One token more for each of `sequences`, [n], in their order. Those with no place here lose their rows."""
        if list(sequences) != self.order:
            self.arrange(sequences)
        self.run_step(len(sequences))
        for sequence in sequences:
            sequence.num_sampled += 1
        return self.rows.tokens[: len(sequences)]

    @torch.inference_mode()
    def step_rows(self, num_rows: int) -> None:
        """The step itself, for the first rows: reads and advances `rows`, and nothing of the host."""
        rows = self.rows.first(num_rows)
        rows.advance(self.sampler(self.row_logits(rows), rows.keys, rows.positions + 1))

    def row_logits(self, rows: Rows) -> Tensor:
        lengths = rows.lengths()

        def attend(query: Tensor, cache: PagedKV) -> Tensor:
            return paged_attention(query, cache, rows.block_table, lengths, self.decoder.scale)

        return self.decoder.logits(self.decoder(rows.inputs(), attend, self.caches))

    def _tokens(self, parts: Ordered[Part]) -> Tokens:
        ids = [token for part in parts for token in part.sequence.prompt[part.start : part.end]]
        places = [(part.sequence.pages, position) for part in parts for position in range(part.start, part.end)]
        positions = [position for _, position in places]
        slots = [pages[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE for pages, position in places]
        return Tokens(*to_device(torch.tensor([ids, positions, slots]), self.device).unbind(0))

    def _attend(self, parts: Ordered[Part]) -> Attend:
        tables = [to_device(torch.tensor(part.sequence.pages), self.device) for part in parts]

        def attend(query: Tensor, cache: PagedKV) -> Tensor:
            outputs = []
            chunks = query.split([part.end - part.start for part in parts])
            for part, table, chunk in zip(parts, tables, chunks, strict=True):
                keys, values = gather_kv(cache, table, part.end, query.dtype)
                outputs.append(prefill_attention(chunk, keys, values, self.decoder.scale))
            return torch.cat(outputs)

        return attend

    def arrange(self, sequences: Ordered[Sequence]) -> None:
        """Gives each sequence its row; its newest token comes from the row it had, or from the end of its prefill."""
        rows = {sequence: row for row, sequence in enumerate(self.order)}
        fresh = [sequence for sequence in sequences if sequence not in rows]
        num_rows = self.limits.batch_size
        sources = rows | {sequence: num_rows + at for at, sequence in enumerate(fresh)}
        tokens = torch.cat([self.rows.tokens, *(self.fresh.pop(sequence).view(1) for sequence in fresh)])
        self.rows.arrange(sequences, [sources[sequence] for sequence in sequences], tokens)
        self.order = list(sequences)
