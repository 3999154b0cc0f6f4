"""Prompts in, logits out: chunks, padding, reuse of the cache, and what is refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from parallel.communicator import Communicator
from parallel.engine.engine import Engine, pad_left
from parallel.engine.generate import time_steps
from parallel.partition import split_by_heads
from tests.parallel.ranks import CPU, load, run_on_ranks
from tests.parallel.small_models import CONFIGS, prompts_of

MAX_CONTEXT = 40


def make_engine(communicator: Communicator, folder: Path, *, prefill_chunk: int = 512) -> Engine:
    return Engine(load(communicator, folder), CPU, max_context=MAX_CONTEXT, prefill_chunk=prefill_chunk)


def cache_use(communicator: Communicator, folder: Path) -> dict[str, object]:
    engine, prompts = make_engine(communicator, folder), prompts_of("llama")
    first = engine.prefill(prompts[:2])
    storage = [layer.keys for layer in engine.cache.layers]
    engine.prefill(prompts[2:4])
    again = engine.prefill(prompts[:2])
    kept = all(layer.keys is keys for layer, keys in zip(engine.cache.layers, storage, strict=True))
    two_bytes = engine.cache.num_bytes()
    engine.prefill(prompts[:3])
    return {
        "kept": kept,
        "same_logits": torch.equal(first, again),
        "two_bytes": two_bytes,
        "three_bytes": engine.cache.num_bytes(),
        "length": engine.cache.get_seq_length(),
    }


@pytest.mark.parametrize("world_size", (1, 3))
def test_storage_is_kept_for_the_same_batch_size_and_taken_anew_for_another(
    folders: dict[str, Path], world_size: int
) -> None:
    config = CONFIGS["llama"]
    heads = split_by_heads(config.num_key_value_heads, world_size, config.num_key_value_heads)
    for rank, use in enumerate(run_on_ranks(cache_use, world_size, folders["llama"])):
        assert use["kept"]
        assert use["same_logits"]
        bytes_per_sequence = config.num_hidden_layers * 2 * heads[rank] * MAX_CONTEXT * config.head_dim * 4
        assert (use["two_bytes"], use["three_bytes"]) == (2 * bytes_per_sequence, 3 * bytes_per_sequence)
        assert use["length"] == 17


def chunked_logits(communicator: Communicator, folder: Path, sizes: list[int]) -> list[tuple[Tensor, list[int]]]:
    prompts, outcomes = prompts_of("llama"), []
    for size in sizes:
        engine, columns = make_engine(communicator, folder, prefill_chunk=size), []
        logits = engine.prefill(prompts, on_progress=lambda done, total, seen=columns: seen.append(done))
        outcomes.append((logits, columns))
    return outcomes


def test_chunks_do_not_change_the_logits(folders: dict[str, Path]) -> None:
    """Down to one column a step, even where prefill_chunk is smaller than the batch."""
    sizes = [1, 4, 20, 32, 512]
    outcomes = run_on_ranks(chunked_logits, 1, folders["llama"], sizes)[0]
    assert [len(columns) for _, columns in outcomes] == [30, 30, 6, 4, 1]
    assert all(columns[-1] == 30 for _, columns in outcomes)
    for logits, _ in outcomes:
        assert torch.isfinite(logits).all()
        torch.testing.assert_close(logits, outcomes[-1][0], rtol=0, atol=1e-4)


def next_positions(communicator: Communicator, folder: Path) -> tuple[Tensor, Tensor]:
    engine = make_engine(communicator, folder, prefill_chunk=32)
    engine.prefill(prompts_of("llama"))
    after_prefill = engine.next_positions
    engine.decode(torch.tensor([1, 2, 3, 4]))
    return after_prefill, engine.next_positions


def test_positions_count_a_prompts_own_tokens_and_no_padding(folders: dict[str, Path]) -> None:
    after_prefill, after_decode = run_on_ranks(next_positions, 1, folders["llama"])[0]
    assert after_prefill.tolist() == [[3], [17], [9], [30]]
    assert after_decode.tolist() == [[4], [18], [10], [31]]


def timed_and_untimed(communicator: Communicator, folder: Path) -> tuple[Tensor, Tensor, set[int], list[float]]:
    logits = []
    for num_steps in (0, 3):
        engine = make_engine(communicator, folder)
        engine.prefill(prompts_of("llama"))
        tokens = torch.tensor([5, 6, 7, 8])
        engine.decode(tokens)
        times = time_steps(engine, tokens, num_steps)
        logits.append(engine.decode(torch.tensor([1, 2, 3, 4])))
    assert engine.attention_mask is not None
    return *logits, {engine.cache.get_seq_length(), engine.attention_mask.shape[-1]}, times


@pytest.mark.parametrize("world_size", (1, 2))
def test_timed_steps_leave_the_sequences_as_they_were(folders: dict[str, Path], world_size: int) -> None:
    for untimed, timed, lengths, times in run_on_ranks(timed_and_untimed, world_size, folders["llama"]):
        torch.testing.assert_close(timed, untimed, rtol=0, atol=1e-6)
        assert lengths == {30 + 2}
        assert len(times) == 3
        assert min(times) > 0


def fill_context(communicator: Communicator, folder: Path) -> tuple[int, str]:
    engine = make_engine(communicator, folder)
    engine.prefill([[1] * (MAX_CONTEXT - 1)])
    engine.decode(torch.tensor([2]))
    length = engine.cache.get_seq_length()
    engine.repeat_step(torch.tensor([2]))
    with pytest.raises(AssertionError) as caught:
        engine.decode(torch.tensor([3]))
    return length, str(caught.value)


def test_context_can_be_filled_and_not_exceeded(folders: dict[str, Path]) -> None:
    length, message = run_on_ranks(fill_context, 1, folders["llama"])[0]
    assert length == MAX_CONTEXT
    assert "exceed" in message


def refusals(communicator: Communicator, folder: Path) -> list[str]:
    engine, messages = make_engine(communicator, folder), []
    for prompts in ([[1, 2], []], [[1], [1] * MAX_CONTEXT]):
        with pytest.raises(ValueError) as caught:
            engine.prefill(prompts)
        messages.append(str(caught.value))
    return messages


def test_prompt_that_is_empty_or_too_long_is_refused(folders: dict[str, Path]) -> None:
    empty, long = run_on_ranks(refusals, 1, folders["llama"])[0]
    assert empty == "prompt 1 has no tokens."
    assert f"a prompt of {MAX_CONTEXT} tokens leaves no room in engine.max_context={MAX_CONTEXT}" in long


def test_padding_is_on_the_left() -> None:
    ids, mask = pad_left([[7], [1, 2, 3]], 4, CPU)
    assert ids.tolist() == [[0, 0, 0, 7], [0, 1, 2, 3]]
    assert mask.tolist() == [[0, 0, 0, 1], [0, 1, 1, 1]]
