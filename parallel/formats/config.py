"""config.json's `quantization_config` as a `Scheme`; what cannot be loaded is refused here, before any rank starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from parallel.formats.scheme import FormatError, Scheme

Section = dict[str, Any]
SUPPORTED = (
    "bf16, fp16 and fp32; AWQ (4 bits, version gemm); GPTQ (4 or 8 bits, checkpoint_format gptq or gptq_v2); "
    "compressed-tensors (pack-quantized with 4 or 8 bits, int-quantized with 8, float-quantized with 8 and a scale per "
    "channel, tensor or block); FP8 with a scale per tensor or block; bitsandbytes (4 bits, NF4 in uint8)"
)


def read_scheme(section: Any) -> Scheme | None:
    """The scheme of config.json's quantization_config (compression_config in older files); None: not quantised.

    Raises:
        FormatError: a method or variant that cannot be loaded.
    """
    if not section:
        return None
    section = _object("quantization_config", section)
    return READERS[_choice("quant_method", section.get("quant_method"), READERS)](section)


def read_awq(section: Section) -> Scheme:
    # Newer files may say `format` instead.
    name = "version" if section.get("version") is not None else "format"
    _choice(name, str(section.get(name) or "gemm").lower(), ("gemm",))
    _choice("zero_point", section.get("zero_point", True), (True,))
    bits = _choice("bits", section.get("bits", section.get("w_bit")), (4,))
    return Scheme("awq", "awq", bits, _group_size(section, "q_group_size"), has_zeros=True)


def read_gptq(section: Section) -> Scheme:
    """`checkpoint_format` (`format` in newer files) says whether zeros are stored less one: in "gptq" they are.

    `dynamic` has settings by layer. Those it leaves out ("-:") are told by their tensors.
    """
    stored_as = _choice(
        "checkpoint_format", section.get("checkpoint_format", section.get("format", "gptq")), ("gptq", "gptq_v2")
    )
    _choice("is_marlin_format", section.get("is_marlin_format", False), (False,))
    dynamic = _object("quantization_config.dynamic", section.get("dynamic") or {})
    if own := {layers: settings for layers, settings in dynamic.items() if not layers.startswith("-:")}:
        raise FormatError(f"quantization_config.dynamic={own!r} (settings by layer) cannot be loaded.")
    return Scheme(
        "gptq",
        "gptq",
        bits=_choice("bits", section.get("bits"), (4, 8)),
        group_size=_group_size(section),
        has_zeros=not section.get("sym", True),
        # With one group for all inputs their order changes nothing.
        act_order=bool(section.get("desc_act", False)) and _group_size(section) is not None,
        zeros_less_one=stored_as == "gptq",
    )


def read_fp8(section: Section) -> Scheme:
    """FP8 with one scale a tensor, or a block; activations are quantised by some runtimes, and not here."""
    if section.get("weight_block_size") is None:
        return Scheme("fp8", "float-quantized", bits=8, group_size=None, is_float=True, per_tensor=True)
    block_outputs, block_inputs = _block("weight_block_size", section["weight_block_size"])
    return Scheme("fp8", "fp8-block", bits=8, group_size=block_inputs, is_float=True, block_outputs=block_outputs)


def read_bitsandbytes(section: Section) -> Scheme:
    """NF4. Blocks are of 64 weights, which the weights' own state confirms, and config.json does not say."""
    _choice("load_in_8bit", section.get("load_in_8bit", False), (False,))
    _choice("load_in_4bit", section.get("load_in_4bit", False), (True,))
    # What transformers takes where the field is missing is another type.
    _choice("bnb_4bit_quant_type", section.get("bnb_4bit_quant_type", "fp4"), ("nf4",))
    _choice("bnb_4bit_quant_storage", section.get("bnb_4bit_quant_storage") or "uint8", ("uint8",))
    nested = _choice("bnb_4bit_use_double_quant", section.get("bnb_4bit_use_double_quant", False), (True, False))
    return Scheme("bitsandbytes", "nf4", bits=4, group_size=64, has_codebook=True, nested_scales=nested)


