"""Plans: which devices hold which layers and which way requests go, read from and written to files."""

from hexgen.plan_file import dump_plan, load_plan, parse_plan, plan_to_dict, resolve_cluster
from hexgen.plan_spec import (
    DevicePrediction,
    EngineOptions,
    Hop,
    Layers,
    Plan,
    Prediction,
    Route,
    Stage,
    StagePrediction,
)

__all__ = [
    "DevicePrediction",
    "EngineOptions",
    "Hop",
    "Layers",
    "Plan",
    "Prediction",
    "Route",
    "Stage",
    "StagePrediction",
    "dump_plan",
    "load_plan",
    "parse_plan",
    "plan_to_dict",
    "resolve_cluster",
]
