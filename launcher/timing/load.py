"""What predictions are asked of: the work of a model on a rank, and the requests that it gets."""

from __future__ import annotations

from dataclasses import dataclass, replace

from launcher.config.workload import middle_tokens

ALL_REDUCES_PER_LAYER = 2


@dataclass(frozen=True)
class Work:
    """What the rank that has most does for a model; bytes of one layer, one token or the head on that rank."""

    format: str
    num_layers: int
    layer_bytes: int
    # At 16 bits, whatever the format.
    layer_plain_bytes: int
    head_bytes: int
    kv_bytes_per_token: int
    num_heads: int
    message_bytes: int


@dataclass(frozen=True)
class Workload:
    """Requests that all come at once."""

    batch_size: int
    prompt_tokens: int
    output_tokens: int
    prefill_chunk: int
    # Where answers are under way.
    prefill_chunk_while_decoding: int

    @property
    def middle_tokens(self) -> int:
        return middle_tokens(self.prompt_tokens, self.output_tokens)

    @property
    def prompts_only(self) -> Workload:
        return replace(self, output_tokens=1)

    @property
    def num_tokens(self) -> int:
        """Of all prompts."""
        return self.batch_size * self.prompt_tokens
