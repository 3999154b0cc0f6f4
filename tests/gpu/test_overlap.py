"""Passes in sections or halves on a card, sums on a second stream: what whole passes give, again and again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from launcher.tasks.breakdown import Piece, profile_steps
from parallel.checkpoint.headers import read_checkpoint
from parallel.checkpoint.load import load_checkpoint
from parallel.checkpoint.quantize_schemes import QUANTIZE_SCHEMES
from parallel.communicator import Communicator, ElidedAllReduce
from parallel.engine import limits
from parallel.engine.chunk_timer import prepared_chunk
from parallel.engine.engine import Engine
from parallel.engine.limits import EngineLimits
from parallel.engine.sequence import Part, TokenSequence
from parallel.kernels import grouping
from parallel.kernels.pages import pages_for
from parallel.layers.merged import LayerMerger
from parallel.shard import share_process_group
from tests.gpu.one_card import DEVICE, run_on_one_card
from tests.parallel.engine.prefill.test_overlap import Cut, cut_passes
from tests.parallel.ranks import build
from tests.parallel.small_models import DEMO

pytestmark = pytest.mark.gpu
# Lengths of the prompts of each pass.
PASSES = ((1000,), (513,), (300, 1, 400, 260), (2000,))
NUM_REPEATS = 6
ROWS_PER_TILE = 128
HALVES = Cut(2, dequantizes=True, num_ahead=4, rows_apart=512)
JOINED = Cut(3, joined=(1, 2))
CUTS = (HALVES, Cut(2), Cut(3), Cut(4), JOINED)


def open_engine(communicator: Communicator, kind: str) -> Engine:
    share_process_group(torch.device("cpu"))
    model = build(communicator, DEMO, torch.float32 if kind == "float32" else torch.bfloat16)
    scheme = QUANTIZE_SCHEMES.get(kind)
    load_checkpoint(model, read_checkpoint(DEMO), DEVICE, quantize=scheme, on_placed=LayerMerger(model.module))
    # Launch by launch; tests/gpu/test_prefill_graphs.py has graphs.
    limits.GRAPHED_ROWS = ()
    # Several blocks in gate_up and in down.
    grouping.DEQUANTIZED_AT_A_TIME = 256 * 256
    engine = Engine(model.module, communicator, EngineLimits(2048, 4, 2048))
    # As where copies carry sums.
    engine.target = replace(engine.target, joins=True)
    return engine


def pass_states(engine: Engine, lengths: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(sum(lengths))
    for cache in engine.caches:
        cache.keys.fill_(torch.nan)
        cache.values.fill_(torch.nan)
    sequences = [
        TokenSequence(row, torch.randint(3, 4000, (length,), generator=generator).tolist(), 1)
        for row, length in enumerate(lengths)
    ]
    for sequence in sequences:
        sequence.pages = engine.pages.allocate(pages_for(sequence.num_tokens))
    states = engine.hidden_states([Part(sequence, 0, len(sequence.prompt)) for sequence in sequences]).clone()
    for sequence in sequences:
        engine.pages.release(sequence.pages)
    return states


@dataclass(frozen=True)
class Found:
    """Of one cut of one pass: the error beside the spread of the whole's numbers, and how many different results."""

    cut: Cut
    lengths: tuple[int, ...]
    error: float
    num_different: int


def compare(communicator: Communicator, kind: str) -> list[Found]:
    engine, found = open_engine(communicator, kind), []
    for lengths in PASSES:
        cut_passes(CUTS[0], min_rows=10**9)
        whole = pass_states(engine, lengths)
        for cut in CUTS:
            cut_passes(cut, rows_per_tile=ROWS_PER_TILE)
            states = [pass_states(engine, lengths) for _ in range(NUM_REPEATS)]
            error = max(float((each - whole).float().std() / whole.float().std()) for each in states)
            found.append(Found(cut, lengths, error, sum(not torch.equal(each, states[0]) for each in states)))
    communicator.barrier()
    return found


@pytest.mark.parametrize(("kind", "allowed"), [("float32", 1e-5), ("bfloat16", 0.03), ("int4", 0.03), ("int8", 0.03)])
def test_sections_give_what_the_whole_gives(tmp_path: Path, kind: str, allowed: float) -> None:
    """In bf16 but for the rounding of products of other numbers of rows; the same bits every time."""
    for rank, found in enumerate(run_on_one_card(compare, 2, tmp_path, kind)):
        for each in found if rank == 0 else ():
            print(kind, each)
        assert all(each.error < allowed and each.num_different == 0 for each in found), found


class Slow(ElidedAllReduce):
    """Takes about a millisecond of one multiprocessor for each sum."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        torch.cuda._sleep(2_000_000)
        return tensor


def profiled_pass(communicator: Communicator, cut: Cut) -> tuple[list[Piece], int]:
    """What two passes through five layers do, on the first rank; and the sums of a layer."""
    if communicator.rank != 0:
        return [], 0
    cut_passes(cut, rows_per_tile=ROWS_PER_TILE)
    engine = open_engine(communicator, "int4")
    with prepared_chunk(engine, [1024], Slow(communicator)) as run:
        run()
        blocks = engine.model.model.layers[0].mlp.down_proj.blocks(torch.bfloat16)
        # Of halves two, one for each block of down but the last, and two.
        num_sums = 2 + len(blocks) - 1 + 2 if cut.dequantizes else 2 * cut.sections
        return profile_steps(run, DEVICE, 1), num_sums


@pytest.mark.parametrize("cut", [HALVES, Cut(2), Cut(4), JOINED], ids=["halves", "two", "four", "joined"])
def test_products_run_beside_sums(tmp_path: Path, cut: Cut) -> None:
    pieces, num_sums = run_on_one_card(profiled_pass, 2, tmp_path, cut)[0]
    sums = [piece for piece in pieces if "spin" in piece.name.lower()]
    others = [piece for piece in pieces if piece not in sums]
    # And one of the embedding.
    assert len(sums) == 2 * (1 + 5 * num_sums), {piece.name for piece in pieces}
    beside = [sum(each.start_us < other.start_us < each.start_us + each.us for other in others) for each in sums]
    print(cut, "kernels that began during each sum:", beside)
    assert sum(count > 0 for count in beside) >= 2 * 5 * 2
