"""Keys and values of layers that lie in host memory lie there too, and come to the card for each of their attentions.

Two staging caches, each as large as that of one layer, take turns. A pass brings the pages in which its sequences have
tokens, two layers ahead of their use; a layer writes its new tokens there as it would to a cache on the card, and they
are written back right after it. So what lies on the host is complete between passes, whoever reads it next: a later
chunk, a prompt that begins the same, a step after drafts that were wrong.

The copy engine brings pages, as many neighbours at once as there are. A kernel writes tokens back, to pinned memory
that the card sees: where they go the device alone may know, and in a layer of a 70B a token has 4 kB, its page 262.
Copies of a pass begin after all that was queued before it, written tokens included; weights of its first layers come
meanwhile, so that the link does not rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from parallel.kernels.limits import PAGE_SIZE
from parallel.kernels.pages import PagedKV
from parallel.offload.copies import CopyQueue, open_copy_queue
from parallel.offload.embedding import card_view
from parallel.offload.host_memory import HostBuffer
from parallel.offload.spread import NUM_STAGED

# Pages between two that are wanted which come with them: a copy takes the host some 10 us to queue, in which the link
# brings two pages of a 70B's keys (131 kB at 25 GB/s).
MAX_GAP = 2
FEWER_TOKENS = "keep fewer keys and values there (engine.max_context, workload.batch_size, or offload.kv=card)"
# What tokens are moved as: the widest numbers of which a head's keys are a multiple, whatever they hold.
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class HostKV:
    """Pages of the layers with the indices `layers`. All passes over the model `begin` here, and go `through`.

    `caches`: by index, what a layer's attention reads and writes, the same memory for every other layer. `stored`: the
    pages of all layers where they stay, as the device sees them.
    """

    def __init__(
        self,
        layers: Sequence[int],
        num_pages: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Raises RuntimeError: the memory cannot be pinned."""
        self.places = {index: place for place, index in enumerate(sorted(layers))}
        shape = (len(layers), 2, num_pages, kv_heads, PAGE_SIZE, head_dim)
        self.num_bytes = math.prod(shape) * dtype.itemsize
        # A rank without KV heads has none.
        self.buffer = HostBuffer(max(1, self.num_bytes), device, FEWER_TOKENS)
        seen = card_view(self.buffer, device) if device.type == "cuda" else self.buffer.memory
        pages, seen_pages = (memory[: self.num_bytes].view(dtype).view(shape) for memory in (self.buffer.memory, seen))
        self.staging = torch.zeros(min(NUM_STAGED, len(layers)), *shape[1:], dtype=dtype, device=device)
        self.caches = {index: PagedKV(*self.staging[place % NUM_STAGED]) for index, place in self.places.items()}
        self.stored = [PagedKV(*layer) for layer in seen_pages]
        word = WORDS[math.gcd(head_dim * dtype.itemsize, 8)]
        self.pages, self.seen_words, self.staged_words = (each.view(word) for each in (pages, seen_pages, self.staging))
        self.copies: CopyQueue = open_copy_queue(device, NUM_STAGED)
        # Of the pass under way: what is brought, and the pages and places of what is written.
        self.ranges: list[tuple[int, int]] = []
        self.written: tuple[Tensor, Tensor] | None = None

    def begin(self, pages: Iterable[int], slots: Tensor) -> None:
        """Begins a pass of sequences that have tokens in `pages`, which caches those in `slots` [tokens] int64."""
        self.ranges = page_ranges(pages)
        self.written = slots // PAGE_SIZE, slots % PAGE_SIZE
        for place in range(len(self.staging)):
            # Also after all that was written back, and moved there.
            self.copies.mark_used(place)
            self.fetch(place)

    def through(self, layers: Iterable[nn.Module]) -> Iterator[nn.Module]:
        """The layers of the model in turn, each with its pages in place until the next is asked for."""
        assert self.written is not None, "a pass that was not begun"
        for index, layer in enumerate(layers):
            place = self.places.get(index)
            if place is not None:
                self.copies.wait_copied(place % NUM_STAGED)
            yield layer
            if place is not None:
                self.write_back(place)
                self.copies.mark_used(place % NUM_STAGED)
                self.fetch(place + NUM_STAGED)
        self.written = None

    def pass_bytes(self, num_tokens: int) -> int:
        """What a pass brings whose sequences have so many tokens; a part of a page counts as such."""
        return num_tokens * self.num_bytes // (self.pages.shape[2] * PAGE_SIZE)

    def fetch(self, place: int) -> None:
        """Queues copies of the layer at `place`, where there is one."""
        if place < len(self.places):
            source, target = self.pages[place], self.staged_words[place % NUM_STAGED]
            parts = [(part, slice(*each)) for each in self.ranges for part in range(2)]
            self.copies.copy([(source[at], target[at]) for at in parts], place % NUM_STAGED)

    def write_back(self, place: int) -> None:
        """Queues the copy of what the pass cached."""
        assert self.written is not None
        pages, places = self.written
        staged = self.staged_words[place % NUM_STAGED]
        self.seen_words[place][:, pages, :, places] = staged[:, pages, :, places]


def page_ranges(pages: Iterable[int]) -> list[tuple[int, int]]:
    """Neighbouring pages that hold all of `pages` and little else: from the first to before the second, in order."""
    ranges: list[tuple[int, int]] = []
    for page in sorted(set(pages)):
        if ranges and page <= ranges[-1][1] + MAX_GAP:
            ranges[-1] = ranges[-1][0], page + 1
        else:
            ranges.append((page, page + 1))
    return ranges
