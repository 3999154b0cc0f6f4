"""Picking the next token from vocabulary-sharded logits, the same one on every rank.

Greedy needs one exchange of (value, index) per sequence. Sampling gathers the logits, filters them with transformers'
own warpers and draws with noise that is a function of the sequence's seed and position, so that an answer depends on
its prompt and its seed, not on what else is in the batch; every rank computes the same noise and so draws the same
token. All of it can be captured in a CUDA graph.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from parallel.communicator import Communicator
from parallel.engine.limits import SAMPLED_ROWS
from parallel.engine.noise import exponential_noise, signed

# In place of a token: the model's logits were no numbers.
NO_NUMBER = -1
# Lower ones draw the same, and logits divided by them are no numbers in float32.
LEAST_TEMPERATURE = 1e-30


@dataclass(frozen=True)
class SamplingParams:
    """temperature 0 is greedy; top_k 0 and top_p 1 keep every token."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class VocabularyShards:
    """How many tokens of the vocabulary each rank holds, in rank order."""

    sizes: tuple[int, ...]

    @property
    def vocab_size(self) -> int:
        return sum(self.sizes)

    def start(self, rank: int) -> int:
        return sum(self.sizes[:rank])


def greedy_tokens(logits: Tensor, shards: VocabularyShards, communicator: Communicator) -> Tensor:
    """[batch, local vocabulary] -> token ids [batch]; the lowest id wins a tie, as in torch.argmax of the whole."""
    values, indices = logits.float().max(dim=-1)
    indices = indices + shards.start(communicator.rank)
    # float64 holds a float32 logit and an index below 2**53 exactly, so one small message carries both.
    best = communicator.all_gather(torch.stack([values.double(), indices.double()], dim=-1))
    winner = best[..., 0].argmax(dim=0, keepdim=True)
    return best[..., 1].gather(0, winner).squeeze(0).long()


def checked(tokens: Tensor, logits: Tensor) -> Tensor:
    """`tokens` [batch], NO_NUMBER where this rank's part of the `logits` [batch, local vocabulary] holds NaN, or
    infinity."""
    return torch.where(logits.amax(dim=-1).isfinite(), tokens, NO_NUMBER)


def gather_logits(logits: Tensor, shards: VocabularyShards, communicator: Communicator) -> Tensor:
    """[batch, local vocabulary] on each rank -> [batch, vocabulary] on all; uneven shards are padded on the way."""
    widest = max(shards.sizes)
    padded = torch.nn.functional.pad(logits, (0, widest - logits.shape[-1]))
    gathered = communicator.all_gather(padded)
    return torch.cat([part[..., :size] for part, size in zip(gathered, shards.sizes, strict=True)], dim=-1)


def sampled_tokens(logits: Tensor, params: SamplingParams, noise: Tensor) -> Tensor:
    """[batch, vocabulary] -> ids [batch], drawn from the softmax after temperature, top-k and top-p in that order.

    argmax(p / e) with e ~ Exp(1), which is `noise` [batch, vocabulary], draws from p (the exponential race, equal to
    the Gumbel-max trick).
    """
    return (warped(logits, params).softmax(dim=-1) / noise).argmax(dim=-1)


def warped(logits: Tensor, params: SamplingParams) -> Tensor:
    """[batch, vocabulary] float32 logits of what is drawn from; -inf for what is left out."""
    scores = TemperatureLogitsWarper(max(params.temperature, LEAST_TEMPERATURE))(None, logits.float())
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(None, scores)
    return scores


def sequence_key(seed: int, prompt_index: int) -> int:
    """The key of a sequence's noise: 64 bits that all depend on both numbers, as int64 holds them."""
    digest = hashlib.blake2b(f"{seed} {prompt_index}".encode(), digest_size=8).digest()
    return signed(int.from_bytes(digest, "little"))


