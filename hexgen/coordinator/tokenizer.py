"""Text to token ids and back. transformers reads the checkpoint's tokenizer; no code comes with it.

A checkpoint may have no tokenizer: then ``load_tokenizer`` gives None, and the engine serves token ids only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hexgen.errors import CheckpointError, RequestError

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


class Tokenizer:
    """A checkpoint's tokenizer, as transformers reads it; the per-token calls go straight to its Rust core."""

    def __init__(self, inner: Any, where: str) -> None:
        self._inner = inner
        self._core = getattr(inner, "backend_tokenizer", None)
        self._where = where
        self.vocab_size: int = len(inner)
        self._token_texts: dict[int, str] = {}  # at most the vocabulary
        vocabulary = inner.get_vocab()
        # No token stands for more characters than this, so a longer text has at least so many more tokens.
        self.longest_token_chars: int = max((len(token) for token in vocabulary), default=1)

    def encode(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of ``text``; with ``add_special_tokens`` as the model expects a prompt (BOS, if any)."""
        check_text(text)
        return tuple(self._inner.encode(text, add_special_tokens=add_special_tokens, verbose=False))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        if self._core is not None:
            text: str = self._core.decode(ids, skip_special_tokens=skip_special_tokens)
        else:
            text = self._inner.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token: int) -> str:
        """What one token reads as, alone (part of a character reads as U+FFFD)."""
        text = self._token_texts.get(token)
        if text is None:
            text = self._token_texts[token] = self.decode((token,), skip_special_tokens=False)
        return text

    @property
    def has_chat_template(self) -> bool:
        return bool(self._inner.chat_template)

    def render_chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the prompt text that the checkpoint's template (sandboxed Jinja) makes of it."""
        import jinja2

        if not self.has_chat_template:
            raise RequestError(
                "this model's tokenizer has no chat template",
                where="messages",
                remedy="send a prompt to the completions interface instead",
            )
        for message in messages:
            check_text(message["content"], "messages")
        try:
            text = self._inner.apply_chat_template(
                [dict(m) for m in messages], tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
            raise RequestError(
                f"the chat template refuses these messages: {str(error)[:200]}", where="messages"
            ) from error
        return str(text)


def check_text(text: str, where: str = "prompt") -> None:
    """Refuse what has no UTF-8: JSON may carry half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError("is not valid Unicode: it holds half of a surrogate pair", where=where) from error


def load_tokenizer(directory: str | Path) -> Tokenizer | None:
    """The tokenizer in a checkpoint's directory, or None where there is none."""
    path = Path(directory)
    if not any((path / name).is_file() for name in _FILES):
        return None
    from transformers import AutoTokenizer

    try:
        inner = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError, RecursionError) as error:
        raise CheckpointError(
            f"its tokenizer cannot be read: {str(error)[:300]}",
            where=str(path),
            remedy="restore the tokenizer's files, or remove them all to serve token ids only",
        ) from error
    return Tokenizer(inner, str(path))
