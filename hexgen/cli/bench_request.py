"""What ``hexgen bench`` was asked, checked, and turned into a load."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hexgen.bench.against import Expected
from hexgen.bench.asks import (
    MAX_REQUESTS,
    MAX_VOCABULARY,
    SAFE_VOCABULARY,
    Ask,
    from_file,
    read_prompts,
    synthetic,
)
from hexgen.bench.client import ServerFacts
from hexgen.cli._common import given_text
from hexgen.cli._load import rate_of
from hexgen.cli.read_plan import read_plan
from hexgen.errors import SpecError
from hexgen.scheduler.simulation import Requests, replay, requests_of
from hexgen.scheduler.task import default_workload
from hexgen.workload import Slo, Workload, load_workload

_REQUESTS = 100  # where nothing says how many
_MOST_CONCURRENCY = 4096
_LIMITS = {"ttft": "ttft_s", "tpot": "tpot_s", "e2el": "latency_s"}


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """The options of the command, as they were given."""

    url: str | None
    grpc: str | None
    requests: int | None
    rate: str | None
    burstiness: float
    concurrency: int | None
    workload: str | None
    trace: Path | None
    prompts: Path | None
    seed: int
    goodput: tuple[str, ...]
    warm_ups: int
    model: str | None
    chat: bool
    ignore_eos: bool
    vocab_size: int | None
    timeout_s: float
    api_key: str | None
    tls_ca: Path | None
    against: Path | None
    cost: Path | None
    as_json: bool
    detailed: bool
    output: Path | None
    plot: Path | None
    fail_on_errors: bool = False


def check(asked: BenchRequest) -> None:
    """What can be told without reading a file."""
    for option, text in (("--url", asked.url), ("--grpc", asked.grpc), ("--model", asked.model)):
        given_text(option, text)
    given_text("--workload", asked.workload)
    if asked.url is not None and asked.grpc is not None:
        raise SpecError("one server at a time", remedy="give --url or --grpc, not both")
    if asked.requests is not None and not 1 <= asked.requests <= MAX_REQUESTS:
        raise SpecError(f"must lie between 1 and {MAX_REQUESTS}, not {asked.requests}", where="--requests")
    if asked.concurrency is not None and not 1 <= asked.concurrency <= _MOST_CONCURRENCY:
        raise SpecError(
            f"must lie between 1 and {_MOST_CONCURRENCY}, not {asked.concurrency}", where="--concurrency"
        )
    if asked.concurrency is not None and asked.rate is not None:
        raise SpecError("a closed loop has no rate of its own", remedy="give --rate or --concurrency, not both")
    for name, value in (("--timeout", asked.timeout_s), ("--burstiness", asked.burstiness)):
        if not (math.isfinite(value) and value > 0):
            raise SpecError(f"must be a positive number, not {value:g}", where=name)
    if asked.chat and (asked.prompts is None or asked.grpc is not None):
        raise SpecError("chats are texts, over HTTP", where="--chat", remedy="give --prompts FILE, and --url")
    if asked.trace is not None and asked.prompts is not None:
        raise SpecError("a trace has lengths, a file has prompts", remedy="give --trace or --prompts, not both")
    if asked.cost is not None and asked.against is None:
        raise SpecError("a cost table is for a prediction", where="--cost", remedy="name the plan with --against")
    if asked.detailed and not (asked.as_json or asked.output):
        raise SpecError("is for JSON", where="--detailed", remedy="add --json, or -o FILE")
    if asked.api_key is not None and not asked.api_key.isprintable():
        raise SpecError("has characters that no header can carry", where="--api-key")


def expected_of(asked: BenchRequest) -> Expected | None:
    """The plan of ``--against`` with its cluster and model; None without it."""
    if asked.against is None:
        return None
    read = read_plan(asked.against, asked.cost)
    return Expected(read.plan, read.cluster, read.model, read.table)


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent: a trace's rows, a file's prompts, or what is drawn once the server's context is known."""

    asked: BenchRequest
    workload: Workload
    usual: bool  # nobody named a workload: what does not fit the server is shortened
    trace: Requests | None
    prompts: list[Ask] | None
    slo: Slo

    def asks(self, facts: ServerFacts) -> list[Ask]:
        vocabulary = min(self.asked.vocab_size or facts.vocab_size or SAFE_VOCABULARY, MAX_VOCABULARY)
        if self.prompts is not None:
            return self.prompts
        if self.trace is not None:
            return synthetic(self.trace, vocabulary, self.asked.seed)
        requests = drawn(self.asked, self.fitting(facts))
        if self.usual and facts.max_context is not None:
            requests = shortened(requests, facts.max_context)
        return synthetic(requests, vocabulary, self.asked.seed)

    def fitting(self, facts: ServerFacts) -> Workload:
        """The workload, or where none was named the built-in one in the server's measure."""
        if not self.usual or facts.max_context is None:
            return self.workload
        return replace(default_workload(facts.max_context), rate=self.workload.rate)


