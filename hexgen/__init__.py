"""A distributed inference engine for clusters whose GPUs do not match.

What is named here is loaded when it is first used: ``import hexgen`` itself imports neither torch nor Ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hexgen.cluster import Cluster, load_cluster
    from hexgen.errors import (
        CheckpointError,
        DeploymentError,
        EngineError,
        HexgenError,
        InfeasibleError,
        ModelNotFoundError,
        QueueFullError,
        RequestError,
        RequestTooLargeError,
        SpecError,
        UnavailableError,
    )
    from hexgen.llm import LLM
    from hexgen.model import ModelSpec, load_model
    from hexgen.plan import EngineOptions, Plan, dump_plan, load_plan
    from hexgen.request import CompletionOutput, RequestOutput, SamplingParams
    from hexgen.workload import Workload

__version__ = "0.1.0"

_HOMES = {
    "hexgen.cluster": ("Cluster", "load_cluster"),
    "hexgen.errors": (
        "CheckpointError",
        "DeploymentError",
        "EngineError",
        "HexgenError",
        "InfeasibleError",
        "ModelNotFoundError",
        "QueueFullError",
        "RequestError",
        "RequestTooLargeError",
        "SpecError",
        "UnavailableError",
    ),
    "hexgen.llm": ("LLM",),
    "hexgen.model": ("ModelSpec", "load_model"),
    "hexgen.plan": ("EngineOptions", "Plan", "dump_plan", "load_plan"),
    "hexgen.request": ("CompletionOutput", "RequestOutput", "SamplingParams"),
    "hexgen.workload": ("Workload",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "LLM",
    "CheckpointError",
    "Cluster",
    "CompletionOutput",
    "DeploymentError",
    "EngineError",
    "EngineOptions",
    "HexgenError",
    "InfeasibleError",
    "ModelNotFoundError",
    "ModelSpec",
    "Plan",
    "QueueFullError",
    "RequestError",
    "RequestOutput",
    "RequestTooLargeError",
    "SamplingParams",
    "SpecError",
    "UnavailableError",
    "Workload",
    "__version__",
    "dump_plan",
    "load_cluster",
    "load_model",
    "load_plan",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hexgen' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
