"""Passes of prompts as graphs on a card: the bits of their pieces launch by launch, and what whole passes give."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parallel.checkpoint.headers import read_checkpoint
from parallel.checkpoint.load import load_checkpoint
from parallel.checkpoint.quantize_schemes import QUANTIZE_SCHEMES
from parallel.communicator import Communicator, ElidedAllReduce
from parallel.engine import limits
from parallel.engine.answer import StopRules
from parallel.engine.chunk_timer import prepared_chunk
from parallel.engine.engine import Engine
from parallel.engine.generate import generate
from parallel.engine.limits import EngineLimits
from parallel.engine.prefill import section_sizes
from parallel.engine.prefill.graphs import PassGraphs
from parallel.kernels import grouping
from parallel.layers.merged import LayerMerger
from parallel.shard import share_process_group
from parallel.transports.copies import wrap_copies
from tests.gpu.one_card import DEVICE, run_on_one_card
from tests.parallel.engine.prefill.passes import parts_of
from tests.parallel.ranks import build, demo_tokenizer, numbered
from tests.parallel.small_models import DEMO

pytestmark = pytest.mark.gpu
# Start and end of the parts of each pass; those that do not start at 0 follow tokens in the cache.
PASSES = (
    *(((0, 1),), ((0, 64),), ((0, 129),), ((0, 384),), ((0, 500),), ((0, 1024),)),
    *(((0, 300), (0, 1), (0, 250)), ((200, 700),), ((64, 65), (100, 480), (0, 30))),
)
NUM_REPEATS = 4
GRAPHED_ROWS = limits.GRAPHED_ROWS


@dataclass(frozen=True)
class Found:
    """Of one pass: largest error beside the spread of the whole's numbers, replays that differ from the first, whether
    they are the bits of the pieces; ms for the host to queue a graphed pass, and one launch by launch."""

    parts: tuple[tuple[int, int], ...]
    error: float
    num_different: int
    is_equal: bool
    host_ms: float
    launched_ms: float


def open_engine(communicator: Communicator, kind: str, *, is_graphed: bool) -> Engine:
    share_process_group(torch.device("cpu"))
    limits.GRAPHED_ROWS = GRAPHED_ROWS if is_graphed else ()
    section_sizes.MIN_HALVED_ROWS = 10**9
    # Several blocks in each large weight.
    grouping.DEQUANTIZED_AT_A_TIME = 256 * 256
    model = build(communicator, DEMO, torch.float32 if kind == "float32" else torch.bfloat16)
    scheme = QUANTIZE_SCHEMES.get(kind)
    load_checkpoint(model, read_checkpoint(DEMO), DEVICE, quantize=scheme, on_placed=LayerMerger(model.module))
    sizes = EngineLimits(2048, 4, 2048, captured_passes=2 * len(GRAPHED_ROWS))
    return Engine(model.module, communicator, sizes)


def launched(calls: Iterable[Callable[[], None]], pool: object) -> list[Callable[[], None]]:
    """In place of graphs."""
    return list(calls)


def pass_states(engine: Engine, parts: tuple[tuple[int, int], ...]) -> tuple[Tensor, float]:
    """[tokens, hidden] of prompts that depend on the parts alone, and ms for the host to queue their pass."""
    generator = torch.Generator().manual_seed(sum(end for _, end in parts))
    for cache in engine.caches:
        cache.keys.fill_(torch.nan)
        cache.values.fill_(torch.nan)
    ids = [torch.randint(3, 4000, (end,), generator=generator).tolist() for _, end in parts]
    with parts_of(engine, ids, parts) as found:
        engine.communicator.barrier()
        begin = time.perf_counter()
        states = engine.hidden_states(found)
        host_ms = (time.perf_counter() - begin) * 1e3
        states = states.clone()
    torch.cuda.synchronize()
    return states, host_ms


def find(communicator: Communicator, kind: str) -> list[Found]:
    engine = open_engine(communicator, kind, is_graphed=True)
    graphed, found = engine.target, []
    assert graphed.graphs is not None
    in_pieces = replace(
        graphed, graphs=PassGraphs(engine.decoder, engine.caches, tuple(graphed.graphs.passes), None, launched)
    )
    # From now on passes launch by launch are left whole; the graphs are what they are.
    section_sizes.SECTIONS = ((10**9, (1,)),)
    for parts in PASSES:
        engine.target = replace(graphed, graphs=None)
        whole, _ = pass_states(engine, parts)
        engine.target = in_pieces
        pieces, launched_ms = pass_states(engine, parts)
        engine.target = graphed
        replays = [pass_states(engine, parts) for _ in range(NUM_REPEATS)]
        states = [each for each, _ in replays]
        error = max(float((each - whole).float().std() / whole.float().std()) for each in states)
        different = sum(not torch.equal(each, states[0]) for each in states)
        host_ms = min(ms for _, ms in replays)
        found.append(Found(parts, error, different, torch.equal(states[0], pieces), host_ms, launched_ms))
    communicator.barrier()
    return found


@pytest.mark.parametrize(
    ("kind", "allowed", "world_size"),
    [("float32", 1e-5, 2), ("bfloat16", 0.03, 2), ("int4", 0.03, 2), ("int4", 0.03, 3)],
)
def test_graphs_give_the_bits_of_their_pieces(tmp_path: Path, kind: str, allowed: float, world_size: int) -> None:
    """And what a whole pass gives, in bf16 but for the rounding of products of other numbers of rows."""
    for rank, found in enumerate(run_on_one_card(find, world_size, tmp_path, kind)):
        for each in found if rank == 0 else ():
            print(kind, each)
        for each in found:
            assert each.error < allowed and each.num_different == 0 and each.is_equal, each


def answers(communicator: Communicator, is_graphed: bool) -> list[list[int]]:
    """Of prompts read in chunks of up to 128 tokens beside decode steps, some after pages that are in the cache."""
    engine = open_engine(communicator, "float32", is_graphed=is_graphed)
    engine.limits = replace(engine.limits, prefill_chunk=300, prefill_chunk_while_decoding=128)
    generator = torch.Generator().manual_seed(5)
    shared = torch.randint(3, 4000, (200,), generator=generator).tolist()
    prompts = [shared[: 30 + 25 * row] + [row + 5] * (40 * row) for row in range(7)]
    result = generate(engine, numbered(prompts), demo_tokenizer(), StopRules(12))
    return [answer.token_ids for answer in result.answers]


def test_answers_are_those_of_passes_launch_by_launch(tmp_path: Path) -> None:
    expected = run_on_one_card(answers, 2, tmp_path, False)
    (tmp_path / "again").mkdir()
    assert run_on_one_card(answers, 2, tmp_path / "again", True) == expected


def late_recording(communicator: Communicator) -> tuple[int, list[tuple[int, bool, float, float]]]:
    """How much more memory torch holds once all sizes are recorded than before, in bytes; of each size, whole prompts
    and others, ms of the pass that records it, and of the next."""
    engine, found = open_engine(communicator, "int4", is_graphed=True), []
    graphs = engine.target.graphs
    assert graphs is not None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(DEVICE)
    for size in graphs.passes:
        for start in (0, 64):
            times = []
            for _ in range(3):
                communicator.barrier()
                begin = time.perf_counter()
                pass_states(engine, ((start, start + size),))
                times.append((time.perf_counter() - begin) * 1e3)
            found.append((size, start == 0, *times[1:]))
    torch.cuda.empty_cache()
    after = torch.cuda.memory_reserved(DEVICE)
    communicator.barrier()
    return after - before, found


def test_passes_recorded_late_fit_into_the_memory_of_the_largest(tmp_path: Path) -> None:
    for more, found in run_on_one_card(late_recording, 2, tmp_path):
        print(f"{more / 2**20:.1f} MiB more", *found, sep="\n")
        # Blocks of 2 MiB, which streams do not share.
        assert more <= 32 * 2**20


def passes_in_turn(communicator: Communicator) -> tuple[list[int], int, float, float]:
    """How many passes are held after each of eight kinds in turn, with room for two; how many differ from the first of
    their kind; bytes outside of torch for a layer of what is held, after some and after more gave their places."""
    engine = open_engine(communicator, "int4", is_graphed=True)
    graphs, first, held, num_different = engine.target.graphs, dict[tuple[int, int], Tensor](), [], 0
    assert graphs is not None
    graphs.places.num = 2

    def outside() -> int:
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info(DEVICE)
        return total - free - torch.cuda.memory_reserved(DEVICE)

    before, taken = outside(), []
    for _ in range(3):
        for size in (64, 128, 256, 1024):
            for start in (0, 64):
                states, _ = pass_states(engine, ((start, start + size),))
                num_different += not torch.equal(states, first.setdefault((size, start), states))
                held.append(sum(each.is_recorded for passes in graphs.passes.values() for each in passes.recorded))
        taken.append(outside() - before)
        # The last two take the places of those that were used longest ago.
        engine.record_passes()
    layers = len(engine.model.model.layers)
    communicator.barrier()
    return held, num_different, taken[1] / layers, taken[-1] / layers


def test_passes_give_their_places_without_a_trace(tmp_path: Path) -> None:
    (found,) = run_on_one_card(passes_in_turn, 1, tmp_path)
    held, num_different, early, late = found
    print(f"{early / 2**20:.2f} MiB a layer outside of torch, then {late / 2**20:.2f}")
    assert max(held) == 2 and num_different == 0


# Whole prompts, then parts after tokens in the cache, which leave sums that nobody has joined to the capture that
# comes next.
IN_TURN = (((0, 512),), ((64, 576),), ((0, 512),), ((64, 576),), ((0, 512),), ((0, 300), (0, 200)), ((100, 400),))


def passes_beside_copies(communicator: Communicator, kind: str) -> tuple[list[int], list[float]]:
    """Where copies carry sums that are not captured: sizes that are captured after the first, and how far each pass is
    from one launch by launch."""
    engine = open_engine(wrap_copies(communicator, DEVICE, timeout_sec=30), kind, is_graphed=True)
    graphed, graphs = engine.target, engine.target.graphs
    assert graphs is not None
    # All of them first: they join what they start.
    engine.target = replace(graphed, graphs=None)
    launched = [pass_states(engine, parts)[0] for parts in IN_TURN]
    engine.target = graphed
    states = [pass_states(engine, parts)[0] for parts in IN_TURN]
    errors = [
        float((ours - theirs).float().std() / theirs.float().std())
        for ours, theirs in zip(states, launched, strict=True)
    ]
    engine.communicator.barrier()
    held = [size for size, passes in graphs.passes.items() for each in passes.recorded if each.is_recorded]
    return [size for size in held if size < graphs.max_rows], errors


# 64 is what comes before the second kind of pass. In float32 there is but one kind: no attention to whole prompts can
# be captured.
@pytest.mark.parametrize(
    ("kind", "allowed", "sizes"),
    [("float32", 1e-5, [64, 512]), ("bfloat16", 0.03, [64, 512, 512]), ("int4", 0.03, [64, 512, 512])],
)
def test_captures_wait_for_no_sums_that_copies_carry(
    tmp_path: Path, kind: str, allowed: float, sizes: list[int]
) -> None:
    for captured, errors in run_on_one_card(passes_beside_copies, 2, tmp_path, kind):
        print(kind, captured, errors)
        assert captured == sizes and max(errors) < allowed


def sums_in_passes(communicator: Communicator) -> tuple[float, float]:
    """Whether a timed pass without all-reduces leaves them out: how much its result differs, and one with them."""
    engine, states = open_engine(communicator, "bfloat16", is_graphed=True), []
    for each in (communicator, ElidedAllReduce(communicator), communicator):
        with prepared_chunk(engine, [500], each) as run:
            run()
            graphs = engine.target.graphs
            assert graphs is not None
            states.append(graphs.passes[512].buffers.residual[:500].float().clone())
    communicator.barrier()
    with_sums, without, again = states
    return float((without - with_sums).std()), float((again - with_sums).std())


def test_a_timed_pass_leaves_its_sums_out(tmp_path: Path) -> None:
    for without, again in run_on_one_card(sums_in_passes, 2, tmp_path):
        assert without > 1e-3 and again == 0
