"""An engine without a model: its cache holds which tokens a slot stands for, and all of them decide its answers."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from parallel.engine.limits import EngineLimits
from parallel.engine.page_allocator import PageAllocator
from parallel.engine.sampling import Sampler, SamplingParams, VocabularyShards
from parallel.engine.sequence import Part, TokenSequence
from parallel.kernels.limits import PAGE_SIZE
from parallel.transports.solo import Solo

EOS = 1
VOCABULARY = 20
SAMPLER = Sampler(SamplingParams(), VocabularyShards((VOCABULARY,)), Solo(torch.device("cpu")))


def next_token(tokens: Sequence[int]) -> int:
    """Any of the vocabulary, EOS too, as all tokens before it decide."""
    return zlib.crc32(bytes(tokens)) % VOCABULARY


def answer_alone(prompt: Sequence[int], max_tokens: int) -> list[int]:
    """What a prompt must be answered, whatever else is in the batch."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


@dataclass
class TracedEngine:
    """Keeps, slot by slot, what a real cache depends on: all tokens up to its own. Reads check every slot.

    Tokens are below 256, so that bytes hold them.
    """

    limits: EngineLimits
    pages: PageAllocator
    sampler: Sampler = SAMPLER
    # ("prefill" or "step", the indices of its sequences)
    events: list[tuple[str, list[int]]] = field(default_factory=list)
    tokens: dict[TokenSequence, bytearray] = field(default_factory=dict)
    slots: dict[int, bytes] = field(default_factory=dict)
    fresh: dict[TokenSequence, Tensor] = field(default_factory=dict)
    # Nothing is drafted.
    plan = None
    looks_first = False

    def reset(self) -> None:
        self.pages.reset()

    def write(self, sequence: TokenSequence, start: int, end: int) -> None:
        for position in range(start, end):
            self.slots[self.slot(sequence, position)] = bytes(self.tokens[sequence][: position + 1])

    def read(self, sequence: TokenSequence, end: int) -> None:
        for position in range(end):
            found = self.slots.get(self.slot(sequence, position))
            assert found == self.tokens[sequence][: position + 1], f"{sequence.index=} {position=}"

    def slot(self, sequence: TokenSequence, position: int) -> int:
        return sequence.pages[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE

    def prefill(self, parts: Sequence[Part]) -> Tensor:
        assert 0 < sum(len(part) for part in parts) <= self.limits.prefill_chunk
        self.events.append(("prefill", [part.sequence.index for part in parts]))
        for part in parts:
            assert part.start == part.sequence.num_prefilled < part.end
            self.tokens[part.sequence] = bytearray(part.sequence.prompt)
            self.write(part.sequence, part.start, part.end)
            part.sequence.num_prefilled = part.end
        for part in parts:
            self.read(part.sequence, part.end)
        return torch.empty(0)

    def prefill_drafts(self, parts: Sequence[Part]) -> None:
        """There is no draft model."""

    def start_answers(self, sequences: Sequence[TokenSequence], logits: Tensor) -> Tensor:
        assert all(sequence.is_prefilled and not sequence.num_sampled for sequence in sequences)
        return self.extend(sequences)

    def step(self, sequences: Sequence[TokenSequence]) -> Tensor:
        assert len(sequences) <= self.limits.batch_size
        self.events.append(("step", [sequence.index for sequence in sequences]))
        for sequence in sequences:
            assert sequence.num_sampled < sequence.max_tokens
            self.write(sequence, sequence.next_position, sequence.next_position + 1)
        for sequence in sequences:
            self.read(sequence, sequence.next_position + 1)
        return self.extend(sequences)

    def extend(self, sequences: Sequence[TokenSequence]) -> Tensor:
        for sequence in sequences:
            self.tokens[sequence].append(next_token(self.tokens[sequence]))
            sequence.num_sampled += 1
        return torch.tensor([self.tokens[sequence][-1] for sequence in sequences])
