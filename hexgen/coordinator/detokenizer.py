"""Token ids to text while they arrive: never half a character, always the spaces that the whole would have."""

from __future__ import annotations

from collections.abc import Sequence

from hexgen.coordinator.tokenizer import Tokenizer

_CONTEXT_TOKENS = 6  # of the prompt, decoded before the first output token so that its leading space is right
_MAX_PENDING_TOKENS = 64  # a text that still ends in U+FFFD after so many tokens really has it
_HALF = "\ufffd"  # what an incomplete UTF-8 sequence decodes to


class Detokenizer:
    """Text of one sequence, piece by piece. The pieces add up to the decoding of all tokens.

    The prefix-offset method: new tokens are decoded behind the last settled ones (``_context``), and what the
    context itself decodes to is cut off. A trailing U+FFFD may be the first bytes of a character whose others
    are in the next token, so it waits; everything before it cannot change any more.
    """

    __slots__ = ("_context", "_emitted", "_pending", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = list(prompt[-_CONTEXT_TOKENS:])
        self._pending: list[int] = []
        # Characters of decode(context + pending) that are out.
        self._emitted = len(tokenizer.decode(self._context).rstrip(_HALF))

    def push(self, token: int) -> str:
        """The text that ``token`` completes; empty while a character is incomplete."""
        self._pending.append(token)
        text = self._tokenizer.decode(self._context + self._pending)
        if text.endswith(_HALF) and len(self._pending) < _MAX_PENDING_TOKENS:
            settled = len(text.rstrip(_HALF))
            piece = text[self._emitted : settled]
            self._emitted = max(self._emitted, settled)
            return piece
        piece = text[self._emitted :]
        chars = len(self._tokenizer.decode(self._pending))
        if chars:
            self._context, self._pending, self._emitted = self._pending, [], chars
        else:  # tokens that read as nothing (special ones) are no context: keep the one before them
            self._emitted = len(text)
            if len(self._pending) >= _MAX_PENDING_TOKENS:
                self._pending = []
        return piece

    def flush(self) -> str:
        """What is left at the end: an incomplete character reads as U+FFFD, as in the decoding of the whole."""
        if not self._pending:
            return ""
        return self._tokenizer.decode(self._context + self._pending)[self._emitted :]
