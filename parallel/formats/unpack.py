"""Small unsigned integers out of int32 words. Value i of a word is in bits i * bits and up."""

from __future__ import annotations

import torch
from torch import Tensor

from parallel.formats.scheme import Box, CheckpointError, Range, Scheme


def unpack(words: Tensor, bits: int) -> Tensor:
    """[rows, words] int32 -> [rows, words * 32 / bits] uint8; `bits` is 4 or 8."""
    # Little-endian, as safetensors is and every machine that runs this: a word's first byte has its first values.
    # One word in a row may keep a stride that view() rejects.
    in_bytes = words.contiguous().as_strided(words.shape, (words.shape[1], 1)).view(torch.uint8)
    if bits == 8:
        return in_bytes
    return split_bytes(in_bytes, first=0)


def split_bytes(pairs: Tensor, first: int) -> Tensor:
    """[rows, n] uint8 -> [rows, 2 * n], values below 16; `first` is 0 where a low half comes first, else 1."""
    values = pairs.new_empty(len(pairs), 2 * pairs.shape[1])
    torch.bitwise_and(pairs, 15, out=values[:, first::2])
    torch.bitwise_right_shift(pairs, 4, out=values[:, 1 - first :: 2])
    return values


def trim(values: Tensor, dim: int, wanted: Range, per_word: int) -> Tensor:
    """Cuts off what came along because words were read whole: `values` starts at a multiple of `per_word`."""
    return values.narrow(dim, wanted[0] % per_word, wanted[1] - wanted[0])


def cut_groups(scheme: Scheme, box: Box, like: Tensor) -> Tensor | None:
    """[in] int64 on the device of `like`: the group of each input where the first group is cut, else None."""
    first, end = box.inputs
    if scheme.group_size is None or first % scheme.group_size == 0:
        return None
    return torch.arange(first, end, device=like.device) // scheme.group_size - first // scheme.group_size


def stored_groups(indices: Tensor, num_groups: int) -> Tensor:
    """[in] int64: the group of each input, as a file has it in act order.

    Raises CheckpointError where it names one that has no scales: a card would stop at it, a CPU take another for -1.
    """
    groups = indices.long()
    strange = groups[(groups < 0) | (groups >= num_groups)]
    if strange.numel():
        raise CheckpointError(
            f"an input is in group {int(strange[0])}, where groups are 0 to {num_groups - 1}. Download the file again."
        )
    return groups