def greedy_guesses(
    logits: Tensor, num: int, shards: VocabularyShards, communicator: Communicator
) -> tuple[Tensor, Tensor]:
    """The `num` likeliest tokens and the logarithms of their probabilities [batch, num], the likeliest first."""
    local = logits.float()
    values, indices = local.topk(min(num, local.shape[-1]))
    missing = num - values.shape[-1]
    values = torch.nn.functional.pad(values, (0, missing), value=-torch.inf)
    indices = torch.nn.functional.pad(indices, (0, missing)) + shards.start(communicator.rank)
    # One message, as of greedy_tokens.
    sums = local.logsumexp(dim=-1, keepdim=True)
    best = communicator.all_gather(torch.cat([values.double(), indices.double(), sums.double()], dim=-1))
    values, indices, sums = best.split([num, num, 1], dim=-1)
    values, indices = (each.transpose(0, 1).flatten(1) for each in (values, indices))
    values, order = values.sort(dim=-1, descending=True, stable=True)
    log_probs = (values[:, :num] - sums.logsumexp(0)).clamp(max=0)
    return indices.gather(1, order[:, :num]).long(), log_probs.float()


def sampled_guesses(logits: Tensor, num: int, params: SamplingParams, noise: Tensor) -> tuple[Tensor, Tensor]:
    """As `greedy_guesses`, of what a model with other logits [batch, vocabulary] draws with the same noise.

    Its race has, but for the temperature, the scores t * log(p / e), which are the logits where t is 0; how far they
    are apart tells, as logits do, how sure the winner is.
    """
    scores = params.temperature * (warped(logits, params) - noise.log())
    log_probs, tokens = scores.log_softmax(dim=-1).topk(min(num, scores.shape[-1]))
    missing = num - tokens.shape[-1]
    pad = torch.nn.functional.pad
    return pad(tokens, (0, missing)), pad(log_probs.clamp(max=0), (0, missing), value=-torch.inf)


@dataclass(frozen=True)
class Sampler:
    """Picks tokens for the rows of a step."""

    params: SamplingParams
    shards: VocabularyShards
    communicator: Communicator

    def __call__(self, logits: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
        """[batch, local vocabulary] -> token ids [batch], equal on every rank.

        Args:
            keys: [batch] int64, `sequence_key` of each row.
            positions: [batch] int64, where in its sequence each row's new token will stand.
        """
        if self.params.temperature == 0:
            return greedy_tokens(logits, self.shards, self.communicator)
        return torch.cat([self._draw(*part) for part in some_rows(logits, keys, positions)])

    def readable(self, tokens: Tensor) -> Tensor:
        """`tokens` of another model of the same tokenizer, any shape, as this one can read them: its own as they are,
        those beyond its vocabulary, which it never draws, as its last."""
        return tokens.clamp(max=self.shards.vocab_size - 1)

    def _draw(self, logits: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
        whole = gather_logits(logits, self.shards, self.communicator)
        return sampled_tokens(whole, self.params, exponential_noise(keys, positions, whole.shape[-1]))

    def guesses(self, logits: Tensor, keys: Tensor, positions: Tensor, num: int) -> tuple[Tensor, Tensor]:
        """What another model may draw there, from logits that are like these: `num` different tokens and the logarithms
        of their chances, [batch, num] each, the best first; -inf for none. Args as of a draw."""
        if self.params.temperature == 0:
            return greedy_guesses(logits, num, self.shards, self.communicator)
        found = [self._guess(num, *part) for part in some_rows(logits, keys, positions)]
        tokens, chances = zip(*found, strict=True)
        return torch.cat(tokens), torch.cat(chances)

    def _guess(self, num: int, logits: Tensor, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        whole = gather_logits(logits, self.shards, self.communicator)
        return sampled_guesses(whole, num, self.params, exponential_noise(keys, positions, whole.shape[-1]))


def some_rows(*columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """SAMPLED_ROWS at a time of each, so that many take no more memory than these."""
    return zip(*(column.split(SAMPLED_ROWS) for column in columns), strict=True)


def open_sampler(model: PreTrainedModel, params: SamplingParams, communicator: Communicator) -> Sampler:
    """For a sharded model."""
    return Sampler(params, VocabularyShards(tuple(model.lm_head._partition_sizes)), communicator)
