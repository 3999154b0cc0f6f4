"""Small models whose linears are stored in each format, beside plain ones with the same weights dequantised."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2Config

from parallel.checkpoint.headers import read_checkpoint
from parallel.checkpoint.load import LoadResult, load_checkpoint
from parallel.communicator import Communicator
from parallel.formats.scheme import CheckpointError
from tests.parallel.packers import CASES, FLOAT8_CASES, NF4_CASES, Case
from tests.parallel.ranks import CPU, build, whole_logits
from tests.parallel.small_models import COMMON, load_whole, write_model

# Heads of 12: a rank's keys end within AWQ's words of 8, its part of o_proj within a group of 32. The MLP is dealt in
# grains of 64 or 32.
CONFIG = Qwen2Config(
    **COMMON | {"hidden_size": 96, "intermediate_size": 224, "num_hidden_layers": 2},
    head_dim=12,
    tie_word_embeddings=False,
)
# Inputs in whole blocks of 64; a rank's part of o_proj begins within one.
CONFIG_64 = Qwen2Config(
    **COMMON | {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2},
    head_dim=24,
    tie_word_embeddings=False,
)
MODEL_CASES: dict[str, Case] = CASES | FLOAT8_CASES | NF4_CASES
# One linear that these checkpoints leave as it is.
LEFT_ALONE = "model.layers.1.mlp.down_proj"
LEAVING = ("awq", "nf4")
PROMPTS = [[5, 17, 999, 3, 250, 8], [71, 4]]
NEXT = [12, 600]


def write_pair(name: str, folder: Path, *, seed: int = 11) -> Path:
    """`folder`/quantized and `folder`/plain; returns `folder`."""
    case, plain, quantized = MODEL_CASES[name], folder / "plain", folder / "quantized"
    write_model(CONFIG_64 if name in NF4_CASES else CONFIG, plain)
    tensors = load_file(plain / "model.safetensors")
    stored: dict[str, Tensor] = {}
    for index, (key, value) in enumerate(sorted(tensors.items())):
        linear, _, kind = key.rpartition(".")
        if kind != "weight" or "_proj" not in key or (name in LEAVING and linear == LEFT_ALONE):
            stored[key] = value
            continue
        drawn = case.drawn(tuple(value.shape), seed + index)
        tensors[key] = drawn.weight.float()
        stored |= {f"{linear}.{part}": tensor for part, tensor in case.store(drawn, case.config).items()}
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    quantized.mkdir()
    save_file(stored, quantized / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text()) | {"quantization_config": case.config}
    (quantized / "config.json").write_text(json.dumps(config))
    return folder


@torch.inference_mode()
def expected_logits(folder: Path) -> Tensor:
    """[step, prompt, vocabulary]: transformers on the plain checkpoint, each prompt alone."""
    model = load_whole(folder / "plain")
    both = [model(torch.tensor([[*prompt, token]])).logits[0, -2:] for prompt, token in zip(PROMPTS, NEXT, strict=True)]
    return torch.stack(both, dim=1)


@dataclass(frozen=True)
class QuantizedRun:
    """One rank's view: logits as above, what the load cost, and the bytes that linears hold by name."""

    logits: Tensor = field(repr=False)
    load: LoadResult
    held_bytes: dict[str, int]
    on_meta: list[str]


def run_quantized(communicator: Communicator, folders: list[Path]) -> list[QuantizedRun]:
    return [run_one(communicator, folder) for folder in folders]


def run_one(communicator: Communicator, folder: Path) -> QuantizedRun:
    model = build(communicator, folder)
    load = load_checkpoint(model, read_checkpoint(folder), CPU)
    module = model.module
    held_bytes = {
        name: sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()) if t.dim() > 1)
        for name, layer in module.named_modules()
        if name.endswith("_proj")
    }
    return QuantizedRun(
        logits=whole_logits(communicator, module, PROMPTS, NEXT),
        load=load,
        held_bytes=held_bytes,
        on_meta=[name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta],
    )


def refusals(communicator: Communicator, folders: list[Path]) -> list[str]:
    """Why each checkpoint could not be loaded; empty where it was."""
    reasons = []
    for folder in folders:
        try:
            load_checkpoint(build(communicator, folder), read_checkpoint(folder), CPU)
            reasons.append("")
        except CheckpointError as error:
            reasons.append(str(error))
    return reasons
