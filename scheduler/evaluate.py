"""What a plan will do: one evaluator for the planner's own plans, for baselines, for plans that people write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hexgen.cluster import Cluster, Device, Link
from hexgen.memory import PlanMemory, plan_memory
from hexgen.model import ModelSpec
from hexgen.plan import DevicePrediction, Plan, Prediction, Route, Stage, StagePrediction
from hexgen.scheduler.bound import upper_bound_tokens_s
from hexgen.scheduler.cost import CostModel, GroupShape, StageProfile
from hexgen.scheduler.flow_bound import flow_bound_tokens_s
from hexgen.scheduler.groups import Topology
from hexgen.scheduler.lanes.merged import merged, merged_loads, ways_of_plan
from hexgen.scheduler.pipeline import (
    Part,
    alone,
    at_rate,
    concurrency_for,
    most_within_limits,
    steady,
)
from hexgen.scheduler.residency import tabled_kv_tokens
from hexgen.scheduler.sharing import RouteState, StageLoad, stage_loads, stretches, sustained
from hexgen.scheduler.tables.source import CostTable
from hexgen.scheduler.traffic import Traffic, traffic_of
from hexgen.units import format_time
from hexgen.workload import Slo, Workload


def evaluate(
    plan: Plan,
    cluster: Cluster,
    model: ModelSpec,
    workload: Workload,
    objective: str = "throughput",
    *,
    cost_table: CostTable | None = None,
) -> Prediction:
    """The prediction for a valid plan (``hexgen.validate.check_plan``). Raises ``InfeasibleError``."""
    memory = plan_memory(plan, cluster, model)
    return predict(plan, cluster, model, workload, memory, objective, cost_table=cost_table)


def predict(
    plan: Plan,
    cluster: Cluster,
    model: ModelSpec,
    workload: Workload,
    memory: PlanMemory,
    objective: str,
    *,
    cost_table: CostTable | None = None,
) -> Prediction:
    traffic = traffic_of(model, workload, plan.engine)
    cost = CostModel(model, memory.dtype, plan.engine, cost_table)
    topology = Topology(cluster)
    devices = {device.id: device for device in cluster.devices()}
    profiles = {stage.name: cost.profile(group_shape(stage, topology, devices)) for stage in plan.stages}
    kv_tokens = memory.kv_tokens
    if cost_table is not None and cost_table.holds_kv:
        kv_tokens = tabled_kv_tokens(plan, profiles, model)
    # These two count what is served in time, not all that could be.
    limited = objective in ("slo", "cost") and traffic.slo != Slo()
    # A published table counts a machine's rate whatever it is busy with: what waits at it is one batch. Plans that
    # share no stage are predicted alike, so that plans can be compared.
    merges = cost_table is not None and cost_table.holds_kv
    states = [
        route_state(plan, route, kv, topology, cost, profiles, devices, traffic, limited and not merges)
        for route, kv in zip(plan.routes, kv_tokens, strict=True)
    ]
    if merges:
        return _merged_prediction(plan, cluster, cost, memory, states, traffic, objective, limited)
    rates = sustained(plan, states, traffic)
    total = sum(rates)
    scale = 1.0 if traffic.rate is None or traffic.rate >= total else traffic.rate / total
    carried = [rate * scale for rate in rates]
    running = [
        at_rate(s.parts, s.edges, s.back, traffic, s.most, rate, slowed)
        for s, rate, slowed in zip(states, carried, stretches(plan, states, carried), strict=True)
    ]
    loads = stage_loads(plan, states, rates)
    used = {device for stage in plan.stages for device in stage.devices}
    return Prediction(
        objective=objective,
        tokens_s=total * traffic.output,
        requests_s=total,
        ttft_s=_weighted([s.ttft_s for s in running], rates),
        tpot_s=_weighted([s.tpot_s for s in running], rates),
        latency_s=_weighted([s.latency_s for s in running], rates),
        single_tokens_s=max(s.alone.tokens_s for s in states),
        bottleneck=_bottleneck(plan, states, rates, kv_tokens, traffic),
        upper_bound_tokens_s=_upper_bound(plan, cluster, cost, traffic),
        price_usd_h=_price(cluster, used),
        source=None if cost_table is None else cost_table.source,
        devices=memory.devices,
        stages=_stage_predictions(plan, states, loads),
    )


def _merged_prediction(
    plan: Plan,
    cluster: Cluster,
    cost: CostModel,
    memory: PlanMemory,
    states: Sequence[RouteState],
    traffic: Traffic,
    objective: str,
    limited: bool,
) -> Prediction:
    """Stages merge what waits at them (`hexgen.scheduler.lanes.model`)."""
    ways = ways_of_plan(plan, states)
    total, running = merged(ways, states, traffic, limited)
    rates = [total * way.weight for way in ways]
    loads = merged_loads(plan, states, traffic, rates)
    busiest = max(plan.stages, key=lambda stage: loads[stage.name].prefill + loads[stage.name].decode)
    load = loads[busiest.name].prefill + loads[busiest.name].decode
    text = f"stage {busiest.name} ({load:.0%} of its published rate)"
    if load < 0.99:  # else it is what bounds the plan
        held = sum(state.most for state in states)
        text = f"KV room for {held} requests at once, {format_time(running.trip_s)} a token; busiest is {text}"
    return Prediction(
        objective=objective,
        tokens_s=total * traffic.output,
        requests_s=total,
        ttft_s=running.ttft_s,
        tpot_s=running.trip_s,
        latency_s=running.latency_s,
        single_tokens_s=max(state.alone.tokens_s for state in states),
        bottleneck=text,
        upper_bound_tokens_s=_upper_bound(plan, cluster, cost, traffic),
        price_usd_h=_price(cluster, {device for stage in plan.stages for device in stage.devices}),
        source=None if cost.table is None else cost.table.source,
        devices=memory.devices,
        stages=_stage_predictions(plan, states, loads),
    )


def _upper_bound(plan: Plan, cluster: Cluster, cost: CostModel, traffic: Traffic) -> float | None:
    """Of the catalogue's figures by arithmetic; of a published table by its rates; measured ones have none."""
    if cost.table is None:
        return upper_bound_tokens_s(
            cost.model, cost.dtype, cluster.nodes, traffic, plan.engine.max_sequences, cluster.budget_usd_h
        )
    if not cost.table.holds_kv:
        return None
    return (
        flow_bound_tokens_s(cost, cluster.nodes, traffic, in_turns=True)
        * traffic.output
        / (traffic.prompt + traffic.decodes)
    )


