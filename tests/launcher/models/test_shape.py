import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers import PretrainedConfig as Config

from launcher.config import ModelFacts
from launcher.models.config_json import SUPPORTED, ShapeError
from launcher.models.shape import (
    DTYPE_BYTES,
    ModelShape,
    part_bytes,
    shape_from_checkpoint,
    shape_from_facts,
)
from parallel.kernels.fused import rotary_tables
from parallel.kernels.rotations import ROPE_TYPES
from parallel.partition import choose_grain, split_by_grain
from tests.launcher.config.test_config import composed

# Eight heads over four key/value heads: uneven over three ranks.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 208,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
    "dtype": "bfloat16",
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama biased": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama wide heads": LlamaConfig(**SIZES, head_dim=24),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "qwen3 biased": Qwen3Config(**SIZES, head_dim=16, attention_bias=True),
}
FACTS = ModelFacts(
    hidden_size=64,
    intermediate_size=208,
    num_layers=3,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    vocab_size=1000,
    max_positions=512,
)


def saved(folder: Path, config: Config) -> Path:
    """The folder with the config.json that transformers writes."""
    config.save_pretrained(folder)
    return folder


def written(folder: Path, config: Config = CONFIGS["llama"], **changes: Any) -> Path:
    """Its config.json with fields changed, or left out where the value is ...; `folder`."""
    saved(folder, config)
    fields = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: v for name, v in fields.items() if v is not ...}))
    return folder


def refused(folder: Path, *parts: str | Path) -> None:
    with pytest.raises(ShapeError) as caught:
        shape_from_checkpoint(folder)
    assert all(str(part) in str(caught.value) for part in parts), caught.value


def replicated_bytes(shape: ModelShape, parts: dict[str, int], element_bytes: int) -> int:
    """Norms and row-parallel biases, which every rank holds whole."""
    num_row_biases = (shape.output_bias + shape.mlp_bias) * shape.num_layers * shape.hidden_size
    return parts["norms"] + num_row_biases * element_bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_parts_over_all_ranks_add_up_to_transformers_model(
    tmp_path: Path, name: str, tied: bool, world_size: int, dtype: str
) -> None:
    CONFIGS[name].save_pretrained(tmp_path)
    folder = written(tmp_path, CONFIGS[name], tie_word_embeddings=tied)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    shape, element_bytes = shape_from_checkpoint(folder), DTYPE_BYTES[dtype]
    grain = choose_grain((shape.intermediate_size, shape.vocab_size), world_size)
    parts = part_bytes(shape, world_size, grain, dtype)
    once = replicated_bytes(shape, parts[0], element_bytes)
    assert len(parts) == world_size
    assert sum(sum(rank.values()) for rank in parts) - (world_size - 1) * once == model.num_parameters() * element_bytes


def test_parts_of_one_rank_are_those_of_transformers_model(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS["qwen2"])
    (parts,) = part_bytes(shape_from_checkpoint(saved(tmp_path, CONFIGS["qwen2"])), 1, 128, "bfloat16")
    names = {"embedding": "embed_tokens", "head": "lm_head", "attention": "self_attn", "mlp": "mlp", "norms": "norm"}
    for part, name in names.items():
        assert parts[part] == 2 * sum(p.numel() for key, p in model.named_parameters() if name in key), part


def test_uneven_heads_make_uneven_attention() -> None:
    first, second, third = part_bytes(shape_from_facts(FACTS), 3, 16, "bfloat16")
    assert first["attention"] == 2 * second["attention"] == 2 * third["attention"]


@pytest.mark.parametrize("name", CONFIGS)
def test_shape_has_what_transformers_config_has(tmp_path: Path, name: str) -> None:
    config = CONFIGS[name]
    shape = shape_from_checkpoint(saved(tmp_path, config))
    assert (shape.model_type, shape.source) == (config.model_type, "checkpoint")
    assert (shape.hidden_size, shape.num_layers, shape.num_heads, shape.num_kv_heads) == (64, 3, 8, 4)
    assert shape.head_dim == (getattr(config, "head_dim", None) or 8)
    assert (shape.dtype, shape.quantization, shape.linear_bits) == ("bfloat16", "none", 16.0)
    assert shape.qk_norm == name.startswith("qwen3")
    assert shape.qkv_bias == (name == "qwen2" or "biased" in name)
    assert shape.sliding_window is None


