"""Which model is run, where its weights come from, in what dtype, and its shape where no checkpoint tells."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import PurePath
from typing import ClassVar

from omegaconf import MISSING


class DType(str, Enum):
    """Type of weights and activations; `auto` takes the checkpoint's own."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class WeightsKind(str, Enum):
    """Where weights come from: the checkpoint's files, or made up: then only speed and memory mean anything."""

    checkpoint = "checkpoint"
    dummy = "dummy"


class QuantizeKind(str, Enum):
    """To what the linears of a bf16, fp16 or fp32 checkpoint are rounded while it loads."""

    none = "none"
    int4 = "int4"
    int8 = "int8"
    fp8 = "fp8"


@dataclass
class ModelFacts:
    """Shape of a dense decoder (conf/model_shape), for planning before its checkpoint is on this machine."""

    hidden_size: int = MISSING
    intermediate_size: int = MISSING
    num_layers: int = MISSING
    num_heads: int = MISSING
    num_kv_heads: int = MISSING
    head_dim: int = MISSING
    vocab_size: int = MISSING
    max_positions: int = MISSING
    tied_embeddings: bool = False
    qkv_bias: bool = False
    dtype: str = "bfloat16"
    # How the linears are stored: none, awq, gptq, compressed-tensors, fp8.
    quantization: str = "none"
    # Bits a weight of a linear takes with its scales and zeros.
    linear_bits: float = 16.0


@dataclass
class ModelConfig:
    """A model and the form of its weights."""

    # What `path` is called on the command line.
    key: ClassVar[str] = "model.path"
    # A local folder, pkg://PACKAGE/FOLDER for what ships with a package, or a hub name such as org/name.
    path: str = MISSING
    dtype: DType = DType.auto
    # `dummy`: random weights of the same layout, made on the cards; needs config.json only, or `shape`.
    weights: WeightsKind = WeightsKind.checkpoint
    # Round the linears of a bf16, fp16 or fp32 checkpoint to 4 or 8 bits while it loads: none, int4, int8 or fp8.
    quantize: QuantizeKind = QuantizeKind.none
    # Plans and dummy weights use this where the checkpoint itself is not on this machine.
    shape: ModelFacts | None = None

    @property
    def name(self) -> str:
        return PurePath(self.path).name

    def problems(self) -> Iterator[str]:
        if not self.path.strip():
            yield "model.path is empty. Give a local folder or a hub name such as org/name."


@dataclass
class DraftModelConfig(ModelConfig):
    """The small model of speculation.kind=draft, found and downloaded as the model is."""

    key: ClassVar[str] = "speculation.draft_path"
