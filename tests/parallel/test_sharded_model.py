"""A sharded model says what the whole one says: transformers, each prompt alone, in float32."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, LlamaConfig, PretrainedConfig

from parallel.communicator import Communicator
from parallel.engine.answer import StopRules
from parallel.partition import choose_grain, split_by_grain, split_by_heads
from parallel.shard import build_sharded_model
from tests.parallel.ranks import ModelRun, build, run_model, run_on_ranks
from tests.parallel.small_models import COMMON, CONFIGS, NAMES, NUM_FORCED_TOKENS, NUM_NEW_TOKENS, Reference

WORLD_SIZES = (1, 2, 3, 4)
TOLERANCE = 1e-4

Runs = Callable[[str, int], list[ModelRun]]

each_model = pytest.mark.parametrize("name", NAMES)
each_world_size = pytest.mark.parametrize("world_size", WORLD_SIZES)


@pytest.fixture(scope="module")
def runs(folders: dict[str, Path], references: dict[str, Reference]) -> Callable[[str, int], list[ModelRun]]:
    """(model, world size) -> what each rank saw; a pair runs once for all the tests that ask for it."""
    done: dict[tuple[str, int], list[ModelRun]] = {}

    def run(name: str, world_size: int) -> list[ModelRun]:
        if (name, world_size) not in done:
            reference = references[name]
            done[name, world_size] = run_on_ranks(
                run_model,
                world_size,
                folders[name],
                reference.prompts,
                [tokens[:NUM_FORCED_TOKENS] for tokens in reference.tokens],
                StopRules(NUM_NEW_TOKENS),
            )
        return done[name, world_size]

    return run


@each_model
def test_reference_is_no_trivial_answer(references: dict[str, Reference], name: str) -> None:
    reference = references[name]
    best_two = torch.cat(reference.logits).topk(2).values
    assert (best_two[:, 0] - best_two[:, 1]).min() > 10 * TOLERANCE, "greedy tokens would hang on rounding"
    assert all(len(tokens) == NUM_NEW_TOKENS for tokens in reference.tokens)
    assert len({token for tokens in reference.tokens for token in tokens}) > NUM_NEW_TOKENS


@each_model
@each_world_size
def test_prefill_logits_are_the_whole_models(
    runs: Runs, references: dict[str, Reference], name: str, world_size: int
) -> None:
    expected = torch.stack([logits[0] for logits in references[name].logits])
    for run in runs(name, world_size):
        torch.testing.assert_close(run.logits[0], expected, rtol=0, atol=TOLERANCE)


@each_model
@each_world_size
def test_decode_logits_are_the_whole_models(
    runs: Runs, references: dict[str, Reference], name: str, world_size: int
) -> None:
    expected = torch.stack(references[name].logits, dim=1)[: NUM_FORCED_TOKENS + 1]
    for run in runs(name, world_size):
        torch.testing.assert_close(run.logits, expected, rtol=0, atol=TOLERANCE)


@each_model
@each_world_size
def test_greedy_answers_are_those_of_generate(
    runs: Runs, references: dict[str, Reference], name: str, world_size: int
) -> None:
    for run in runs(name, world_size):
        assert [answer.token_ids for answer in run.answers] == references[name].tokens
        assert {answer.finish_reason for answer in run.answers} == {"length"}


@each_model
@each_world_size
def test_no_tensor_is_left_on_meta(runs: Runs, name: str, world_size: int) -> None:
    assert [run.on_meta for run in runs(name, world_size)] == [[]] * world_size


@each_model
@each_world_size
def test_shards_add_up_to_the_whole(runs: Runs, name: str, world_size: int) -> None:
    ranks = runs(name, world_size)
    whole = set()
    for parameter, full in ranks[0].full_shapes.items():
        shapes = [run.shapes[parameter] for run in ranks]
        cut = [dim for dim in range(len(full)) if any(shape[dim] != full[dim] for shape in shapes)]
        if cut:
            assert sum(shape[cut[0]] for shape in shapes) == full[cut[0]], parameter
        assert len(cut) <= 1, parameter
        if not cut:
            whole.add(parameter)
    if world_size > 1:
        assert all(parameter.endswith(("norm.weight", "o_proj.bias", "down_proj.bias")) for parameter in whole), whole


@each_world_size
def test_vocabulary_that_does_not_divide_is_dealt_to_all(runs: Runs, world_size: int) -> None:
    for run in runs("llama", world_size):
        assert len(run.vocabulary) == world_size
        assert sum(run.vocabulary) == 1003
        assert min(run.vocabulary) > 0


@pytest.mark.parametrize("world_size", (3, 4))
def test_ranks_beyond_the_kv_heads_hold_no_attention_and_answers_stay_right(
    runs: Runs, references: dict[str, Reference], world_size: int
) -> None:
    """The launcher's plan refuses this, as it would waste a card; the engine itself can do it."""
    ranks = runs("llama_with_two_kv_heads", world_size)
    assert [run.shapes["model.layers.0.self_attn.k_proj.weight"][0] for run in ranks[2:]] == [0] * (world_size - 2)
    for run in ranks:
        assert [answer.token_ids for answer in run.answers] == references["llama_with_two_kv_heads"].tokens