def load_of(asked: BenchRequest, expected: Expected | None) -> Load:
    """Raises ``SpecError`` where a file is wrong, naming its line."""
    given = load_workload(asked.workload) if asked.workload else None
    if given is None and expected is not None:
        given = expected.cluster.workload
    workload = given or Workload()
    if asked.rate is not None:
        workload = replace(workload, rate=rate_of(asked.rate))
    slo = _slo(asked.goodput, workload.slo)
    trace = None
    if asked.trace is not None:
        given_rate = None if asked.rate is None or workload.rate == "max" else workload.rate
        trace = replay(asked.trace, limit=asked.requests, rate=given_rate)
        if len(trace) > MAX_REQUESTS:
            raise SpecError(
                f"has {len(trace)} requests, more than {MAX_REQUESTS}",
                where=str(asked.trace),
                remedy="take its first ones with --requests",
            )
        told = load_workload(asked.trace)
        workload = replace(workload, prompt_tokens=told.prompt_tokens, output_tokens=told.output_tokens)
        if asked.rate == "max":
            trace = trace.at_once()
        elif math.isfinite(trace.rate):
            workload = replace(workload, rate=trace.rate)
    prompts = None
    if asked.prompts is not None:
        lines = read_prompts(asked.prompts)
        ids = next((number for number, line in enumerate(lines, 1) if not isinstance(line.prompt, str)), None)
        if asked.chat and ids is not None:
            raise SpecError(
                f"prompt {ids} is token ids, and chats are texts",
                where=str(asked.prompts),
                remedy="give texts, or leave out --chat",
            )
        prompts = from_file(drawn(replace(asked, requests=asked.requests or len(lines)), workload), lines)
    return Load(asked, workload, given is None, trace, prompts, slo)


def drawn(asked: BenchRequest, workload: Workload) -> Requests:
    """As ``hexgen simulate`` draws them for this seed."""
    return requests_of(workload, asked.requests or _REQUESTS, asked.seed, burstiness=asked.burstiness)


def shortened(requests: Requests, max_context: int) -> Requests:
    """Outputs first get what prompts leave of the context, at least half of it; then prompts what is left."""
    outputs = np.minimum(requests.output_tokens, max(1, max_context // 2))
    outputs = np.minimum(requests.output_tokens, np.maximum(outputs, max_context - requests.prompt_tokens))
    prompts = np.minimum(requests.prompt_tokens, np.maximum(1, max_context - outputs))
    return Requests(requests.arrival_s, prompts, np.minimum(outputs, np.maximum(1, max_context - prompts)))


def _slo(limits: tuple[str, ...], slo: Slo) -> Slo:
    """The workload's limits, with those of ``--goodput`` (ms, as vLLM writes them) in their place."""
    for text in limits:
        name, _, figure = text.partition(":")
        try:
            value_ms = float(figure)
        except ValueError:
            value_ms = math.nan
        if name not in _LIMITS or not (math.isfinite(value_ms) and value_ms > 0):
            raise SpecError(
                f"{text[:60]!r} is no limit",
                where="--goodput",
                remedy="give ttft:MS, tpot:MS or e2el:MS, like --goodput ttft:2000",
            )
        slo = replace(slo, **{_LIMITS[name]: value_ms / 1e3})
    return slo
