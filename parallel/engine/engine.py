"""One rank's model, cache and rows: chunks of prompts in, then a token a step for every row, without waiting for any.

All ranks make the same calls in the same order, on the same tokens; nothing else keeps them together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from parallel.communicator import Communicator
from parallel.engine.graphs import StepGraphs
from parallel.engine.limits import EngineLimits, graphed_rows
from parallel.engine.page_allocator import PageAllocator
from parallel.engine.paged_model import open_paged
from parallel.engine.prefill.graphs import PassGraphs
from parallel.engine.prefill.recorded import Places
from parallel.engine.prefix_cache import PrefixCache
from parallel.engine.rows import Rows, to_device
from parallel.engine.sampling import SamplingParams, checked, open_sampler
from parallel.engine.sequence import Part, TokenSequence
from parallel.engine.speculation.auto import AutoSpeculator
from parallel.engine.speculation.choice import open_speculator
from parallel.engine.speculation.fixed import FixedSpeculator
from parallel.engine.speculation.speculator import Speculation, Speculator
from parallel.engine.speculation.tree_plan import TreePlan
from parallel.engine.speculation.tree_speculator import TreeSpeculator
from parallel.engine.tree_rows import TreeRows
from parallel.kernels.pages import pages_for
from parallel.offload.host_layers import HostLayers
from parallel.offload.streamer import Streamer


class Engine:
    """Runs a loaded, sharded model; it takes over the model's weights (see Decoder).

    Args:
        host_layers: those of the model's layers that lie in host memory, to be streamed in every pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        communicator: Communicator,
        limits: EngineLimits,
        *,
        sampling: SamplingParams | None = None,
        kv_dtype: torch.dtype | None = None,
        prefix_cache: bool = True,
        speculation: Speculation | None = None,
        host_layers: HostLayers | None = None,
    ) -> None:
        num_ahead = 0 if speculation is None else speculation.num_ahead
        self.limits = limits = replace(limits, num_ahead=max(limits.num_ahead, num_ahead))
        # The head is on the device wherever layers and the embedding are.
        head = model.lm_head.weight
        self.model, self.dtype = model, head.dtype
        self.device = device = head.device
        self.target = open_paged(model, limits, kv_dtype, device, host_layers)
        self.decoder, self.caches = self.target.decoder, self.target.caches
        # Of the memory of all graphs.
        self.pool = pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        sizes = graphed_rows(limits.prefill_chunk) if self.captures and limits.captured_passes else ()
        if sizes:
            places = Places(limits.captured_passes)
            self.target = replace(self.target, graphs=PassGraphs(self.decoder, self.caches, sizes, pool, places=places))
        self.pages = (PrefixCache if prefix_cache else PageAllocator)(limits.num_pages)
        self.sampler = open_sampler(model, sampling or SamplingParams(), communicator)
        self.rows = Rows.empty(limits.batch_size, limits.pages_per_sequence, device)
        self.speculator: Speculator | TreeSpeculator | AutoSpeculator | None = None
        if speculation is not None:
            self.speculator = open_speculator(speculation, limits, self.sampler, self.target, kv_dtype, device)
        self.order: list[TokenSequence] = []
        # The first tokens of answers whose sequences wait for a row.
        self.fresh: dict[TokenSequence, Tensor] = {}
        self.run_step = self.capture_steps(pool) if self.captures else self.step_rows
        if self.captures_drafts:
            self.capture_drafts()

    @property
    def captures(self) -> bool:
        """Whether steps are captured as graphs, and passes where limits say so; parallel/offload/streamer.py says why
        streamed ones are not."""
        return self.device.type == "cuda" and self.streamer is None

    def capture_steps(self, pool: Any) -> Callable[[int], None]:
        """Graphs in the memory `pool`; what runs the one for so many rows."""
        if self.speculator is not None:
            return self.speculator.capture_steps(self.step_rows, self.limits.batch_size, pool)
        return StepGraphs(self.step_rows, self.limits.batch_size, pool).run

    @property
    def captures_drafts(self) -> bool:
        """Whether a draft model's passes are captured though those that check its drafts are not."""
        drafts = [] if self.speculator is None else self.speculator.drafter.models
        return self.device.type == "cuda" and not self.captures and bool(drafts)

    @property
    def drafting(self) -> list[FixedSpeculator[Any]]:
        """What makes drafts: one for each tree that a step may have."""
        return [] if self.speculator is None else self.speculator.drafting

    def capture_drafts(self) -> None:
        """Graphs of what makes drafts."""
        # The largest first: the others fit into its memory.
        for each in sorted(self.drafting, key=lambda each: -each.rows_per_sequence):
            each.capture_drafts(self.rows, self.pool)

    def record_passes(self) -> None:
        """Captures passes of prompts that were made so far, so that none of those to come is held up by it, as far as
        there are places. Without sequences."""
        if self.target.graphs is not None:
            self.target.graphs.record_used()

    @property
    def plan(self) -> TreePlan | None:
        """Of the trees of the last step, where they are chosen step by step."""
        return None if self.speculator is None else self.speculator.chosen_plan

    def learn(self, plan: TreePlan, nodes: Sequence[int]) -> None:
        """What came true in a sequence's step; see Policy.learn."""
        if self.speculator is not None:
            self.speculator.learn(plan, nodes)

    @property
    def streamer(self) -> Streamer | None:
        return self.decoder.streamer

    @property
    def looks_first(self) -> bool:
        """Whether a step is queued once all tokens before it have been seen, not while they are computed.

        Where the host computes layers of a step, or reads them from the disk, it has queued one only when most of it is
        done, and would see tokens a step late. Where it could be ahead that gains nothing: while it looks, the link
        brings the next two layers. And a step takes as long as its copies, also one that follows the end of an answer.
        """
        return self.streamer is not None

    @property
    def models(self) -> nn.ModuleList:
        """Those whose layers a step runs."""
        drafts = [] if self.speculator is None else self.speculator.drafter.models
        return nn.ModuleList([self.model, *drafts])

    @property
    def communicator(self) -> Communicator:
        return self.sampler.communicator

    @torch.inference_mode()
    def prefill(self, parts: Sequence[Part]) -> Tensor:
        """Takes parts of prompts through the model; returns logits [n, local vocabulary] after those now complete.

        The parts follow what is in the cache, or parts before them, and their sequences have pages. Each layer writes
        the keys and values of all parts before any part attends to them. Before anything else, `prefill_drafts` is to
        follow.
        """
        hidden = self.hidden_states(parts)
        for part in parts:
            part.sequence.num_prefilled = part.end
        ends = torch.tensor([len(part) for part in parts]).cumsum(0) - 1
        whole = [row for row, part in enumerate(parts) if part.sequence.is_prefilled]
        return self.decoder.logits(hidden[to_device(ends[whole], self.device)])

    @torch.inference_mode()
    def prefill_drafts(self, parts: Sequence[Part]) -> None:
        """Takes parts of prompts through the draft model, where there is one. By itself: it gives no token, so that the
        first ones of answers need not wait for it."""
        if self.speculator is not None:
            self.speculator.prefill(parts)

    @torch.inference_mode()
    def hidden_states(self, parts: Sequence[Part]) -> Tensor:
        """[tokens, hidden] of all tokens of `parts`, one part after the other; their keys and values are cached."""
        return self.target.part_states(parts)

    @torch.inference_mode()
    def start_answers(self, sequences: Sequence[TokenSequence], logits: Tensor) -> Tensor:
        """Draws the first token of each answer from `logits` [n, local vocabulary]: [n], NO_NUMBER where these are no
        numbers. They join at the next step."""
        keys, positions = torch.tensor([[s.key, len(s.prompt)] for s in sequences]).unbind(1)
        tokens = self.sampler(logits, to_device(keys, self.device), to_device(positions, self.device))
        for sequence, token in zip(sequences, tokens.unbind(), strict=True):
            sequence.num_sampled = 1
            if not sequence.is_sampled:
                self.fresh[sequence] = token
        return checked(tokens, logits)

    def reset(self) -> None:
        """Forgets every sequence and takes all pages back: their content is unknown after a pass that failed."""
        self.pages.reset()
        self.fresh.clear()
        self.order = []

    @torch.inference_mode()
    def step(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """A token more for each of `sequences`, [n], in their order. Those with no place here lose their rows.

        With speculation as many as were right and one: see Speculator.given.
        """
        if list(sequences) != self.order:
            self.arrange(sequences)
        if self.speculator is not None:
            self.speculator.choose(self.rows.first(len(sequences)))
        self.run_step(len(sequences))
        for sequence in sequences:
            # At least: of more the host learns when they arrive.
            sequence.num_sampled += 1
        given = self.rows.tokens if self.speculator is None else self.speculator.given
        return given[: len(sequences)]

    @torch.inference_mode()
    def step_rows(self, num_rows: int) -> None:
        """The step itself, for the first rows: reads and advances `rows`, and nothing of the host."""
        if self.speculator is None:
            self.plain_rows(num_rows)
        else:
            self.speculator.step(self.rows.first(num_rows), self.row_logits)

    @torch.inference_mode()
    def plain_rows(self, num_rows: int) -> None:
        """A step without drafts."""
        rows = self.rows.first(num_rows)
        rows.advance(self.sampler(self.row_logits(rows), rows.keys, rows.positions + 1), rows.active)

    def row_logits(self, rows: Rows | TreeRows) -> Tensor:
        """[rows, local vocabulary]"""
        return self.decoder.logits(self.target.row_states(rows, self.past_pages()))

    def past_pages(self) -> list[int]:
        """Those in which sequences with a row have tokens, where some lie in host memory; with speculation all of
        theirs, as only the device knows how far they have come."""
        if self.decoder.host_kv is None:
            return []
        if self.speculator is not None:
            return [page for sequence in self.order for page in sequence.pages]
        return [page for each in self.order for page in each.pages[: pages_for(each.next_position)]]

    def arrange(self, sequences: Sequence[TokenSequence]) -> None:
        """Gives each sequence its row; its newest token comes from the row it had, or from the end of its prefill."""
        rows = {sequence: row for row, sequence in enumerate(self.order)}
        fresh = [sequence for sequence in sequences if sequence not in rows]
        num_rows = self.limits.batch_size
        places = rows | {sequence: num_rows + at for at, sequence in enumerate(fresh)}
        sources = [places[sequence] for sequence in sequences]
        tokens = torch.cat([self.rows.tokens, *(self.fresh.pop(sequence).view(1) for sequence in fresh)])
        # With speculation, of those that had a row only the device knows where they are.
        starts = to_device(torch.tensor([sequence.next_position for sequence in fresh]).long(), self.device)
        self.rows.arrange(sequences, sources, tokens, torch.cat([self.rows.positions, starts]))
        if self.speculator is not None:
            self.speculator.history.arrange(sources, fresh, self.rows)
        self.order = list(sequences)
