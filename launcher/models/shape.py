"""The shape of a dense decoder and the bytes of its parts on each rank, without torch.

A shape comes from a checkpoint's config.json, or from facts in the config for a model that is not on this machine.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from launcher.config import ModelFacts
from launcher.models.config_json import ShapeError, read_model_config
from parallel.checkpoint.headers import Checkpoint, read_checkpoint
from parallel.checkpoint.quantize_schemes import QUANTIZE_SCHEMES
from parallel.footprint import stored_bits
from parallel.formats.config import SUPPORTED as SUPPORTED_FORMATS
from parallel.formats.scheme import Scheme, inputs_problem
from parallel.partition import split_by_grain, split_by_heads

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# How the formats of `model.shape.quantization` store weights unless config.json says otherwise. These can be loaded; a
# name that is not here can be planned.
TYPICAL_SCHEMES = {
    "awq": Scheme("awq", "awq", bits=4, group_size=128, has_zeros=True),
    "gptq": Scheme("gptq", "gptq", bits=4, group_size=128),
    "compressed-tensors": Scheme("compressed-tensors", "pack-quantized", bits=4, group_size=128),
    "fp8": Scheme("compressed-tensors", "float-quantized", bits=8, group_size=None, is_float=True),
    "bitsandbytes": Scheme("bitsandbytes", "nf4", bits=4, group_size=64, has_codebook=True, nested_scales=True),
}
# Bits of a weight with its scales, above which those formats are taken to have 8 bits.
MOST_BITS_OF_FOUR = 6.0
EMBEDDING_NAME = "model.embed_tokens.weight"
# One of these belongs to every quantised linear.
QUANTIZED_PARTS = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".absmax")
# Of one size whatever the linear's.
TABLES = (".quant_map", ".nested_quant_map", ".bitsandbytes__nf4")
HEAD_NAMES = ("lm_head.weight", "lm_head.bias")
# Several times as deep as any decoder; plans try them one by one.
MOST_LAYERS = 1000


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder in numbers.

    `sliding_window` is set where some layer attends to that many tokens only and `max_positions` is larger.
    `linear_bits` is what a weight of the layers' linears takes in the checkpoint, with its scales and zeros. `scheme`
    is how they are stored (None: as numbers, or in a way that cannot be loaded, which `not_loadable` then explains).
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: int | None
    dtype: str
    quantization: str
    linear_bits: float
    source: str
    scheme: Scheme | None = None
    not_loadable: str = ""

    @property
    def num_linear_weights(self) -> int:
        """Weights of the linears of all layers, biases left out."""
        attention = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        return self.num_layers * self.hidden_size * (attention + 3 * self.intermediate_size)


def shape_from_checkpoint(folder: Path, checkpoint: Checkpoint | None = None) -> ModelShape:
    """The shape in config.json; headers count too where it leaves the dtype open or the weights are quantised.

    Args:
        checkpoint: the headers, where they have been read already.

    Raises:
        ShapeError: config.json is missing or invalid, lacks a field, or its model_type is not in SUPPORTED.
        CheckpointError: the headers had to be read and cannot be used.
    """
    file = folder / "config.json"
    fields = read_model_config(file)
    fields["dtype"] = fields["dtype"] or _stored_dtype(file, checkpoint or read_checkpoint(folder))
    _check(fields, str(file))
    unquantized_bits = 8.0 * DTYPE_BYTES[fields["dtype"]]
    shape = ModelShape(**fields, linear_bits=unquantized_bits, source="checkpoint")
    if shape.quantization == "none":
        return shape
    checkpoint = checkpoint or read_checkpoint(folder)
    return replace(
        shape,
        linear_bits=8 * _linear_bytes(checkpoint) / shape.num_linear_weights,
        not_loadable=shape.not_loadable or _awkward_inputs(shape) or _not_loadable(checkpoint),
    )


def shape_from_config(folder: Path) -> ModelShape:
    """The shape in config.json alone, for weights that are made up; a dtype that it leaves open is bfloat16.

    Raises:
        ShapeError: as for a checkpoint.
    """
    file = folder / "config.json"
    fields = read_model_config(file)
    fields["dtype"] = fields["dtype"] or "bfloat16"
    _check(fields, str(file))
    scheme: Scheme | None = fields["scheme"]
    linear_bits = stored_bits(scheme, fields["hidden_size"]) if scheme else 8.0 * DTYPE_BYTES[fields["dtype"]]
    shape = ModelShape(**fields, linear_bits=linear_bits, source="config.json")
    return replace(shape, not_loadable=shape.not_loadable or _awkward_inputs(shape))


def quantized_shape(shape: ModelShape, kind: str, knob: str = "model.quantize") -> ModelShape:
    """`shape` with its linears rounded while they load; `kind` is a key of QUANTIZE_SCHEMES, as `knob` has it.

    Raises:
        ShapeError: the checkpoint is quantised already.
    """
    if shape.quantization != "none":
        raise ShapeError(
            f"{knob}={kind} rounds bf16, fp16 and fp32 checkpoints, and this one is quantised as "
            f"{shape.quantization} already. Set {knob}=none."
        )
    scheme = QUANTIZE_SCHEMES[kind]
    return replace(shape, quantization=kind, scheme=scheme, linear_bits=stored_bits(scheme, shape.hidden_size))


def shape_from_facts(facts: ModelFacts) -> ModelShape:
    """The shape that model.shape describes; facts know of no output or MLP biases, nor of query and key norms.

    Raises:
        ShapeError: a size is below 1, layers are too many, heads do not divide, or the dtype is unknown.
    """
    fields = asdict(facts)
    for name, value in fields.items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise ShapeError(f"model.shape.{name}={value} must be at least 1.")
    _check(fields, "model.shape")
    if not 0 < facts.linear_bits <= 32:
        raise ShapeError(f"model.shape.linear_bits={facts.linear_bits} must be above 0 and at most 32.")
    return ModelShape(
        **fields,
        model_type="dense",
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        sliding_window=None,
        source="facts",
        **typical_quantization(facts.quantization, facts.linear_bits),
    )


def typical_quantization(name: str, linear_bits: float) -> dict[str, Any]:
    """`scheme` and `not_loadable` of a shape of which only the format's name and the bits of a weight are known."""
    if name == "none":
        return {"scheme": None, "not_loadable": ""}
    if name not in TYPICAL_SCHEMES:
        return {"scheme": None, "not_loadable": f"supported: {SUPPORTED_FORMATS}."}
    scheme = TYPICAL_SCHEMES[name]
    if scheme.has_codebook and linear_bits > MOST_BITS_OF_FOUR:
        return {"scheme": None, "not_loadable": f"in more than 4 bits; supported: {SUPPORTED_FORMATS}."}
    if scheme.bits == 4 and linear_bits > MOST_BITS_OF_FOUR:
        scheme = replace(scheme, bits=8, group_size=None)
    return {"scheme": scheme, "not_loadable": ""}


