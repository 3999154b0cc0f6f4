"""One function on several ranks that are processes with a card each: their own, or those that torchrun started."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from parallel.communicator import Communicator
from parallel.transports.torch_distributed import open_gloo, open_nccl

LIMIT = timedelta(seconds=120)
BACKENDS = "cpu:gloo,cuda:nccl"


@dataclass(frozen=True)
class CardRank:
    """One rank: its card, NCCL, and `control` on the CPU, by which ranks agree whatever the cards do."""

    device: torch.device
    nccl: Communicator
    control: Communicator


def is_started_by_torchrun() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def run_on_cards(function: Callable[..., None], num_cards: int, *args: Any) -> None:
    """Calls `function(rank, *args)` on each rank, without peer access; `num_cards` is not for ranks of torchrun.

    Raises what a rank raised; the others are ended then.
    """
    os.environ.setdefault("NCCL_P2P_DISABLE", "1")
    if is_started_by_torchrun():
        call_on_card(function, int(os.environ["LOCAL_RANK"]), args)
        return
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(  # type: ignore[attr-defined, no-untyped-call]
            join_and_call, (function, num_cards, f"file://{folder}/store", args), num_cards
        )


def join_and_call(rank: int, function: Callable[..., None], num_cards: int, store: str, args: Any) -> None:
    call_on_card(function, rank, args, init_method=store, rank=rank, world_size=num_cards)


def call_on_card(function: Callable[..., None], card: int, args: Any, **group: Any) -> None:
    """`group`: how the default group comes about, where torchrun's environment does not say it."""
    device = torch.device("cuda", card)
    torch.cuda.set_device(device)
    dist.init_process_group(BACKENDS, timeout=LIMIT, **group)
    try:
        function(CardRank(device, open_nccl(device, LIMIT), open_gloo(torch.device("cpu"), LIMIT)), *args)
    finally:
        # NCCL waits for graphs with its sums (launcher/rank/context.py).
        gc.collect()
        dist.destroy_process_group()
