"""One rank's model and cache: prompts in, next-token logits out. Sequences of a batch may differ in length."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from parallel.engine.cache import KVCache
from parallel.engine.sampling import VocabularyShards


class Engine:
    """Runs a sharded model over one batch of sequences at a time.

    Shorter prompts are padded on the left, so that all sequences end, and go on, in the same column.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, *, max_context: int, prefill_chunk: int) -> None:
        self.model = model
        self.device = device
        self.max_context = max_context
        self.prefill_chunk = prefill_chunk
        self.cache = KVCache(model.config.num_hidden_layers, max_context)
        self.attention_mask: Tensor | None = None
        self.next_positions = torch.zeros(0)

    @property
    def vocabulary_shards(self) -> VocabularyShards:
        return VocabularyShards(tuple(self.model.lm_head._partition_sizes))

    @torch.inference_mode()
    def prefill(
        self, prompts: Sequence[Sequence[int]], *, on_progress: Callable[[int, int], None] = lambda done, total: None
    ) -> Tensor:
        """Takes token ids of new sequences, in chunks, and returns logits [batch, local vocabulary] after the last.

        Raises:
            ValueError: a prompt is empty or does not leave room for one token of answer.
        """
        longest = self._check(prompts)
        ids, mask = pad_left(prompts, longest, self.device)
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
        # Without padding attention needs no mask, which lets torch choose its fastest kernels.
        padded = bool((mask == 0).any())
        self.cache = self._fresh_cache(len(prompts))
        columns = max(1, self.prefill_chunk // len(prompts))
        logits = torch.empty(0)
        for start in range(0, longest, columns):
            end = min(start + columns, longest)
            self.attention_mask = mask[:, :end] if padded else None
            logits = self._forward(ids[:, start:end], positions[:, start:end])
            on_progress(end, longest)
        self.next_positions = positions[:, -1:] + 1
        return logits

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> Tensor:
        """Takes the newest token of each sequence, [batch], and returns logits [batch, local vocabulary]."""
        if self.attention_mask is not None:
            ones = self.attention_mask.new_ones(len(tokens), 1)
            self.attention_mask = torch.cat([self.attention_mask, ones], dim=-1)
        logits = self._forward(tokens.unsqueeze(-1), self.next_positions)
        self.next_positions = self.next_positions + 1
        return logits

    @torch.inference_mode()
    def repeat_step(self, tokens: Tensor) -> None:
        """Takes the newest cached step again: for timing. Lengths stay; the newest keys and values become `tokens`'."""
        length, mask, positions = self.cache.get_seq_length(), self.attention_mask, self.next_positions
        self.cache.rewind(length - 1)
        self.attention_mask = None if mask is None else mask[:, :-1]
        self.next_positions = positions - 1
        self.decode(tokens)
        assert self.cache.get_seq_length() == length

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        output = self.model(
            input_ids=ids,
            attention_mask=self.attention_mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def _fresh_cache(self, batch_size: int) -> KVCache:
        """The cache emptied, its storage kept where the batch size is the same."""
        first = self.cache.layers[0]
        if first.is_initialized and first.keys.shape[0] != batch_size:
            return KVCache(len(self.cache.layers), self.max_context)
        self.cache.rewind(0)
        return self.cache

    def _check(self, prompts: Sequence[Sequence[int]]) -> int:
        lengths = [len(prompt) for prompt in prompts]
        if min(lengths) == 0:
            raise ValueError(f"prompt {lengths.index(0)} has no tokens.")
        if max(lengths) >= self.max_context:
            raise ValueError(
                f"a prompt of {max(lengths)} tokens leaves no room in engine.max_context={self.max_context}. "
                "Raise engine.max_context or shorten the prompt."
            )
        return max(lengths)


def pad_left(prompts: Sequence[Sequence[int]], length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, each [batch, length]; the mask is 0 over padding."""
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    mask = torch.zeros(len(prompts), length, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    return ids.to(device), mask.to(device)
