"""Times passes of prompts by their sections: `python -m tools.bench.sections --cards 2`, or as ranks of torchrun.

A few layers of a 70B in turn, with dummy weights, between cards without peer access; or with it, where
NCCL_P2P_DISABLE=0 is set and --large nccl carries the sums of prompts. For each number of rows: milliseconds of as many
layers as a 70B has, the slowest rank's, for a pass whole, in halves that share dequantised weights, and in sections, as
one graph with sums by two steps, and launch by launch with sums by copy engines; with its sums, and without; how long
the host takes to queue it, and the card once it need not wait for the host. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch

from launcher.config import ModelFacts
from launcher.models.shape import shape_from_facts
from launcher.tasks.weights import config_of_shape
from parallel.checkpoint.dummy import fill_dummy
from parallel.checkpoint.quantize_schemes import QUANTIZE_SCHEMES
from parallel.communicator import Communicator, ElidedAllReduce
from parallel.engine.chunk_timer import prepared_chunk, time_apart, time_chunks
from parallel.engine.engine import Engine
from parallel.engine.limits import EngineLimits
from parallel.engine.prefill import pieces, section_sizes, side_stream
from parallel.engine.prefill.graphs import PassGraphs
from parallel.kernels.grouping import GroupedLinear
from parallel.layers.merged import LayerMerger
from parallel.partition import choose_grain
from parallel.product_trial import TRIED_ROWS
from parallel.shard import build_sharded_model, share_process_group
from parallel.transports import dense
from parallel.transports.by_size import BySize
from parallel.transports.copies import wrap_copies
from parallel.transports.dense import wrap_dense
from parallel.transports.host_memory import wrap_host_memory
from parallel.transports.selftest import EAGER_BYTES
from parallel.transports.two_step import wrap_two_step
from parallel.units import KIB
from tools.bench.card_ranks import CardRank, is_started_by_torchrun, run_on_cards

FACTS = ModelFacts(8192, 28672, 80, 64, 8, 128, 32768, 8192)
# Own weights have this many of them; they are beyond any cache.
NUM_LAYERS = 4
# Layers of a timed pass, unless told. A queue of the card holds some thousand launches: with as many layers as a 70B
# has, a host that is ahead has to wait.
DEPTH = 20
TIMEOUT_SEC = 10.0
SMALL_BYTES = 64 * KIB


@dataclass(frozen=True)
class Way:
    """How a pass runs: in sections, of which so many attend at once, and then; or in halves; as a graph, where it can
    be one."""

    sections: tuple[int, ...]
    is_halved: bool
    is_graphed: bool


@dataclass(frozen=True)
class Times:
    """Milliseconds of a pass; without its sums; until the host has queued it; of the card alone.

    A queue holds some thousand launches: where a pass has more, the host waits for the card in the last two.
    """

    rows: int
    way: Way
    ms: float
    without_sums_ms: float
    host_ms: float
    card_ms: float

    def scaled(self, by: float) -> Times:
        found = {name: value * by for name, value in vars(self).items() if name.endswith("ms")}
        return replace(self, **found)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.sections", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cards", type=int, default=2, help="ranks, each a process with a card of its own")
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument(
        "--sections",
        type=parse_sections,
        nargs="+",
        default=[parse_sections(each) for each in ("2", "1+2", "2+2", "3", "4")],
        help="so many sections; or 1+2: one, then two that attend at once",
    )
    parser.add_argument("--launched", action="store_true", help="no graphs")
    parser.add_argument("--large", choices=("host", "nccl"), default="host", help="what carries sums of over 2 MiB")
    parser.add_argument("--quantize", choices=("none", *QUANTIZE_SCHEMES), default="int4")
    parser.add_argument(
        "--fused-rows", type=int, default=max(TRIED_ROWS), help="rows of a section up to which weights stay packed"
    )
    parser.add_argument("--spared", type=int, help="multiprocessors that products leave to sums; else as they do")
    parser.add_argument("--depth", type=int, default=DEPTH, help="layers of a pass")
    parser.add_argument("--passes", type=int, default=5)
    args = parser.parse_args()
    if not is_started_by_torchrun() and torch.cuda.device_count() < args.cards:
        parser.error(f"--cards {args.cards} of {torch.cuda.device_count()} that are here.")
    run_on_cards(bench_cards, args.cards, args)


def bench_cards(rank: CardRank, args: argparse.Namespace) -> None:
    share_process_group(rank.device)
    engine = open_engine(open_sums(rank, args.large), rank.device, FACTS, args.quantize, max(args.rows), args.depth)
    fuse(engine, args.fused_rows)
    if args.spared is not None:
        side_stream.blocks_for = lambda num_bytes: args.spared
    layers = list(engine.model.model.layers)
    scale = FACTS.num_layers / len(layers)
    say(rank, f"{FACTS.num_layers} layers by {len(layers)} on {torch.cuda.get_device_name(rank.device)}")
    found = []
    for rows in args.rows:
        for way in ways(args.sections, (False,) if args.launched else (True, False)):
            times = time_way(engine, rank.control, rows, way, args.passes)
            found.append(times.scaled(scale))
            say(rank, describe(found[-1]))
    say(rank, json.dumps({"card": torch.cuda.get_device_name(rank.device), "passes": [asdict(each) for each in found]}))


def open_sums(rank: CardRank, for_large: str) -> Communicator:
    """Transports as they are chosen between cards that go through host memory; large sums by NCCL where it is told."""
    small, middle, large = (
        wrap(rank.nccl, rank.device, timeout_sec=TIMEOUT_SEC) for wrap in (wrap_host_memory, wrap_dense, wrap_two_step)
    )
    routes: list[tuple[int, Communicator]] = [(SMALL_BYTES, small), (dense.MAX_BYTES, middle)]
    if for_large == "nccl":
        routes.append((2 * EAGER_BYTES, rank.nccl))
    else:
        copied = wrap_copies(large, rank.device, timeout_sec=TIMEOUT_SEC)
        routes += [(EAGER_BYTES - 1, large), (2 * EAGER_BYTES, copied)]
    return BySize(rank.nccl, routes, small, rank.device)


def open_engine(
    communicator: Communicator, device: torch.device, facts: ModelFacts, quantize: str, max_rows: int, depth: int
) -> Engine:
    """A model of a few layers in turn."""
    shape = shape_from_facts(replace(facts, num_layers=NUM_LAYERS))
    grain = choose_grain((facts.intermediate_size, facts.vocab_size), communicator.world_size)
    model = build_sharded_model(config_of_shape(shape), communicator, dtype=torch.bfloat16, grain=grain)
    fill_dummy(model, QUANTIZE_SCHEMES.get(quantize), device, on_placed=LayerMerger(model.module))
    own = list(model.module.model.layers)
    model.module.model.layers = torch.nn.ModuleList(own[place % len(own)] for place in range(depth))
    sizes = EngineLimits(max_rows + 1, 1, max_rows, captured_passes=0)
    return Engine(model.module, communicator, sizes, prefix_cache=False)


def fuse(engine: Engine, max_rows: int) -> None:
    for module in engine.model.modules():
        if isinstance(module, GroupedLinear):
            module.max_rows = max_rows


def parse_sections(text: str) -> tuple[int, ...]:
    """Of "3" (1, 1, 1), of "1+2" (1, 2).

    Raises ValueError, which argparse turns into its own.
    """
    counts = tuple(map(int, text.split("+"))) if "+" in text else (1,) * int(text)
    if not counts or min(counts) < 1 or len(counts) > len(section_sizes.MOST_SECTIONS):
        raise ValueError(f"{text}: 1 to {len(section_sizes.MOST_SECTIONS)} numbers of sections")
    return counts


def ways(sections: Iterable[tuple[int, ...]], graphed: Iterable[bool]) -> Iterator[Way]:
    for is_graphed in graphed:
        yield Way((1,), False, is_graphed)
        yield Way((1, 1), True, is_graphed)
        yield from (Way(number, False, is_graphed) for number in sections)


def time_way(engine: Engine, control: Communicator, rows: int, way: Way, num_passes: int) -> Times:
    """The slowest rank's medians."""
    with chosen(engine, way):
        before, communicator = engine.target, engine.communicator
        graphs = PassGraphs(engine.decoder, engine.caches, (rows,), None) if way.is_graphed else None
        engine.target = replace(before, graphs=graphs, joins=True)
        try:
            medians = [
                statistics.median(time_chunks(engine, [rows], num_passes, each))
                for each in (communicator, ElidedAllReduce(communicator))
            ]
            with prepared_chunk(engine, [rows], communicator) as run:
                apart = time_apart(run, communicator, engine.device)
        finally:
            engine.target = before
    times = torch.tensor([*medians, apart.queued, apart.card], dtype=torch.float64)
    slowest = control.all_gather(times).amax(dim=0)
    return Times(rows, way, *slowest.tolist())


