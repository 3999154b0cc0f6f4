"""A checkpoint's config.json in the terms of `launcher.models.shape`, in the spellings of transformers 4 and 5."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from parallel.formats.config import read_scheme
from parallel.formats.scheme import FormatError
from parallel.kernels.rotations import ROPE_TYPES

# What distinguishes the families: a fact, or the name of the config.json field that says it.
FAMILIES: dict[str, dict[str, bool | str]] = {
    "llama": {"qkv_bias": "attention_bias", "output_bias": "attention_bias", "mlp_bias": "mlp_bias", "qk_norm": False},
    "mistral": {"qkv_bias": False, "output_bias": False, "mlp_bias": False, "qk_norm": False},
    "qwen2": {"qkv_bias": True, "output_bias": False, "mlp_bias": False, "qk_norm": False},
    "qwen3": {"qkv_bias": "attention_bias", "output_bias": "attention_bias", "mlp_bias": False, "qk_norm": True},
}
SUPPORTED = tuple(FAMILIES)
# Sizes every config.json must give: our name -> theirs.
SIZES = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
}
# Two names for one function.
ACTIVATIONS = ("silu", "swish")
# Of the section about rotary embeddings: its numbers, and those that a rope_type cannot do without.
ROTATION_NUMBERS = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
NEEDED_FOR_ROTATION = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
# The defaults of transformers' config classes, for fields that a config.json may leave out.
DEFAULT_WINDOW = 4096
DEFAULT_MAX_WINDOW_LAYERS = 28
QWEN3_HEAD_DIM = 128


class ShapeError(ValueError):
    """A model whose shape cannot be used; the message names the file and field, or the fact."""


def read_model_config(file: Path) -> dict[str, Any]:
    """Fields of `ModelShape` that config.json decides; `dtype` is empty where it does not say.

    Raises:
        ShapeError: the file is missing or invalid, lacks a field, or its model_type is not in SUPPORTED.
    """
    config = _load(file)
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ShapeError(
            f"{file}: model_type={model_type!r} is not supported; supported: {', '.join(SUPPORTED)}. "
            "Set model.path to a model of these families."
        )
    _check_activation(file, config)
    _check_rotation(file, config)
    sizes = {name: _positive(file, config, field) for name, field in SIZES.items()}
    return {
        "model_type": model_type,
        **sizes,
        "num_kv_heads": _num_kv_heads(file, config),
        "head_dim": _head_dim(file, config),
        "tied_embeddings": bool(config.get("tie_word_embeddings", False)),
        **{name: _flag(config, flag) for name, flag in FAMILIES[model_type].items()},
        "sliding_window": _sliding_window(file, config),
        "dtype": _dtype(file, config),
        **_quantization(config),
    }


def _load(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ShapeError(f"{file} is missing. Set model.path to a folder with config.json and *.safetensors.")
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ShapeError(f"{file} is no valid JSON ({error}). Download it again.") from error
    if not isinstance(config, dict):
        raise ShapeError(f"{file} holds no JSON object. Download it again.")
    return config


def _check_activation(file: Path, config: dict[str, Any]) -> None:
    """Kernels know one; the default of every family is that."""
    name = config.get("hidden_act", ACTIVATIONS[0])
    if name not in ACTIVATIONS:
        raise ShapeError(
            f"{file}: hidden_act={name!r} is not supported; supported: {', '.join(ACTIVATIONS)}. "
            "Set model.path to a model with one of these."
        )


def _check_rotation(file: Path, config: dict[str, Any]) -> None:
    """The engine keeps one table of angles; the older name of the section is rope_scaling, of the field type."""
    _check_rotation_numbers(file, "", {"rope_theta": config.get("rope_theta")})
    for name in ("rope_parameters", "rope_scaling"):
        section = config.get(name)
        if section is None:
            continue
        if not isinstance(section, dict):
            raise ShapeError(f"{file}: {name}={section!r} must be an object.")
        kind = section.get("rope_type", section.get("type", ROPE_TYPES[0]))
        if kind not in ROPE_TYPES:
            raise ShapeError(
                f"{file}: {name}.rope_type={kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}. "
                "Set model.path to a model with one of these."
            )
        if lacking := [field for field in NEEDED_FOR_ROTATION.get(kind, ()) if section.get(field) is None]:
            raise ShapeError(
                f"{file}: {name} has no {', '.join(lacking)}, which rope_type={kind!r} needs. Take the config.json "
                "that belongs to the weights."
            )
        _check_rotation_numbers(file, f"{name}.", section)


def _check_rotation_numbers(file: Path, name: str, section: dict[str, Any]) -> None:
    """Angles are powers of these: a zero or a text would be found in the first pass only, as logits that are none."""
    for field in ROTATION_NUMBERS:
        value = section.get(field)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 < value < math.inf):
            raise ShapeError(
                f"{file}: {name}{field}={value!r} must be a number above 0. Take the config.json that belongs to the "
                "weights."
            )


def _positive(file: Path, config: dict[str, Any], field: str) -> int:
    if field not in config:
        raise ShapeError(f"{file} has no {field}. Take the config.json that belongs to the weights.")
    value = config[field]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ShapeError(f"{file}: {field}={value!r} must be a whole number above 0.")
    return value


def _flag(config: dict[str, Any], flag: bool | str) -> bool:
    return bool(config.get(flag, False)) if isinstance(flag, str) else flag


def _num_kv_heads(file: Path, config: dict[str, Any]) -> int:
    """Key/value heads; Llama 1 and 2 configs, and nulls, mean one for each query head."""
    field = "num_key_value_heads"
    omitted = field not in config and config["model_type"] == "llama"
    if omitted or config.get(field, 0) is None:
        return _positive(file, config, "num_attention_heads")
    return _positive(file, config, field)


def _head_dim(file: Path, config: dict[str, Any]) -> int:
    if config.get("head_dim") is not None:
        return _positive(file, config, "head_dim")
    if config["model_type"] == "qwen3":
        return QWEN3_HEAD_DIM
    hidden_size, num_heads = (_positive(file, config, field) for field in ("hidden_size", "num_attention_heads"))
    if hidden_size % num_heads:
        raise ShapeError(
            f"{file}: hidden_size={hidden_size} must be a multiple of num_attention_heads={num_heads} "
            "where head_dim is not given."
        )
    return hidden_size // num_heads


def _sliding_window(file: Path, config: dict[str, Any]) -> int | None:
    """The window of layers that do not attend to everything; null where it never cuts anything off."""
    if not _uses_window(config) or config.get("sliding_window", DEFAULT_WINDOW) is None:
        return None
    window = _positive(file, {"sliding_window": DEFAULT_WINDOW, **config}, "sliding_window")
    return window if window < _positive(file, config, "max_position_embeddings") else None


def _uses_window(config: dict[str, Any]) -> bool:
    if config["model_type"] == "mistral":
        return True
    if not config.get("use_sliding_window", False) or config["model_type"] == "llama":
        return False
    if config.get("layer_types") is not None:
        return "sliding_attention" in config["layer_types"]
    return bool(config.get("max_window_layers", DEFAULT_MAX_WINDOW_LAYERS) < config["num_hidden_layers"])


def _dtype(file: Path, config: dict[str, Any]) -> str:
    value = config.get("dtype", config.get("torch_dtype"))
    if value is not None and not isinstance(value, str):
        raise ShapeError(f"{file}: dtype={value!r} must be a name such as bfloat16.")
    return (value or "").removeprefix("torch.")


def _quantization(config: dict[str, Any]) -> dict[str, Any]:
    """The name of the weight format and how it stores weights, or why it cannot be loaded.

    Older compressed-tensors files spell the section compression_config.
    """
    section = config.get("quantization_config") or config.get("compression_config")
    method = section.get("quant_method") if isinstance(section, dict) else None
    name = str(method or "unknown") if section else "none"
    try:
        return {"quantization": name, "scheme": read_scheme(section), "not_loadable": ""}
    except FormatError as error:
        return {"quantization": name, "scheme": None, "not_loadable": str(error)}
