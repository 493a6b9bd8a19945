"""What is asked: each request's prompt, its length limit, and when it is due. The same seed asks the same."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hexgen.errors import SpecError
from hexgen.scheduler.simulation import Requests

MAX_REQUESTS = 100_000  # every token's time is kept until the end
MAX_PROMPTS_BYTES = 256 * 1024 * 1024
MAX_OUTPUT_TOKENS = 1_000_000
MAX_PROMPT_TOKENS = 100_000_000  # of all requests together
# Where a server does not say how many token ids its model has: today's models have all of these.
SAFE_VOCABULARY = 1000
MAX_VOCABULARY = 2**31 - 1


Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """One request. ``due_s`` counts from the start of the run."""

    number: int
    due_s: float
    prompt: str | Ids
    prompt_tokens: int | None  # None: a text, whose tokens the server counts
    output_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A line of a prompts file; ``output_tokens`` where the line says how long its answer is to be."""

    prompt: str | Ids
    output_tokens: int | None = None


def synthetic(requests: Requests, vocab_size: int, seed: int) -> list[Ask]:
    """Random token ids in the lengths that ``hexgen simulate`` draws for this seed.

    The ids come from a stream of their own, the fourth of the seed: arrivals and lengths have the first three
    (`hexgen.scheduler.simulation.arrivals`).
    """
    total = int(requests.prompt_tokens.sum())
    if total > MAX_PROMPT_TOKENS:
        raise SpecError(
            f"prompts of {total} tokens in all are more than {MAX_PROMPT_TOKENS}",
            where="requests",
            remedy="send fewer with --requests, or shorter ones",
        )
    random = np.random.default_rng(np.random.SeedSequence(seed).spawn(4)[3])
    rows = zip(
        requests.arrival_s.tolist(), requests.prompt_tokens.tolist(), requests.output_tokens.tolist(), strict=True
    )
    return [
        Ask(i, due_s, random.integers(0, vocab_size, prompt, dtype=np.int32), prompt, output)
        for i, (due_s, prompt, output) in enumerate(rows)
    ]


def from_file(requests: Requests, prompts: list[Prompt]) -> list[Ask]:
    """The arrivals of ``requests``, the prompts in the file's order, over and over; a line's own output length
    goes before the drawn one.
    """
    asks = []
    rows = zip(requests.arrival_s.tolist(), requests.output_tokens.tolist(), strict=True)
    for i, (due_s, output) in enumerate(rows):
        line = prompts[i % len(prompts)]
        tokens = None if isinstance(line.prompt, str) else len(line.prompt)
        asks.append(Ask(i, due_s, line.prompt, tokens, line.output_tokens or output))
    return asks


def read_prompts(path: Path) -> list[Prompt]:
    """A prompt a line, empty lines left out. ``SpecError`` naming the line.

    It is text; where the file's name ends in .jsonl it is a JSON string, a list of token ids, or an object with
    ``prompt`` and optionally ``output_tokens``.
    """
    try:
        if path.stat().st_size > MAX_PROMPTS_BYTES:
            raise SpecError(f"is larger than {MAX_PROMPTS_BYTES} bytes", where=str(path))
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SpecError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise SpecError("is not UTF-8 text", where=str(path)) from error
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise SpecError("has no prompts", where=str(path))
    if path.suffix != ".jsonl":
        return [Prompt(line) for _, line in lines]
    return [_json_prompt(line, f"{path}, line {number}") for number, line in lines]


def _json_prompt(line: str, where: str) -> Prompt:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"is not JSON: {str(error)[:100]}", where=where) from error
    if not isinstance(value, dict):
        return Prompt(_prompt(value, where))
    output = value.get("output_tokens")
    if output is not None and not (type(output) is int and 1 <= output <= MAX_OUTPUT_TOKENS):
        raise SpecError(f"output_tokens must be a whole number from 1 to {MAX_OUTPUT_TOKENS}", where=where)
    return Prompt(_prompt(value.get("prompt"), where), output)


def _prompt(value: Any, where: str) -> str | Ids:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(type(i) is int and 0 <= i < 2**31 for i in value):
        return np.array(value, dtype=np.int32)
    raise SpecError("the prompt is neither a text nor a list of token ids", where=where)
