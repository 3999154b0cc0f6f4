"""How many tokens a model takes, how many are wanted unless otherwise asked, and what of a budget a plan keeps free."""

from __future__ import annotations

from launcher.config import RunConfig
from launcher.models.shape import ModelShape

DEFAULT_MAX_CONTEXT = 8192
# Of a budget where the plan chooses the context: measured peaks were up to 2 % above the predicted ones (checkpoints of
# 70B on one H200, results/one_card_h200_202611.md).
KEPT_FREE = 0.02
# The same where layers are streamed, so that no more of them are than must be: plans of such runs are 0.03 to 1.7 %
# above their peaks (results/LOG.md, "Plans of streamed runs").
KEPT_FREE_STREAMED = 0.01


def context_limit(shape: ModelShape, draft: ModelShape | None = None) -> tuple[int, str]:
    """The most tokens the model takes here, beside a draft model where there is one, and what sets that limit."""
    limit, reason = shape.max_positions, f"the model's limit of {shape.max_positions} positions"
    if shape.sliding_window is not None:
        # Full attention equals a sliding window up to the window's size.
        limit = shape.sliding_window
        reason = f"the model's sliding window of {limit} tokens (attention is full here)"
    if draft is not None and draft.max_positions < limit:
        limit, reason = draft.max_positions, f"the draft model's limit of {draft.max_positions} positions"
    return limit, reason


def wanted_context(run: RunConfig, limit: int, *, is_streamed: bool) -> int:
    """Tokens of a sequence to make room for, as far as memory goes, where engine.max_context leaves it open.

    Beside layers that are streamed no more than are known to be needed: in place of other room the card holds layers.
    """
    if is_streamed and run.num_prompt_tokens is not None:
        return run.needed_tokens
    return min(max(DEFAULT_MAX_CONTEXT, run.needed_tokens), limit)