def read_compressed_tensors(section: Section) -> Scheme:
    """All groups of layers must store their weights alike; how activations would be quantised does not matter."""
    for name in ("kv_cache_scheme", "transform_config"):
        _choice(name, section.get(name) or None, (None,))
    sparsity = _object("quantization_config.sparsity_config", section.get("sparsity_config") or {})
    _choice("sparsity_config.format", sparsity.get("format", "dense"), ("dense",))
    groups = section.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise FormatError("quantization_config has no config_groups. Download config.json again.")
    read = {name: _read_group(name, group, section.get("format")) for name, group in groups.items()}
    schemes = {name: scheme for name, scheme in read.items() if scheme is not None}
    if len(set(schemes.values())) != 1:
        ways = "; ".join(f"{name}: {_described(each)}" for name, each in schemes.items())
        raise FormatError(
            "quantization_config.config_groups stores weights in more ways than one, or in none "
            f"({ways or 'no group has weights'}); one is supported."
        )
    return next(iter(schemes.values()))


def _described(scheme: Scheme) -> str:
    scale = "a tensor" if scheme.per_tensor else f"{scheme.block_outputs} x {scheme.group_size or 'all'} weights"
    others = {"zeros": scheme.has_zeros, "act order": scheme.act_order}
    named = [name for name, is_there in others.items() if is_there]
    return ", ".join([scheme.layout, f"{scheme.bits} bits", f"a scale for {scale}", *named])


def _read_group(name: str, group: Any, layout: Any) -> Scheme | None:
    """None where weights are left as they are."""
    group = _object(name, group)
    weights = group.get("weights")
    return _read_weights(group.get("format") or layout, _object(f"{name}.weights", weights)) if weights else None


def _read_weights(layout: Any, weights: Section) -> Scheme:
    allowed = _choice("format", layout, LAYOUTS)
    kind, bits_allowed, strategies = LAYOUTS[allowed]
    _choice("weights.type", weights.get("type", "int"), (kind,))
    strategy = weights.get("strategy") or ("tensor" if _group_size(weights) is None else "group")
    group_size = _group_size(weights) if _choice("weights.strategy", strategy, strategies) == "group" else None
    block_outputs = 1
    if strategy == "block":
        block_outputs, group_size = _block("weights.block_structure", weights.get("block_structure"))
    order = weights.get("actorder")
    return Scheme(
        "compressed-tensors",
        allowed,
        bits=_choice("weights.num_bits", weights.get("num_bits", 8), bits_allowed),
        group_size=group_size,
        has_zeros=kind == "int" and not weights.get("symmetric", True),
        is_float=kind == "float",
        # "weight" and "static" sort while quantising and store everything in the old order.
        act_order=group_size is not None and _choice("weights.actorder", order, ORDERS) in (True, "group", "dynamic"),
        per_tensor=strategy == "tensor",
        block_outputs=block_outputs,
    )


READERS: dict[str, Callable[[Section], Scheme]] = {
    "awq": read_awq,
    "gptq": read_gptq,
    "compressed-tensors": read_compressed_tensors,
    "fp8": read_fp8,
    "bitsandbytes": read_bitsandbytes,
}
# What compressed-tensors may have in each format: type, bits, strategies.
LAYOUTS: dict[str, tuple[str, tuple[int, ...], tuple[str, ...]]] = {
    "pack-quantized": ("int", (4, 8), ("group", "channel")),
    "int-quantized": ("int", (8,), ("channel", "tensor")),
    "float-quantized": ("float", (8,), ("channel", "tensor", "block")),
}
ORDERS = (None, False, True, "group", "dynamic", "weight", "static")


def _object(name: str, value: Any) -> Section:
    if not isinstance(value, dict):
        raise FormatError(f"{name}={value!r} is no JSON object. Download config.json again.")
    return value


def _group_size(section: Section, other_name: str = "group_size") -> int | None:
    """Inputs that share a scale; -1 and null mean all of them."""
    value = section.get("group_size", section.get(other_name))
    if value is None or value == -1:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise FormatError(f"quantization_config.group_size={value!r} must be a whole number above 0, or -1.")
    return value


def _block(name: str, value: Any) -> tuple[int, int]:
    """Outputs and inputs that share a scale."""
    if not isinstance(value, list) or len(value) != 2 or not all(type(size) is int and size > 0 for size in value):
        raise FormatError(f"quantization_config.{name}={value!r} must be two whole numbers above 0.")
    return value[0], value[1]


def _choice(name: str, value: Any, allowed: Any) -> Any:
    # By value and type: True == 1, and a JSON true is no number of bits.
    if any(value == option and type(value) is type(option) for option in allowed):
        return value
    known = ", ".join(str(option) for option in allowed)
    raise FormatError(f"quantization_config.{name}={value!r} cannot be loaded (only {known}); supported: {SUPPORTED}.")
