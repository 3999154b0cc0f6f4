"""Bytes that a run takes on each rank, line by line, predicted from the shape of the model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from launcher.config import KVDType
from launcher.memory.kv import kv_lines
from launcher.memory.layer import Layer, draft_graphs_bytes, graphs_bytes, prompt_keys_bytes
from launcher.memory.process import process_lines
from launcher.memory.streamed import linear_load, streamed_lines
from launcher.memory.weights import held_linear_bits
from launcher.models.shape import DTYPE_BYTES, ModelShape, part_bytes
from parallel.engine.limits import SAMPLED_ROWS, EngineLimits, choose_sections, graph_sizes
from parallel.kernels.footprint import (
    DEQUANTIZED_AT_A_TIME,
    HOST_INT4_PRODUCT_BYTES,
    held_bits,
    host_int4_bits,
    host_refusal,
)
from parallel.offload.spread import NUM_STAGED
from parallel.partition import choose_grain, split_by_grain, split_by_heads

# Sampling works on float32 logits: noise, the logits, their sorted copy with int64 positions, probabilities and their
# sums, and what is left out (tests/launcher/memory/test_activations.py).
SAMPLING_BYTES_PER_LOGIT = 4 + 4 + 4 + 8 + 4 + 4 + 2
# Of what plain torch norms or rotates, at most; where it is not in float32, that too.
PLAIN_TORCH_COPIES = 2
FLOAT32_BYTES = 4
# Of a row and a token, in plain torch: which nodes it sees and which not, as booleans.
TREE_MASK_BYTES = 4
FP8_BYTES = 1
# Of a token in the table from which drafts are made.
TOKEN_BYTES = 4


@dataclass(frozen=True)
class Demand:
    """What the bytes depend on, apart from the length of the context."""

    shape: ModelShape
    world_size: int
    grain: int
    dtype: str
    # As engine.kv_dtype: auto or fp8.
    kv_dtype: str
    device: str
    # A key of memory_process.COMMUNICATOR_BYTES.
    transport: str
    batch_size: int
    prefill_chunk: int
    # In a decode step: the newest token and the drafts. Then those of a pass of the draft model, of one in which it
    # drafts, how many these are for all trees, and slots in the cache beyond a sequence's tokens.
    rows_per_sequence: int = 1
    draft_rows: int = 1
    drafting_rows: int = 1
    drafting_passes: int = 0
    num_ahead: int = 0
    # Whether small passes of prompts are graphs, as steps are.
    captures_passes: bool = False
    # Whether tokens are drawn; the likeliest take less memory to find.
    is_sampled: bool = True
    # Of the model that guesses, where one does.
    draft_shape: ModelShape | None = None
    # Layers that do not lie on the card and come there in every pass, from host memory; and of them, from the disk.
    num_streamed: int = 0
    num_on_disk: int = 0
    # Whether the host may compute some of these itself, if it can.
    may_share: bool = False
    # Whether keys and values of those in host memory lie there too.
    kv_on_host: bool = False

    @property
    def host_computes(self) -> bool:
        """Whether linears are such that the host may come to compute some layers."""
        scheme = self.shape.scheme
        if not self.may_share or self.num_streamed <= self.num_disk or scheme is None or self.device != "cuda":
            return False
        return host_refusal(scheme, self.dtype) is None

    @property
    def num_disk(self) -> int:
        return min(self.num_on_disk, self.num_streamed)

    @property
    def num_kv_hosted(self) -> int:
        """Layers whose keys and values lie in host memory."""
        return self.num_streamed - self.num_disk if self.kv_on_host else 0

    @property
    def draft(self) -> Demand | None:
        """What its model takes, of the same ranks and sequences."""
        if self.draft_shape is None:
            return None
        sizes = (self.draft_shape.intermediate_size, self.draft_shape.vocab_size)
        grain = choose_grain(sizes, self.world_size)
        rows = self.draft_rows
        return replace(
            self, shape=self.draft_shape, draft_shape=None, grain=grain, num_streamed=0, rows_per_sequence=rows
        )

    def fixed_lines(self) -> tuple[dict[str, int], ...]:
        """Lines that the context does not change: context, communicator, weights.* and what is streamed; one dict per
        rank."""
        parts = self._part_bytes(self.shape.num_layers - self.num_streamed)
        if self.num_streamed:
            parts = tuple(part | {"embedding": part["embedding"] - self.host_embedding_bytes(part)} for part in parts)
        base = process_lines(self.device, self.transport, self.world_size)
        return tuple(
            base | {f"weights.{name}": size for name, size in part.items()} | streamed | self._draft_weights(rank)
            for rank, (part, streamed) in enumerate(zip(parts, streamed_lines(self), strict=True))
        )

    def sharing(self, layer_bytes: int) -> dict[str, int]:
        """What layers that are packed for the host take beyond others when they are streamed: in the buffers, and to be
        dequantised."""
        scheme = self.shape.scheme
        if not self.host_computes or scheme is None:
            return {}
        held = held_bits(scheme, self.device, self.dtype, self.shape.hidden_size)
        wider = max(0.0, host_int4_bits(scheme, self.shape.hidden_size) / held - 1)
        rows = max(self.prefill_chunk, self.batch_size * self.rows_per_sequence)
        own = self._layer(0).product(rows, DEQUANTIZED_AT_A_TIME)
        dequantizing = max(0, HOST_INT4_PRODUCT_BYTES - own)
        return {"sharing": math.ceil(NUM_STAGED * layer_bytes * wider) + dequantizing}

    def host_bytes(self) -> tuple[int, ...]:
        """Weights in host memory, of each rank: streamed layers, and the embedding, of which a pass reads few rows."""
        parts = self._part_bytes(self.shape.num_layers)
        return tuple(
            (self.num_streamed - self.num_disk) * size + self.host_embedding_bytes(part)
            for size, part in zip(self.layer_bytes(), parts, strict=True)
        )

    def host_embedding_bytes(self, part: dict[str, int]) -> int:
        """Of a rank's embedding: all of it, unless it is the head too."""
        return 0 if self.shape.tied_embeddings else part["embedding"]

    def layer_bytes(self) -> tuple[int, ...]:
        """Weights of one decoder layer on each rank."""
        with_one, without = (self._part_bytes(num) for num in (1, 0))
        return tuple(sum(a.values()) - sum(b.values()) for a, b in zip(with_one, without, strict=True))

    def _part_bytes(self, num_layers: int) -> tuple[dict[str, int], ...]:
        shape = replace(self.shape, num_layers=num_layers)
        return part_bytes(shape, self.world_size, self.grain, self.dtype, linear_bits=self._held_bits())

    def _draft_weights(self, rank: int) -> dict[str, int]:
        draft = self.draft
        if draft is None:
            return {}
        lines = draft.fixed_lines()[rank]
        return {"draft.weights": sum(size for name, size in lines.items() if name.startswith("weights."))}

    def lines(self, max_context: int) -> tuple[dict[str, int], ...]:
        """All lines for sequences of up to `max_context` tokens: the fixed ones, those of drafts, of keys and values,
        activations, graphs and load.

        Cache and activations come after the load, in whose place they are; what it takes beyond them is its own line.
        """
        return tuple(
            fixed | self._speculation(rank, max_context) | self._varying(rank, max_context)
            for rank, fixed in enumerate(self.fixed_lines())
        )

    def _speculation(self, rank: int, max_context: int) -> dict[str, int]:
        """What drafts take beside the weights of their model: its cache, and all tokens of all sequences."""
        cache = {} if self.draft is None else {"draft.kv_cache": kv_lines(self.draft, rank, max_context)["kv_cache"]}
        tokens = self.batch_size * (max_context + 1) * TOKEN_BYTES
        return cache | ({"draft.tokens": tokens} if self.rows_per_sequence > 1 else {})

    def _varying(self, rank: int, max_context: int) -> dict[str, int]:
        models = [each for each in (self, self.draft) if each is not None]
        cache = kv_lines(self, rank, max_context)
        activations = max(each._activations(rank, max_context) for each in models)
        load = max(0, max(each._load(rank) for each in models) - sum(cache.values()) - activations)
        return cache | {"activations": activations} | self._graphs(rank) | ({"load": load} if load else {})

    def _graphs(self, rank: int) -> dict[str, int]:
        """Steps with streamed layers are not captured, but what drafts for them is."""
        if self.device == "cpu":
            return {}
        if self.num_streamed:
            return {} if self.draft is None else {"graphs": self.draft._draft_graphs(rank)}
        layer, captures = self._layer(rank), self.captures_passes
        return {"graphs": graphs_bytes(layer, self.shape.num_layers, self.prefill_chunk, captures_passes=captures)}

    def _draft_graphs(self, rank: int) -> int:
        rows, num_graphs = self.batch_size * self.drafting_rows, len(graph_sizes(self.batch_size))
        num_layers = num_graphs * self.drafting_passes * self.shape.num_layers
        return draft_graphs_bytes(self._layer(rank), rows, num_layers, self._logits(rank, rows))

    def _load(self, rank: int) -> int:
        """Peak beside the weights that stay, of the tensor whose load takes most."""
        shape, stored_bytes = self.shape, DTYPE_BYTES[self.shape.dtype]
        queries = self._local(shape.num_heads)[rank] * shape.head_dim
        intermediate = split_by_grain(shape.intermediate_size, self.world_size, self.grain)[rank]
        linear = max(queries, intermediate) * shape.hidden_size
        # A plain tensor becomes what it stays, beside itself where its dtype changes.
        embedding = split_by_grain(shape.vocab_size, self.world_size, self.grain)[rank] * shape.hidden_size
        plain = stored_bytes * embedding if shape.dtype != self.dtype else 0
        if self.device == "cuda":
            # The last layer, while its tensors move into one piece.
            plain = max(plain, self.layer_bytes()[rank])
        if self.num_streamed:
            # Staging buffers come after the load, too, in place of layers on their way to the host.
            hosted = self.host_embedding_bytes(self._part_bytes(0)[rank])
            staged = NUM_STAGED if self.num_streamed > self.num_disk else 0
            plain = max(plain, hosted - staged * self.layer_bytes()[rank])
        return max(plain, linear_load(shape, self.device, self.dtype, linear))

    def limits(self, max_context: int) -> EngineLimits:
        """As far as they say what is allocated."""
        return EngineLimits(max_context, self.batch_size, self.prefill_chunk, num_ahead=self.num_ahead)

    def _held_bits(self) -> float | None:
        """What a quantised weight takes once it is packed for its kernel; None: as it is stored."""
        return held_linear_bits(self.shape, self.device, self.dtype)

    def kv_bytes_per_token(self) -> tuple[int, ...]:
        """Keys and values of one token of one sequence on each rank: layers x 2 x local KV heads x head_dim."""
        element_bytes = FP8_BYTES if self.kv_dtype == KVDType.fp8.value else DTYPE_BYTES[self.dtype]
        heads = split_by_heads(self.shape.num_kv_heads, self.world_size, self.shape.num_kv_heads)
        return tuple(self.shape.num_layers * 2 * num * self.shape.head_dim * element_bytes for num in heads)

    def _activations(self, rank: int, max_context: int) -> int:
        """Peak while a pass of prefill goes through a layer: what lives throughout, and the largest step.

        Written for decoder.py, prefill/overlap.py and prefill/halves.py of parallel/engine; e is the size of an element
        in bytes. On a card norms, rotation and activation write nothing but their results; plain torch needs copies, in
        float32 but for the activation's.
        """
        e, shape = DTYPE_BYTES[self.dtype], self.shape
        prompt = min(self.prefill_chunk, self.batch_size * max_context)
        rows = self.batch_size * self.rows_per_sequence
        packed = shape.scheme is not None
        # A kernel that multiplies packed weights by so many rows takes less than this, which dequantises.
        sections = choose_sections(prompt, self.world_size, lambda _: packed)
        largest = max(sections)
        # Multiplied at a time. A step that checks drafts may have more rows than a pass of prompts.
        tokens = max(prompt if packed else largest, rows)
        layer = self._layer(rank)
        hidden, queries, keys, qkv = layer.hidden, layer.queries, layer.keys, layer.qkv
        on_cpu = self.device == "cpu"
        normed = largest if len(sections) > 1 else tokens
        plain = (PLAIN_TORCH_COPIES + (e < FLOAT32_BYTES)) * FLOAT32_BYTES * normed if on_cpu else 0
        steps = layer.linear_steps(tokens) | {
            "norm": plain * hidden,
            "rotation": tokens * (qkv + queries) * e + plain * queries,
            # Queries, their outputs apart and together.
            "attention": 3 * tokens * queries * e + self._prompt_keys(rank, largest, max_context),
            "logits": self._logits(rank, rows),
            "decode": self._plain_decode(max_context, self._local(shape.num_heads)[rank], keys) if on_cpu else 0,
        }
        if packed and len(sections) > 1:
            # Attention of the second half: beside its own, q, k, v and outputs of the first, and both weights.
            weights = layer.whole_weight(qkv * hidden) + layer.product(tokens, queries * hidden)
            kept = largest * (2 * qkv + 4 * queries) * e
            steps["attention"] = kept + self._prompt_keys(rank, largest, max_context) + weights
        # The residual stream, the update that is added to it, and the norm of the sum.
        return (2 * max(prompt, tokens) + tokens) * hidden * e + max(steps.values())

    def _layer(self, rank: int) -> Layer:
        shape = self.shape
        queries, keys = (self._local(num)[rank] * shape.head_dim for num in (shape.num_heads, shape.num_kv_heads))
        return Layer(
            hidden=shape.hidden_size,
            queries=queries,
            keys=keys,
            intermediate=split_by_grain(shape.intermediate_size, self.world_size, self.grain)[rank],
            element_bytes=DTYPE_BYTES[self.dtype],
            dtype=self.dtype,
            device=self.device,
            scheme=shape.scheme,
        )

    def _logits(self, rank: int, rows: int) -> int:
        """Of last tokens alone, or of what a step checks: this rank's part, and that in float32 where the likeliest is
        looked for, or some rows at a time gathered from all ranks, joined, sampled."""
        e, vocab_size = DTYPE_BYTES[self.dtype], self.shape.vocab_size
        local = rows * split_by_grain(vocab_size, self.world_size, self.grain)[rank]
        if not self.is_sampled:
            return local * (e + (FLOAT32_BYTES if e < FLOAT32_BYTES else 0))
        return local * e + min(rows, SAMPLED_ROWS) * vocab_size * (2 * e + SAMPLING_BYTES_PER_LOGIT)

    def _prompt_keys(self, rank: int, num_rows: int, max_context: int) -> int:
        kv_bytes = FP8_BYTES if self.kv_dtype == KVDType.fp8.value else DTYPE_BYTES[self.dtype]
        return prompt_keys_bytes(self._layer(rank), self.shape.head_dim, kv_bytes, num_rows, self.limits(max_context))

    def _plain_decode(self, max_context: int, heads: int, keys: int) -> int:
        """Attention of a step in plain torch: keys or values of all sequences as they lie in pages, in float32, and
        without what is absent; of every row scores, and their softmax, and what it sees of a tree."""
        per_row = 2 * heads * FLOAT32_BYTES + (TREE_MASK_BYTES if self.rows_per_sequence > 1 else 0)
        per_token = keys * (DTYPE_BYTES[self.dtype] + 2 * FLOAT32_BYTES) + self.rows_per_sequence * per_row
        return self.batch_size * (max_context + self.num_ahead) * per_token

    def _local(self, num_heads: int) -> tuple[int, ...]:
        return split_by_heads(num_heads, self.world_size, self.shape.num_kv_heads)