@pytest.mark.parametrize("changes", [{"dtype": ..., "torch_dtype": "float16"}, {"dtype": "torch.float16"}])
def test_dtype_is_read_in_both_spellings(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert shape_from_checkpoint(written(tmp_path, **changes)).dtype == "float16"


def test_dtype_comes_from_the_weights_where_config_is_silent(tmp_path: Path) -> None:
    save_file({"model.embed_tokens.weight": torch.ones(2, 2).half()}, tmp_path / "model.safetensors")
    assert shape_from_checkpoint(written(tmp_path, dtype=...)).dtype == "float16"


def test_dtype_that_nothing_tells_is_refused(tmp_path: Path) -> None:
    save_file({"other": torch.ones(2)}, tmp_path / "model.safetensors")
    refused(written(tmp_path, dtype=...), "config.json", "dtype", "model.embed_tokens.weight")


def test_llama_1_config_has_as_many_kv_heads_as_heads(tmp_path: Path) -> None:
    shape = shape_from_checkpoint(written(tmp_path, num_key_value_heads=..., head_dim=...))
    assert (shape.num_kv_heads, shape.head_dim) == (8, 8)


def test_qwen3_without_head_dim_has_transformers_default(tmp_path: Path) -> None:
    assert shape_from_checkpoint(written(tmp_path, CONFIGS["qwen3"], head_dim=...)).head_dim == Qwen3Config().head_dim


@pytest.mark.parametrize(
    ("config", "changes", "window"),
    [
        ("mistral", {"sliding_window": 256}, 256),
        ("mistral", {"sliding_window": 512}, None),
        ("mistral", {"sliding_window": ..., "max_position_embeddings": 8192}, 4096),
        ("qwen2", {"sliding_window": 256, "use_sliding_window": False}, None),
        ("qwen2", {"sliding_window": 256, "use_sliding_window": True, "layer_types": ..., "max_window_layers": 2}, 256),
        (
            "qwen2",
            {"sliding_window": 256, "use_sliding_window": True, "layer_types": ..., "max_window_layers": 3},
            None,
        ),
        ("qwen3", {"sliding_window": 256, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 3}, 256),
        ("qwen3", {"sliding_window": 256, "use_sliding_window": True, "layer_types": ["full_attention"] * 3}, None),
        ("llama", {"sliding_window": 256}, None),
    ],
)
def test_sliding_window_is_recorded_where_it_cuts(
    tmp_path: Path, config: str, changes: dict[str, Any], window: int | None
) -> None:
    assert shape_from_checkpoint(written(tmp_path, CONFIGS[config], **changes)).sliding_window == window


def test_other_model_types_are_refused_with_the_supported_ones(tmp_path: Path) -> None:
    refused(written(tmp_path, model_type="gpt2"), "config.json", "model_type='gpt2'", ", ".join(SUPPORTED))


def test_missing_config_is_named(tmp_path: Path) -> None:
    refused(tmp_path, tmp_path / "config.json", "missing")


@pytest.mark.parametrize("text", ["", "{", "[]", "\udcff"])
def test_invalid_config_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    refused(tmp_path, tmp_path / "config.json")


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"])
def test_missing_field_is_named(tmp_path: Path, field: str) -> None:
    refused(written(tmp_path, **{field: ...}), tmp_path / "config.json", field)


@pytest.mark.parametrize("value", [0, -4, "8", 1.5, None, True, []])
def test_field_that_is_no_size_is_named_with_its_value(tmp_path: Path, value: object) -> None:
    refused(written(tmp_path, intermediate_size=value), "config.json", f"intermediate_size={value!r}")


@pytest.mark.parametrize("value", ["gelu", "gelu_pytorch_tanh", None, ["silu"]])
def test_an_activation_that_no_kernel_computes_is_refused_by_name(tmp_path: Path, value: object) -> None:
    refused(written(tmp_path, hidden_act=value), tmp_path / "config.json", f"hidden_act={value!r}", "silu, swish")


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope_parameters.rope_type='dynamic'"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_scaling.rope_type='longrope'"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn' must be an object"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_parameters.rope_theta=0 must be a number above 0"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor='2' must be a number above 0"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling has no factor, which rope_type='linear' needs"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": None}},
            "rope_parameters has no low_freq_factor, high_freq_factor, which rope_type='llama3' needs",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": "1", "high_freq_factor": 4}},
            "rope_parameters.low_freq_factor='1' must be a number above 0",
        ),
        ({"rope_theta": "1e4"}, "rope_theta='1e4' must be a number above 0"),
    ],
)
def test_rotation_without_one_table_is_refused_before_weights_load(
    tmp_path: Path, section: dict[str, Any], words: str
) -> None:
    refused(written(tmp_path, **section), tmp_path / "config.json", words)


