"""Bytes of what lies between two attentions of a pass, and of the graphs that have it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from parallel.engine.limits import EngineLimits, graphed_rows
from parallel.footprint import may_dequantize, product_bytes
from parallel.formats.scheme import Scheme
from parallel.units import KIB, MIB

# Graphs themselves, outside of torch's allocator: 55 MiB measured for the decode step of one number of sequences as for
# six (Llama-70B, 1 to 32 sequences, on an H200 with torch 2.11).
GRAPHS_BYTES = 55 * MIB
# Of a layer's kernels in the graphs of one pass: 1.1 to 1.4 MiB on H200, of a 70B at TP2 and an 8B on one card, piece
# by piece, with some 120 kernels a layer where weights are dequantised block by block. Two sections that multiply by
# weights as they are have 52, and take less: all that is not torch's was 1,168 MiB after five such passes, of 512 and
# 1024 tokens, and 1,100 to 1,118 after one (results/asking_ahead_h200_202611.json).
PASS_GRAPH_BYTES = 1200 * 1024
# Of those a decode step has a tenth.
STEP_GRAPH_BYTES = PASS_GRAPH_BYTES // 10
# Of cuBLAS on a stream, which torch allocates (parseChosenWorkspaceSize): two times 4 MiB and eight times 16 KiB before
# sm_90; from there on so much, or by torch's version as little as before.
CUBLAS_BYTES = 32 * MIB
CUBLAS_BYTES_BEFORE_SM90 = 2 * 4 * MIB + 8 * 16 * KIB
# By so much torch makes memory larger that may grow (kLargeBuffer), of which up to as much is left at its end. Weights,
# cache and activations are in one such memory, graphs in another. As much may stay about what the load took besides,
# which goes back in whole pieces of this size.
GROWN_BYTES = 20 * MIB
# Ids, positions and slots of a pass.
NUM_TOKEN_COLUMNS = 3
INT64_BYTES = 8


@dataclass(frozen=True)
class Layer:
    """Numbers of a token's values in a layer of one rank, and how they are computed."""

    hidden: int
    queries: int
    keys: int
    intermediate: int
    element_bytes: int
    dtype: str
    device: str
    scheme: Scheme | None
    # As of parallel/footprint.py.
    fused_rows: int

    @property
    def qkv(self) -> int:
        return self.queries + 2 * self.keys

    def linear_steps(self, tokens: int) -> dict[str, int]:
        """Bytes of each step of so many tokens, beside the residual stream, its update and the norm of the sum."""
        e, hidden, queries, qkv = self.element_bytes, self.hidden, self.queries, self.qkv
        intermediate = self.intermediate
        return {
            "qkv": tokens * qkv * e + max(self.product(tokens, qkv * hidden), self.whole_weight(tokens, qkv * hidden)),
            "rotation": tokens * (qkv + queries) * e,
            "output": tokens * (queries + hidden) * e + self.product(tokens, queries * hidden),
            "gate_up": tokens * 2 * intermediate * e + self.product(tokens, 2 * intermediate * hidden),
            "activation": tokens * (3 if (self.device, self.dtype) == ("cuda", "bfloat16") else 4) * intermediate * e,
            "down": tokens * (intermediate + hidden) * e + self.product(tokens, intermediate * hidden),
        }

    def product(self, num_rows: int, numel: int) -> int:
        """Beside its operands, of a product of so many rows with a weight of so many elements."""
        if self.scheme is None:
            return 0
        sizes = (self.element_bytes, num_rows, numel, self.fused_rows)
        return product_bytes(self.scheme, self.device, self.dtype, *sizes)

    def whole_weight(self, num_rows: int, numel: int) -> int:
        """Of a weight that is dequantised all at once for so many rows; nothing where it is not."""
        return numel * self.element_bytes if self.may_dequantize(num_rows) else 0

    def may_dequantize(self, num_rows: int) -> bool:
        """Whether weights are, or may be, dequantised for a pass of so many rows."""
        if self.scheme is None:
            return False
        return may_dequantize(self.scheme, self.device, self.dtype, num_rows, self.fused_rows)


def cublas_bytes(capabilities: Iterable[tuple[int, int] | None]) -> int:
    """What cuBLAS takes on a stream, at most, of cards with these compute capabilities (None: unknown)."""
    is_before = all(each is not None and each < (9, 0) for each in capabilities)
    return CUBLAS_BYTES_BEFORE_SM90 if is_before else CUBLAS_BYTES


def graphs_bytes(layer: Layer, num_layers: int, prefill_chunk: int, captured_passes: int, step: int) -> int:
    """Of decode steps, and of passes of prompts: what their pieces hand to one another, the largest piece, and graphs;
    beside what cuBLAS takes.

    Written for pieces.py and fresh.py of parallel/engine/prefill; steps and passes of all sizes share memory.

    Args:
        captured_passes: at a time, as of EngineLimits.
        step: what the largest decode step takes, see step_bytes.
    """
    tokens = max(graphed_rows(prefill_chunk), default=0) if captured_passes else 0
    kept = tokens * ((layer.hidden + 2 * layer.queries) * layer.element_bytes + NUM_TOKEN_COLUMNS * INT64_BYTES)
    piece = 3 * tokens * layer.hidden * layer.element_bytes + max(layer.linear_steps(tokens).values())
    shared = max(piece if tokens else 0, step) + GROWN_BYTES
    return GRAPHS_BYTES + kept + shared + (captured_passes * num_layers * PASS_GRAPH_BYTES if tokens else 0)


def step_bytes(layer: Layer, num_rows: int, logits_bytes: int) -> int:
    """Of a decode step of so many rows, or their draws: residual stream, update and norm, and the largest step."""
    largest = max(*layer.linear_steps(num_rows).values(), logits_bytes)
    return 3 * num_rows * layer.hidden * layer.element_bytes + largest


def draft_graphs_bytes(layer: Layer, num_rows: int, num_layers: int, logits_bytes: int) -> int:
    """Of a draft model, whose passes are captured where those that check its drafts are not: graphs, and the largest
    step of a pass of so many rows, which has memory of its own.

    Args:
        num_layers: in all graphs, each as often as it is passed through.
    """
    hidden, intermediate = layer.hidden, layer.intermediate
    activated = 3 * num_rows * intermediate * layer.element_bytes + layer.product(num_rows, 2 * intermediate * hidden)
    held = 3 * num_rows * hidden * layer.element_bytes + max(activated, logits_bytes)
    return max(GRAPHS_BYTES, num_layers * STEP_GRAPH_BYTES) + held


def prompt_keys_bytes(layer: Layer, head_dim: int, kv_bytes: int, num_rows: int, limits: EngineLimits) -> int:
    """What so many tokens of prompts attend to: keys and values of some parts at a time, and where those of all are;
    plain torch has masks too, of booleans and of numbers.

    Written for parallel/engine/prefill/part_attention.py. `kv_bytes`: of a number in the cache; other numbers are
    converted.
    """
    e, max_context = layer.element_bytes, limits.max_context
    converted = kv_bytes if kv_bytes != e else 0
    gathered = limits.gathered_keys * layer.keys * (2 * e + converted)
    places = min(limits.batch_size, num_rows) * max_context * (layer.keys // head_dim) * INT64_BYTES
    tokens = min(num_rows, max_context)
    mask = tokens * max_context * (1 + e) if layer.device == "cpu" and tokens < max_context else 0
    return gathered + places + mask
