"""A pass of many tokens in the order that suits its weights: whole, in sections, or in halves."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from parallel.engine.decoder import Attend, Decoder, Tokens
from parallel.engine.prefill.halves import PassInHalves
from parallel.engine.prefill.overlap import PassInSections, cut_in_sections
from parallel.kernels.pages import PagedKV


def run_pass(
    decoder: Decoder, tokens: Tokens, sizes: Sequence[int], attends: Sequence[Attend], caches: Sequence[PagedKV]
) -> Tensor:
    """[tokens, hidden]: what `decoder` gives, in sections of so many tokens. `attends`: that of each section."""
    if len(sizes) == 1:
        return decoder(tokens, attends[0], caches)
    residual: Tensor = decoder.model.model.embed_tokens(tokens.ids)
    open_pass(decoder, tokens, residual, sizes).run(attends, caches)
    return residual


def open_pass(decoder: Decoder, tokens: Tokens, residual: Tensor, sizes: Sequence[int]) -> PassInSections:
    """In sections of so many tokens, which are two where weights have to be dequantised for them."""
    kind = PassInHalves if decoder.dequantizes(sum(sizes)) else PassInSections
    return kind(decoder, cut_in_sections(tokens, residual, sizes))