@pytest.mark.parametrize("kind", ROPE_TYPES)
def test_rotations_that_have_a_table_are_those_that_the_engine_takes(tmp_path: Path, kind: str) -> None:
    rotation = {"type": kind, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert shape_from_checkpoint(written(tmp_path, rope_scaling=rotation)).intermediate_size == 208
    rotary: Any = SimpleNamespace(rope_type=kind, attention_scaling=1.0, get_buffer=lambda name: torch.ones(4))
    rotary_tables(rotary, 8)


@pytest.mark.parametrize("value", ["silu", "swish", ...])
def test_both_names_of_the_activation_are_taken_and_it_is_the_default(tmp_path: Path, value: object) -> None:
    assert shape_from_checkpoint(written(tmp_path, hidden_act=value)).intermediate_size == 208


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"num_key_value_heads": 3}, "8 heads must be a multiple of 3"),
        ({"dtype": "float64"}, "dtype=float64 is not supported; supported: float32, bfloat16, float16"),
        ({"dtype": 16}, "dtype=16"),
        ({"hidden_size": 60, "head_dim": None}, "hidden_size=60 must be a multiple of num_attention_heads=8"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    refused(written(tmp_path, **changes), "config.json", part)


def awq_linear(num_in: int, num_out: int, group: int = 16) -> dict[str, torch.Tensor]:
    """The tensors of AWQ: weights and zeros of 4 bits, 16-bit scales."""
    return {
        "qweight": torch.zeros(num_in, num_out // 8, dtype=torch.int32),
        "qzeros": torch.zeros(num_in // group, num_out // 8, dtype=torch.int32),
        "scales": torch.zeros(num_in // group, num_out, dtype=torch.float16),
    }


def test_bits_of_quantised_linears_are_counted_in_the_checkpoint(tmp_path: Path) -> None:
    linears = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (64, 32), "self_attn.v_proj": (64, 32)}
    linears |= {"self_attn.o_proj": (64, 64), "mlp.gate_proj": (64, 208), "mlp.up_proj": (64, 208)}
    linears |= {"mlp.down_proj": (208, 64)}
    weights = {
        f"model.layers.{layer}.{name}.{part}": tensor
        for layer in range(3)
        for name, (num_in, num_out) in linears.items()
        for part, tensor in awq_linear(num_in, num_out).items()
    }
    others = {
        "model.embed_tokens.weight": torch.zeros(1000, 64),
        "model.layers.0.self_attn.q_norm.weight": torch.ones(8),
    }
    save_file(weights | others, tmp_path / "model.safetensors")
    shape = shape_from_checkpoint(written(tmp_path, quantization_config={"quant_method": "awq", "bits": 4}))
    assert (shape.quantization, shape.linear_bits) == ("awq", 4 + (16 + 4) / 16)
    (parts,) = part_bytes(shape, 1, 16, "bfloat16")
    assert parts["attention"] + parts["mlp"] == sum(tensor.nbytes for tensor in weights.values())


def test_older_spelling_of_compressed_tensors_is_recognised(tmp_path: Path) -> None:
    save_file({"model.layers.0.mlp.up_proj.weight_packed": torch.zeros(4)}, tmp_path / "model.safetensors")
    section = {"quant_method": "compressed-tensors"}
    assert shape_from_checkpoint(written(tmp_path, compression_config=section)).quantization == "compressed-tensors"


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def test_nf4_blocks_that_run_from_row_to_row_are_not_loadable(tmp_path: Path) -> None:
    save_file({"model.layers.0.mlp.up_proj.weight.absmax": torch.zeros(4)}, tmp_path / "model.safetensors")
    shape = shape_from_checkpoint(written(tmp_path, quantization_config=NF4))
    assert "blocks of 64 weights run on from one row of 208 inputs" in shape.not_loadable
    shape = shape_from_checkpoint(written(tmp_path, quantization_config=NF4, intermediate_size=256))
    assert (shape.not_loadable, shape.quantization) == ("", "bitsandbytes")


@pytest.mark.parametrize(("linear_bits", "words"), [(4.127, ""), (8.0, "in more than 4 bits; supported: ")])
def test_facts_of_bitsandbytes_are_nf4(linear_bits: float, words: str) -> None:
    shape = shape_from_facts(replace(FACTS, quantization="bitsandbytes", linear_bits=linear_bits))
    assert shape.not_loadable.startswith(words) and bool(shape.not_loadable) == bool(words)
    assert (shape.scheme is None) == bool(words)


def test_facts_make_a_shape() -> None:
    shape = shape_from_facts(replace(FACTS, quantization="gptq", linear_bits=4.15625, qkv_bias=True))
    assert asdict(shape).items() >= {"hidden_size": 64, "qkv_bias": True, "quantization": "gptq"}.items()
    assert (shape.source, shape.qk_norm, shape.sliding_window, shape.linear_bits) == ("facts", False, None, 4.15625)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"hidden_size": 0}, "model.shape.hidden_size=0 must be at least 1"),
        ({"num_layers": 10**9}, "model.shape: 1000000000 layers are more than the 1000 "),
        ({"num_kv_heads": 3}, "8 heads must be a multiple of 3"),
        ({"dtype": "int8"}, "dtype=int8 is not supported"),
        ({"linear_bits": 0.0}, "model.shape.linear_bits=0.0"),
    ],
)
def test_facts_that_cannot_be_are_refused(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(ShapeError, match=part):
        shape_from_facts(replace(FACTS, **changes))


def test_shape_survives_json() -> None:
    adapter, shape = TypeAdapter(ModelShape), shape_from_facts(FACTS)
    assert adapter.validate_json(adapter.dump_json(shape)) == shape


def test_qwen_in_awq_has_the_bytes_of_its_files() -> None:
    """All but the head, which is in a file of its own: ten of 3.46 to 3.99 GB."""
    facts = composed("model=qwen2_5_72b_awq").model.shape
    assert facts is not None
    (parts,) = part_bytes(shape_from_facts(facts), 1, 128, "bfloat16")
    assert sum(parts.values()) - parts["head"] == pytest.approx(39.08e9, rel=1e-3)
    assert len(set(split_by_grain(facts.intermediate_size, 4, 128))) == 1