def group_shape(stage: Stage, topology: Topology, devices: Mapping[str, Device]) -> GroupShape:
    """The stage as the cost model sees it; its link is the slowest between any two of its nodes."""
    members = [devices[device] for device in stage.devices]
    places = sorted({topology.index[device.node] for device in members})
    pairs = [topology.link(a, b) for i, a in enumerate(places) for b in places[i + (len(places) > 1) :]]
    if any(sum(1 for m in members if topology.index[m.node] == place) > 1 for place in places):
        pairs += [topology.nodes[place].link for place in places]
    link = Link(min(p.bandwidth_bytes_s for p in pairs), max(p.latency_s for p in pairs))
    return GroupShape(tuple(device.type for device in members), link, stage.shares)


def route_state(
    plan: Plan,
    route: Route,
    kv_tokens: int,
    topology: Topology,
    cost: CostModel,
    profile_of: Mapping[str, StageProfile],
    devices: Mapping[str, Device],
    traffic: Traffic,
    limited: bool,
) -> RouteState:
    """The route with its room in use, and one request alone on it; ``limited``: no fuller than limits allow."""
    stages = [plan.stage(hop.stage) for hop in route.path]
    profiles = [profile_of[stage.name] for stage in stages]
    places = [topology.index[devices[stage.devices[0]].node] for stage in stages]
    last = len(stages) - 1
    parts = tuple(
        Part(profile, hop.layers[1] - hop.layers[0], i == 0, i == last)
        for i, (profile, hop) in enumerate(zip(profiles, route.path, strict=True))
    )
    edges = tuple(
        cost.edge(profiles[i], profiles[i + 1], topology.link(places[i], places[i + 1])) for i in range(last)
    )
    back = cost.token_edge(profiles[-1], profiles[0], topology.link(places[-1], places[0])) if last else None
    # A route that holds less than one mean request still serves shorter ones, one at a time.
    most = max(1, concurrency_for(kv_tokens, traffic))
    if limited:
        most = max(1, most_within_limits(parts, edges, back, traffic, most))
    return RouteState(
        parts,
        edges,
        back,
        most,
        steady(parts, edges, back, traffic, float(most)),
        alone(parts, edges, back, traffic),
    )


