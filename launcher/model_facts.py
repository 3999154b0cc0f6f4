"""What conf/model_shape says of a model."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING


@dataclass
class ModelFacts:
    """Shape of a dense decoder, for planning before its checkpoint is on this machine."""

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
