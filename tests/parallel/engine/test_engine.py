"""What the engine leaves in its cache and its rows, and that timing its steps disturbs nothing."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from parallel.checkpoint.headers import read_checkpoint
from parallel.checkpoint.load import load_checkpoint
from parallel.communicator import Communicator, ElidedAllReduce
from parallel.engine.answer import StopRules
from parallel.engine.generate import generate
from parallel.engine.graphs import graph_sizes
from parallel.engine.sampling import gather_logits
from parallel.engine.step_timer import time_steps
from parallel.kernels.limits import PAGE_SIZE
from parallel.layers.merged import LayerMerger, is_merged
from parallel.partition import split_by_heads
from tests.parallel.ranks import (
    CPU,
    build,
    demo_tokenizer,
    forced_logits,
    load,
    make_engine,
    numbered,
    run_on_ranks,
    whole_logits,
)
from tests.parallel.small_models import CONFIGS, prompts_of

FORCED = [[5, 6, 7], [8, 9, 10], [11, 12, 13], [14, 15, 16]]


def logits_by_chunk(communicator: Communicator, folder: Path, sizes: list[int]) -> list[Tensor]:
    return [forced_logits(make_engine(communicator, folder, prefill_chunk=size), prompts_of("llama"), FORCED)
            for size in sizes]  # fmt: skip


def test_chunks_do_not_change_the_logits(folders: dict[str, Path]) -> None:
    """Down to one token a pass."""
    whole, *chunked = run_on_ranks(logits_by_chunk, 1, folders["llama"], [512, 1, 4, 20])[0]
    assert torch.isfinite(whole).all()
    for logits in chunked:
        torch.testing.assert_close(logits, whole, rtol=0, atol=1e-4)


def cache_bytes(communicator: Communicator, folder: Path) -> int:
    engine = make_engine(communicator, folder, max_context=PAGE_SIZE + 1, batch_size=3)
    return sum(cache.keys.nbytes + cache.values.nbytes for cache in engine.caches)


@pytest.mark.parametrize("world_size", (1, 3))
def test_cache_takes_whole_pages_for_every_row_and_one_page_that_is_nobodys(
    folders: dict[str, Path], world_size: int
) -> None:
    config = CONFIGS["llama"]
    heads = split_by_heads(config.num_key_value_heads, world_size, config.num_key_value_heads)
    for rank, found in enumerate(run_on_ranks(cache_bytes, world_size, folders["llama"])):
        page_bytes = config.num_hidden_layers * 2 * heads[rank] * PAGE_SIZE * config.head_dim * 4
        assert found == (1 + 3 * 2) * page_bytes


def poisoned_and_clean(communicator: Communicator, folder: Path) -> tuple[Tensor, Tensor]:
    """Logits with what a sequence does not own set to a huge number, and without."""
    found = []
    for value in (1e30, 0.0):
        engine = make_engine(communicator, folder)
        for cache in engine.caches:
            cache.keys.fill_(value)
            cache.values.fill_(value)
        found.append(forced_logits(engine, prompts_of("llama"), FORCED))
    return found[0], found[1]


def test_nothing_outside_a_sequence_is_attended_to(folders: dict[str, Path]) -> None:
    poisoned, clean = run_on_ranks(poisoned_and_clean, 1, folders["llama"])[0]
    assert torch.equal(poisoned, clean)


def timed_and_untimed(communicator: Communicator, folder: Path) -> tuple[list[list[int]], list[list[int]], list[float]]:
    """Answers before and after steps were timed, with all-reduces and without; and the times."""
    engine, answers, times = make_engine(communicator, folder), [], []
    for _ in range(2):
        result = generate(engine, numbered(prompts_of("llama")), demo_tokenizer(), StopRules(9))
        answers.append([answer.token_ids for answer in result.answers])
        for inner in (communicator, ElidedAllReduce(communicator)):
            times += time_steps(engine, [64, 5, 17], 3, inner)
    assert engine.pages.num_free == 4
    return answers[0], answers[1], times


@pytest.mark.parametrize("world_size", (1, 2))
def test_timed_steps_leave_the_engine_as_it_was(folders: dict[str, Path], world_size: int) -> None:
    for before, after, times in run_on_ranks(timed_and_untimed, world_size, folders["llama"]):
        assert before == after
        assert len(times) == 12
        assert min(times) > 0


def merged_while_loading(communicator: Communicator, folder: Path) -> tuple[list[bool], Tensor, Tensor]:
    """Which layers were merged when the load ended; logits then, and where the engine merges them."""
    model = build(communicator, folder)
    load_checkpoint(model, read_checkpoint(folder), CPU, on_placed=LayerMerger(model.module))
    merged = [is_merged(layer) for layer in model.module.model.layers]
    prompts, following = prompts_of("llama_with_biases")[:2], [5, 6]
    early = whole_logits(communicator, model.module, prompts, following)
    return merged, early, whole_logits(communicator, load(communicator, folder), prompts, following)


@pytest.mark.parametrize("world_size", (1, 3))
def test_layers_may_be_merged_as_they_load(folders: dict[str, Path], world_size: int) -> None:
    for merged, early, late in run_on_ranks(merged_while_loading, world_size, folders["llama_with_biases"]):
        assert merged == [True, True]
        assert torch.equal(early, late)


def fp8_and_plain(communicator: Communicator, folder: Path) -> list[Tensor]:
    found = []
    for kv_dtype in (None, torch.float8_e4m3fn):
        engine = make_engine(communicator, folder, kv_dtype=kv_dtype)
        assert engine.caches[0].keys.dtype == (kv_dtype or torch.float32)
        logits = forced_logits(engine, prompts_of("demo"), FORCED)
        found.append(torch.stack([gather_logits(step, engine.sampler.shards, communicator) for step in logits]))
    return found


def test_fp8_cache_costs_a_little(folders: dict[str, Path]) -> None:
    """e4m3 keeps 4 bits of a number: logits move by a few hundredths of their spread, and not by nothing."""
    for plain, fp8 in run_on_ranks(fp8_and_plain, 2, folders["demo"]):
        error = (fp8 - plain).std() / plain.std()
        assert 0.001 < error < 0.05


def test_graphs_are_captured_for_powers_of_two_and_the_largest() -> None:
    assert graph_sizes(1) == (1,)
    assert graph_sizes(8) == (1, 2, 4, 8)
    assert graph_sizes(24) == (1, 2, 4, 8, 16, 24)
