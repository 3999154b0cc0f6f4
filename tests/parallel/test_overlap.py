"""Passes in two halves give what whole passes give, and each half's sum is started before the other goes on."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from parallel import linear
from parallel.communicator import Communicator
from parallel.engine import limits, merged, overlap, paged_model
from parallel.engine.engine import Engine, Part
from parallel.engine.generate import StopRules, generate
from parallel.engine.paged_model import split_parts
from parallel.engine.sequence import Sequence
from parallel.engine.side_stream import SideStream, Sum
from parallel.kernels.blocks import Block
from tests.parallel.passes import parts_of
from tests.parallel.quantized_models import write_pair
from tests.parallel.ranks import demo_tokenizer, make_engine, numbered, run_on_ranks
from tests.parallel.small_models import prompts_of

# Of the parts of each pass: start and end in their prompts. Cuts fall within parts, between them, and after odd numbers
# of rows; a second pass follows what the first has cached.
PASSES = (
    ((0, 41),),
    ((0, 1), (0, 20), (0, 5), (0, 33)),
    ((0, 8), (0, 8)),
    ((0, 2),),
    ((5, 6), (17, 30)),
)


def pass_states(engine: Engine, parts: tuple[tuple[int, int], ...]) -> Tensor:
    """[tokens, hidden] of the parts of as many random prompts, which are in the cache up to the start of theirs."""
    generator = torch.Generator().manual_seed(len(parts))
    ids = [torch.randint(1, 900, (end,), generator=generator).tolist() for _, end in parts]
    with parts_of(engine, ids, parts) as found:
        return engine.hidden_states(found).clone()


def split_weights() -> None:
    """Plain weights come in three blocks, too."""

    def in_blocks(weight: Tensor) -> list[Block]:
        size = -(-len(weight) // 3)
        outputs = [slice(start, min(start + size, len(weight))) for start in range(0, len(weight), size)]
        return [Block(each, lambda each=each: weight[each].clone()) for each in outputs]

    linear.whole = merged.whole = in_blocks


def whole_and_halved(
    communicator: Communicator, folder: Path, num_ahead: int, rows_apart: int
) -> list[tuple[Tensor, Tensor]]:
    split_weights()
    overlap.num_ahead, overlap.MIN_ROWS_APART = lambda device, num_rows: num_ahead, rows_apart
    engine = make_engine(communicator, folder)
    found = []
    for parts in PASSES:
        limits.MIN_HALVED_ROWS = 10**9
        whole = pass_states(engine, parts)
        for cache in engine.caches:
            cache.keys.fill_(torch.nan)
            cache.values.fill_(torch.nan)
        limits.MIN_HALVED_ROWS, limits.ROWS_PER_TILE = 2, 1
        found.append((whole, pass_states(engine, parts)))
    return found


@pytest.mark.parametrize("model", ["llama", "llama_with_biases", "llama_with_two_kv_heads", "qwen3"])
@pytest.mark.parametrize(("world_size", "num_ahead", "rows_apart"), [(2, 1, 100), (3, 2, 1), (2, 4, 8)])
def test_halves_give_what_the_whole_gives(
    folders: dict[str, Path], model: str, world_size: int, num_ahead: int, rows_apart: int
) -> None:
    """With two KV heads the third rank has none."""
    for found in run_on_ranks(whole_and_halved, world_size, folders[model], num_ahead, rows_apart):
        for whole, halved in found:
            assert whole.isfinite().all()
            torch.testing.assert_close(halved, whole, rtol=0, atol=2e-5 * float(whole.abs().max()))


def halved_answers(communicator: Communicator, folder: Path, min_rows: int) -> tuple[list[list[int]], list[int]]:
    """Tokens of answers to prompts that are read in small chunks beside decode steps; rows of the passes' halves."""
    limits.MIN_HALVED_ROWS, limits.ROWS_PER_TILE, cuts = min_rows, 1, []
    choose = limits.choose_cut
    paged_model.choose_cut = lambda *sizes: (cuts.append(choose(*sizes)), cuts[-1])[1]
    engine = make_engine(communicator, folder, prefill_chunk=16, batch_size=2)
    result = generate(engine, numbered(prompts_of("llama")), demo_tokenizer(), StopRules(9))
    return [answer.token_ids for answer in result.answers], [cut for cut in cuts if cut is not None]


