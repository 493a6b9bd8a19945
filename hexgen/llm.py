"""The Python API, as users of vLLM expect it: ``LLM(model).generate(prompts, SamplingParams(...))``."""

from __future__ import annotations

import asyncio
import atexit
import sys
import threading
import weakref
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from hexgen.coordinator.admission import AdmissionLimits
from hexgen.coordinator.answer import Answer
from hexgen.coordinator.coordinator import Coordinator, CoordinatorLimits, ServedModel
from hexgen.coordinator.stream import RequestStream, RequestUpdate, merge
from hexgen.coordinator.tokenizer import Tokenizer, load_tokenizer
from hexgen.errors import EngineError, RequestError, SpecError, UnavailableError
from hexgen.llm_inputs import Prompt, Prompts, as_prompts, one_each
from hexgen.plan import EngineOptions, Plan
from hexgen.request import RequestOutput, SamplingParams

if TYPE_CHECKING:
    from hexgen.deploy.base import Deployment
    from hexgen.deploy.ray_launch import Launchable
    from hexgen.worker.report import RankReport

Message = Mapping[str, str]
T = TypeVar("T")

# vLLM's names of what we call otherwise.
_VLLM_OPTIONS = {
    "max_model_len": "max_context",
    "max_num_seqs": "max_sequences",
    "max_num_batched_tokens": "token_budget",
    "block_size": "page_size",
    "enable_prefix_caching": "prefix_cache",
}


