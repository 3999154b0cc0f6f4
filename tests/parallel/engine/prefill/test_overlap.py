"""Passes in sections or halves give what whole passes give; each sum is started before the next section goes on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from parallel.communicator import Around, Communicator
from parallel.engine import paged_model
from parallel.engine.answer import StopRules
from parallel.engine.decoder import Decoder, Tokens
from parallel.engine.engine import Engine
from parallel.engine.generate import generate
from parallel.engine.paged_model import split_parts
from parallel.engine.prefill import halves, overlap, part_attention, pieces, section_sizes
from parallel.engine.prefill.order import run_pass
from parallel.engine.prefill.pieces import PassBuffers, Pieces
from parallel.engine.prefill.side_stream import SideStream, Sum
from parallel.engine.sequence import Part, TokenSequence
from parallel.kernels import multiprocessors
from parallel.kernels.blocks import Block
from parallel.layers import linear, merged
from parallel.transports.by_size import BySize
from parallel.transports.copies import CopiedHostMemory
from parallel.transports.two_step import TwoStepHostMemory
from tests.parallel.engine.prefill.passes import parts_of
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


@dataclass(frozen=True)
class Cut:
    """How a pass is cut: in so many sections; or in halves, as if weights were dequantised.

    `joined`: how many attend at once, and then; each by itself if empty.
    """

    sections: int
    dequantizes: bool = False
    num_ahead: int = 1
    rows_apart: int = 100
    joined: tuple[int, ...] = ()


def cut_passes(cut: Cut, min_rows: int = 2, rows_per_tile: int = 1) -> None:
    """Those of so many rows, after any tile."""
    section_sizes.SECTIONS, section_sizes.ROWS_PER_TILE = ((min_rows - 1, (1,)),), rows_per_tile
    section_sizes.MOST_SECTIONS = cut.joined or (1,) * cut.sections
    section_sizes.MIN_HALVED_ROWS = pieces.GRAPHED_HALVED_ROWS = min_rows
    Decoder.dequantizes = lambda self, num_rows: cut.dequantizes
    halves.num_ahead, halves.MIN_ROWS_APART = lambda device, num_rows: cut.num_ahead, cut.rows_apart


def whole_and_cut(communicator: Communicator, folder: Path, cuts: tuple[Cut, ...]) -> list[tuple[Tensor, Tensor]]:
    split_weights()
    engine = make_engine(communicator, folder)
    found = []
    for parts in PASSES:
        whole = pass_states(engine, parts)
        for cut in cuts:
            for cache in engine.caches:
                cache.keys.fill_(torch.nan)
                cache.values.fill_(torch.nan)
            cut_passes(cut)
            found.append((whole, pass_states(engine, parts)))
        cut_passes(cut, min_rows=10**9)
    return found


CUTS = {
    2: (Cut(2), Cut(3), Cut(4), Cut(3, joined=(1, 2)), Cut(4, joined=(2, 2)), Cut(2, True, 1, 100), Cut(2, True, 4, 8)),
    3: (Cut(3), Cut(7), Cut(6, joined=(2, 1, 3)), Cut(2, True, 2, 1)),
}


@pytest.mark.parametrize("model", ["llama", "llama_with_biases", "llama_with_two_kv_heads", "qwen3"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_sections_give_what_the_whole_gives(folders: dict[str, Path], model: str, world_size: int) -> None:
    """With two KV heads the third rank has none."""
    cuts = CUTS[world_size]
    for found in run_on_ranks(whole_and_cut, world_size, folders[model], cuts):
        assert len(found) == len(PASSES) * len(cuts)
        for (whole, in_sections), cut in zip(found, cuts * len(PASSES), strict=True):
            assert whole.isfinite().all()
            allowed = 2e-5 * float(whole.abs().max())
            torch.testing.assert_close(
                in_sections, whole, rtol=0, atol=allowed, msg=lambda why, cut=cut: f"{cut} {why}"
            )


def answers_in_sections(
    communicator: Communicator, folder: Path, cuts: tuple[Cut, ...]
) -> list[tuple[list[list[int]], list[int]]]:
    """For passes left whole, then for each cut: tokens of answers, and how many sections each pass had.

    Prompts are read in small chunks beside decode steps, twice: the second time their pages are in the cache.
    """
    counts: list[int] = []
    choose = section_sizes.choose_sections

    def counting(*args: Any, **options: Any) -> tuple[int, ...]:
        counts.append(sum(map(len, choose(*args, **options))))
        return choose(*args, **options)

    paged_model.choose_sections = counting
    prompts, found = numbered([(prompt * 9)[:70] for prompt in prompts_of("llama")[:2]]), []
    for cut in (None, *cuts):
        if cut is not None:
            cut_passes(cut)
        counts.clear()
        engine = make_engine(communicator, folder, max_context=128, prefill_chunk=16, batch_size=2)
        answers = [generate(engine, prompts, demo_tokenizer(), StopRules(9)).answers for _ in range(2)]
        found.append(([answer.token_ids for each in answers for answer in each], list(counts)))
    return found


@pytest.mark.parametrize("name", ["w4a16 act order", "awq"])
def test_answers_do_not_depend_on_sections(tmp_path: Path, name: str) -> None:
    """Of a quantised model, on two ranks."""
    cuts = Cut(2, dequantizes=True), Cut(3), Cut(3, joined=(1, 2))
    for (expected, whole), *others in run_on_ranks(
        answers_in_sections, 2, write_pair(name, tmp_path) / "quantized", cuts
    ):
        assert set(whole) == {1}
        for cut, (answers, counts) in zip(cuts, others, strict=True):
            assert answers == expected
            assert max(counts) == cut.sections and counts.count(cut.sections) >= 4, counts


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
    overlap.side_stream = Traced
    cut_passes(Cut(2, True, 2, rows_apart))
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


def traced_sections(communicator: Communicator, folder: Path, sections: section_sizes.Sections) -> list[str]:
    """Starts of sums, waits for them and products, with their rows, in a pass of such sections."""
    overlap.side_stream = TracedRows
    paged_model.choose_sections = lambda *_, **__: sections
    for owner, name in ((merged.MergedLinear, "forward"), (linear.ShardedLayer, "multiply")):
        setattr(owner, name, traced_product(getattr(owner, name)))
    pass_states(make_engine(communicator, folder), PASSES[0])
    return Traced.events


def traced_product(multiply: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def traced(layer: Any, rows: Tensor) -> Tensor:
        assert multiprocessors.SPARED.get() == 7
        Traced.events.append(f"{len(rows)}")
        return multiply(layer, rows)

    return traced


class TracedRows(Traced):
    def multiprocessors(self, communicator: Communicator, num_bytes: int) -> int:
        """For 20 rows of 80 numbers."""
        return 7 if num_bytes == 20 * 80 * 4 else 0

    def start_all_reduce(self, communicator: Communicator, tensor: Tensor) -> Sum:
        self.events.append(f"{len(tensor)}>")
        return SumOfRows(communicator.all_reduce(tensor), None)


class SumOfRows(Sum):
    def wait(self) -> Tensor:
        Traced.events.append(f"<{len(self.tensor)}")
        return super().wait()


def sections_beside(communicator: Communicator, folder: Path) -> list[list[int]]:
    """Rows of sections that attend at once, where sums leave all multiprocessors and where they take some."""
    cut_passes(Cut(3, joined=(1, 2)))
    run_pass, found = paged_model.run_pass, list[list[int]]()

    def noting(decoder: Decoder, tokens: Any, sections: section_sizes.Sections, *others: Any) -> Tensor:
        found.append([len(each) for each in sections])
        return run_pass(decoder, tokens, sections, *others)

    paged_model.run_pass = noting
    for num in (0, 7):
        paged_model.side_stream = lambda device, num=num: TakesSome(device, num)
        pass_states(make_engine(communicator, folder), PASSES[0])
    return found


class TakesSome(SideStream):
    """Of messages of JOINED_ROWS rows of 80 numbers."""

    def __init__(self, device: torch.device, num: int) -> None:
        super().__init__(device)
        self.num = num

    def multiprocessors(self, communicator: Communicator, num_bytes: int) -> int:
        return self.num if num_bytes == section_sizes.JOINED_ROWS * 80 * 4 else -1


def test_sections_attend_at_once_where_sums_leave_all_multiprocessors(folders: dict[str, Path]) -> None:
    assert run_on_ranks(sections_beside, 2, folders["llama"])[0] == [[1, 2], [1, 1]]


def sections_over(communicator: Communicator, folder: Path) -> list[int]:
    """How many a pass has, launched and as one that is captured, where its sums are worth hiding, and where not."""
    cut_passes(Cut(2))
    found = []
    for hides_sums in (True, False):
        engine = make_engine(communicator, folder, hides_sums=hides_sums)
        buffers = PassBuffers.empty(engine.decoder, 24)
        found.append(len(Pieces(engine.decoder, engine.caches, buffers).sections))
        counts: list[int] = []
        paged_model.run_pass = counting_sections(counts)
        pass_states(engine, ((0, 24),))
        found += counts
    return found


def counting_sections(counts: list[int]) -> Callable[..., Tensor]:
    def counting(decoder: Decoder, tokens: Tokens, sections: section_sizes.Sections, *others: Any) -> Tensor:
        counts.append(len(sections))
        return run_pass(decoder, tokens, sections, *others)

    return counting


def test_passes_stay_whole_where_sums_are_not_worth_hiding(folders: dict[str, Path]) -> None:
    assert run_on_ranks(sections_over, 2, folders["llama"])[0] == [2, 2, 1, 1]


def test_each_section_is_multiplied_while_others_are_summed_up(folders: dict[str, Path]) -> None:
    first = [event for rows in (20, 14, 7) for event in (f"{rows}", f"{rows}", f"{rows}>")]
    others = [event for rows in (20, 14, 7) for event in (f"<{rows}", f"{rows}", f"{rows}", f"{rows}>")]
    found = run_on_ranks(traced_sections, 2, folders["llama"], ((20,), (14,), (7,)))[0]
    assert found == [*first, *others, *others, *others, *others, *others, "<20", "<14", "<7", "join"]


def test_sections_that_attend_at_once_are_summed_up_apart(folders: dict[str, Path]) -> None:
    first, second = ["20", "20", "20>"], ["21", "21", "14>", "7>"]
    later = ["<20", *first, "<14", "<7", *second]
    mlp = [event for rows in (20, 14, 7) for event in (f"<{rows}", f"{rows}", f"{rows}", f"{rows}>")]
    found = run_on_ranks(traced_sections, 2, folders["llama"], ((20,), (14, 7)))[0]
    assert found == [*first, *second, *mlp, *later, *mlp, *later, *mlp, "<20", "<14", "<7", "join"]


def interrupted(communicator: Communicator, folder: Path, cut: Cut) -> tuple[list[str], bool]:
    """What side streams saw last of a pass that ends in its second layer; whether the next one is as it should be."""
    engine = make_engine(communicator, folder)
    cut_passes(cut)
    before = pass_states(engine, PASSES[1])
    attend, calls = part_attention.Group.attend, []
    overlap.side_stream = TracedRows

    def failing(*args: Any) -> Tensor:
        calls.append(args)
        if len(calls) == cut.sections + 2:
            raise RuntimeError("in the middle")
        return attend(*args)

    part_attention.Group.attend = failing
    with pytest.raises(RuntimeError, match="in the middle"):
        pass_states(engine, PASSES[1])
    events, part_attention.Group.attend = list(Traced.events), attend
    engine.reset()
    return events, torch.equal(pass_states(engine, PASSES[1]), before)


@pytest.mark.parametrize("cut", [Cut(3), Cut(2, dequantizes=True)], ids=["sections", "halves"])
def test_nothing_is_in_flight_after_an_error(folders: dict[str, Path], cut: Cut) -> None:
    """The parts of a section attend at once; its second one's do not, in the second layer."""
    for events, is_right in run_on_ranks(interrupted, 2, folders["llama"], cut):
        assert sum(event.endswith(">") for event in events) > sum(event.startswith("<") for event in events)
        assert events.count("join") == 1 and events[-1] == "join" and is_right


