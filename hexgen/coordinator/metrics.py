"""What the coordinator counts, in a registry of its own, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hexgen.plan import Plan
from hexgen.protocol import Stats
from hexgen.routing import RouteState
from hexgen.worker.report import RankReport

_TTFT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TPOT_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5)
_LATENCY_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class LiveState(Protocol):
    """What is read when somebody scrapes, and costs nothing in between."""

    @property
    def waiting(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def route_states(self) -> Iterable[RouteState]: ...
    def route_stats(self, route: int) -> Stats | None: ...
    def route_tokens_s(self, route: int) -> float | None: ...
    @property
    def rank_reports(self) -> Iterable[RankReport]: ...
    @property
    def plan(self) -> Plan | None: ...


class Metrics:
    """Counters that requests move when they are refused, admitted and finished; never once a token."""

    def __init__(self, live: LiveState) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "hexgen_requests", "Requests by how they ended", ["outcome"], registry=self.registry
        )
        self.prompt_tokens = Counter(
            "hexgen_prompt_tokens", "Prompt tokens of admitted requests", registry=self.registry
        )
        self.output_tokens = Counter("hexgen_output_tokens", "Tokens generated", registry=self.registry)
        self.queue_s = Histogram(
            "hexgen_queue_seconds", "Arrival to route", buckets=_TTFT_S, registry=self.registry
        )
        self.ttft_s = Histogram(
            "hexgen_ttft_seconds", "Arrival to first token", buckets=_TTFT_S, registry=self.registry
        )
        self.tpot_s = Histogram(
            "hexgen_tpot_seconds", "Time per output token after the first", buckets=_TPOT_S, registry=self.registry
        )
        self.latency_s = Histogram(
            "hexgen_request_seconds", "Arrival to last token", buckets=_LATENCY_S, registry=self.registry
        )
        self.registry.register(_LiveCollector(live))

    def exposition(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)


class _LiveCollector(Collector):
    def __init__(self, live: LiveState) -> None:
        self._live = live

    def collect(self) -> Iterable[Metric]:
        live = self._live
        yield GaugeMetricFamily("hexgen_waiting_requests", "Requests that wait for a route", live.waiting)
        yield GaugeMetricFamily("hexgen_running_requests", "Requests sent to a route", live.running)
        gauges = {
            name: GaugeMetricFamily(f"hexgen_{name}", text, labels=["route"])
            for name, text in (
                ("route_up", "1 where the route's head is connected"),
                ("route_weight", "The plan's weight, at the speed that was measured"),
                ("route_speed", "Measured against predicted, as far as the weight follows it yet"),
                ("route_full_tokens_per_second", "Output tokens/s seen while the route was full"),
                ("kv_free_pages", "KV pages free, cached ones included"),
                ("kv_total_pages", "KV pages of the route"),
                ("running_sequences", "Sequences running on the route"),
                ("waiting_sequences", "Sequences in the head's own queue"),
                ("step_seconds", "Mean duration of recent steps"),
                ("step_host_seconds", "Mean time of recent steps outside the model"),
            )
        }
        counters = {
            name: CounterMetricFamily(f"hexgen_{name}", text, labels=["route"])
            for name, text in (
                ("steps", "Steps run"),
                ("preemptions", "Sequences preempted to free pages"),
                ("cached_tokens", "Prompt tokens served from the prefix cache"),
            )
        }
        for state in live.route_states:
            label = [str(state.route)]
            gauges["route_up"].add_metric(label, float(state.up))
            gauges["route_weight"].add_metric(label, state.weight * state.speed)
            gauges["route_speed"].add_metric(label, state.speed)
            measured = live.route_tokens_s(state.route)
            if measured is not None:
                gauges["route_full_tokens_per_second"].add_metric(label, measured)
            gauges["kv_total_pages"].add_metric(label, state.total_pages)
            stats = live.route_stats(state.route)
            if stats is None:
                gauges["kv_free_pages"].add_metric(label, state.free_pages)
                continue
            gauges["kv_free_pages"].add_metric(label, stats.free_pages)
            gauges["running_sequences"].add_metric(label, stats.running)
            gauges["waiting_sequences"].add_metric(label, stats.waiting)
            gauges["step_seconds"].add_metric(label, stats.step_s)
            gauges["step_host_seconds"].add_metric(label, stats.host_s)
            counters["steps"].add_metric(label, stats.steps)
            counters["preemptions"].add_metric(label, stats.preemptions)
            counters["cached_tokens"].add_metric(label, stats.cached_tokens)
        yield from gauges.values()
        yield from counters.values()
        yield from _rank_counters(live.rank_reports)
        if live.plan is not None:
            layers = GaugeMetricFamily(
                "hexgen_layers", "Layers that the stage holds", labels=["stage", "first", "end"]
            )
            for stage in live.plan.stages:
                first, end = stage.layers
                layers.add_metric([stage.name, str(first), str(end)], end - first)
            yield layers


def _rank_counters(reports: Iterable[RankReport]) -> Iterable[Metric]:
    labels = ["stage", "rank", "device"]
    families = {
        name: CounterMetricFamily(f"hexgen_stage_{name}", text, labels=labels)
        for name, text in (
            ("steps", "Steps that the rank has run"),
            ("compute_seconds", "Layers, embedding and output head, with the stage's collectives in them"),
            ("wait_seconds", "Idle, until a step's input was there"),
            ("transfer_seconds", "Passing on to the stage's other ranks and to the next stage"),
            ("host_seconds", "Everything else: batching, headers, page tables, sampling, answering"),
        )
    }
    for report in reports:
        label = [report.stage, str(report.rank), report.device]
        families["steps"].add_metric(label, report.steps)
        for name, seconds in report.seconds.items():
            families[f"{name}_seconds"].add_metric(label, seconds)
    return families.values()