class LLM:
    """A model that is running. Ends with ``close()``, with the ``with`` block, or with the process.

    ``model`` is a checkpoint's directory or the name of a bundled one (default: the plan's, else ``demo``).
    ``plan`` is a plan or its file; without one, this machine or the cluster at ``ray_address`` is planned over.
    ``backend``: ``in_process`` runs all ranks as threads of this process, ``ray`` on Ray; ``auto`` takes Ray where
    the plan names several nodes or an address is given. ``options`` are those of ``EngineOptions`` (``dtype``,
    ``page_size``, ``token_budget``, ``max_sequences``, ``max_context``, ``prefix_cache``), under vLLM's names too.

    Raises ``SpecError``, ``InfeasibleError``, ``CheckpointError`` or ``DeploymentError`` where it cannot start.
    Threads may share one; requests of all of them run together.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        plan: Plan | str | Path | None = None,
        *,
        ray_address: str | None = None,
        backend: Literal["auto", "in_process", "ray"] = "auto",
        **options: Any,
    ) -> None:
        from hexgen.deploy.ray_launch import prepare

        if backend not in ("auto", "in_process", "ray"):
            raise SpecError(f"must be auto, in_process or ray, not {backend!r}", where="backend")
        self._closed = False
        ready = _with_options(prepare(plan, model, ray_address=ray_address), options)
        self.plan = ready.plan
        self.tokenizer: Tokenizer | None = load_tokenizer(ready.model_path)
        if backend == "auto":
            nodes = {device.split("/")[0] for stage in ready.plan.stages for device in stage.devices}
            backend = "ray" if ray_address is not None or len(nodes) > 1 else "in_process"
        self._deployment = _deploy(ready, backend, ray_address)
        try:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="hexgen-llm", daemon=True)
            self._thread.start()
            self._coordinator = self._run(self._start(ready))
            _close_at_exit(weakref.ref(self))
        except BaseException:
            self.close()
            raise

    async def _start(self, ready: Launchable) -> Coordinator:
        model = ServedModel(str(ready.plan.model), ready.model.vocab_size, ready.model.eos_token_ids)
        # Whoever calls generate() has all prompts already: none is refused because others wait.
        limits = CoordinatorLimits(
            AdmissionLimits(max_waiting_requests=sys.maxsize, max_waiting_tokens=sys.maxsize)
        )
        coordinator = Coordinator(
            self._deployment.endpoints(), self._deployment.secret, model, self.tokenizer, limits, ready.plan
        )
        await coordinator.start()
        return coordinator

    # ---- answers -------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompts,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """One ``RequestOutput`` a prompt, in the order of ``prompts``.

        A prompt is a text, a list of token ids, or ``{"prompt": ...}`` or ``{"prompt_token_ids": ...}``;
        ``prompts`` is one or a list of them. One ``sampling_params`` for all (default: its own), or one each.
        ``use_tqdm`` shows progress on standard error. ``RequestError`` where any prompt or parameter is wrong.
        """
        given = as_prompts(prompts)
        return self._run(self._generate(given, one_each(sampling_params, len(given)), use_tqdm))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        add_generation_prompt: bool = True,
    ) -> list[RequestOutput]:
        """As ``generate``, for one conversation or a list of them, through the model's chat template."""
        if self.tokenizer is None:
            raise RequestError(
                "this model has no tokenizer", where="messages", remedy="use generate with token ids"
            )
        if not messages:
            raise RequestError("is empty", where="messages")
        first = messages[0]
        conversations: Sequence[Any] = [messages] if isinstance(first, Mapping) else messages
        prompts: list[str | tuple[int, ...]] = [
            self.tokenizer.encode(self.tokenizer.render_chat(c, add_generation_prompt), add_special_tokens=False)
            for c in conversations
        ]
        return self._run(self._generate(prompts, one_each(sampling_params, len(prompts)), use_tqdm))

    def generate_stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestUpdate]:
        """Updates of one request as they come. Leaving the loop early aborts it."""
        (given,) = as_prompts([prompt])
        updates = self._open_coordinator().generate(given, sampling_params or SamplingParams())
        try:
            while (update := self._run(_next(updates))) is not None:
                yield update
        finally:
            if not self._closed:
                self._run(_close(updates))

    async def _generate(
        self,
        prompts: Sequence[str | tuple[int, ...]],
        sampling: Sequence[SamplingParams],
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        coordinator = self._open_coordinator()
        streams: list[RequestStream] = []
        try:
            for prompt, params in zip(prompts, sampling, strict=True):
                streams.append(await coordinator.submit(prompt, params))
            answers = [
                Answer(stream, prompt if isinstance(prompt, str) else None)
                for stream, prompt in zip(streams, prompts, strict=True)
            ]
            with _Progress(len(streams), shown=use_tqdm) as progress:
                async for position, update in merge(streams):
                    answers[position].add(update)
                    progress.add(update)
        finally:
            for stream in streams:
                stream.abort()
        return [answer.output() for answer in answers]

    def reports(self) -> dict[str, RankReport]:
        """What each device holds and where the time of its steps went, by device id."""
        return self._deployment.reports()

    # ---- life ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop everything that was started; harmless when called again."""
        if self._closed:
            return
        self._closed = True
        try:
            if hasattr(self, "_coordinator"):
                asyncio.run_coroutine_threadsafe(self._coordinator.close(), self._loop).result()
            if hasattr(self, "_thread"):
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join()
                self._loop.close()
        finally:
            self._deployment.stop()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_coordinator(self) -> Coordinator:
        if self._closed:
            raise UnavailableError("this LLM is closed")
        return self._coordinator

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` on the coordinator's loop and wait; Ctrl-C cancels it, which aborts its requests."""
        if self._closed:
            work.close()
            raise UnavailableError("this LLM is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except (EngineError, UnavailableError) as error:
            failure = self._deployment.failure()
            if failure is not None:
                raise failure from error
            raise
        except BaseException:
            future.cancel()
            raise


def _close_at_exit(ref: weakref.ref[LLM]) -> None:
    """A script may simply end: what close() stops must not meet an interpreter that is half gone."""

    def close() -> None:
        llm = ref()
        if llm is not None:
            llm.close()

    # atexit itself comes too late: thread pools, which stopping a deployment needs, have been shut by then.
    # concurrent.futures registers its own end in the same place; the last registered runs first.
    getattr(threading, "_register_atexit", atexit.register)(close)


def _with_options(ready: Launchable, options: Mapping[str, Any]) -> Launchable:
    """``ready`` with engine options changed, checked again: other options need other memory."""
    from hexgen.validate import check_plan

    known = {field.name for field in fields(EngineOptions)}
    changed = {_VLLM_OPTIONS.get(name, name): value for name, value in options.items() if value is not None}
    for name in changed:
        if name not in known:
            raise SpecError(
                "is no option of the engine", where=name, remedy=f"there are {', '.join(sorted(known))}"
            )
    if not changed:
        return ready
    plan = replace(ready.plan, engine=replace(ready.plan.engine, **changed))
    check_plan(plan, ready.cluster, ready.model)
    return replace(ready, plan=plan)


def _deploy(ready: Launchable, backend: str, ray_address: str | None) -> Deployment:
    if backend == "ray":
        from hexgen.deploy.ray_launch import deploy

        return deploy(ready, ray_address=ray_address)
    from hexgen.deploy.in_process import InProcessDeployment

    return InProcessDeployment(ready.plan, ready.cluster, ready.model_path)


async def _next(updates: Any) -> RequestUpdate | None:
    update: RequestUpdate | None = await anext(updates, None)
    return update


async def _close(updates: Any) -> None:
    await updates.aclose()


class _Progress:
    """Finished requests and tokens, on standard error."""

    def __init__(self, total: int, *, shown: bool) -> None:
        self._total = total
        self._bar: Any = None
        if shown:
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True))

    def __enter__(self) -> _Progress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("requests", total=self._total)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def add(self, update: RequestUpdate) -> None:
        if self._bar is not None and update.finished:
            self._bar.advance(self._task)