def part_bytes(
    shape: ModelShape, world_size: int, grain: int, dtype: str, *, linear_bits: float | None = None
) -> tuple[dict[str, int], ...]:
    """Bytes of weights on each rank, by part: embedding, head, attention, mlp, norms; biases go with their linears.

    Embedding, head and MLP are dealt by `grain`, attention by key/value heads. Norms and the biases of row-parallel
    linears (output and down projections) are whole on every rank. Quantised linears take `linear_bits` a weight, by
    default those of the checkpoint; all else, and unquantised linears, are stored in `dtype` (float32, bfloat16 or
    float16).
    A tied head is the embedding and adds nothing.

    Returns:
        One dict per rank, in rank order.

    Raises:
        PartitionError: `world_size` or `grain` is below 1.
    """
    element_bytes = DTYPE_BYTES[dtype]
    if linear_bits is None:
        linear_bits = 8 * element_bytes if shape.quantization == "none" else shape.linear_bits
    queries = split_by_heads(shape.num_heads * shape.head_dim, world_size, shape.num_kv_heads)
    keys = split_by_heads(shape.num_kv_heads * shape.head_dim, world_size, shape.num_kv_heads)
    intermediate = split_by_grain(shape.intermediate_size, world_size, grain)
    vocabulary = split_by_grain(shape.vocab_size, world_size, grain)

    def linears(num_columns: int, num_biases: int) -> int:
        weights = shape.num_layers * shape.hidden_size * num_columns
        return math.ceil(weights * linear_bits / 8) + shape.num_layers * num_biases * element_bytes

    def one_rank(rank: int) -> dict[str, int]:
        q, k, m = queries[rank], keys[rank], intermediate[rank]
        embedding_bytes = vocabulary[rank] * shape.hidden_size * element_bytes
        return {
            "embedding": embedding_bytes,
            "head": 0 if shape.tied_embeddings else embedding_bytes,
            "attention": linears(2 * (q + k), shape.qkv_bias * (q + 2 * k) + shape.output_bias * shape.hidden_size),
            "mlp": linears(3 * m, shape.mlp_bias * (2 * m + shape.hidden_size)),
            "norms": _num_norm_weights(shape) * element_bytes,
        }

    return tuple(one_rank(rank) for rank in range(world_size))


