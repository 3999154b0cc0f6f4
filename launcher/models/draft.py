"""The small model of speculation.kind=draft: where it is, its shape, and that it speaks the large one's tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.config import (
    ConfigError,
    DraftModelConfig,
    QuantizeKind,
    RunConfig,
    SpeculationKind,
    TaskKind,
    WeightsKind,
)
from launcher.models.config_json import ShapeError
from launcher.models.files import download_model, find_local_model
from launcher.models.shape import ModelShape, quantized_shape, shape_from_checkpoint, shape_from_config
from parallel.checkpoint.headers import read_checkpoint

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Draft:
    """A draft model as the ranks load it."""

    shape: ModelShape
    folder: str


def find_draft(run: RunConfig, shape: ModelShape, folder: Path | None) -> Draft | None:
    """The draft model of a run, found or downloaded; None where it has none.

    Its weights are made up where those of the model are, and a plan needs none.

    Args:
        shape: of the model that checks its drafts.
        folder: of that model; None where it is known by facts only.

    Raises:
        ValueError: no such model, its files cannot be used, or its tokenizer is another.
    """
    if run.speculation.kind != SpeculationKind.draft:
        return None
    path = run.speculation.draft_path
    assert path is not None, "the config has been checked"
    is_plan = run.task.kind == TaskKind.plan
    model = DraftModelConfig(path=path, weights=WeightsKind.dummy if is_plan else run.model.weights)
    found = find_local_model(model) or download_model(model)
    try:
        is_dummy = model.weights == WeightsKind.dummy
        draft = shape_from_config(found) if is_dummy else shape_from_checkpoint(found, read_checkpoint(found))
        if run.speculation.draft_quantize != QuantizeKind.none:
            draft = quantized_shape(draft, run.speculation.draft_quantize.value, "speculation.draft_quantize")
    except ShapeError as error:
        raise ShapeError(f"{model.key}={path}: {error}") from error
    check_tokens(run, found, draft, folder, shape)
    return Draft(draft, str(found))


def check_tokens(run: RunConfig, found: Path, draft: ModelShape, folder: Path | None, shape: ModelShape) -> None:
    """By the vocabularies of both tokenizers; by their sizes where a model comes without."""
    ours, theirs = (None if each is None else read_vocabulary(each) for each in (folder, found))
    if draft.vocab_size == shape.vocab_size if ours is None or theirs is None else ours == theirs:
        return
    raise ConfigError(
        f"speculation.draft_path={run.speculation.draft_path}: its tokens are not those of "
        f"model.path={run.model.path} ({draft.vocab_size} and {shape.vocab_size}). Drafts are tokens: give a model of "
        "the same tokenizer, or use speculation.kind=ngram."
    )


def read_vocabulary(folder: Path) -> Any:
    """The tokens and their ids as tokenizer.json has them; None without that file.

    Raises:
        ConfigError: it holds none.
    """
    file = folder / TOKENIZER
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_bytes())["model"]["vocab"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} holds no vocabulary ({error!r}). Download it again.") from error
