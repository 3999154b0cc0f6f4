"""Which prompts a pass reads, and how much of each, where there are more tokens than it takes. No torch.

In the order in which they came, a prompt of some thousand tokens would keep all behind it from their first token for
seconds; shortest first, it might never be read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from parallel.engine.sequence import Part, TokenSequence
from parallel.kernels.limits import PAGE_SIZE


def share_pass(sequences: Sequence[TokenSequence], room: int) -> list[Part]:
    """Parts of `sequences`, which are in the order in which they came, of up to `room` tokens together; in that order.

    Half of the room is for the oldest, if it has as much left, the rest for who has least left to read. What one reuses
    that another is still to read, it waits for.
    """
    ends = {each: each.num_prefilled for each in sequences}
    half = room - room // 2
    shortest_first = sorted(sequences, key=lambda each: len(each.prompt) - each.num_prefilled)
    # At last in their order: who waited for a longer one may follow it in this pass.
    for turn, sequence in enumerate([*sequences[:1], *shortest_first, *sequences]):
        if is_ready(sequence, ends):
            taken = min(room if turn else half, len(sequence.prompt) - ends[sequence])
            room -= taken
            ends[sequence] += taken
    return [Part(each, each.num_prefilled, ends[each]) for each in sequences if ends[each] > each.num_prefilled]


def is_ready(sequence: TokenSequence, ends: Mapping[TokenSequence, int]) -> bool:
    """Whether pages that it has of others hold their tokens once each of those is read to its end in `ends`.

    All who have the last of these pages have the same ones before it.
    """
    num_pages = sequence.num_reused // PAGE_SIZE
    if num_pages == 0 or sequence.num_prefilled > sequence.num_reused:
        return True
    shared = sequence.pages[:num_pages]
    return all(end >= sequence.num_reused for other, end in ends.items() if other.pages[:num_pages] == shared)
