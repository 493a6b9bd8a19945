"""One run of Helix's simulator (a checkout of the ASPLOS'25 artifact): set up, fed, and measured."""

from __future__ import annotations

import importlib
import math
import random
import statistics
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helix_layout import SINK, SOURCE, Layout, cluster_ini

from hexgen.errors import SpecError

MODELS = {"llama-2-70b": "LLaMa70B", "llama-1-30b": "LLaMa30B"}
# Of the artifact's offline runs (artifact_evaluation/*/step3_simulation.py): shares of KV room, queries at first.
ROOM_OF_A_NODE, ROOM_OF_ALL, FIRST_QUERIES = 0.85, 0.8, 20


@dataclass(frozen=True, slots=True)
class Load:
    """``rate`` requests per second, or None: as many as fit, as Helix launches them offline."""

    rate: float | None
    warmup_s: int
    window_s: int


@dataclass(frozen=True, slots=True)
class Run:
    """One seed. Rates per second, latencies in seconds: median and 95th percentile."""

    name: str
    weights: str  # "maxflow" or "plan"
    seed: int
    max_flow_tokens_s: float
    decode_tokens_s: float
    prompts_s: float
    prompt_tokens: float  # mean of the prompts served
    rejected: int  # tries that found no room: dropped by Helix's offline feeder, repeated by ours
    waiting: int  # requests left without room at the end
    prompt_p50_s: float
    prompt_p95_s: float
    ttft_p50_s: float
    ttft_p95_s: float
    decode_p50_s: float
    decode_p95_s: float


