"""Dummy weights: the same random model however many ranks, in every scheme, with activations that stay finite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, PretrainedConfig

from launcher.models.shape import TYPICAL_SCHEMES
from parallel.checkpoint import dummy
from parallel.checkpoint.dummy import STANDARD_DEVIATION, fill_dummy
from parallel.checkpoint.load import LoadResult
from parallel.checkpoint.load_memory import load_bytes
from parallel.checkpoint.quantize_schemes import QUANTIZE_SCHEMES
from parallel.communicator import Communicator
from parallel.formats.scheme import Scheme
from parallel.partition import choose_grain
from parallel.shard import ShardedModel, build_sharded_model
from tests.parallel.memory import peak_bytes
from tests.parallel.quantized_models import NEXT, PROMPTS
from tests.parallel.ranks import CPU, run_on_ranks, whole_logits
from tests.parallel.small_models import COMMON
from tools.checkpoint.quantization import is_linear

SCHEMES: dict[str, Scheme | None] = {
    "plain": None,
    **TYPICAL_SCHEMES,
    **{f"rounded {kind}": scheme for kind, scheme in QUANTIZE_SCHEMES.items()},
    "act order": replace(TYPICAL_SCHEMES["gptq"], group_size=32, act_order=True),
    "by tensor": replace(TYPICAL_SCHEMES["fp8"], per_tensor=True),
    "int8 by channel": Scheme("compressed-tensors", "int-quantized", bits=8, group_size=None, has_zeros=True),
}
# Heads of 12: a rank's part of o_proj begins within a group.
LLAMA = LlamaConfig(**COMMON | {"hidden_size": 96}, head_dim=12, attention_bias=True, tie_word_embeddings=False)
TIED = LlamaConfig(**COMMON, tie_word_embeddings=True)
LINEAR, EMBEDDING, HEAD = "model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight", "lm_head.weight"
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Run:
    """One rank's view: its parameters, linears dequantised, and the gathered logits [step, prompt, vocabulary]."""

    weights: Tensors
    logits: Tensor
    load: LoadResult
    progress: list[tuple[int, int]]
    shares_head: bool
    on_meta: list[str]


def meta_model(communicator: Communicator, config: PretrainedConfig, dtype: torch.dtype) -> ShardedModel:
    grain = choose_grain((config.intermediate_size, config.vocab_size), communicator.world_size)
    return build_sharded_model(config, communicator, dtype=dtype, grain=grain)


def fill(communicator: Communicator, config: PretrainedConfig, scheme: Scheme | None) -> Run:
    model, progress = meta_model(communicator, config, torch.float32), []
    load = fill_dummy(model, scheme, CPU, on_progress=lambda done, total: progress.append((done, total)))
    module = model.module
    packed = {f"{name}.weight": layer.packed.dequantize(torch.float32)
              for name, layer in module.named_modules() if getattr(layer, "packed", None) is not None}  # fmt: skip
    weights = {name: p.data for name, p in module.named_parameters(remove_duplicate=False)} | packed
    return Run(
        weights=weights,
        logits=whole_logits(communicator, module, PROMPTS, NEXT),
        load=load,
        progress=progress,
        shares_head=module.get_input_embeddings().weight is module.lm_head.weight,
        on_meta=[name for name, t in (*module.named_parameters(), *module.named_buffers()) if t.is_meta],
    )


def fill_all(communicator: Communicator) -> dict[str, Run]:
    runs = {name: fill(communicator, LLAMA, scheme) for name, scheme in SCHEMES.items()}
    return runs | {"tied": fill(communicator, TIED, None)}


Runs = Callable[[int], list[dict[str, Run]]]


@pytest.fixture(scope="module")
def runs() -> Runs:
    done: dict[int, list[dict[str, Run]]] = {}

    def run(world_size: int) -> list[dict[str, Run]]:
        if world_size not in done:
            done[world_size] = run_on_ranks(fill_all, world_size)
        return done[world_size]

    return run


each_scheme = pytest.mark.parametrize("name", [*SCHEMES, "tied"])