@pytest.mark.parametrize("name", ["w4a16 act order", "awq"])
def test_answers_do_not_depend_on_halves(tmp_path: Path, name: str) -> None:
    """Of a quantised model, on two ranks."""
    folder = write_pair(name, tmp_path) / "quantized"
    whole = run_on_ranks(halved_answers, 2, folder, 10**9)
    halved = run_on_ranks(halved_answers, 2, folder, 2)
    assert [answers for answers, _ in halved] == [answers for answers, _ in whole]
    assert all(cuts == [] for _, cuts in whole)
    assert all(len(cuts) >= 4 for _, cuts in halved)


class Traced(SideStream):
    """Says when sums are started, waited for and joined."""

    events: ClassVar[list[str]] = []

    def start_all_reduce(self, communicator: Communicator, tensor: Tensor) -> Sum:
        self.events.append("start")
        return TracedSum(super().start_all_reduce(communicator, tensor).tensor, None)

    def join(self) -> None:
        self.events.append("join")


class TracedSum(Sum):
    def wait(self) -> Tensor:
        Traced.events.append("wait")
        return super().wait()


def traced_pass(communicator: Communicator, folder: Path, rows_apart: int) -> list[str]:
    """Starts of sums, waits for them, and products with their rows, in a pass of two halves of 21 and 20."""
    limits.MIN_HALVED_ROWS, limits.ROWS_PER_TILE, overlap.side_stream = 2, 1, Traced
    overlap.num_ahead, overlap.MIN_ROWS_APART = lambda device, num_rows: 2, rows_apart
    split_weights()
    multiply = Block.multiply

    def traced_multiply(block: Block, rows: Tensor, *tensors: Tensor) -> None:
        Traced.events.append({21: "A", 20: "B", 41: "AB"}[len(rows)])
        multiply(block, rows, *tensors)

    Block.multiply = traced_multiply
    pass_states(make_engine(communicator, folder), PASSES[0])
    return Traced.events


def test_one_half_is_multiplied_while_the_other_is_summed_up(folders: dict[str, Path]) -> None:
    """Each weight in three blocks, of which the first half takes two of gate and up ahead of the second."""
    output = ["A", "B", "A", "start", "B", "start"]
    gate_up = ["wait", "A", "A", "wait", "B", "AB", "B"]
    at_once = ["AB", "start", "AB", "start", "A", "start", "B", "start"]
    apart = [*["A", "start", "B"] * 3, "start"]
    for rows_apart, down, waits in ((22, at_once, (3, 3)), (21, apart, (3, 1))):
        first, second = (["wait"] * num for num in waits)
        layer = [*"AAA", "A", *"BBB", "B", *output, *gate_up, *down]
        others = [*first, *"AAA", "A", *second, *"BBB", "B", *output, *gate_up, *down]
        found = run_on_ranks(traced_pass, 2, folders["llama"], rows_apart)[0]
        assert found == [*layer, *others, *others, *first, *second, "join"]


def test_parts_are_cut_at_any_token() -> None:
    sequences = [Sequence(index, [0] * 20, 1) for index in range(3)]
    parts = [Part(sequences[0], 3, 9), Part(sequences[1], 0, 1), Part(sequences[2], 5, 12)]
    places = [(part.sequence.index, at) for part in parts for at in range(part.start, part.end)]
    for cut in range(len(places) + 1):
        halves = split_parts(parts, cut)
        found = [[(part.sequence.index, at) for part in half for at in range(part.start, part.end)] for half in halves]
        assert found == [places[:cut], places[cut:]]
        assert all(part.start < part.end for half in halves for part in half)


def test_halves_are_whole_tiles_and_about_equal() -> None:
    assert [limits.choose_cut(rows, 2) for rows in (1, 1023, 1024, 1025, 1280, 1281, 2048)] == [
        *(None, None, 512, 640, 640, 768, 1024)
    ]
    assert limits.choose_cut(2048, 1) is None
