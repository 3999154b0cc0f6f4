"""The forward pass of a sharded transformers model, over the tokens of many sequences at once.

The model's own modules keep their weights; this calls them with as few launches as they need: q, k and v in one linear,
gate and up in one, residual sums within norms, rotation within the write to the cache. It knows the families of
launcher/models/config_json.py, whose layers differ in biases and in norms of queries and keys only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from parallel.communicator import Communicator
from parallel.kernels.fused import rms_norm, rotary_and_cache, rotary_tables
from parallel.kernels.pages import PagedKV
from parallel.layers.linear import Update
from parallel.layers.merged import is_merged, linears_of, local_sizes, merge_layer, swiglu
from parallel.offload.host_kv import HostKV
from parallel.offload.streamer import Streamer

# query [tokens, local heads, head_dim], the layer's cache -> the same shape
Attend = Callable[[Tensor, PagedKV], Tensor]


@dataclass(frozen=True)
class Tokens:
    """What a pass takes: ids, positions in their sequences and slots in the cache, each [tokens] int64."""

    ids: Tensor
    positions: Tensor
    slots: Tensor

    def __getitem__(self, rows: slice) -> Tokens:
        return Tokens(self.ids[rows], self.positions[rows], self.slots[rows])


class Decoder:
    """A loaded model, ready to run. Its q, k, v, gate and up projections are merged: transformers' forward is gone.

    `host_kv`: has the keys and values of those layers whose own lie in host memory, where some do.

    Args:
        streamer: has the layers that lie in host memory, where some do.
    """

    host_kv: HostKV | None = None

    def __init__(self, model: PreTrainedModel, max_context: int, streamer: Streamer | None = None) -> None:
        config = model.config
        self.model, self.streamer = model, streamer
        self.eps = config.rms_norm_eps
        self.head_dim = model.model.layers[0].self_attn.head_dim
        self.num_heads, self.num_kv_heads = (size // self.head_dim for size in local_sizes(model.model.layers[0]))
        self.scale = self.head_dim**-0.5
        self.num_layers = len(model.model.layers)
        self.communicator: Communicator = model.model.layers[0].self_attn.o_proj.communicator
        self.world_size = self.communicator.world_size
        # Whether long passes go in sections, so that sums go on beside products.
        self.hides_sums = self.world_size > 1
        # By numbers of rows; see `dequantizes`.
        self.dequantizing: dict[int, bool] = {}
        for layer in model.model.layers:
            if not is_merged(layer):
                merge_layer(layer)
        # One tensor for cosines, one for sines: [max_context, head_dim / 2] float32.
        self.cos, self.sin = rotary_tables(model.model.rotary_emb, max_context)

    def __call__(self, tokens: Tokens, attend: Attend, caches: Sequence[PagedKV]) -> Tensor:
        """[tokens, hidden]: the last layer's output before the final norm, with its residual added."""
        residual = self.model.model.embed_tokens(tokens.ids)
        update: Update | None = None
        for layer, cache in zip(self.layers(len(tokens.ids)), caches, strict=True):
            update = self._attention(layer, residual, update, tokens, attend, cache)
            update = self.mlp(layer, residual, update)
        assert update is not None
        return residual.add_(update.total())

    def queries(self, layer: Any, residual: Tensor, update: Update | None, tokens: Tokens, cache: PagedKV) -> Tensor:
        """A layer up to its attention: adds `update` to `residual`, caches keys and values, and returns the queries.

        [tokens, local heads, head_dim]
        """
        norm = layer.input_layernorm.weight
        normed = update.add_norm(residual, norm, self.eps) if update else rms_norm(residual, norm, self.eps)
        return self.queries_of_normed(layer, normed, tokens, cache)

    def queries_of_normed(self, layer: Any, normed: Tensor, tokens: Tokens, cache: PagedKV) -> Tensor:
        """As `queries`, from the norm's `normed` [tokens, hidden] on."""
        if self.num_heads == 0:
            return normed.new_empty(len(normed), 0, self.head_dim)
        return self.queries_of_qkv(layer.self_attn, layer.self_attn.qkv(normed), tokens, cache)

    def queries_of_qkv(self, attention: Any, qkv: Tensor, tokens: Tokens, cache: PagedKV) -> Tensor:
        """As `queries`, from the products `qkv` [tokens, local heads of all three * head_dim] on."""
        query_norm, key_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        return rotary_and_cache(
            qkv,
            self.cos,
            self.sin,
            tokens.positions,
            tokens.slots,
            cache.keys,
            cache.values,
            self.num_heads,
            self.num_kv_heads,
            None if query_norm is None else query_norm.weight,
            None if key_norm is None else key_norm.weight,
            self.eps,
        )

    def mlp(self, layer: Any, residual: Tensor, update: Update) -> Update:
        """A layer from its attention's `update` on: adds that to `residual`; what is to be added next."""
        normed = update.add_norm(residual, layer.post_attention_layernorm.weight, self.eps)
        activated = swiglu(layer.mlp.gate_up, normed)
        if self.streamer is None:
            return layer.mlp.down_proj.update(activated)
        # The norm after it is the next layer's: its arrival is not to be waited for before the sum is made.
        return Update(layer.mlp.down_proj(activated), None)

    def layers(self, num_rows: int) -> Iterator[Any]:
        """In turn, for a pass of so many rows; each is ready until the next is asked for."""
        layers = self.model.model.layers
        passing = iter(layers) if self.streamer is None else self.streamer.through(layers, num_rows)
        return passing if self.host_kv is None else self.host_kv.through(passing)

    def dequantizes(self, num_rows: int) -> bool:
        """Whether any rank makes numbers of some weight before it multiplies so many rows by it.

        To be asked on all ranks: they answer alike, and wait for one another when they are asked for the first time.
        """
        if num_rows not in self.dequantizing:
            linears = (linear for layer in self.model.model.layers for linear in linears_of(layer))
            own = any(linear.dequantizes(num_rows) for linear in linears)
            flag = torch.tensor([float(own)], device=self.model.lm_head.weight.device)
            self.dequantizing[num_rows] = self.communicator.all_reduce(flag).item() > 0
        return self.dequantizing[num_rows]

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, local vocabulary]"""
        logits: Tensor = self.model.lm_head(rms_norm(hidden, self.model.model.norm.weight, self.eps))
        return logits

    def _attention(
        self, layer: Any, residual: Tensor, update: Update | None, tokens: Tokens, attend: Attend, cache: PagedKV
    ) -> Update:
        query = self.queries(layer, residual, update, tokens, cache)
        # With more ranks than KV heads: nothing to do here but to add zeros to the sum.
        attended = attend(query, cache) if self.num_heads else query
        return layer.self_attn.o_proj.update(attended.flatten(1))
