"""What counts as better under each objective, as one number that people can read."""

from __future__ import annotations

from hexgen.plan import Plan
from hexgen.scheduler.task import Objective

_METRICS: dict[Objective, str] = {
    "throughput": "tokens/s",
    "slo": "tokens/s within the limits",
    "maxflow": "tokens/s",
    "latency": "tokens/s of one request alone",
    "cost": "tokens a dollar",
}


def metric_of(objective: Objective) -> str:
    return _METRICS[objective]


def value_of(plan: Plan, objective: Objective) -> float:
    """Larger is better; in ``metric_of(objective)``. Raises ``ValueError`` for a plan without prediction."""
    predicted = plan.predicted
    if predicted is None:
        raise ValueError("the plan has no prediction")
    if objective == "latency":
        return predicted.single_tokens_s
    if objective == "cost":
        return tokens_a_dollar(predicted.tokens_s, predicted.price_usd_h)
    return predicted.tokens_s


def tokens_a_dollar(tokens_s: float, price_usd_h: float | None) -> float:
    """Nodes without a price count as one dollar an hour together: then only tokens count."""
    return tokens_s * 3600 / (price_usd_h or 1.0)
