"""From token ids to text as it appears: incremental decoding, and stop texts that never show half."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

# What tokenizers says, by no class of its own, where tokens change text before them that was given already: bytes that
# are no character also take those ahead of them, a line break of Llama 2 for one. That stays as it was shown.
CHANGED = "Invalid prefix encountered"


class TextStream:
    """Text of one answer. `add` returns what may be shown now; `stopped` tells that a stop text came up."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        # Tokens since the last text, which may be parts of a character.
        self._unfinished: list[int] = []
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Text that `token` completes; empty while a character or a possible stop text is unfinished."""
        self._held += self._decode(token)
        found = [at for at in (self._held.find(text) for text in self._stop) if at >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = max((_overlap(self._held, text) for text in self._stop), default=0)
        split = len(self._held) - keep
        shown, self._held = self._held[:split], self._held[split:]
        return shown

    def _decode(self, token: int) -> str:
        try:
            text: str = self._decoder.step(self._tokenizer, token) or ""
        except Exception as error:
            if not str(error).startswith(CHANGED):
                raise
            self._decoder = DecodeStream(self._unfinished, skip_special_tokens=True)
            text = self._decoder.step(self._tokenizer, token) or ""
        if text:
            self._unfinished.clear()
        else:
            self._unfinished.append(token)
        return text

    def finish(self) -> str:
        """What was held back, once no more tokens come."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:size])), 0)
