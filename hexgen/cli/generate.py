"""``hexgen generate``: start a plan, answer the prompts on the command line, stop."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from hexgen.cli._common import (
    ModelOption,
    PlanArgument,
    RayOption,
    StopSignals,
    raise_cause,
    say_remarks,
    shown_progress,
)
from hexgen.errors import EngineError, RequestError, SpecError, UnavailableError
from hexgen.request import SamplingParams

if TYPE_CHECKING:
    from hexgen.coordinator.tokenizer import Tokenizer
    from hexgen.deploy.ray_deployment import RayDeployment
    from hexgen.deploy.ray_launch import Launchable
    from hexgen.model import ModelSpec

MAX_PROMPT_FILE_BYTES = 16 * 1024 * 1024
MAX_PROMPTS = 10_000
_ORDER = "hexgen.order"
Prompt = str | tuple[int, ...]


class InOrderCommand(TyperCommand):
    """Remembers the order of options, so that answers come in the order of the prompts whatever their kinds."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        ctx.meta[_ORDER] = [parameter.name for parameter in order]
        return super().parse_args(ctx, args)


@dataclass(frozen=True, slots=True)
class Answer:
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str | None

    def to_json(self) -> str:
        return json.dumps(
            {
                "prompt_token_ids": list(self.prompt_token_ids),
                "token_ids": list(self.token_ids),
                "text": self.text,
                "finish_reason": self.finish_reason,
            }
        )


def generate_command(
    context: typer.Context,
    plan: PlanArgument = None,
    model: ModelOption = None,
    ray_address: RayOption = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt. May be repeated.")] = None,
    prompt_ids: Annotated[
        list[str] | None, typer.Option("--prompt-ids", help="A prompt as token ids, 1,2,3. May be repeated.")
    ] = None,
    prompt_file: Annotated[
        list[Path] | None, typer.Option("--prompt-file", help="A file that is one prompt. May be repeated.")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Tokens to generate at most.")] = 64,
    temperature: Annotated[
        float,
        typer.Option("--temperature", help="0 always takes the likeliest token; above it, tokens are sampled."),
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option("--top-p", help="Sample from the likeliest tokens that together have this probability."),
    ] = 1.0,
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", help="Sample from so many of the likeliest tokens (default: from all)."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Of sampling: the same seed gives the same text.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the model's end token.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object for each prompt on standard output, and nothing else.")
    ] = False,
) -> None:
    """Answer prompts with a plan that is started for them and stopped afterwards."""
    given: dict[str, list[Any]] = {
        "prompt": prompt or [],
        "prompt_ids": prompt_ids or [],
        "prompt_file": prompt_file or [],
    }
    prompts = _prompts(given, context.meta[_ORDER])
    sampling = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        ignore_eos=ignore_eos,
    )
    sampling.validate()
    alone = len(prompts) == 1 and not as_json
    answers = run(
        prompts, sampling, plan, model, ray_address, quiet=as_json, on_text=_print_text if alone else None
    )
    for number, answer in enumerate(answers, 1):
        if as_json:
            typer.echo(answer.to_json())
        elif alone and answer.text:
            typer.echo()  # the text is there already
        else:
            text = answer.text or ",".join(map(str, answer.token_ids))
            typer.echo(text if alone else f"[{number}] {text}")


def _print_text(text: str) -> None:
    typer.echo(text, nl=False)


def run(
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    plan: str | None,
    model: str | None,
    ray_address: str | None,
    *,
    quiet: bool,
    on_text: Callable[[str], None] | None = None,
) -> list[Answer]:
    """The answers in the order of ``prompts``; the deployment has ended when they are there.

    ``on_text`` gets the text of all as it comes.
    """
    from hexgen.coordinator.tokenizer import load_tokenizer
    from hexgen.deploy.ray_launch import deploy, prepare

    with StopSignals() as signals:
        ready = prepare(plan, model, ray_address=ray_address)
        tokenizer = load_tokenizer(ready.model_path)
        if tokenizer is None and any(isinstance(prompt, str) for prompt in prompts):
            raise RequestError(
                "this checkpoint has no tokenizer",
                where="--prompt",
                remedy="give token ids with --prompt-ids 1,2,3",
            )
        _check_prompts(prompts, tokenizer, ready)
        with shown_progress(quiet) as show:
            deployment = deploy(ready, ray_address=ray_address, on_progress=show)
        with deployment:
            try:
                if not quiet:
                    say_remarks(deployment)
                return asyncio.run(_answer_all(deployment, ready.model, tokenizer, prompts, sampling, on_text))
            except (EngineError, UnavailableError):
                raise_cause(deployment)
                raise
            finally:
                signals.shield()


