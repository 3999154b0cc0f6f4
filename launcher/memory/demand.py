"""Bytes that a run takes on each rank, line by line, predicted from the shape of the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from launcher.config import KVDType
from launcher.memory.activations import activations_bytes, between_layers_bytes, lasting_bytes, logits_bytes
from launcher.memory.kv import kv_lines
from launcher.memory.layer import CUBLAS_BYTES, Layer, draft_graphs_bytes, graphs_bytes, step_bytes
from launcher.memory.process import process_lines
from launcher.memory.streamed import brought_bytes, linear_load, made_layer_bytes, mapping_lines, streamed_lines
from launcher.memory.weights import held_linear_bits
from launcher.models.shape import DTYPE_BYTES, ModelShape, part_bytes
from parallel.engine.limits import EngineLimits, graph_sizes
from parallel.footprint import MIN_FUSED_ROWS, host_refusal
from parallel.partition import choose_grain, split_by_grain, split_by_heads

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
    # Passes of prompts that are graphs at a time, as steps are.
    captured_passes: int = 0
    # Whether long passes of prompts go in sections, where there are several ranks.
    hides_sums: bool = True
    # Of a product, up to which no packed weight is dequantised for sure.
    fused_rows: int = MIN_FUSED_ROWS
    # Of cuBLAS, on a stream.
    cublas_bytes: int = CUBLAS_BYTES
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

    def host_bytes(self) -> tuple[int, ...]:
        """Weights in host memory, of each rank: streamed layers, and the embedding, of which a pass reads few rows."""
        parts = self._part_bytes(self.shape.num_layers)
        return tuple(
            (self.num_streamed - self.num_disk) * size + self.host_embedding_bytes(part)
            for size, part in zip(self.layer_bytes, parts, strict=True)
        )

    def host_embedding_bytes(self, part: dict[str, int]) -> int:
        """Of a rank's embedding: all of it, unless it is the head too."""
        return 0 if self.shape.tied_embeddings else part["embedding"]

    @cached_property
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
        return tuple(self.each_lines(max_context))

    def each_lines(self, max_context: int) -> Iterator[dict[str, int]]:
        """The same, one rank after the other: most runs that do not fit fail on the first."""
        for rank, fixed in enumerate(self.fixed_lines()):
            yield fixed | self._speculation(rank, max_context) | self._varying(rank, max_context)

    def _speculation(self, rank: int, max_context: int) -> dict[str, int]:
        """What drafts take beside the weights of their model: its cache, and all tokens of all sequences."""
        cache = {} if self.draft is None else {"draft.kv_cache": kv_lines(self.draft, rank, max_context)["kv_cache"]}
        tokens = self.batch_size * (max_context + 1) * TOKEN_BYTES
        return cache | ({"draft.tokens": tokens} if self.rows_per_sequence > 1 else {})

    def _varying(self, rank: int, max_context: int) -> dict[str, int]:
        models = [each for each in (self, self.draft) if each is not None]
        cache = kv_lines(self, rank, max_context)
        activations = max(activations_bytes(each, rank, max_context) for each in models)
        if self.num_disk:
            # What a layer from the disk is made of is free while it computes.
            making = made_layer_bytes(self, rank) - self.layer_bytes[rank]
            activations = max(between_layers_bytes(self, max_context), activations - making)
        activations += lasting_bytes(models, max_context)
        load = max(0, max(each._load(rank) for each in models) - sum(cache.values()) - activations)
        outside = mapping_lines(self, rank, max_context) | self._graphs(rank)
        return cache | {"activations": activations} | outside | ({"load": load} if load else {})

    def _graphs(self, rank: int) -> dict[str, int]:
        """Steps with streamed layers are not captured, but what drafts for them is."""
        if self.device == "cpu":
            return {}
        if self.num_streamed:
            return {} if self.draft is None else {"graphs": self.draft._draft_graphs(rank)}
        rows = self.batch_size * self.rows_per_sequence
        step = step_bytes(self.layer(rank), rows, logits_bytes(self, rank, rows))
        chunk, num = self.prefill_chunk, self.captured_passes
        graphs = graphs_bytes(self.layer(rank), self.shape.num_layers, chunk, num, step)
        return {"graphs": graphs + self.cublas_bytes}

    def _draft_graphs(self, rank: int) -> int:
        rows, num_graphs = self.batch_size * self.drafting_rows, len(graph_sizes(self.batch_size))
        num_layers = num_graphs * self.drafting_passes * self.shape.num_layers
        return draft_graphs_bytes(self.layer(rank), rows, num_layers, logits_bytes(self, rank, rows))

    def _load(self, rank: int) -> int:
        """Peak beside the weights that stay, of the tensor whose load takes most."""
        shape, stored_bytes = self.shape, DTYPE_BYTES[self.shape.dtype]
        queries = self.local(shape.num_heads)[rank] * shape.head_dim
        intermediate = split_by_grain(shape.intermediate_size, self.world_size, self.grain)[rank]
        linear = max(queries, intermediate) * shape.hidden_size
        # A plain tensor becomes what it stays, beside itself where its dtype changes.
        embedding = split_by_grain(shape.vocab_size, self.world_size, self.grain)[rank] * shape.hidden_size
        plain = stored_bytes * embedding if shape.dtype != self.dtype else 0
        if self.device == "cuda":
            # The last layer, while its tensors move into one piece.
            plain = max(plain, self.layer_bytes[rank])
        load = max(plain, linear_load(shape, self.device, self.dtype, linear))
        # A layer that is to leave the card is there besides. What brings such layers back comes after the load, too.
        return load + self.layer_bytes[rank] - brought_bytes(self, rank) if self.num_streamed else load

    def limits(self, max_context: int) -> EngineLimits:
        """As far as they say what is allocated."""
        return EngineLimits(max_context, self.batch_size, self.prefill_chunk, num_ahead=self.num_ahead)

    def _held_bits(self) -> float | None:
        """What a quantised weight takes once it is packed for its kernel; None: as it is stored."""
        return held_linear_bits(self.shape, self.device, self.dtype)

    def kv_bytes_per_token(self) -> tuple[int, ...]:
        """Keys and values of one token of one sequence on each rank: layers x 2 x local KV heads x head_dim."""
        shape = self.shape
        return tuple(
            shape.num_layers * 2 * num * shape.head_dim * self.kv_element_bytes
            for num in self.local(shape.num_kv_heads)
        )

    @property
    def kv_element_bytes(self) -> int:
        """Of a number in the cache."""
        return FP8_BYTES if self.kv_dtype == KVDType.fp8.value else DTYPE_BYTES[self.dtype]

    def layer(self, rank: int) -> Layer:
        """One decoder layer as `rank` computes it."""
        shape = self.shape
        queries, keys = (self.local(num)[rank] * shape.head_dim for num in (shape.num_heads, shape.num_kv_heads))
        return Layer(
            hidden=shape.hidden_size,
            queries=queries,
            keys=keys,
            intermediate=split_by_grain(shape.intermediate_size, self.world_size, self.grain)[rank],
            element_bytes=DTYPE_BYTES[self.dtype],
            dtype=self.dtype,
            device=self.device,
            scheme=shape.scheme,
            fused_rows=self.fused_rows,
        )

    def local(self, num_heads: int) -> tuple[int, ...]:
        """How many of so many heads each rank has."""
        return split_by_heads(num_heads, self.world_size, self.shape.num_kv_heads)