class Helix:
    """The modules of a checkout."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "simulator" / "event_simulator").is_dir():
            raise SpecError(
                "holds no simulator/event_simulator", where=str(folder), remedy="name a checkout of Helix"
            )
        sys.path.insert(0, str(folder))

        def module(name: str) -> Any:
            return importlib.import_module(f"simulator.{name}")

        self.cluster = module("event_simulator.cluster_simulator")
        self.scheduling = module("scheduler.global_maxflow.global_maxflow_scheduler")
        self.feeding = module("trace_generator.simulator_query_feeder")
        self.lengths = module("trace_generator.length_sampler")
        self.prompt = module("event_simulator.request").RequestPhase.Initialization

    def simulator(self, layout: Layout, model: str) -> tuple[Any, int]:
        """A simulator with the layout loaded and its scheduler ready, and the second at which it can start."""
        simulator = self.cluster.ClusterSimulator(
            model_name=getattr(self.cluster.ModelName, MODELS[model]), machine_num_dict=layout.kinds
        )
        tables = simulator.model_manager
        _check_layers(layout, tables)

        def room(kind: str, held: int) -> int:
            return int(tables.get_kv_cache_capacity(machine_type=kind, num_on_node_layers=held))

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cluster.ini"
            path.write_text(cluster_ini(layout, room), encoding="utf-8")
            simulator.from_ini_file(config_file_name=str(path))
        kv = self.scheduling.KVParameters(expected_kv_hwm=ROOM_OF_A_NODE, expected_output_length_ratio=1)
        simulator.init_scheduler(
            scheduling_method=self.cluster.SchedulingMethod.MaxFlow,
            args={"kv_param": kv, "scheduling_mode": self.scheduling.SchedulingMode.Offline},
        )
        simulator.init_query_manager()
        simulator.mark_as_ready()
        sizes = tables.get_model_params()
        loaded_s = 0.0
        for i, machine in enumerate(layout.machines, start=2):
            node = simulator.name_2_compute_node[f"compute_node_{i}"]
            held = list(range(machine.first, machine.end))
            simulator.issue_command_load_model(
                load_time=0, node_uid=node.node_uid, new_layers=held, request_uids_to_wait=[]
            )
            loaded_s = max(loaded_s, sum(sizes[layer] for layer in held) / node.disk_speed)
        start_s = math.ceil(loaded_s) + 1
        simulator.simulate(until=start_s)
        simulator.update_scheduler()
        return simulator, start_s


def _check_layers(layout: Layout, tables: Any) -> None:
    for machine in layout.machines:
        held = machine.end - machine.first
        most = tables.get_max_num_layers(machine_type=machine.kind)
        if held > most:
            raise SpecError(
                f"holds {held} layers, and Helix's table of {machine.kind} ends at {most}",
                where=f"stage {machine.name}",
                remedy="such a plan cannot be judged there",
            )


def weigh(simulator: Any, layout: Layout) -> None:
    """Let the scheduler choose by the plan's weights instead of by its max-flow solution.

    Where routes share a stage, its next steps are drawn by their shares of what leaves it, not route by route.
    """
    nodes = simulator.scheduler.core.scheduler_nodes
    uids = {SOURCE: simulator.source_node.node_uid, SINK: simulator.sink_node.node_uid}
    for i, machine in enumerate(layout.machines, start=2):
        uids[machine.name] = simulator.name_2_compute_node[f"compute_node_{i}"].node_uid
    shares = {(uids[wire.start], uids[wire.to]): wire.weight for wire in layout.wires}
    flow = simulator.scheduler.flow_graph
    for uid, link in simulator.links.items():
        a, b = link.node_in.node_uid, link.node_out.node_uid
        used = shares[a, b] * flow.flow_value
        speed = link.bandwidth * used / flow.get_link_capacity(prev_node_uid=a, next_node_uid=b)["transmission"]
        out = nodes[a].outbound_link_uids.index(uid)
        nodes[a].outbound_links_used_token_throughput[out] = used
        nodes[a].execution_scheduler.capacities[out] = used
        nodes[a].outbound_links_used_speed[out] = speed
        nodes[b].inbound_links_used_speed[nodes[b].inbound_link_uids.index(uid)] = speed


class RateFeeder:
    """Poisson arrivals; who finds no KV room waits, first come first served, and tries again when one ends."""

    def __init__(self, simulator: Any, start_s: float, rate: float, end_s: float, lengths: Any, seed: int) -> None:
        self.simulator = simulator
        self.end_s = end_s
        self.tried = 0
        self.arrived: dict[int, tuple[float, int, int]] = {}
        self.waiting: deque[tuple[float, int, int]] = deque()
        times, draws = random.Random(1000 + seed), random.Random(seed)
        self.arrivals: list[tuple[float, int, int]] = []
        after_s = times.expovariate(rate)
        while start_s + after_s < end_s:
            i = draws.randint(0, len(lengths.input_length_list) - 1)
            self.arrivals.append((start_s + after_s, lengths.input_length_list[i], lengths.output_length_list[i]))
            after_s += times.expovariate(rate)

    def run(self) -> None:
        self.simulator.register_offline_query_feeder(offline_query_feeder=self)
        self.simulator.query_manager.reject_query = self.rejected
        for arrival in self.arrivals:
            self.simulator.simulate(until=arrival[0])
            if self.waiting:
                self.waiting.append(arrival)
            else:
                self._issue(arrival)
        self.simulator.simulate(until=self.end_s)

    def rejected(self, request: Any) -> None:
        self.tried += 1
        uid = request.base_query_uid
        del self.simulator.query_manager.queries_on_the_fly[uid]
        self.waiting.appendleft(self.arrived.pop(uid))

    def check_launch_new_query(self, finished_request_type: Any) -> None:
        """Their simulator calls this when a prompt or a whole query has ended."""
        del finished_request_type
        if self.waiting:
            self._issue(self.waiting.popleft())

    def _issue(self, arrival: tuple[float, int, int]) -> None:
        manager = self.simulator.query_manager
        self.arrived[manager.next_query_uid] = arrival
        now_s = self.simulator.current_time
        manager.issue_query(creation_time=now_s, input_seq_length=arrival[1], output_seq_length=arrival[2])


def judge(helix: Helix, layout: Layout, model: str, weights: str, load: Load, seed: int) -> Run:
    """One run, and its figures over the window."""
    simulator, start_s = helix.simulator(layout, model)
    if weights == "plan":
        weigh(simulator, layout)
    after_s = load.warmup_s + load.window_s
    arrived: dict[int, tuple[float, int, int]] = {}
    if load.rate is None:
        offline = helix.feeding.OfflineRequestFeeder(
            initial_query_count=FIRST_QUERIES,
            start_time=start_s,
            duration=after_s,
            stop_at_duration=True,
            feed_hwm=ROOM_OF_ALL,
            seed=seed,
        )
        offline.auto_simulate(simulator=simulator)
        manager = simulator.query_manager
        issued = manager.next_query_uid - helix.cluster.BASE_QUERY_UID
        rejected, waiting = issued - len(manager.queries_on_the_fly) - len(manager.finished_queries), 0
    else:
        sampler = helix.lengths.LengthSampler(dataset=helix.lengths.Dataset.AzureConversation, seed=seed)
        feeder = RateFeeder(simulator, start_s, load.rate, start_s + after_s, sampler, seed)
        feeder.run()
        arrived, rejected, waiting = feeder.arrived, feeder.tried, len(feeder.waiting)
    prompts: list[float] = []
    firsts: list[float] = []
    decodes: list[float] = []
    tokens: list[int] = []
    for done_s, request in simulator.finished_requests.values():
        if not start_s + load.warmup_s <= done_s <= start_s + after_s:
            continue
        sent_s = request.location_history[0][1]
        took_s = request.location_history[-1][1] - sent_s
        if request.phase == helix.prompt:
            prompts.append(took_s)
            tokens.append(request.token_seq_length)
            firsts.append(took_s + sent_s - arrived.get(request.base_query_uid, (sent_s, 0, 0))[0])
        else:
            decodes.append(took_s)
    return Run(
        name=layout.name,
        weights=weights,
        seed=seed,
        max_flow_tokens_s=float(simulator.scheduler.flow_graph.flow_value),
        decode_tokens_s=len(decodes) / load.window_s,
        prompts_s=len(prompts) / load.window_s,
        prompt_tokens=statistics.fmean(tokens) if tokens else math.nan,
        rejected=rejected,
        waiting=waiting,
        prompt_p50_s=quantile(prompts, 0.5),
        prompt_p95_s=quantile(prompts, 0.95),
        ttft_p50_s=quantile(firsts, 0.5),
        ttft_p95_s=quantile(firsts, 0.95),
        decode_p50_s=quantile(decodes, 0.5),
        decode_p95_s=quantile(decodes, 0.95),
    )


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[int(len(values) * share)] if values else math.nan
