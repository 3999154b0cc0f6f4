"""A transformers model on the meta device, sharded by DeepSpeed AutoTP: shapes only, nothing allocated.

`deepspeed.init_inference` is not used: it casts the rotary frequencies to bf16, refuses CUDA graphs with tensor
parallelism and loads whole files on every rank. Its parts are: AutoTP replaces each linear that the model's own
`tp_plan` names, on meta tensors, and freezes the sizes that every rank gets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from parallel.communicator import Communicator
from parallel.footprint import MIN_FUSED_ROWS
from parallel.formats.config import read_scheme
from parallel.formats.scheme import Scheme
from parallel.layers.linear import LINEARS, adopt


def share_process_group(device: torch.device) -> None:
    """Lets DeepSpeed use torch's default process group, which must exist."""
    import deepspeed
    import deepspeed.comm

    # Unasked, it finds out which of its operators could be built, by compilers run for each, and then builds its
    # shared-memory collectives for the CPU, which need LOCAL_SIZE too. It is to build none.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    deepspeed.comm.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)


@dataclass(frozen=True)
class ShardedModel:
    """A model whose parameters are on meta, and the full shapes that its checkpoint must have.

    `scheme` is how the checkpoint stores the weights of `linears` (of all of them or some); None: as numbers.
    """

    module: PreTrainedModel
    full_shapes: dict[str, tuple[int, ...]]
    scheme: Scheme | None
    linears: tuple[str, ...]


def build_sharded_model(
    config: PretrainedConfig,
    communicator: Communicator,
    *,
    dtype: torch.dtype,
    grain: int,
    fused_rows: int = MIN_FUSED_ROWS,
) -> ShardedModel:
    """Builds and shards; buffers (the rotary frequencies) are real and stay float32.

    Args:
        grain: MLP and vocabulary are dealt in multiples of this many rows, so that a quantisation group stays whole.
        fused_rows: as of parallel/kernels/choice.py.

    Raises:
        ValueError: the architecture has no tensor-parallel plan.
        FormatError: the config's quantization_config cannot be loaded.
    """
    scheme = read_scheme(getattr(config, "quantization_config", None) or getattr(config, "compression_config", None))
    model = build_meta_model(config, dtype)
    full_shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    apply_tensor_parallel(model, communicator, grain, fused_rows)
    linears = tuple(f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, LINEARS))
    return ShardedModel(model, full_shapes, scheme, linears)


def build_meta_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    # The dtype is named, or the config's own would win. Weights on meta would be drawn one by one, for nothing: 0.2 of
    # 0.6 s for 80 layers.
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.tie_weights()
    return model.eval()


def apply_tensor_parallel(model: PreTrainedModel, communicator: Communicator, grain: int, fused_rows: int) -> None:
    """Replaces the linears, the head and the embedding of `model` by this rank's shards, in place."""
    from deepspeed.module_inject.auto_tp import AutoTP
    from deepspeed.module_inject.autotp_config import AutoTPConfig
    from deepspeed.module_inject.layers import TensorParallel_Layer, VocabParallelEmbedding
    from deepspeed.module_inject.tp_plan_converter import TPPlanConverter

    if not model.tp_plan:
        raise ValueError(f"model_type={model.config.model_type!r} has no tensor-parallel plan in transformers.")
    world_size = communicator.world_size
    specs = AutoTPConfig(
        tp_size=world_size, layer_specs=TPPlanConverter.convert(model.tp_plan), use_default_specs=False
    )
    autotp = AutoTP(
        model, (), "", None, None, None,
        partition_config=specs, vocab_parallel_lm_head=True, model_config=model.config, tp_grain_size=grain,
    )  # fmt: skip
    group = dist.group.WORLD
    # Sizes that modules keep of their model are read by nobody here. For each it would write the module out as text,
    # the whole model 16 times: 0.6 s of a core for 80 layers.
    autotp.update_mp_params = lambda child, name=None: None
    autotp.set_tensor_parallel_config(world_size, group)
    autotp.update_linear_policies()
    autotp._replace_module(model)
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding):
        # AutoTP shards a tied embedding with the head and leaves an untied one whole, 2.1 GB a card for Llama-70B.
        # The head's name makes it deal the vocabulary in the same grains.
        sharded = VocabParallelEmbedding(embedding, group, name="lm_head", tp_meta=autotp.tp_meta)
        model.set_input_embeddings(sharded)
    for layer in model.modules():
        if isinstance(layer, TensorParallel_Layer):
            adopt(layer, communicator, fused_rows)