def _check_prompts(prompts: Sequence[Prompt], tokenizer: Tokenizer | None, ready: Launchable) -> None:
    """Refuse what can never run before a worker is started for it."""
    from hexgen.coordinator.admission import check_prompt
    from hexgen.memory import plan_memory

    context = max(plan_memory(ready.plan, ready.cluster, ready.model).max_context)
    for prompt in prompts:
        if not isinstance(prompt, str):
            check_prompt(prompt, ready.model.vocab_size, context)
        elif tokenizer is not None:
            check_prompt(tokenizer.encode(prompt), ready.model.vocab_size, context)


async def _answer_all(
    deployment: RayDeployment,
    model: ModelSpec,
    tokenizer: Tokenizer | None,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    on_text: Callable[[str], None] | None,
) -> list[Answer]:
    from hexgen.coordinator.admission import AdmissionLimits
    from hexgen.coordinator.coordinator import Coordinator, CoordinatorLimits, ServedModel
    from hexgen.coordinator.stream import merge

    # All of the prompts were given at once: none is refused because others wait.
    limits = CoordinatorLimits(AdmissionLimits(max_waiting_requests=MAX_PROMPTS, max_waiting_tokens=sys.maxsize))
    coordinator = Coordinator(
        deployment.endpoints(),
        deployment.secret,
        ServedModel(model.name, model.vocab_size, model.eos_token_ids),
        tokenizer,
        limits,
    )
    try:
        await coordinator.start()
        streams = [await coordinator.submit(prompt, sampling) for prompt in prompts]
        tokens: list[list[int]] = [[] for _ in streams]
        texts: list[list[str]] = [[] for _ in streams]
        reasons: list[str | None] = [None] * len(streams)
        async for position, update in merge(streams):
            for delta in update.deltas:
                tokens[position] += delta.token_ids
                texts[position].append(delta.text)
                reasons[position] = delta.finish_reason or reasons[position]
                if on_text is not None and delta.text:
                    on_text(delta.text)
        return [
            Answer(stream.prompt_token_ids, tuple(tokens[i]), "".join(texts[i]), reasons[i])
            for i, stream in enumerate(streams)
        ]
    finally:
        await coordinator.close()


def _prompts(given: dict[str, list[Any]], order: Sequence[str]) -> list[Prompt]:
    """The prompts in the order of the command line."""
    readers: dict[str, Callable[[Any], Prompt]] = {
        "prompt": lambda text: str(text),
        "prompt_ids": _parse_ids,
        "prompt_file": _read_file,
    }
    left = {name: iter(values) for name, values in given.items()}
    prompts = [readers[name](next(left[name])) for name in order if name in readers]
    if not prompts:
        raise SpecError(
            "there is no prompt", remedy="give --prompt TEXT, --prompt-ids 1,2,3 or --prompt-file FILE"
        )
    if len(prompts) > MAX_PROMPTS:
        raise SpecError(f"{len(prompts)} prompts are more than {MAX_PROMPTS}", remedy="use `hexgen serve`")
    for prompt in prompts:
        if not prompt:
            raise RequestError("is empty", where="prompt", remedy="give at least one token")
    return prompts


def _parse_ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise RequestError(f"{text[:60]!r} is no list of token ids like 1,2,3", where="--prompt-ids") from None


def _read_file(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_PROMPT_FILE_BYTES:
            raise RequestError(f"is larger than {MAX_PROMPT_FILE_BYTES} bytes", where=str(path))
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise SpecError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise RequestError("is not UTF-8 text", where=str(path)) from error
