"""The model of a job with its weights in place: those of its checkpoint, or dummy ones."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen2Config

from launcher.config import WeightsKind
from launcher.models.shape import ModelShape
from launcher.rank.context import RankContext
from launcher.tasks.model_texts import read_config
from parallel.checkpoint.dummy import fill_dummy
from parallel.checkpoint.headers import read_checkpoint
from parallel.checkpoint.load import LoadResult, load_checkpoint
from parallel.checkpoint.quantize_schemes import QUANTIZE_SCHEMES
from parallel.formats.scheme import Scheme
from parallel.layers.merged import LayerMerger
from parallel.offload.host_layers import HostLayers, HostLoader
from parallel.product_trial import FusedRows, rows_limit
from parallel.shard import ShardedModel, build_sharded_model


def load_sharded_model(
    context: RankContext, fused_rows: FusedRows | None, host_layers: HostLayers | None = None
) -> tuple[PreTrainedModel, LoadResult]:
    """This rank's part of the model, on its device, but for what `host_layers` takes as it is loaded.

    Args:
        fused_rows: what was chosen for its linears, where there was a choice.

    Raises:
        CheckpointError: the weights cannot be used; the message says which and why.
    """
    job = context.job
    assert job.plan is not None and job.shape is not None, "the parent plans a model for this task"
    source = Source(job.model_folder, job.shape, QUANTIZE_SCHEMES.get(job.run.model.quantize.value))
    return load_source(context, source, job.plan.grain, fused_rows, host_layers)


def load_draft_model(context: RankContext, fused_rows: FusedRows | None) -> tuple[PreTrainedModel, LoadResult] | None:
    """This rank's part of the draft model; None where the run has none. Raises as `load_sharded_model`."""
    draft, plan = context.job.draft, context.job.plan
    if draft is None:
        return None
    assert plan is not None and plan.draft_grain is not None, "a plan with a draft model deals it over the ranks"
    scheme = QUANTIZE_SCHEMES.get(context.job.run.speculation.draft_quantize.value)
    return load_source(context, Source(draft.folder, draft.shape, scheme), plan.draft_grain, fused_rows)


@dataclass(frozen=True)
class Source:
    """Where a model comes from. `folder` is None where its shape is all there is; `quantize` rounds it on the way."""

    folder: str | None
    shape: ModelShape
    quantize: Scheme | None


def load_source(
    context: RankContext,
    source: Source,
    grain: int,
    fused_rows: FusedRows | None,
    host_layers: HostLayers | None = None,
) -> tuple[PreTrainedModel, LoadResult]:
    job = context.job
    assert job.plan is not None
    model = build_sharded_model(
        config_of(source),
        context.communicator,
        dtype=getattr(torch, job.plan.dtype),
        grain=grain,
        fused_rows=rows_limit(fused_rows),
    )
    if host_layers is not None and host_layers.disk is not None:
        assert job.disk_folder is not None, "the parent finds the files of layers on the disk"
        host_layers.disk.open(model, read_checkpoint(Path(job.disk_folder)), source.quantize)
    on_placed = LayerMerger(model.module) if host_layers is None else HostLoader(model.module, host_layers)
    return model.module, FILLS[job.run.model.weights](context, model, source, on_placed)


def give_back(device: torch.device) -> None:
    """Memory of what nobody holds any more, to be used for something else; what refers to itself goes here only."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def config_of(source: Source) -> PretrainedConfig:
    """Raises ValueError: transformers takes its config.json for no model's."""
    return config_of_shape(source.shape) if source.folder is None else read_config(source.folder)


def config_of_shape(shape: ModelShape) -> PretrainedConfig:
    """The transformers config of a model that is known by facts only: a Llama, or a Qwen2 where queries have biases."""
    family = Qwen2Config if shape.qkv_bias else LlamaConfig
    return family(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=shape.tied_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def fill_from_checkpoint(
    context: RankContext, model: ShardedModel, source: Source, on_placed: Callable[[str], None]
) -> LoadResult:
    assert source.folder is not None, "only dummy weights come without a folder"
    return load_checkpoint(
        model,
        read_checkpoint(Path(source.folder)),
        context.device,
        on_placed=on_placed,
        quantize=source.quantize,
        on_progress=lambda done, total: context.events.progress(
            "loading weights", done, total, "bytes", each_rank=True
        ),
    )


def fill_with_dummies(
    context: RankContext, model: ShardedModel, source: Source, on_placed: Callable[[str], None]
) -> LoadResult:
    return fill_dummy(
        model,
        source.shape.scheme,
        context.device,
        on_placed=on_placed,
        on_progress=lambda done, total: context.events.progress(
            "making weights", done, total, "parameters", each_rank=True
        ),
    )


FILLS: dict[WeightsKind, Callable[[RankContext, ShardedModel, Source, Callable[[str], None]], LoadResult]] = {
    WeightsKind.checkpoint: fill_from_checkpoint,
    WeightsKind.dummy: fill_with_dummies,
}