def _num_norm_weights(shape: ModelShape) -> int:
    """Two norms a layer and one at the end; query and key norms where the family has them."""
    return (2 * shape.num_layers + 1) * shape.hidden_size + shape.qk_norm * 2 * shape.num_layers * shape.head_dim


def _check(fields: dict[str, object], where: str) -> None:
    names = ("num_layers", "num_heads", "num_kv_heads", "dtype")
    num_layers, num_heads, num_kv_heads, dtype = (fields[name] for name in names)
    assert isinstance(num_layers, int) and isinstance(num_heads, int) and isinstance(num_kv_heads, int)
    if num_layers > MOST_LAYERS:
        raise ShapeError(f"{where}: {num_layers} layers are more than the {MOST_LAYERS} that a model may have.")
    if num_heads % num_kv_heads:
        raise ShapeError(f"{where}: {num_heads} heads must be a multiple of {num_kv_heads} key/value heads.")
    if dtype not in DTYPE_BYTES:
        raise ShapeError(f"{where}: dtype={dtype} is not supported; supported: {', '.join(DTYPE_BYTES)}.")


def _stored_dtype(file: Path, checkpoint: Checkpoint) -> str:
    """The dtype of the embedding, which every format leaves unquantised."""
    entry = checkpoint.tensors.get(EMBEDDING_NAME)
    if entry is None:
        raise ShapeError(f"{file} has no dtype and the weights have no {EMBEDDING_NAME} to take it from.")
    return SAFETENSORS_DTYPES.get(entry.dtype, entry.dtype)


def _linear_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the layers' linears as stored, with scales and zeros, without biases, norms and tables."""
    return sum(
        entry.num_bytes
        for name, entry in checkpoint.tensors.items()
        if (".self_attn." in name or ".mlp." in name) and not name.endswith((".bias", *TABLES)) and "_norm." not in name
    )


def _awkward_inputs(shape: ModelShape) -> str:
    """A linear whose number of inputs the format cannot be read with; empty: there is none."""
    if shape.scheme is None:
        return ""
    sizes = (shape.hidden_size, shape.num_heads * shape.head_dim, shape.intermediate_size)
    problems = [inputs_problem(shape.scheme, num_in) for num_in in sizes]
    return next((f"{problem}; such linears cannot be loaded." for problem in problems if problem), "")


def _not_loadable(checkpoint: Checkpoint) -> str:
    """What only the headers tell: weights that are not quantised after all, or a head that is too."""
    parts = [name for name in checkpoint.tensors if name.startswith("lm_head.") and name not in HEAD_NAMES]
    if parts:
        return f"{parts[0]} in the checkpoint: a quantised lm_head cannot be loaded."
    if not any(name.endswith(QUANTIZED_PARTS) for name in checkpoint.tensors):
        return "the checkpoint has no quantised tensor, whatever quantization_config says; remove it from config.json."
    return ""