def asked(communicator: Communicator, folder: Path) -> tuple[list[bool], int]:
    """Of 300, 20, 300 and 20 rows, of which one linear of the last rank dequantises 300; sums that this took."""
    decoder = make_engine(communicator, folder).decoder
    if communicator.rank == communicator.world_size - 1:
        decoder.model.model.layers[1].mlp.down_proj.dequantizes = lambda num_rows: num_rows > 256
    decoder.communicator = Counting(communicator)
    return [decoder.dequantizes(rows) for rows in (300, 20, 300, 20)], decoder.communicator.sums


class Counting(Around):
    sums = 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        self.sums += 1
        return self.inner.all_reduce(tensor)


def test_products_leave_sums_what_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies take none, but in a graph others carry what they carry; messages of a few MiB take fewer."""
    copies, other = (object.__new__(kind) for kind in (CopiedHostMemory, TwoStepHostMemory))
    both = object.__new__(BySize)
    both.limits, both.communicators = [1000], [other, copies]
    side = SideStream(torch.device("cpu"))
    assert side.multiprocessors(other, 1) == 0
    side.stream = object()
    for is_captured, found in ((False, (8, 0, 0, 16)), (True, (8, 8, 8, 16))):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda answer=is_captured: answer)
        asked = ((both, 1000), (both, 1001), (copies, 1), (other, 10**9))
        assert tuple(side.multiprocessors(*each) for each in asked) == found


class Copies(CopiedHostMemory):
    """Says what is asked of it."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def can_start(self, tensor: Tensor) -> bool:
        return len(tensor) > 1

    def start_all_reduce(self, tensor: Tensor) -> Callable[[], None]:
        self.asked.append("start")
        return lambda: self.asked.append("wait")

    def all_reduce(self, tensor: Tensor) -> Tensor:
        self.asked.append("sum")
        return tensor

    def join(self) -> None:
        self.asked.append("join")