@contextmanager
def chosen(engine: Engine, way: Way) -> Iterator[None]:
    """Passes go that way, whatever weights are."""
    sections, halved = (section_sizes.SECTIONS, section_sizes.MOST_SECTIONS), section_sizes.MIN_HALVED_ROWS
    graphed, answers = pieces.GRAPHED_HALVED_ROWS, engine.decoder.dequantizing
    section_sizes.SECTIONS, section_sizes.MOST_SECTIONS = (), way.sections
    section_sizes.MIN_HALVED_ROWS = pieces.GRAPHED_HALVED_ROWS = 0
    engine.decoder.dequantizing = Always(way.is_halved)
    try:
        yield
    finally:
        (section_sizes.SECTIONS, section_sizes.MOST_SECTIONS), section_sizes.MIN_HALVED_ROWS = sections, halved
        pieces.GRAPHED_HALVED_ROWS, engine.decoder.dequantizing = graphed, answers


class Always(dict[int, bool]):
    """One answer for any number."""

    def __init__(self, answer: bool) -> None:
        super().__init__()
        self.answer = answer

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: int) -> bool:
        return self.answer


def describe(times: Times) -> str:
    sections = "+".join(map(str, times.way.sections))
    way = "halves" if times.way.is_halved else "whole" if times.way.sections == (1,) else sections
    kind = "graph" if times.way.is_graphed else "launched"
    return (
        f"{times.rows:>5} rows {kind:>8} {way:>10} {times.ms:8.1f} ms, {times.without_sums_ms:8.1f} without sums; "
        f"host {times.host_ms:8.1f}, card {times.card_ms:8.1f}"
    )


def say(rank: CardRank, text: str) -> None:
    if rank.control.rank == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main()