@each_model
@pytest.mark.parametrize("world_size", (1, 3))
def test_tied_head_and_embedding_are_one_parameter(runs: Runs, name: str, world_size: int) -> None:
    for run in runs(name, world_size):
        assert run.shares_head == name.endswith("_tied")


def rotary_frequencies(communicator: Communicator, configs: list[PretrainedConfig]) -> list[Tensor]:
    models = [build_sharded_model(config, communicator, dtype=torch.bfloat16, grain=16).module for config in configs]
    assert all(parameter.dtype == torch.bfloat16 for model in models for parameter in model.parameters())
    return [model.model.rotary_emb.inv_freq for model in models]


def test_rotary_frequencies_stay_float32_in_a_bf16_model() -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    configs = [*CONFIGS.values(), *(LlamaConfig(**COMMON, rope_parameters=rope) for rope in (yarn, linear))]
    expected = [AutoModelForCausalLM.from_config(c, dtype=torch.float32).model.rotary_emb.inv_freq for c in configs]
    for found in run_on_ranks(rotary_frequencies, 2, configs):
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == torch.float32
            assert not ours.is_meta
            assert torch.equal(ours, theirs)


def dtypes_of(communicator: Communicator, folder: Path) -> dict[str, set[torch.dtype]]:
    assert AutoConfig.from_pretrained(folder).dtype == torch.bfloat16
    return {
        str(dtype): {parameter.dtype for parameter in build(communicator, folder, dtype).module.parameters()}
        for dtype in (torch.float32, torch.bfloat16)
    }


def test_asked_dtype_wins_over_the_config(folders: dict[str, Path]) -> None:
    found = run_on_ranks(dtypes_of, 1, folders["demo"])[0]
    assert found == {"torch.float32": {torch.float32}, "torch.bfloat16": {torch.bfloat16}}


def build_without_texts(communicator: Communicator, folder: Path) -> None:
    def refuse(module: nn.Module) -> str:
        raise AssertionError(type(module))

    nn.Module.__repr__ = refuse  # type: ignore[method-assign]
    build(communicator, folder)


def test_a_model_is_not_written_out_while_it_is_built(folders: dict[str, Path]) -> None:
    run_on_ranks(build_without_texts, 1, folders["llama"])


def refuse_unplanned(communicator: Communicator) -> str:
    config = BertConfig(**COMMON | {"num_key_value_heads": None}, is_decoder=True)
    with pytest.raises(ValueError) as caught:
        build_sharded_model(config, communicator, dtype=torch.float32, grain=16)
    return str(caught.value)


def test_architecture_without_a_plan_is_refused_by_its_name() -> None:
    assert "model_type='bert' has no tensor-parallel plan" in run_on_ranks(refuse_unplanned, 1)[0]


# What each rank reads


def shard_numels(name: str, shape: tuple[int, ...], model: str, world_size: int) -> list[int]:
    """Elements of a tensor on each rank, from the names of the layers and the rules of the partition alone."""
    config = CONFIGS[model]
    grain = choose_grain((config.intermediate_size, config.vocab_size), world_size)
    layer, kind = name.split(".")[-2:]
    dim = 1 if layer in ("o_proj", "down_proj") else 0
    if kind == "bias" and dim == 1:
        return [math.prod(shape)] * world_size
    if layer in ("q_proj", "k_proj", "v_proj", "o_proj"):
        sizes = split_by_heads(shape[dim], world_size, config.num_key_value_heads)
    elif layer in ("gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"):
        sizes = split_by_grain(shape[dim], world_size, grain)
    else:
        return [math.prod(shape)] * world_size
    return [math.prod(shape) // shape[dim] * size for size in sizes]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("world_size", (1, 2, 3, 4))
def test_each_rank_reads_the_bytes_of_its_slices(
    runs: Runs, folders: dict[str, Path], name: str, world_size: int
) -> None:
    stored = load_file(folders[name] / "model.safetensors")
    numels = {key: shard_numels(key, tuple(value.shape), name, world_size) for key, value in stored.items()}
    bytes_read = [run.load.bytes_read for run in runs(name, world_size)]
    assert bytes_read == [4 * sum(numel[rank] for numel in numels.values()) for rank in range(world_size)]
    replicated_bytes = 4 * sum(v.numel() for key, v in stored.items() if numels[key] == [v.numel()] * world_size)
    file_bytes = sum(value.nbytes for value in stored.values())
    assert sum(bytes_read) == file_bytes + (world_size - 1) * replicated_bytes


@pytest.mark.parametrize("world_size", (1, 2, 3))
def test_progress_rises_to_the_total(runs: Runs, world_size: int) -> None:
    for run in runs("llama_with_biases", world_size):
        done, totals = zip(*run.progress, strict=True)
        assert list(done) == sorted(set(done))
        assert set(totals) == {run.load.bytes_read} == {done[-1]}
        assert len(done) == len(run.full_shapes)
        assert run.load.sec > 0
