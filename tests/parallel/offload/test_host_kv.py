"""Keys and values in host memory: the answers of those on the device, though nothing stays there between layers."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parallel.communicator import Communicator
from parallel.engine.answer import StopRules
from parallel.engine.engine import Engine
from parallel.engine.generate import Prompt, Result, generate
from parallel.engine.speculation.speculator import Speculation
from parallel.engine.speculation.tree_plan import TreePlan
from parallel.engine.step_timer import time_steps
from parallel.kernels.limits import PAGE_SIZE
from parallel.kernels.pages import FP8
from parallel.offload.copies import HostCopies
from parallel.offload.host_kv import MAX_GAP, HostKV, page_ranges
from parallel.offload.host_layers import HostLayers, SharedLayers
from tests.parallel.offload.test_sharing import CONFIG, FORCED, PROMPTS, needs_layout, open_engine
from tests.parallel.offload.test_streaming import Recorder
from tests.parallel.ranks import CPU, demo_tokenizer, forced_logits, make_engine, numbered, run_on_ranks
from tests.parallel.small_models import DEMO, write_model

NGRAM = Speculation("ngram", num_drafts=3)
TREE = Speculation("ngram", tree=TreePlan(10, 3, 1))
AUTO = Speculation("ngram", choices=(TreePlan(6, 3, 1), TreePlan(10, 3, 1)))
# Of the model itself: long branches come true, and not those that lie where they are to stay.
GROWN = Speculation("draft", tree=TreePlan(20, 4, 5))
# Of five layers.
SETS = ((2,), (0, 1, 3, 4))
ODD = ((0, 2, 4),)
Sets = tuple[tuple[int, ...], ...]
NUM_NEW = 12


class PoisonedCopies(HostCopies):
    """Leaves nothing in a staging cache that has been used."""

    def __init__(self, host_kv: HostKV) -> None:
        self.host_kv = host_kv

    def mark_used(self, buffer: int) -> None:
        self.host_kv.staging[buffer].view(torch.uint8).fill_(0xFF)


def poisoned(engine: Engine) -> Engine:
    host_kv = engine.decoder.host_kv
    assert host_kv is not None
    host_kv.copies = PoisonedCopies(host_kv)
    return engine


def prompts_of_pages() -> list[list[int]]:
    """Of less than a page, of one, of several; two begin with two pages of another, and one is no more than that."""
    tokens = torch.randint(5, 500, (1000,), generator=torch.Generator().manual_seed(3)).tolist()
    long = tokens[: 2 * PAGE_SIZE + 20]
    return [
        tokens[300:307],
        # Drafts go on to the next page before the host knows.
        tokens[700 : 700 + PAGE_SIZE - 4],
        long,
        tokens[400 : 400 + PAGE_SIZE],
        long[: 2 * PAGE_SIZE] + tokens[500:503],
        # N-grams to be found again.
        tokens[600:620] * 5,
        long[: 2 * PAGE_SIZE],
    ]


def answered(engine: Engine, prompts: list[Prompt], num_tokens: int = NUM_NEW) -> Result:
    return generate(engine, prompts, demo_tokenizer(), StopRules(num_tokens))


def tokens_of(result: Result) -> list[list[int]]:
    return [answer.token_ids for answer in result.answers]


Found = tuple[list[list[int]], list[list[list[int]]], int]


def runs(
    communicator: Communicator, sets: Sets, speculation: Speculation | None, kv_dtype: torch.dtype | None
) -> Found:
    """Answers with all on the device, then of each set; and how many tokens of prompts the cache had. There are fewer
    rows than prompts, and chunks that end within pages."""
    prompts = numbered(prompts_of_pages())
    draft = DEMO if speculation is not None and speculation.kind == "draft" else None
    settings = {"max_context": 192, "batch_size": 3, "prefill_chunk": 45, "speculation": speculation, "draft": draft}
    resident = tokens_of(answered(make_engine(communicator, DEMO, **settings, kv_dtype=kv_dtype), prompts))
    found, reused = [], 0
    for streamed in sets:
        engine = make_engine(communicator, DEMO, **settings, kv_dtype=kv_dtype, streamed=streamed, with_kv=True)
        result = answered(poisoned(engine), prompts)
        found.append(tokens_of(result))
        reused = result.reused_tokens
        # A second time, when the cache has what the first left.
        assert tokens_of(answered(engine, prompts, 4)) == [tokens[:4] for tokens in found[-1]]
    return resident, found, reused


@pytest.mark.parametrize(
    ("world_size", "sets", "speculation", "kv_dtype"),
    [
        (1, SETS, None, None),
        (2, ODD, None, FP8),
        (1, ODD, NGRAM, None),
        (2, ODD, TREE, None),
        (1, ODD, AUTO, None),
        (1, ODD, GROWN, None),
    ],
    ids=["one", "two", "ngram", "tree", "auto", "grown"],
)
def test_answers_are_those_of_pages_on_the_device(
    world_size: int, sets: Sets, speculation: Speculation | None, kv_dtype: torch.dtype | None
) -> None:
    for resident, found, reused in run_on_ranks(runs, world_size, sets, speculation, kv_dtype):
        assert len(set(map(tuple, resident))) == len(resident)
        assert found == [resident] * len(sets)
        assert reused >= 3 * PAGE_SIZE


def logits_of(communicator: Communicator, spoil: bool) -> tuple[Tensor, Tensor]:
    """Of resident layers and of streamed ones with their pages; `spoil`: what layer 3 caches is not written back."""
    prompts = prompts_of_pages()
    forced = [[17 + row, 40, 41 + row] for row in range(len(prompts))]
    settings = {"max_context": 192, "batch_size": len(prompts), "prefill_chunk": 32}
    engine = poisoned(make_engine(communicator, DEMO, **settings, streamed=(0, 1, 3), with_kv=True))
    host_kv = engine.decoder.host_kv
    assert host_kv is not None
    if spoil:
        write_back = host_kv.write_back
        host_kv.write_back = lambda place: None if place == 2 else write_back(place)  # type: ignore[method-assign]
    return forced_logits(make_engine(communicator, DEMO, **settings), prompts, forced), forced_logits(
        engine, prompts, forced
    )


def test_logits_are_the_same_to_the_bit_and_hang_on_what_is_written_back() -> None:
    resident, streamed = run_on_ranks(logits_of, 1, False)[0]
    assert torch.isfinite(resident).all()
    assert torch.equal(resident, streamed)
    resident, streamed = run_on_ranks(logits_of, 1, True)[0]
    # The shortest prompt is one chunk: its first logits need nothing of before.
    assert torch.equal(resident[0, 0], streamed[0, 0])
    assert not any(torch.equal(*each) for each in zip(resident[1], streamed[1], strict=True))


def shared_logits(communicator: Communicator, folder: Path) -> list[Tensor]:
    """Of three streamed layers the host computes one in steps; pages on the device, and with their layers."""
    shared = SharedLayers((1,), max_rows=2)
    layers = [HostLayers((0, 1, 3), CPU, shared, with_kv=with_kv) for with_kv in (False, True)]
    engines = [open_engine(communicator, folder, each) for each in layers]
    return [forced_logits(each, PROMPTS, FORCED) for each in (engines[0], poisoned(engines[1]))]


@needs_layout
def test_layers_that_the_host_computes_have_their_pages_there_too(tmp_path: Path) -> None:
    on_device, hosted = run_on_ranks(shared_logits, 1, write_model(CONFIG, tmp_path))[0]
    assert torch.equal(on_device, hosted)


def interrupted(communicator: Communicator) -> tuple[list[list[int]], list[list[int]], list[float]]:
    """Answers before and after a pass that ended in the middle, and timed steps."""
    engine = poisoned(make_engine(communicator, DEMO, max_context=192, batch_size=3, streamed=(0, 2, 3), with_kv=True))
    prompts, host_kv = numbered(prompts_of_pages()), engine.decoder.host_kv
    before = tokens_of(answered(engine, prompts))
    assert host_kv is not None
    host_kv.begin([3, 4], torch.tensor([70]))
    passing = engine.decoder.layers(1)
    for _ in range(4):
        next(passing)
    del passing
    engine.reset()
    after = tokens_of(answered(engine, prompts))
    return before, after, time_steps(engine, [150, 5], 2, communicator)


def test_a_pass_that_fails_leaves_the_next_one_whole() -> None:
    before, after, times = run_on_ranks(interrupted, 1)[0]
    assert before == after
    assert min(times) > 0


def brought(communicator: Communicator) -> list[list[list[int]]]:
    """The pages that each pass over an answer of 4 tokens to 128 brings, in chunks of 100."""
    engine = make_engine(
        communicator, DEMO, max_context=192, batch_size=1, prefill_chunk=100, streamed=(1,), with_kv=True
    )
    host_kv, found = engine.decoder.host_kv, []
    assert host_kv is not None
    begin = host_kv.begin

    def watched(pages: list[int], slots: Tensor) -> None:
        begin(pages, slots)
        found.append([list(range(*each)) for each in host_kv.ranges])

    host_kv.begin = watched  # type: ignore[method-assign, assignment]
    generate(engine, numbered([list(range(5, 133))]), demo_tokenizer(), StopRules(4))
    return found


def test_a_pass_brings_the_pages_that_have_tokens_and_no_others() -> None:
    """Not the one that the first token of the answer begins."""
    assert run_on_ranks(brought, 1)[0] == [[], [[1, 2]], [[1, 2]], [[1, 2, 3]], [[1, 2, 3]]]


def test_neighbouring_pages_come_together() -> None:
    for _ in range(50):
        pages = torch.randperm(200)[: int(torch.randint(1, 60, ()))].tolist()
        ranges = page_ranges(pages + pages[:3])
        covered = [page for first, last in ranges for page in range(first, last)]
        assert set(pages) <= set(covered)
        assert covered == sorted(set(covered))
        assert all(first in pages and last - 1 in pages for first, last in ranges)
        assert all(after[0] - before[1] > MAX_GAP for before, after in pairwise(ranges))
        unasked = [0 if page in pages else 1 for page in covered]
        assert "1" * (MAX_GAP + 1) not in "".join(map(str, unasked))
    assert page_ranges([]) == []


@pytest.mark.parametrize(("kv_heads", "head_dim", "dtype"), [(2, 10, torch.bfloat16), (3, 6, FP8), (0, 16, FP8)])
def test_tokens_of_any_width_go_to_the_host_and_come_back(kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """Every byte, of those tokens alone; a rank may have no heads."""
    host_kv = HostKV([4, 7, 9], 6, kv_heads, head_dim, dtype, CPU)
    per_token = 2 * kv_heads * head_dim * dtype.itemsize
    assert host_kv.num_bytes == 3 * 6 * PAGE_SIZE * per_token
    assert host_kv.staging.nbytes == 2 * 6 * PAGE_SIZE * per_token
    assert host_kv.pass_bytes(100) == 3 * 100 * per_token
    host_kv.copies = PoisonedCopies(host_kv)
    slots = torch.randperm(6 * PAGE_SIZE)[:70]
    wanted = torch.randint(256, (3, 2, 6, kv_heads, PAGE_SIZE, head_dim * dtype.itemsize), dtype=torch.uint8)
    host_kv.begin([], slots)
    for place, _ in enumerate(host_kv.through([torch.nn.Identity() for _ in range(10)])):
        if place in host_kv.places:
            cache, new = host_kv.caches[place], wanted[host_kv.places[place]]
            cache.keys.view(torch.uint8).copy_(new[0])
            cache.values.view(torch.uint8).copy_(new[1])
    is_written = torch.zeros(6 * PAGE_SIZE, dtype=torch.bool).index_fill(0, slots, 1).view(6, 1, PAGE_SIZE, 1)
    wanted = torch.where(is_written, wanted, 0)
    host_kv.begin(range(6), slots[:0])
    for place, _ in enumerate(host_kv.through([torch.nn.Identity() for _ in range(10)])):
        if place in host_kv.places:
            found = torch.stack([host_kv.caches[place].keys, host_kv.caches[place].values]).view(torch.uint8)
            assert torch.equal(found, wanted[host_kv.places[place]])


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
def test_copies_follow_the_last_use_and_are_waited_for(num_layers: int) -> None:
    """Over two passes: what a pass brings is queued after all before it, and nothing is brought for the next."""
    host_kv, recorder = HostKV(range(num_layers), 4, 1, 8, torch.float32, CPU), Recorder()
    host_kv.copies = recorder
    for _ in range(2):
        host_kv.begin([1, 2], torch.tensor([70]))
        for _ in host_kv.through([torch.nn.Identity() for _ in range(num_layers + 1)]):
            recorder.calls.append(("layer", len(recorder.calls)))
    calls = [(name, buffer) for name, buffer in recorder.calls if name != "layer"]
    begun = [(name, buffer) for buffer in range(min(2, num_layers)) for name in ("used", "copy")]
    turns = [(name, place % 2) for place in range(num_layers) for name in ("wait", "used", "copy")]
    # The last two have no other after them.
    kept = [call for at, call in enumerate(turns) if call[0] != "copy" or at // 3 + 2 < num_layers]
    assert calls == 2 * (begun + kept)
    places = [at for at, (name, _) in enumerate(recorder.calls) if name == "layer"]
    hosted = [at for at in places if recorder.calls[at - 1][0] == "wait"]
    assert len(hosted) == 2 * num_layers
    assert all(at + 1 < len(recorder.calls) and recorder.calls[at + 1][0] == "used" for at in hosted)
