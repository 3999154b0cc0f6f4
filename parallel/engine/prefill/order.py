"""A pass of many tokens in the order that suits its weights: whole, in sections, or in halves."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from parallel.engine.decoder import Attend, Decoder, Tokens
from parallel.engine.prefill.halves import PassInHalves
from parallel.engine.prefill.overlap import PassInSections, cut_in_sections
from parallel.engine.prefill.section_sizes import Sections
from parallel.kernels.pages import PagedKV


def run_pass(
    decoder: Decoder, tokens: Tokens, sections: Sections, attends: Sequence[Attend], caches: Sequence[PagedKV]
) -> Tensor:
    """[tokens, hidden]: what `decoder` gives. `attends`: that of sections that attend at once."""
    if len(sections) == 1:
        return decoder(tokens, attends[0], caches)
    residual: Tensor = decoder.model.model.embed_tokens(tokens.ids)
    open_pass(decoder, tokens, residual, sections).run(attends, caches)
    return residual


def open_pass(decoder: Decoder, tokens: Tokens, residual: Tensor, sections: Sections) -> PassInSections:
    """In sections, which are two where weights have to be dequantised for them."""
    kind = PassInHalves if decoder.dequantizes(len(residual)) else PassInSections
    return kind(decoder, cut_in_sections(tokens, residual, sections))