def _stage_predictions(
    plan: Plan, states: Sequence[RouteState], loads: Mapping[str, StageLoad]
) -> tuple[StagePrediction, ...]:
    first: dict[str, tuple[Part, RouteState]] = {}
    for route, state in zip(plan.routes, states, strict=True):
        for hop, part in zip(route.path, state.parts, strict=True):
            first.setdefault(hop.stage, (part, state))
    return tuple(_stage_prediction(stage.name, first.get(stage.name), loads[stage.name]) for stage in plan.stages)


def _stage_prediction(name: str, used: tuple[Part, RouteState] | None, load: StageLoad) -> StagePrediction:
    """The stage's steps, as the first route that passes it makes them."""
    if used is None:
        return StagePrediction(name, 0.0, 0.0, 0.0, 0.0, 0.0)  # on no route: idle
    part, state = used
    return StagePrediction(
        name,
        prefill_step_s=part.profile.step_s(part.layers, state.full.mix.mixed, part.embeds, part.samples),
        decode_step_s=part.profile.step_s(part.layers, state.full.mix.plain, part.embeds, part.samples),
        utilisation=min(1.0, load.prefill + load.decode),
        prefill_utilisation=min(1.0, load.prefill),
        decode_utilisation=min(1.0, load.decode),
    )


def _bottleneck(
    plan: Plan, states: Sequence[RouteState], rates: Sequence[float], kv_tokens: Sequence[int], traffic: Traffic
) -> str:
    """What bounds the route that carries most, in words."""
    number = max(range(len(states)), key=lambda i: (rates[i], -i))
    route, state = plan.routes[number], states[number]
    full = state.full
    if full.limit == "link":
        a, b = route.path[full.index].stage, route.path[full.index + 1].stage
        text = f"the link from {a} to {b} ({format_time(full.link_busy_s[full.index])} of each step)"
    elif full.limit == "round trip":
        text = f"the way between the stages ({format_time(full.tpot_s)} for a round trip)"
    else:
        stage = route.path[full.index].stage
        text = f"stage {stage} ({format_time(full.busy_s[full.index])} a step)"
    if state.most < traffic.max_sequences:
        text += f"; KV room for {state.most} requests at once ({kv_tokens[number]} tokens)"
    prefix = f"route {number}: " if len(plan.routes) > 1 else ""
    return prefix + text


def _weighted(values: Sequence[float], weights: Sequence[float]) -> float:
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


def _price(cluster: Cluster, devices: set[str]) -> float | None:
    """USD per hour of the nodes that are used; None where one of them has no price."""
    names = {device.rsplit("/", 1)[0] for device in devices}
    prices = [node.price_usd_h for node in cluster.nodes if node.name in names]
    known = [price for price in prices if price is not None]
    return sum(known) if len(known) == len(prices) else None


def stranded_bytes(device: DevicePrediction) -> int:
    """Memory of a device that the plan leaves unused."""
    return device.memory_bytes - device.weights_bytes - device.kv_bytes - device.buffers_bytes
