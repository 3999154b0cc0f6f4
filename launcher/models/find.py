"""The model of a run: found on this machine or downloaded, its shape checked before its weights are fetched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.config import QuantizeKind, RunConfig, TaskKind, WeightsKind
from launcher.models.files import download_model, download_texts, find_local_model
from launcher.models.shape import (
    ModelShape,
    quantized_shape,
    shape_from_checkpoint,
    shape_from_config,
    shape_from_facts,
)
from parallel.checkpoint.headers import read_checkpoint

# Raises where a run of a model of that shape cannot work; what it returns is not read.
CheckShape = Callable[[ModelShape], object]


@dataclass(frozen=True)
class Model:
    """A model that a run will load, or facts about one; `folder` is None for facts."""

    shape: ModelShape
    folder: Path | None


def find_model(run: RunConfig, check: CheckShape) -> Model:
    """Finds (or downloads) the model and decides its shape.

    Args:
        check: raises for a shape that the run cannot have; called before weights are downloaded.

    Raises:
        ValueError: no such model, its files are missing, truncated or of a kind that is not read, or it is quantised
            and model.quantize is set.
    """

    def rounded(shape: ModelShape) -> ModelShape:
        kind = run.model.quantize
        return shape if kind == QuantizeKind.none else quantized_shape(shape, kind.value)

    model = find_stored_model(run, lambda shape: check(rounded(shape)))
    return replace(model, shape=rounded(model.shape))


def find_stored_model(run: RunConfig, check: CheckShape) -> Model:
    """The model as it is stored; facts do where task=plan or dummy weights have no folder."""
    folder, is_dummy = find_local_model(run.model), run.model.weights == WeightsKind.dummy
    if folder is None and run.model.shape is not None and (is_dummy or run.task.kind == TaskKind.plan):
        return Model(shape_from_facts(run.model.shape), None)
    if folder is None and not is_dummy:
        check(shape_from_config(download_texts(run.model)))
    folder = folder or download_model(run.model)
    shape = shape_from_config(folder) if is_dummy else shape_from_checkpoint(folder, read_checkpoint(folder))
    return Model(shape, folder)
