"""A plan served on a virtual clock: the engine's own batching and routing, the planner's own step times."""

from hexgen.scheduler.simulation.arrivals import gamma_arrivals, replay, requests_of
from hexgen.scheduler.simulation.rates import AttainmentPoint, attainment_curve, carries, largest_rate
from hexgen.scheduler.simulation.requests import Requests
from hexgen.scheduler.simulation.result import SimulationResult
from hexgen.scheduler.simulation.run import simulate
from hexgen.scheduler.simulation.served import served

__all__ = [
    "AttainmentPoint",
    "Requests",
    "SimulationResult",
    "attainment_curve",
    "carries",
    "gamma_arrivals",
    "largest_rate",
    "replay",
    "requests_of",
    "served",
    "simulate",
]
