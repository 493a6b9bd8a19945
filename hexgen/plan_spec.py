"""A plan: which devices hold which layers, and which way requests go. A file a person can read and edit."""

from __future__ import annotations

from dataclasses import dataclass, field

from hexgen.cluster_spec import Cluster
from hexgen.model_spec import DType

Layers = tuple[int, int]  # half-open


@dataclass(frozen=True, slots=True)
class Stage:
    """A tensor-parallel group of devices that holds one half-open range of layers."""

    name: str
    layers: Layers
    devices: tuple[str, ...]  # ids, rank order
    shares: tuple[float, ...] | None = None  # None: equal

    @property
    def width(self) -> int:
        return len(self.devices)


@dataclass(frozen=True, slots=True)
class Hop:
    """A stage on a route, and which of its layers the route uses."""

    stage: str
    layers: Layers


@dataclass(frozen=True, slots=True)
class Route:
    path: tuple[Hop, ...]
    weight: float = 1.0
    # Tokens of KV cache that every stage of the route keeps for it; None: as many as fit.
    kv_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How the plan is run. All of it has defaults; a plan file names only what differs."""

    dtype: DType | None = None  # None: the checkpoint's own on GPUs, float32 on CPUs
    page_size: int = 16  # tokens of one KV page
    token_budget: int = 512  # tokens of one step
    max_sequences: int = 64  # sequences running at once on one route
    max_context: int | None = None  # tokens; None: the model's own, or what the KV room allows
    prefix_cache: bool = True


@dataclass(frozen=True, slots=True)
class DevicePrediction:
    """What one device will hold, in bytes."""

    device: str
    weights_bytes: int
    kv_bytes: int
    buffers_bytes: int
    memory_bytes: int  # what there is


@dataclass(frozen=True, slots=True)
class StagePrediction:
    """Seconds a step of the plan's own workload spends in one stage."""

    stage: str
    prefill_step_s: float
    decode_step_s: float
    utilisation: float  # of the stage when the cluster serves `Prediction.tokens_s`
    prefill_utilisation: float | None = None  # the part of it that prompts take
    decode_utilisation: float | None = None


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the planner expects for its workload. ``tokens_s`` counts output tokens of the whole cluster."""

    objective: str
    tokens_s: float
    requests_s: float
    ttft_s: float
    tpot_s: float
    latency_s: float
    single_tokens_s: float  # output tokens/s of one request alone
    bottleneck: str
    upper_bound_tokens_s: float | None = None
    price_usd_h: float | None = None
    max_flow_tokens_s: float | None = None  # prompt and output tokens; compute and links alone, as Helix counts
    max_flow_bound_tokens_s: float | None = None  # that no placement's max-flow exceeds
    slo_requests_s: float | None = None  # the largest rate at which 99 % of requests keep the limits, simulated
    slo_attainment: float | None = None  # the share that keeps them at the workload's own rate, simulated
    source: str | None = None  # of the figures; None: the built-in catalogue
    devices: tuple[DevicePrediction, ...] = ()
    stages: tuple[StagePrediction, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    model: str
    cluster: Cluster | str  # inline, or the path of the file as written in the plan
    stages: tuple[Stage, ...]
    routes: tuple[Route, ...]
    engine: EngineOptions = field(default_factory=EngineOptions)
    predicted: Prediction | None = None
    version: int = 1

    def stage(self, name: str) -> Stage:
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(name)
