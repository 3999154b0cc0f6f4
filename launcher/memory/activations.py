"""Bytes of activations: what a pass of prefill or a step takes at its peak, beside weights and cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from launcher.memory.layer import GROWN_BYTES, prompt_keys_bytes
from launcher.models.shape import DTYPE_BYTES
from parallel.engine.limits import SAMPLED_ROWS
from parallel.engine.prefill.section_sizes import MIN_HALVED_ROWS, SECTIONS, choose_sections, most_at_once
from parallel.kernels.limits import HEAD_DIMS, MAX_GROUP
from parallel.partition import split_by_grain

if TYPE_CHECKING:
    from launcher.memory.demand import Demand

# Sampling works on float32 logits: noise, the logits, their sorted copy with int64 positions, probabilities and their
# sums, and what is left out (tests/launcher/memory/test_activations.py).
SAMPLING_BYTES_PER_LOGIT = 4 + 4 + 4 + 8 + 4 + 4 + 2
# Of what plain torch norms or rotates, at most; where it is not in float32, that too.
PLAIN_TORCH_COPIES = 2
FLOAT32_BYTES = 4
# Of the size of a norm's result, between tensors of a pass that a card takes whole: too small for what an MLP takes at
# once. By the rules of torch's allocator 2048 rows of a 70B leave 8 to 72 MiB so, by where keys and values find room;
# with what GROWN_BYTES is for, an H200 took 78 to 97 MiB beside tensors, and 18 to 44 with 512 rows.
NUM_GAPS = 2
# Rows of passes that are not cut into sections, at most: at all, and where weights are dequantised.
MOST_WHOLE = (SECTIONS[0][0], MIN_HALVED_ROWS - 1)
# Of a row and a token, in plain torch: which nodes it sees and which not, as booleans.
TREE_MASK_BYTES = 4


def activations_bytes(demand: Demand, rank: int, max_context: int) -> int:
    """Peak while a pass of prefill goes through a layer: what lives throughout, and the largest step.

    Written for decoder.py, prefill/overlap.py and prefill/halves.py of parallel/engine; e is the size of an element
    in bytes. On a card norms, rotation and activation in bf16 write nothing but their results; plain torch needs
    copies, in float32 but for the activation's.
    """
    e, shape = DTYPE_BYTES[demand.dtype], demand.shape
    prompt = min(demand.prefill_chunk, demand.batch_size * max_context)
    rows = demand.batch_size * demand.rows_per_sequence
    layer = demand.layer(rank)
    # Where a trial decides: a kernel that multiplies packed weights by so many rows takes less than this.
    dequantizes = layer.may_dequantize(prompt)
    hides_sums = demand.world_size > 1 and demand.hides_sums
    sections = choose_sections(prompt, hides_sums, layer.may_dequantize)
    largest = most_at_once(prompt, hides_sums, layer.may_dequantize)
    # Multiplied at a time. A step that checks drafts may have more rows than a pass of prompts.
    tokens = max(prompt if dequantizes else largest, rows)
    hidden, queries, keys, qkv = layer.hidden, layer.queries, layer.keys, layer.qkv
    on_cpu = demand.device == "cpu"
    normed = largest if len(sections) > 1 else tokens
    in_plain_torch = on_cpu or demand.dtype != "bfloat16"
    plain = (PLAIN_TORCH_COPIES + (e < FLOAT32_BYTES)) * FLOAT32_BYTES * normed if in_plain_torch else 0
    heads = demand.local(shape.num_heads)[rank]
    steps = layer.linear_steps(tokens) | {
        "norm": plain * hidden,
        "rotation": tokens * (qkv + queries) * e + plain * queries,
        # Queries, their outputs apart and together.
        "attention": 3 * tokens * queries * e + attended_bytes(demand, rank, largest, max_context),
        "logits": logits_bytes(demand, rank, rows),
        "decode": 0 if has_step_kernel(demand) else plain_decode_bytes(demand, max_context, heads, keys),
    }
    if dequantizes and len(sections) > 1:
        # Attention of the second half: beside its own, q, k, v and outputs of the first, and both weights.
        weights = layer.whole_weight(prompt, qkv * hidden) + layer.product(tokens, queries * hidden)
        kept = largest * (2 * qkv + 4 * queries) * e
        steps["attention"] = kept + attended_bytes(demand, rank, largest, max_context) + weights
    num_gaps = 0 if on_cpu or len(sections) > 1 else NUM_GAPS
    # The residual stream, the update that is added to it, and the norm of the sum.
    peak = (2 * max(prompt, tokens) + (1 + num_gaps) * tokens) * hidden * e + max(steps.values())
    # Smaller passes may be whole.
    smaller = [replace(demand, prefill_chunk=most) for most in MOST_WHOLE if most < prompt and len(sections) > 1]
    return max([peak, *(activations_bytes(each, rank, max_context) for each in smaller)])


def between_layers_bytes(demand: Demand, max_context: int) -> int:
    """The residual stream and its update, all that there is of a pass while the next layer comes."""
    prompt = min(demand.prefill_chunk, demand.batch_size * max_context)
    tokens = max(prompt, demand.batch_size * demand.rows_per_sequence)
    return 2 * tokens * demand.shape.hidden_size * DTYPE_BYTES[demand.dtype]


def lasting_bytes(models: Sequence[Demand], max_context: int) -> int:
    """What stays on a card besides, whatever a pass does: tables of rotations of each model, memory of cuBLAS, and what
    torch has taken beyond what it needs."""
    if models[0].device == "cpu":
        return 0
    tables = sum(max_context * each.shape.head_dim * FLOAT32_BYTES for each in models)
    # Where the load ended, and where all ends.
    return tables + models[0].cublas_bytes + 2 * GROWN_BYTES


def attended_bytes(demand: Demand, rank: int, num_rows: int, max_context: int) -> int:
    """Keys and values that so many tokens of prompts attend to, gathered from their pages."""
    limits = demand.limits(max_context)
    return prompt_keys_bytes(demand.layer(rank), demand.shape.head_dim, demand.kv_element_bytes, num_rows, limits)


def logits_bytes(demand: Demand, rank: int, rows: int) -> int:
    """Of last tokens alone, or of what a step checks: this rank's part, and that in float32 where the likeliest is
    looked for, or some rows at a time gathered from all ranks, joined, sampled."""
    e, vocab_size = DTYPE_BYTES[demand.dtype], demand.shape.vocab_size
    local = rows * split_by_grain(vocab_size, demand.world_size, demand.grain)[rank]
    if not demand.is_sampled:
        return local * (e + (FLOAT32_BYTES if e < FLOAT32_BYTES else 0))
    return local * e + min(rows, SAMPLED_ROWS) * vocab_size * (2 * e + SAMPLING_BYTES_PER_LOGIT)


def has_step_kernel(demand: Demand) -> bool:
    """Whether a card attends in steps by a kernel, as paged_attention.find_refusal says, not in plain torch."""
    shape = demand.shape
    takes_heads = shape.head_dim in HEAD_DIMS and shape.num_heads // shape.num_kv_heads <= MAX_GROUP
    return demand.device != "cpu" and demand.dtype != "float32" and takes_heads


def plain_decode_bytes(demand: Demand, max_context: int, heads: int, keys: int) -> int:
    """Attention of a step in plain torch: keys or values of all sequences as they lie in pages, in float32, and
    without what is absent; of every row scores, and their softmax, and what it sees of a tree."""
    per_row = 2 * heads * FLOAT32_BYTES + (TREE_MASK_BYTES if demand.rows_per_sequence > 1 else 0)
    per_token = keys * (DTYPE_BYTES[demand.dtype] + 2 * FLOAT32_BYTES) + demand.rows_per_sequence * per_row
    return demand.batch_size * (max_context + demand.num_ahead) * per_token
