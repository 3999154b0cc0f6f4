"""Do accesses of 16 bytes to host memory come whole between cards? `python -m tools.bench.line_tears --cards 2`

The dense all-reduce relies on it. Each card writes lines of 16 bytes of equal numbers, as fast as its link takes them,
while it reads those of the next card and counts mixed ones: none may be. The last line is JSON: of each rank the reads,
the reads that found a new number, and so came close to a write, and the lines that were mixed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from parallel.kernels.launch import load_kernel
from parallel.transports.region_layout import PAGE_BYTES
from parallel.transports.shared_region import share_region
from tools.bench.card_ranks import CardRank, run_on_cards

SOURCE = Path(__file__).with_suffix(".cu")
THREADS, BLOCKS = 256, 16
LINE_BYTES = 16
# Those of a card's own: 64 KiB.
SLOT_BYTES = BLOCKS * THREADS * LINE_BYTES
COUNTS = ("reads", "new", "mixed")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.line_tears", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--cards", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0)
    args = parser.parse_args()
    run_on_cards(look_for_tears, args.cards, args.seconds)


def look_for_tears(rank: CardRank, seconds: float) -> None:
    """Raises AssertionError on every rank where a line was mixed on any."""
    own, world_size = rank.control.rank, rank.control.world_size
    region = share_region(rank.control, torch.device("cpu"), PAGE_BYTES + world_size * SLOT_BYTES)
    region.register()
    kernel = load_kernel(SOURCE, "write_and_read", (), "qqPi", rank.device.index)
    counts = torch.zeros(len(COUNTS), dtype=torch.int64, device=rank.device)
    slots = [region.device_address + PAGE_BYTES + r * SLOT_BYTES for r in range(world_size)]
    rank.nccl.barrier()
    kernel((2 * BLOCKS, 1, 1), THREADS, slots[own], slots[(own + 1) % world_size], counts, round(seconds * 1000))
    rank.nccl.barrier()
    found = rank.control.all_gather(counts.cpu()).tolist()
    region.unregister()
    if own == 0:
        print(json.dumps({name: [row[i] for row in found] for i, name in enumerate(COUNTS)}))
    assert not any(mixed for _, _, mixed in found)


if __name__ == "__main__":
    main()
