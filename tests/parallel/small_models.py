"""Small models with random weights, one for each thing that sharding must get right, and what they answer unsharded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

DEMO = Path(__file__).parents[2] / "launcher" / "models" / "demo"
NUM_NEW_TOKENS = 14
# Of those, how many the ranks are fed one by one, for the logits of each step.
NUM_FORCED_TOKENS = 5

# Four KV heads are dealt 2, 1, 1 over three ranks; the other sizes divide by no number of ranks, nor by a grain.
COMMON = {
    "hidden_size": 80,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1003,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(
        **COMMON | {"num_hidden_layers": 3}, head_dim=12, tie_word_embeddings=False, rope_parameters=LLAMA3_ROPE
    ),
    "llama_tied": LlamaConfig(**COMMON | {"vocab_size": 997}, tie_word_embeddings=True),
    "llama_with_biases": LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    "llama_with_two_kv_heads": LlamaConfig(
        **COMMON | {"num_key_value_heads": 2}, head_dim=12, tie_word_embeddings=False
    ),
    "mistral": MistralConfig(**COMMON | {"intermediate_size": 200}, head_dim=20, tie_word_embeddings=False),
    "qwen2_tied": Qwen2Config(**COMMON | {"hidden_size": 96, "vocab_size": 1009}, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**COMMON, head_dim=16, tie_word_embeddings=False),
}
NAMES = (*CONFIGS, "demo")
PROMPT_LENGTHS = (3, 17, 9, 30)
DEMO_TEXTS = (
    "import os",
    "def read_lines(path):\n    with open(path) as file:\n",
    'class Queue:\n    """A queue of',
    "for name in sorted(names):\n    if name.startswith('_'):\n        continue\n    print(",
)


@dataclass(frozen=True)
class Reference:
    """Each prompt alone through transformers: greedy tokens [NUM_NEW_TOKENS] and the logits they were picked from."""

    prompts: list[list[int]]
    tokens: list[list[int]]
    logits: list[Tensor]


def write_model(config: PretrainedConfig, folder: Path, *, seed: int = 1) -> Path:
    """A float32 checkpoint whose every parameter, norms and biases too, is random."""
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_values(name, parameter.shape, generator))
    model.save_pretrained(folder)
    return folder


def random_values(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Of a spread at which layers, norms and biases all change what the model says."""
    noise = torch.randn(shape, generator=generator, device=generator.device)
    if name.endswith("norm.weight"):
        return 1 + 0.3 * noise
    if name.endswith("bias"):
        return 0.5 * noise
    return 0.3 * noise if "embed" in name else noise * 1.5 / math.sqrt(shape[1])


@lru_cache
def prompts_of(name: str) -> list[list[int]]:
    if name == "demo":
        return [AutoTokenizer.from_pretrained(DEMO)(text)["input_ids"] for text in DEMO_TEXTS]
    generator = torch.Generator().manual_seed(1)
    vocab_size = CONFIGS[name].vocab_size
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


def load_whole(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.inference_mode()
def compute_reference(name: str, folder: Path) -> Reference:
    model, prompts = load_whole(folder), prompts_of(name)
    model.generation_config.eos_token_id = None
    tokens, logits = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NUM_NEW_TOKENS,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens.append(output.sequences[0, len(prompt) :].tolist())
        logits.append(torch.cat(output.logits))
    return Reference(prompts, tokens, logits)
