"""The training text: Python's own standard library, split by file, tokenized and packed."""

import ast
import hashlib
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

END_OF_TEXT = "<|endoftext|>"
SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL_TOKENS = [END_OF_TEXT, SYSTEM, USER, ASSISTANT, END]

# Tests, generated tables and build records: little to learn from, or specific to one machine.
SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages", "__pycache__"),
    *("test", "tests", "idle_test", "encodings", "pydoc_data"),
}
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")


@dataclass(frozen=True)
class Document:
    """One source file."""

    name: str
    text: str


Split = tuple[list[Document], list[Document]]
Arrays = list[np.ndarray]


def read_documents(root: Path) -> list[Document]:
    """Every usable `*.py` file below `root`, by name."""
    documents = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        parts = relative.parts
        if SKIPPED_FOLDERS.intersection(parts):
            continue
        if any(part.startswith(SKIPPED_PREFIXES) for part in parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            documents.append(Document(relative.as_posix(), text))
    return documents


def split_documents(documents: list[Document], share: float = 0.04) -> Split:
    """(train, held-out); held-out are the files whose names have the smallest hashes."""
    ranked = sorted(documents, key=lambda d: hashlib.sha256(d.name.encode()).digest())
    count = max(1, math.ceil(share * len(ranked)))
    return ranked[count:], ranked[:count]


def train_tokenizer(documents: list[Document], vocab_size: int) -> Tokenizer:
    """A byte-level BPE whose decoding gives back exactly what was encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in documents), trainer)
    return tokenizer


def conversations(documents: list[Document]) -> list[str]:
    """Chat-formatted functions: the user gives signature and docstring, the assistant the body."""
    found = []
    for document in documents:
        try:
            tree = ast.parse(document.text)
        except (SyntaxError, ValueError):
            continue
        lines = document.text.splitlines(keepends=True)
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or ast.get_docstring(node) is None:
                continue
            start, body, end = node.lineno - 1, node.body[0].end_lineno, node.end_lineno
            if body is None or end is None or not 2 <= end - body <= 40 or body - start > 15:
                continue
            source = textwrap.dedent("".join(lines[start:end]))
            split = source.splitlines(keepends=True)
            asked, answer = "".join(split[: body - start]), "".join(split[body - start :])
            found.append(f"{USER}{asked.rstrip()}{END}{ASSISTANT}{answer.rstrip()}{END}")
    return found


def encode_all(tokenizer: Tokenizer, texts: list[str]) -> Arrays:
    """Token ids of each text, followed by end-of-text."""
    stop = tokenizer.token_to_id(END_OF_TEXT)
    encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array([*e.ids, stop], dtype=np.int64) for e in encoded]


class Packer:
    """Endless batches: each epoch shuffles the documents, joins them, and cuts windows."""

    def __init__(self, files: Arrays, chats: Arrays, chat_share: float, seed: int) -> None:
        self.files, self.chats, self.seed = files, chats, seed
        file_tokens, chat_tokens = sum(map(len, files)), sum(map(len, chats))
        wanted = chat_share * file_tokens / max(chat_tokens, 1)
        self.chats_per_epoch = min(len(chats), round(wanted * len(chats)))
        self.epoch, self.cursor = 0, 0
        self.stream = self._shuffled()

    def _shuffled(self) -> np.ndarray:
        rng = np.random.default_rng((self.seed, self.epoch))
        picked = rng.permutation(len(self.chats))[: self.chats_per_epoch]
        parts = [*self.files, *(self.chats[i] for i in picked)]
        return np.concatenate([parts[i] for i in rng.permutation(len(parts))])

    def seek(self, epoch: int, cursor: int) -> None:
        """Go to a place in an epoch: after `--resume`."""
        self.epoch, self.cursor = epoch, cursor
        self.stream = self._shuffled()

    def batch(self, rows: int, context: int) -> torch.Tensor:
        """`rows` windows of `context + 1` tokens; neighbours share the token at the seam."""
        need = rows * context + 1
        while len(self.stream) - self.cursor < need:
            self.epoch += 1
            self.stream = np.concatenate([self.stream[self.cursor :], self._shuffled()])
            self.cursor = 0
        flat = self.stream[self.cursor : self.cursor + need]
        self.cursor += rows * context
        windows = np.lib.stride_tricks.sliding_window_view(flat, context + 1)[::context]
        return torch.from_numpy(windows.copy())


class Losses(NamedTuple):
    """One loss in two units."""

    nats_per_token: float
    bits_per_byte: float


class HeldOut:
    """Files that training never sees, and the loss on them."""

    def __init__(self, documents: list[Document], tokenizer: Tokenizer) -> None:
        texts = [d.text for d in documents]
        self.tokens = torch.from_numpy(np.concatenate(encode_all(tokenizer, texts)))
        self.bytes_per_token = sum(len(t.encode()) for t in texts) / len(self.tokens)

    @torch.no_grad()
    def loss(self, model: nn.Module, context: int, limit: int | None = None) -> Losses:
        """Each window is read on its own; `limit` bounds the tokens."""
        was_training = model.training
        model.eval()
        tokens = self.tokens[:limit]
        total, count = 0.0, 0
        for start in range(0, len(tokens) - 1, context):
            losses = model(tokens[None, start : start + context + 1])
            total, count = total + losses.sum().item(), count + losses.numel()
        model.train(was_training)
        nats = total / count
        return Losses(nats, nats / math.log(2) / self.bytes_per_token)
