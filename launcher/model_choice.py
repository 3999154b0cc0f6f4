"""Which model is run, where its weights come from, and in what dtype."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import PurePath
from typing import ClassVar

from omegaconf import MISSING

from launcher.model_facts import ModelFacts
from launcher.quantize_kind import QuantizeKind


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


@dataclass
class ModelConfig:
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
    key: ClassVar[str] = "speculation.draft_path"
