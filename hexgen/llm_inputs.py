"""What users of the Python API may write for prompts and parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hexgen.errors import RequestError
from hexgen.request import SamplingParams

Prompt = str | Sequence[int] | Mapping[str, Any]
Prompts = Prompt | Sequence[Prompt]


def as_prompts(prompts: Prompts) -> list[str | tuple[int, ...]]:
    """One or many prompts, in any of the ways they may be written."""
    if isinstance(prompts, str | Mapping):
        return [_prompt(prompts)]
    if not isinstance(prompts, Iterable):
        raise RequestError("must be a text, token ids, or a list of them", where="prompts")
    items: list[Any] = list(prompts)
    if items and all(isinstance(item, int) and not isinstance(item, bool) for item in items):
        return [tuple(items)]
    return [_prompt(item) for item in items]


def _prompt(prompt: Any) -> str | tuple[int, ...]:
    if isinstance(prompt, Mapping):
        ids = prompt.get("prompt_token_ids")
        prompt = ids if ids is not None else prompt.get("prompt")
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Sequence):
        return tuple(prompt)
    raise RequestError("must be a text, token ids, or a dict with prompt or prompt_token_ids", where="prompts")


def one_each(sampling: SamplingParams | Sequence[SamplingParams] | None, count: int) -> Sequence[SamplingParams]:
    if sampling is None or isinstance(sampling, SamplingParams):
        return [sampling or SamplingParams()] * count
    if len(sampling) != count:
        raise RequestError(f"there are {len(sampling)} for {count} prompts", where="sampling_params")
    return sampling
