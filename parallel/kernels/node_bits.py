"""Sets of a tree's nodes as bits, 64 nodes to an int64: [..., words]."""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BITS = 64


def num_words(num_nodes: int) -> int:
    return -(-num_nodes // WORD_BITS)


def bits_of(nodes: Tensor, words: int) -> Tensor:
    """[..., words]: the set of each of `nodes` [...] int64 alone."""
    word = torch.arange(words, device=nodes.device)
    nodes = nodes.unsqueeze(-1)
    return torch.where(nodes // WORD_BITS == word, torch.ones_like(nodes) << nodes % WORD_BITS, 0)


def pack_bits(flags: Tensor) -> Tensor:
    """[..., words]: the nodes whose flag in [..., nodes], 0 or 1, is set."""
    nodes = torch.arange(flags.shape[-1], device=flags.device)
    bits = flags.long() << nodes % WORD_BITS
    padded = torch.nn.functional.pad(bits, (0, -len(nodes) % WORD_BITS))
    return padded.unflatten(-1, (-1, WORD_BITS)).sum(-1)


def chain_masks(num_nodes: int, device: torch.device) -> Tensor:
    """[nodes, words]: each sees itself and those before it."""
    return bits_of(torch.arange(num_nodes, device=device), num_words(num_nodes)).cumsum(0)
