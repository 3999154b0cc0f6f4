"""Passes of prompts piece by piece, in buffers that stay where they are: what whole passes give, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parallel.communicator import Communicator, ElidedAllReduce
from parallel.engine import limits
from parallel.engine.answer import StopRules
from parallel.engine.chunk_timer import prepared_chunk
from parallel.engine.engine import Engine
from parallel.engine.generate import generate
from parallel.engine.prefill import graphs as pass_graphs
from parallel.engine.prefill.fresh import MAX_PROMPTS, prompt_bounds
from parallel.engine.prefill.graphs import PassGraphs
from parallel.engine.prefill.recorded import Places, Recorded
from parallel.engine.sequence import Part, TokenSequence
from parallel.engine.speculation.speculator import Speculation
from parallel.kernels.pages import pages_for
from parallel.transports.solo import Solo
from tests.parallel.engine.prefill.test_overlap import PASSES, Cut, cut_passes, pass_states, split_weights
from tests.parallel.quantized_models import write_pair
from tests.parallel.ranks import demo_tokenizer, make_engine, numbered, run_on_ranks
from tests.parallel.small_models import prompts_of

SIZES = (4, 9, 16, 48, 64)
SECTIONS = Cut(3)
replayed: list[tuple[str, int]] = []


def as_functions(calls: Iterable[Callable[[], None]], pool: object) -> list[Callable[[], None]]:
    """In place of graphs, which read and write the same tensors each time, too."""

    def run(call: Callable[[], None]) -> None:
        owner = call.func.__self__ if isinstance(call, partial) else call.__self__
        replayed.append((type(owner).__name__, len(owner.buffers.residual)))
        call()

    return [partial(run, call) for call in calls]


def put_pieces(
    engine: Engine, cut: Cut = SECTIONS, *, cut_from: int = 5, is_fresh: bool = True, is_recorded: bool = True
) -> None:
    """Passes as graphs, recorded at once or as they come. Cut where there are as many rows, with weights in several
    blocks; whole prompts all at once, or not."""
    pass_graphs.FRESH_GRAPHS = is_fresh
    cut_passes(cut, cut_from)
    graphs = PassGraphs(engine.decoder, engine.caches, SIZES, None, as_functions, Places(2 * len(SIZES)))
    if is_recorded:
        prepare_all(graphs)
    buffers = graphs.buffers
    for each in (buffers.residual, buffers.queries, buffers.attended):
        each.fill_(torch.nan)
    buffers.tokens.fill_(3)
    engine.target = replace(engine.target, graphs=graphs)


def prepare_all(graphs: PassGraphs) -> None:
    for size in SIZES:
        for num_prompts in (1, MAX_PROMPTS + 1):
            graphs.prepare(size, num_prompts)


def poison(engine: Engine) -> None:
    for cache in engine.caches:
        cache.keys.fill_(torch.nan)
        cache.values.fill_(torch.nan)


@dataclass(frozen=True)
class Case:
    """How passes of so many rows are cut, and whether whole prompts are one graph."""

    cut: Cut
    is_fresh: bool
    cut_from: int = 5


HALVES = Cut(2, dequantizes=True, num_ahead=2)
CASES = {
    1: (Case(SECTIONS, True),),
    2: (
        *(Case(Cut(sections), True) for sections in (2, 3, 4)),
        *(Case(SECTIONS, False), Case(SECTIONS, False, cut_from=100)),
        *(Case(Cut(3, joined=(1, 2)), is_fresh) for is_fresh in (True, False)),
        *(Case(HALVES, True), Case(HALVES, False)),
    ),
    3: (Case(Cut(4), False), Case(HALVES, False)),
}


def whole_and_pieces(
    communicator: Communicator, folder: Path, cases: tuple[Case, ...]
) -> list[list[tuple[Tensor, Tensor]]]:
    split_weights()
    engine = make_engine(communicator, folder)
    whole, found = [pass_states(engine, parts) for parts in PASSES], []
    for case in cases:
        replayed.clear()
        put_pieces(engine, case.cut, cut_from=case.cut_from, is_fresh=case.is_fresh)
        poison(engine)
        found.append(list(zip(whole, [pass_states(engine, parts) for parts in PASSES], strict=True)))
        assert {kind for kind, _ in replayed} == ({"Pieces", "FreshPass"} if case.is_fresh else {"Pieces"})
    return found


@pytest.mark.parametrize("model", ["llama", "llama_with_biases", "llama_with_two_kv_heads", "qwen3"])
@pytest.mark.parametrize("world_size", CASES)
def test_pieces_give_what_the_whole_gives(folders: dict[str, Path], model: str, world_size: int) -> None:
    """Whole passes, and such in sections or halves. With two KV heads the third rank has none."""
    cases = CASES[world_size]
    for rank in run_on_ranks(whole_and_pieces, world_size, folders[model], cases):
        for case, found in zip(cases, rank, strict=True):
            for whole, in_pieces in found:
                assert whole.isfinite().all()
                assert in_pieces.sub(whole).abs().max() <= 2e-5 * whole.abs().max(), case


def written_slots(communicator: Communicator, folder: Path) -> list[tuple[list[int], list[int]]]:
    """Slots that passes of few tokens write, but for those of page 0, and those of their tokens."""
    engine, found = make_engine(communicator, folder), []
    put_pieces(engine)
    for length in (1, 10, 16, 33):
        poison(engine)
        sequence = TokenSequence(0, list(range(length)), 1)
        sequence.pages = engine.pages.allocate(pages_for(length))
        engine.hidden_states([Part(sequence, 0, length)])
        size = engine.caches[0].keys.shape[2]
        written = {
            int(page * size + place)
            for cache in engine.caches
            for stored in (cache.keys, cache.values)
            for page, place in (~stored.isnan()).any(3).any(1).nonzero().tolist()
            if page
        }
        found.append((sorted(written), [sequence.pages[0] * size + place for place in range(length)]))
        engine.pages.release(sequence.pages)
    return found


def test_rows_that_pad_a_pass_write_nowhere(folders: dict[str, Path]) -> None:
    for written, own in run_on_ranks(written_slots, 2, folders["llama"])[0]:
        assert written == own


def answers_in_pieces(
    communicator: Communicator, folder: Path, in_pieces: bool, speculation: Speculation | None
) -> tuple[list[list[int]], set[tuple[str, int]]]:
    """Of prompts that are read in chunks beside decode steps, twice: the second time their pages are there already."""
    engine = make_engine(communicator, folder, max_context=192, prefill_chunk=16, batch_size=2, speculation=speculation)
    if in_pieces:
        put_pieces(engine)
    prompts = [(prompt * 9)[: 70 + 5 * row] for row, prompt in enumerate(prompts_of("llama"))]
    answers = [
        answer.token_ids
        for _ in range(2)
        for answer in generate(engine, numbered(prompts), demo_tokenizer(), StopRules(9)).answers
    ]
    return answers, set(replayed)


@pytest.mark.parametrize("name", ["w4a16 act order", "awq"])
@pytest.mark.parametrize("speculation", [None, Speculation("ngram", 3)], ids=["plain", "speculation"])
def test_answers_do_not_depend_on_pieces(tmp_path: Path, name: str, speculation: Speculation | None) -> None:
    folder = write_pair(name, tmp_path) / "quantized"
    whole = run_on_ranks(answers_in_pieces, 2, folder, False, speculation)
    found = run_on_ranks(answers_in_pieces, 2, folder, True, speculation)
    assert [answers for answers, _ in found] == [answers for answers, _ in whole]
    assert all({kind for kind, _ in ran} == {"Pieces", "FreshPass"} and len(ran) > 2 for _, ran in found), found


def use_by_use(
    communicator: Communicator, folder: Path, is_fresh: bool
) -> tuple[list[tuple[int, ...]], list[Tensor], list[list[int]], bool]:
    """A pass of one prompt, five times, that follows tokens in the cache or none; after each, how often calls were
    recorded and recorded ones run. Its states; slots that passes wrote beside their own and page 0's; whether the
    tokens of another prompt stayed as they were.
    """
    engine, counts, states, foreign = make_engine(communicator, folder), [], [], []
    recorded = []

    def record(calls: Iterable[Callable[[], None]], pool: object) -> list[Callable[[], None]]:
        recorded.append(1)
        return as_functions(calls, pool)

    put_pieces(engine, is_recorded=False)
    graphs = PassGraphs(engine.decoder, engine.caches, SIZES, None, record)
    engine.target = replace(engine.target, graphs=graphs)
    # What was recorded when it was made: passes of the most rows.
    assert len(recorded) == 1 and not replayed
    poison(engine)
    other, start = TokenSequence(1, list(range(3, 15)), 1), 0 if is_fresh else 20
    other.pages = engine.pages.allocate(1)
    engine.hidden_states([Part(other, 0, 12)])
    kept = [cache.keys[other.pages[0]].clone() for cache in engine.caches]
    recorded.clear()
    for _ in range(5):
        sequence = TokenSequence(0, [7 + 5 * place % 90 for place in range(start + 6)], 1)
        sequence.pages = engine.pages.allocate(1)
        if start:
            engine.hidden_states([Part(sequence, 0, start)])
        for cache in engine.caches:
            cache.keys[sequence.pages[0], :, start:] = torch.nan
        replayed.clear()
        before = len(recorded)
        states.append(engine.hidden_states([Part(sequence, start, start + 6)]).clone())
        counts.append((len(recorded) - before, len(replayed)))
        own = {0, other.pages[0], sequence.pages[0]}
        foreign.append([page for page in range(engine.limits.num_pages) if page not in own and touched(engine, page)])
        engine.pages.release(sequence.pages)
    stays = all(
        torch.equal(cache.keys[other.pages[0]].nan_to_num(), each.nan_to_num())
        for cache, each in zip(engine.caches, kept, strict=True)
    )
    return counts, states, foreign, stays


def touched(engine: Engine, page: int) -> bool:
    return any(not cache.keys[page].isnan().all() for cache in engine.caches)


@pytest.mark.parametrize(("is_fresh", "num_calls"), [(True, 1), (False, 4)])
def test_a_pass_is_recorded_at_its_second_use_and_changes_by_no_bit(
    folders: dict[str, Path], is_fresh: bool, num_calls: int
) -> None:
    """While other sequences are in the cache."""
    for counts, states, foreign, stays in run_on_ranks(use_by_use, 2, folders["llama"], is_fresh):
        assert counts == [(0, 0), (1, num_calls), *[(0, num_calls)] * 3]
        assert states[0].isfinite().all()
        assert all(torch.equal(each, states[0]) for each in states)
        assert foreign == [[]] * 5 and stays


def test_calls_that_were_broken_off_are_not_recorded_yet() -> None:
    """Their kernels may not be there."""
    ran: list[str] = []

    def call() -> None:
        ran.append("call")
        if len(ran) == 1:
            raise KeyboardInterrupt

    def record(calls: Iterable[Callable[[], None]], pool: object) -> list[Callable[[], None]]:
        return [partial(ran.append, "replay")]

    recorded = Recorded([call], None, record, Places(1))
    for is_broken in (True, False, False, False):
        with pytest.raises(KeyboardInterrupt) if is_broken else nullcontext(), recorded.use() as (run,):
            run()
    assert ran == ["call", "call", "replay", "replay"]


def recorded_in_time(communicator: Communicator, folder: Path) -> tuple[list[int], list[list[int]]]:
    """How much is recorded in each run of a workload before and after `record_passes`, in timed passes, and where all
    was prepared; answers."""
    engine, recorded, counts, answers = make_engine(communicator, folder, max_context=192, batch_size=2), [], [], []

    def record(calls: Iterable[Callable[[], None]], pool: object) -> list[Callable[[], None]]:
        recorded.append(1)
        return list(calls)

    put_pieces(engine, is_recorded=False)
    graphs = PassGraphs(engine.decoder, engine.caches, SIZES, None, record, Places(2 * len(SIZES)))
    engine.target = replace(engine.target, graphs=graphs)
    for number in range(3):
        recorded.clear()
        prompts = [[3 + (5 * number + 7 * row + place) % 90 for place in range(40)] for row in range(2)]
        result = generate(engine, numbered(prompts), demo_tokenizer(), StopRules(5))
        counts.append(len(recorded))
        answers += [answer.token_ids for answer in result.answers]
        if number == 0:
            engine.record_passes()
    for each in (communicator, ElidedAllReduce(communicator)):
        with prepared_chunk(engine, [10], each) as run:
            recorded.clear()
            run()
            run()
            counts.append(len(recorded))
    kept = [each.keys[1:].nan_to_num() for each in engine.caches]
    prepare_all(graphs)
    # Prompts that were read are still there to be read again.
    assert all(torch.equal(each.keys[1:].nan_to_num(), old) for each, old in zip(engine.caches, kept, strict=True))
    recorded.clear()
    for length in (2, 7, 30, 64):
        sequence = TokenSequence(0, list(range(3, 3 + length)), 1)
        sequence.pages = engine.pages.allocate(1)
        engine.hidden_states([Part(sequence, 0, length)])
        engine.hidden_states([Part(sequence, 1, length)])
        engine.pages.release(sequence.pages)
    return [*counts, len(recorded)], answers


def test_nothing_is_recorded_while_it_is_timed(folders: dict[str, Path]) -> None:
    found = run_on_ranks(recorded_in_time, 2, folders["llama"])
    (counts, answers), (_, others) = found
    assert counts == [0, 0, 0, 0, 0, 0] and answers == others


# Few are recorded at a time


@dataclass(frozen=True)
class Run:
    """A pass of so many tokens of a prompt; whether from its start. 4 to 48 are sizes that it has to itself."""

    tokens: int
    is_fresh: bool = True


# With room for two, beside the largest that is recorded from the start: which run as recorded.
BOUNDED = (
    *((Run(4), False), (Run(4), True)),
    # Another kind of the same size.
    *((Run(4, False), False), (Run(4, False), True)),
    # The largest, which nobody had used, gives its place.
    *((Run(9), False), (Run(9), True)),
    # There is no more: all that came stay.
    *((Run(16), False), (Run(16), False), (Run(64), False), (Run(64), False)),
    *((Run(9), True), (Run(4), True), (Run(4, False), True), (Run(16), False)),
)
# The largest, where it was used.
USED = ((Run(64), True), *BOUNDED[:4], (Run(9), False), (Run(9), False), (Run(64), True), (Run(4), True))


def bounded_passes(
    communicator: Communicator, folder: Path, runs: tuple[tuple[Run, bool], ...]
) -> tuple[list[bool], list[float], int]:
    """Which passes ran as recorded; how far states are from those of passes that are not; the most held at a time."""
    engine, found, errors, most = make_engine(communicator, folder), [], [], 0
    put_pieces(engine, is_recorded=False)
    bounded = PassGraphs(engine.decoder, engine.caches, SIZES, None, as_functions, Places(3))
    launched = PassGraphs(engine.decoder, engine.caches, SIZES, None, lambda calls, pool: list(calls), Places(99))
    for run, _ in runs:
        states = []
        for graphs in (launched, bounded):
            engine.target = replace(engine.target, graphs=graphs)
            replayed.clear()
            states.append(one_pass(engine, run))
        found.append(bool(replayed))
        errors.append(float((states[1] - states[0]).abs().max() / states[0].abs().max()))
        most = max(most, held_by(bounded))
    return found, errors, most


def one_pass(engine: Engine, run: Run) -> Tensor:
    start = 0 if run.is_fresh else 3
    sequence = TokenSequence(0, [3 + 7 * place % 90 for place in range(start + run.tokens)], 1)
    sequence.pages = engine.pages.allocate(pages_for(len(sequence.prompt)))
    if start:
        graphs, engine.target = engine.target.graphs, replace(engine.target, graphs=None)
        engine.hidden_states([Part(sequence, 0, start)])
        engine.target = replace(engine.target, graphs=graphs)
    states = engine.hidden_states([Part(sequence, start, start + run.tokens)]).clone()
    engine.pages.release(sequence.pages)
    return states


def held_by(graphs: PassGraphs) -> int:
    return sum(each.is_recorded for passes in graphs.passes.values() for each in passes.recorded)


@pytest.mark.parametrize("runs", [BOUNDED, USED], ids=["largest_unused", "largest_used"])
def test_the_first_passes_that_come_twice_are_recorded_while_there_are_places(
    folders: dict[str, Path], runs: tuple[tuple[Run, bool], ...]
) -> None:
    for found, errors, most in run_on_ranks(bounded_passes, 2, folders["llama"], runs):
        assert found == [is_recorded for _, is_recorded in runs]
        assert max(errors) == 0 and most == 3


def asked_passes(communicator: Communicator, folder: Path) -> list[object]:
    """What is held after passes of four sizes, after these were asked to be recorded, while passes are timed with
    another communicator, and after that; and whether a size that gave its place is recorded again when it comes."""
    engine = make_engine(communicator, folder)
    put_pieces(engine, is_recorded=False)
    graphs = PassGraphs(engine.decoder, engine.caches, SIZES, None, as_functions, Places(3))
    engine.target = replace(engine.target, graphs=graphs)

    def held() -> list[int]:
        return [size for size, passes in graphs.passes.items() for each in passes.recorded if each.is_recorded]

    found: list[object] = []
    for tokens in (16, 4, 9, 48):
        one_pass(engine, Run(tokens))
    found.append(held())
    engine.record_passes()
    found.append(held())
    with prepared_chunk(engine, [9], ElidedAllReduce(communicator)) as run:
        timed = engine.target.graphs
        assert timed is not None and timed is not graphs
        replayed.clear()
        run()
        found += [held(), held_by(timed), [kind for kind, _ in replayed]]
    found += [held(), held_by(timed)]
    one_pass(engine, Run(4))
    one_pass(engine, Run(4))
    return [*found, held()]


def test_what_is_asked_for_takes_the_places_of_what_was_used_longest_ago(folders: dict[str, Path]) -> None:
    for found in run_on_ranks(asked_passes, 2, folders["llama"]):
        assert found == [[64], [4, 9, 48], [9, 48], 1, ["FreshPass"], [9, 48], 0, [4, 9, 48]]


def passes_after_a_failure(communicator: Communicator, folder: Path) -> tuple[list[Recorded], list[Recorded]]:
    """Those that hold places, or would be recorded next, before and after others could not be recorded."""
    engine = make_engine(communicator, folder)
    graphs = PassGraphs(engine.decoder, engine.caches, SIZES, None, as_functions, Places(3))
    before = list(graphs.places.runs)

    def refuse(calls: Iterable[Callable[[], None]], pool: object) -> list[Callable[[], None]]:
        raise torch.OutOfMemoryError

    graphs.record = refuse
    with pytest.raises(torch.OutOfMemoryError):
        graphs.anew(9)
    return before, list(graphs.places.runs)


def test_passes_that_could_not_be_recorded_hold_no_place(folders: dict[str, Path]) -> None:
    before, after = passes_after_a_failure(Solo(torch.device("cpu")), folders["llama"])
    assert after == before and len(before) == 1


def test_rows_of_a_section_see_what_is_before_them() -> None:
    """And no keys that the section after them caches."""
    lengths, joined = (4, 1, 9, 3), ((6,), (1,), (3, 4), (6,))
    sections = [sum(each) for each in joined]
    prompts = [prompt for prompt, length in enumerate(lengths) for _ in range(length)]
    for number, (queries, keys) in enumerate(prompt_bounds(lengths, joined).tolist()):
        start = sum(sections[:number])
        end = min(start + sections[number], len(prompts))
        for prompt in range(len(lengths)):
            rows = [start + row for row in range(queries[prompt], queries[prompt + 1])]
            seen = list(range(keys[prompt], keys[prompt + 1]))
            assert rows == [row for row in range(start, end) if prompts[row] == prompt]
            assert seen == [row for row in range(end) if prompts[row] == prompt]


def timed_passes(communicator: Communicator, folder: Path) -> tuple[int, int, bool]:
    """Sums of a pass, then of one whose layers talk through another communicator; whether the engine is as before."""
    engine, sums = make_engine(communicator, folder), []
    inner = communicator.all_reduce
    communicator.all_reduce = lambda tensor: (sums.append(1), inner(tensor))[1]
    put_pieces(engine)
    before, counts = engine.target, []
    for each in (communicator, ElidedAllReduce(communicator)):
        with prepared_chunk(engine, [10], each) as run:
            sums.clear()
            run()
            counts.append(len(sums))
    return (*counts, engine.target is before)


def test_a_timed_pass_is_captured_with_its_communicator(folders: dict[str, Path]) -> None:
    talking, silent, is_restored = run_on_ranks(timed_passes, 2, folders["llama"])[0]
    assert talking > 4 and silent == 0 and is_restored


def broken_off(communicator: Communicator, folder: Path) -> tuple[bool, int]:
    """Whether the engine is as before when the pass to be timed cannot be captured, and what is held for that pass."""
    engine = make_engine(communicator, folder)
    put_pieces(engine, is_recorded=False)
    before, places = engine.target, engine.target.graphs.places
    prepare, held = PassGraphs.prepare, len(places.runs)

    def fail(graphs: PassGraphs, num_tokens: int, num_prompts: int = 1) -> None:
        prepare(graphs, num_tokens, num_prompts)
        raise torch.OutOfMemoryError("no room")

    PassGraphs.prepare = fail
    with (
        pytest.raises(torch.OutOfMemoryError, match="no room"),
        prepared_chunk(engine, [10], ElidedAllReduce(communicator)),
    ):
        pass
    return engine.target is before, len(places.runs) - held


def test_an_engine_is_as_before_when_a_pass_cannot_be_captured(folders: dict[str, Path]) -> None:
    assert run_on_ranks(broken_off, 1, folders["llama"])[0] == (True, 0)


def test_sizes_are_those_that_a_chunk_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "GRAPHED_ROWS", (64, 256, 1024))
    chunks = (1, 64, 65, 256, 1000, 1024, 2048)
    assert [limits.graphed_rows(chunk) for chunk in chunks] == [
        *((1,), (64,), (64, 65), (64, 256), (64, 256, 1000), (64, 256, 1024), (64, 256, 1024))
    ]
    monkeypatch.setattr(limits, "GRAPHED_ROWS", ())
    assert limits.graphed_rows(2048) == ()