def join(shards: list[Tensor], whole: Tensor) -> Tensor:
    cut = [dim for dim in range(whole.dim()) if shards[0].shape[dim] != whole.shape[dim]]
    return torch.cat(shards, dim=cut[0]) if cut else shards[0]


@each_scheme
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_hold_slices_of_the_model_that_one_rank_makes(runs: Runs, name: str, world_size: int) -> None:
    whole, parts = runs(1)[0][name].weights, [rank[name].weights for rank in runs(world_size)]
    for key, value in whole.items():
        assert torch.equal(join([part[key] for part in parts], value), value), key


@each_scheme
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_logits_are_those_of_one_rank(runs: Runs, name: str, world_size: int) -> None:
    expected = runs(1)[0][name].logits
    assert expected.isfinite().all() and expected.std() > 0.01
    for rank in runs(world_size):
        torch.testing.assert_close(rank[name].logits, expected, rtol=0, atol=1e-5)


@each_scheme
def test_weights_have_the_spread_of_real_ones(runs: Runs, name: str) -> None:
    for key, value in runs(1)[0][name].weights.items():
        if value.dim() == 1:
            assert bool((value == (0 if key.endswith("bias") else 1)).all()), key
            continue
        assert float(value.std()) == pytest.approx(STANDARD_DEVIATION, rel=0.1), key
        assert abs(float(value.mean())) < 0.1 * STANDARD_DEVIATION, key
        rows = value / value.norm(dim=1, keepdim=True)
        products = rows @ rows.t() - torch.eye(len(rows))
        # Of a thousand rows a pair may begin at the same place.
        assert int((products.abs() > 0.9).sum()) <= 4
        assert float(products.square().mean()) < 2 / value.shape[1]


@each_scheme
def test_every_parameter_is_made_once_and_says_so(runs: Runs, name: str) -> None:
    run = runs(2)[1][name]
    assert run.on_meta == []
    assert run.load.bytes_read == 0
    assert sum(run.load.kernels.values()) == (0 if name in ("plain", "tied") else 14)
    assert run.progress == [(n + 1, len(run.progress)) for n in range(len(run.progress))]
    assert run.shares_head == (name == "tied")


def test_parameters_are_unlike_each_other(runs: Runs) -> None:
    weights = runs(1)[0]["plain"].weights
    assert not torch.equal(weights[EMBEDDING], weights[HEAD])
    assert not torch.equal(weights[LINEAR], weights[LINEAR.replace("layers.1", "layers.0")])


def test_quantised_linears_only_are_linears(runs: Runs) -> None:
    plain, quantised = (runs(1)[0][name].weights for name in ("plain", "awq"))
    assert {key for key in plain if not torch.equal(plain[key], quantised[key])} == {
        key for key in plain if is_linear(key)
    }


def peaks(communicator: Communicator) -> dict[str, tuple[int, int, int]]:
    """Scheme -> most bytes that torch held while weights were made, bytes held in the end, and of the pool."""
    return {name: peak(communicator, SCHEMES[name]) for name in ("plain", "awq", "rounded int8", "fp8")}


def peak(communicator: Communicator, scheme: Scheme | None) -> tuple[int, int, int]:
    wide = {"hidden_size": 512, "intermediate_size": 1024}
    model = meta_model(communicator, LlamaConfig(**COMMON | wide, tie_word_embeddings=False), torch.bfloat16)
    most = peak_bytes(lambda: fill_dummy(model, scheme, CPU))
    held = sum(t.nbytes for t in (*model.module.parameters(), *model.module.buffers()))
    # Numbers are drawn as float32 and int64 before they are what a scheme has.
    return most, held, (dummy.NUM_PLACES + 1024) * 16


def test_memory_is_that_of_the_model_a_linear_and_the_pool() -> None:
    for name, (most, held, pool) in run_on_ranks(peaks, 1)[0].items():
        scheme = SCHEMES[name]
        one = 0 if scheme is None else load_bytes(scheme, "cpu", "bfloat16", 2, 512, 512 * 1024)
        assert most <= held + one + pool