class Streams:
    """A stream that knows what it waits for."""

    def __init__(self) -> None:
        self.waits: list[object] = []

    def wait_stream(self, other: object) -> None:
        self.waits.append(other)

    wait_event = wait_stream

    def record_event(self) -> str:
        return "event"


def test_sums_by_copies_begin_on_streams_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The side stream has no part in them; what copies cannot start goes there, and a join ends both."""
    current, side, copies = Streams(), SideStream(torch.device("cpu")), Copies()
    side.stream = Streams()  # type: ignore[assignment]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    both = object.__new__(BySize)
    both.limits, both.communicators = [], [copies]
    started = side.start_all_reduce(both, torch.ones(2))
    assert (current.waits, side.stream.waits) == ([], [])  # type: ignore[union-attr]
    started.wait()
    side.start_all_reduce(both, torch.ones(1)).wait()
    assert (current.waits, side.stream.waits) == (["event"], [current])  # type: ignore[union-attr]
    side.join()
    side.join()
    assert copies.asked == ["start", "wait", "sum", "join"]
    assert current.waits == ["event", side.stream, side.stream]
    assert side.stream.waits == [current]  # type: ignore[union-attr]


def test_ranks_agree_on_what_dequantises(folders: dict[str, Path]) -> None:
    """Else they would sum up different rows."""
    assert run_on_ranks(asked, 3, folders["llama"]) == [([True, False, True, False], 2)] * 3


def test_parts_are_cut_at_any_token() -> None:
    sequences = [TokenSequence(index, [0] * 20, 1) for index in range(3)]
    parts = [Part(sequences[0], 3, 9), Part(sequences[1], 0, 1), Part(sequences[2], 5, 12)]
    places = [(part.sequence.index, at) for part in parts for at in range(part.start, part.end)]
    num = len(places)
    for first, second in ((one, other) for one in range(num + 1) for other in range(num + 1 - one)):
        sections = split_parts(parts, (first, second, num - first - second))
        found = [
            [(part.sequence.index, at) for part in section for at in range(part.start, part.end)]
            for section in sections
        ]
        assert found == [places[:first], places[first : first + second], places[first + second :]]
        assert all(part.start < part.end for section in sections for part in section)


def test_sections_are_whole_tiles_and_about_equal() -> None:
    """Rows of a pass, and of its sections where weights stay packed, and where they are dequantised."""
    expected = {
        1: (((1,),), ((1,),)),
        255: (((255,),), ((255,),)),
        256: (((128,), (128,)), ((256,),)),
        512: (((256,), (256,)), ((512,),)),
        1023: (((512,), (511,)), ((1023,),)),
        1024: (((512,), (512,)), ((512,), (512,))),
        1025: (((384, 256), (256, 129)), ((640,), (385,))),
        2048: (((512, 512), (512, 512)), ((1024,), (1024,))),
        4096: (((1024, 1024), (1024, 1024)), ((2048,), (2048,))),
        8192: (((2048,), (2048,), (2048,), (2048,)), ((4096,), (4096,))),
    }
    for num_rows, found in expected.items():
        assert tuple(
            section_sizes.choose_sections(num_rows, True, lambda _, answer=answer: answer) for answer in (False, True)
        ) == (found)
        assert section_sizes.choose_sections(num_rows, False, lambda _: False) == ((num_rows,),)
    assert section_sizes.choose_sections(2048, True, lambda _: False, joins=False) == ((1024,), (1024,))
    assert section_sizes.choose_sections(512, True, lambda _: True, 257) == ((256,), (256,))


@pytest.mark.parametrize("num_rows", [1, 127, 128, 129, 513, 2047])
@pytest.mark.parametrize("num_sections", [1, 2, 3, 4, 5])
def test_any_pass_is_cut_into_tiles(num_rows: int, num_sections: int) -> None:
    found = section_sizes.cut_evenly(num_rows, num_sections)
    assert sum(found) == num_rows and len(found) == min(num_sections, -(-num_rows // 128))
    assert all(rows % 128 == 0 for rows in found[:-1])
    tiles = [-(-rows // 128) for rows in found]
    assert max(tiles) - min(tiles) <= 1


def test_sections_of_packed_weights_fill_tiles_of_256_rows_where_they_can() -> None:
    expected = {
        (2048, 3): (768, 768, 512),
        (1536, 4): (512, 256, 512, 256),
        (1152, 3): (512, 512, 128),
        (1024, 3): (512, 256, 256),
        # No fewer of them, or fewer sections, or one of next to no rows.
        (1025, 3): (384, 384, 257),
        (2048, 2): (1024, 1024),
        (600, 2): (384, 216),
        (512, 3): (256, 128, 128),
    }
    for (num_rows, num_sections), found in expected.items():
        assert section_sizes.cut_by_tiles(num_rows, num_sections) == found


@pytest.mark.parametrize("num_rows", [1, 129, 700, 1025, 1500, 2047])
@pytest.mark.parametrize("num_sections", [1, 2, 3, 4])
def test_no_other_cut_has_more_sections_or_fewer_tiles(num_rows: int, num_sections: int) -> None:
    found, even = section_sizes.cut_by_tiles(num_rows, num_sections), section_sizes.cut_evenly(num_rows, num_sections)
    assert sum(found) == num_rows and len(found) == len(even) and min(found) > 0
    assert sum(-(-rows // 256) for rows in found) <= sum(-(-rows // 256) for rows in even)


def test_the_whole_pass_decides_whether_weights_are_dequantised() -> None:
    assert section_sizes.choose_sections(600, True, lambda rows: rows > 599) == ((600,),)
    assert section_sizes.choose_sections(600, True, lambda rows: rows > 600) == ((384,), (216,))
