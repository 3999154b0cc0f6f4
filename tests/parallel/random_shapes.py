"""Models of random shapes in bf16: how far logits of ranks, and of transformers, are from those of float32."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from parallel.checkpoint.headers import read_checkpoint
from parallel.checkpoint.load import load_checkpoint
from parallel.checkpoint.quantize import quantize_weight
from parallel.checkpoint.quantize_schemes import QUANTIZE_SCHEMES
from parallel.communicator import Communicator
from parallel.engine.engine import Engine
from parallel.engine.limits import EngineLimits
from parallel.engine.sampling import gather_logits
from parallel.layers.merged import LayerMerger
from parallel.shard import share_process_group
from tests.parallel.ranks import build, forced_logits
from tests.parallel.small_models import random_values
from tools.checkpoint.quantization import is_linear

CONFIGS: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
PLAIN = "plain"


@dataclass(frozen=True)
class Size:
    """How large shapes are: grains of 128 of hidden and of MLP units, dimensions of heads, tokens of the vocabulary,
    lengths of prompts, tokens that follow, and tokens of a pass."""

    hidden: range
    inner: range
    head_dims: tuple[int, ...]
    vocabulary: range
    lengths: tuple[int, ...]
    num_forced: int
    prefill_chunk: int


SMALL = Size(range(1, 4), range(1, 6), (16, 32, 48), range(500, 1500), (3, 40, 70), 3, 32)
LARGE = Size(range(16, 41), range(40, 112), (64, 128), range(20_000, 60_000), (3, 130, 700), 4, 512)


def random_config(seed: int, size: Size) -> PretrainedConfig:
    """Two layers; at least four KV heads, so that up to four ranks take part in attention."""
    draw = random.Random(seed)
    kind, hidden, num_kv = draw.choice([*CONFIGS]), 128 * draw.choice(size.hidden), draw.choice((4, 4, 5, 8))
    # Heads divide the hidden size, as transformers asks of Llama, and leave a multiple of 16, as kernels ask.
    num_heads = num_kv * draw.choice((1, 2, 4, 8))
    unit = 16 * num_heads
    return config_of(
        kind,
        hidden_size=math.ceil(hidden / unit) * unit,
        intermediate_size=128 * draw.choice(size.inner),
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv,
        head_dim=draw.choice(size.head_dims),
        vocab_size=draw.choice(size.vocabulary),
    )


def config_of(kind: str, **sizes: int) -> PretrainedConfig:
    none = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    others = {"num_hidden_layers": 2, "max_position_embeddings": 2048, "tie_word_embeddings": False}
    return CONFIGS[kind](**sizes, **others, **none)


def write_bf16(config: PretrainedConfig, folder: Path, device: torch.device) -> Path:
    """A checkpoint in bf16 whose every parameter is random."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_values(name, parameter.shape, generator))
    model.save_pretrained(folder)
    return folder


def random_tokens(config: PretrainedConfig, size: Size) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts, and what follows each."""
    generator = torch.Generator().manual_seed(2)
    lengths = [length + size.num_forced for length in size.lengths]
    whole = [torch.randint(config.vocab_size, (length,), generator=generator).tolist() for length in lengths]
    return [each[: -size.num_forced] for each in whole], [each[-size.num_forced :] for each in whole]


def rank_logits(communicator: Communicator, folder: Path, kind: str, size: Size, device: torch.device) -> Tensor:
    """[step, prompt, vocabulary] of sharded ranks in bf16, from `kind` of weights: plain, or rounded so."""
    share_process_group(torch.device("cpu"))
    model = build(communicator, folder, torch.bfloat16)
    on_placed = LayerMerger(model.module) if device.type == "cuda" else lambda name: None
    load_checkpoint(model, read_checkpoint(folder), device, quantize=QUANTIZE_SCHEMES.get(kind), on_placed=on_placed)
    sizes = EngineLimits(max(size.lengths) + size.num_forced + 1, len(size.lengths), size.prefill_chunk)
    engine = Engine(model.module, communicator, sizes)
    prompts, forced = random_tokens(model.module.config, size)
    steps = forced_logits(engine, prompts, forced)
    shards = engine.sampler.shards
    found = torch.stack([gather_logits(step, shards, communicator).float() for step in steps]).cpu()
    communicator.barrier()
    return found


@torch.inference_mode()
def whole_logits(folder: Path, kind: str, size: Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The same of transformers, each prompt alone."""
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **options).to(device).eval()
    if kind != PLAIN:
        stored = load_file(folder / "model.safetensors", device=str(device))
        for name, weight in stored.items():
            if is_linear(name):
                rounded = quantize_weight(weight, QUANTIZE_SCHEMES[kind]).dequantize(torch.float32)
                model.get_parameter(name).copy_(rounded)
    model = model.to(dtype)
    prompts, forced = random_tokens(model.config, size)
    rows = [
        model(torch.tensor([[*prompt, *tokens]], device=device)).logits[0, -size.num_forced - 1 :]
        for prompt, tokens in zip(prompts, forced, strict=True)
    ]
    return torch.stack(rows, dim=1).float().cpu()


def error(found: Tensor, exact: Tensor) -> float:
    """Root of the mean square of errors beside the spread of what is exact."""
    return float((found - exact).double().pow(2).mean().sqrt() / exact.double().std())
