"""The discrete-event loop: arrivals, steps on their way through stages and links, tokens that come back."""

from __future__ import annotations

import math
import time
from heapq import heappop, heappush

from hexgen.cluster import Cluster
from hexgen.errors import SpecError
from hexgen.model import ModelSpec
from hexgen.plan import Plan
from hexgen.scheduler.simulation.coast import coast
from hexgen.scheduler.simulation.counted import CountedBatcher
from hexgen.scheduler.simulation.front import FrontDoor
from hexgen.scheduler.simulation.layout import Layout, layout_of
from hexgen.scheduler.simulation.native import native_run
from hexgen.scheduler.simulation.record import Recorder
from hexgen.scheduler.simulation.requests import Requests
from hexgen.scheduler.simulation.result import SimulationResult, result_of
from hexgen.scheduler.simulation.step import CountedStep
from hexgen.scheduler.simulation.tokenwise import TokenwiseBatcher
from hexgen.scheduler.tables.source import CostTable
from hexgen.workload import Slo

_LOOK_TURNS = 256  # events between two looks at the clock on the wall
_BACK = -1  # instead of a hop: the step's tokens are back at the head


def simulate(
    plan: Plan,
    cluster: Cluster,
    model: ModelSpec,
    requests: Requests,
    *,
    cost_table: CostTable | None = None,
    slo: Slo | None = None,
    warmup_s: float = 0.0,
    until_s: float | None = None,
    concurrency: int | None = None,
    most_waiting: int | None = None,
    exact_steps: bool = False,
    compiled: bool | None = None,
) -> SimulationResult:
    """Serve ``requests`` with ``plan`` on a virtual clock.

    ``slo``: what the result counts as kept. Rates are counted from ``warmup_s`` to ``until_s``, where the clock
    stops; without it, everything is served to its end. ``concurrency``: a closed loop instead of the arrival
    times, so many requests at a time. ``most_waiting``: how many may wait at the door before others are refused
    (without a limit, none is). ``exact_steps``: the engine's own batcher forms every step, token by token; slow,
    with the same result. ``compiled``: whether the compiled loop runs it, where there can be one, again with the
    same result (None: where it is worth its while, `native.py`). Raises ``SpecError`` on impossible figures,
    ``InfeasibleError`` where the plan does not fit into memory.
    """
    layout = layout_of(plan, cluster, model, cost_table)
    _check(warmup_s, until_s, concurrency, most_waiting)
    recorder = Recorder(requests, len(layout.routes), slo or Slo(), 0, None)
    until_s = math.inf if until_s is None else until_s
    native = None
    if not exact_steps:
        native = native_run(layout, requests, recorder, concurrency, most_waiting, compiled)
    run = native or Run(layout, requests, recorder, concurrency, most_waiting, tokenwise=exact_steps)
    run.to_end(warmup_s, until_s)
    return result_of(layout, requests, recorder, run, slo or Slo())


def _check(warmup_s: float, until_s: float | None, concurrency: int | None, most_waiting: int | None) -> None:
    if not (math.isfinite(warmup_s) and warmup_s >= 0):
        raise SpecError(f"must be a time of at least zero, not {warmup_s:g}", where="warmup_s")
    if until_s is not None and not until_s > warmup_s:
        raise SpecError(f"{until_s:g} s leave nothing after a warm-up of {warmup_s:g} s", where="until_s")
    if concurrency is not None and concurrency < 1:
        raise SpecError(f"must be at least 1, not {concurrency}", where="concurrency")
    if most_waiting is not None and most_waiting < 1:
        raise SpecError(f"must be at least 1, not {most_waiting}", where="most_waiting")


class Run:
    """One simulation. ``to_end`` is called once."""

    def __init__(
        self,
        layout: Layout,
        requests: Requests,
        recorder: Recorder,
        concurrency: int | None = None,
        most_waiting: int | None = None,
        *,
        tokenwise: bool = False,
    ) -> None:
        kind = TokenwiseBatcher if tokenwise else CountedBatcher
        self.batchers: list[CountedBatcher | TokenwiseBatcher] = [
            kind(path.limits, layout.windows) for path in layout.routes
        ]
        self.now_s = 0.0
        self.started_s = 0.0  # the window that rates are counted in: from here to now_s
        self.busy_s = [0.0] * len(layout.stages)  # in the window
        self.link_busy_s = [0.0] * layout.links
        self.tokens = 0  # output tokens in the window
        self.finished = 0  # requests in the window
        self._recorder = recorder
        self._judging = recorder.judging
        self._routes = layout.routes
        self._front = FrontDoor(layout.routes, self.batchers, most_waiting)
        self._prompts: list[int] = requests.prompt_tokens.tolist()
        self._outputs: list[int] = requests.output_tokens.tolist()
        self._stage_free_s = [0.0] * len(layout.stages)
        self._link_free_s = [0.0] * layout.links
        self._events: list[tuple[float, int, int, int]] = []  # time, order, route, hop
        self._order = 0
        self._hops: dict[int, CountedStep] = {}  # the step of an event, by its order
        self._arrived = 0
        self._closed = concurrency  # requests that a closed loop has sent so far
        self._finished_all = 0
        self._end_s = math.inf  # of the part of the run that the loop is in

    @property
    def preemptions(self) -> int:
        return sum(batcher.preemptions for batcher in self.batchers)

    @property
    def steps(self) -> int:
        return sum(batcher.steps for batcher in self.batchers)

    # ---- the loop --------------------------------------------------------------------------------------------

    def to_end(self, warmup_s: float, until_s: float, deadline: float | None = None) -> bool:
        """Until all is served, or the clock shows ``until_s``, or too many have missed their limits. ``deadline``
        of `time.monotonic`: then it stops wherever it is, and returns False.
        """
        recorder, events = self._recorder, self._events
        arrivals = recorder.arrival_s
        count = len(arrivals)
        self._end_s = warmup_s if warmup_s > 0 else until_s
        if self._closed is not None:
            arrivals[:] = [0.0 if i < self._closed else math.inf for i in range(count)]
        warm = warmup_s <= 0
        turns = 0
        while not recorder.hopeless:
            arriving = arrivals[self._arrived] if self._arrived < count else math.inf
            now_s = min(arriving, events[0][0]) if events else arriving
            if not warm and now_s > warmup_s:
                warm = True
                self._end_s = until_s
                self._begin_window(warmup_s)
            if now_s > until_s or now_s == math.inf:
                break
            self.now_s = now_s
            if deadline is not None:
                turns += 1
                if turns % _LOOK_TURNS == 0 and time.monotonic() >= deadline:
                    return False
            if now_s >= recorder.next_sample_s:
                self._sample()
            if arriving <= now_s:
                self._arrive()
                continue
            _, order, route, hop = heappop(events)
            if hop == _BACK:
                self._back(route)
            else:
                self._travel(route, hop, self._hops.pop(order), now_s)
        if math.isfinite(until_s) and not recorder.hopeless:
            self.now_s = until_s
        self.tokens = recorder.tokens - self.tokens
        self.finished = self._finished_all - self.finished
        return True

    def _begin_window(self, warmup_s: float) -> None:
        """Steps under way have been counted to their ends already, as they will be at the window's end."""
        self.started_s = warmup_s
        self.busy_s[:] = [0.0] * len(self.busy_s)
        self.link_busy_s[:] = [0.0] * len(self.link_busy_s)
        self.tokens = self._recorder.tokens
        self.finished = self._finished_all

    def _sample(self) -> None:
        self._recorder.sample(
            self.now_s,
            [b.limits.pages - b.free_pages for b in self.batchers],
            [b.running for b in self.batchers],
        )

    # ---- requests --------------------------------------------------------------------------------------------

    def _arrive(self) -> None:
        request = self._arrived
        self._arrived += 1
        if self._judging:
            self._recorder.look(self.now_s)
        prompt = self._prompts[request]
        if self._front.refuses(prompt):
            self._recorder.refuse(request)
            self._next_of_loop()
            return
        self._front.place(request, prompt)
        self._admit()

    def _next_of_loop(self) -> None:
        """In a closed loop, whoever leaves makes room for the next."""
        arrivals = self._recorder.arrival_s
        if self._closed is not None and self._closed < len(arrivals):
            arrivals[self._closed] = self.now_s
            self._closed += 1

    def _admit(self) -> None:
        """From the door to the routes, as long as one has room."""
        while (found := self._front.next()) is not None:
            request, route = found
            self._recorder.route[request] = route
            self.batchers[route].add(self._prompts[request], self._outputs[request], request)
            self._form(route)

    # ---- steps -----------------------------------------------------------------------------------------------

    def _form(self, route: int) -> None:
        """All the steps that the route may send now."""
        batcher = self.batchers[route]
        depth = batcher.limits.depth
        while len(batcher.in_flight) < depth:
            step = batcher.next_step()
            if step is None:
                break
            self._send(route, step)

    def _send(self, route: int, step: CountedStep) -> None:
        step.seconds = self._routes[route].clock.seconds(step)
        self._travel(route, 0, step, self.now_s)

    def _travel(self, route: int, hop: int, step: CountedStep, at_s: float) -> None:
        """Through the route's stages and links from ``hop`` on, which the step reaches at ``at_s``.

        A stage or link serves first what came first. Where nobody else uses those that follow, the whole way is
        known at once; before a stage that other routes use too, the step waits for its moment in the loop.
        """
        path = self._routes[route]
        stage_free, link_free = self._stage_free_s, self._link_free_s
        busy_s, link_busy_s = self.busy_s, self.link_busy_s
        seconds, tokens = step.seconds, step.tokens
        for number, stage, link, token_s, delay_s, waits in path.legs[hop:] if hop else path.legs:
            took = seconds[number]
            free = stage_free[stage]
            end = (at_s if at_s > free else free) + took
            stage_free[stage] = end
            busy_s[stage] += took
            if link < 0:
                break
            took = tokens * token_s
            free = link_free[link]
            at_s = (end if end > free else free) + took
            link_free[link] = at_s
            link_busy_s[link] += took
            at_s += delay_s
            if waits:
                self._order += 1
                self._hops[self._order] = step
                heappush(self._events, (at_s, self._order, route, number + 1))
                return
        self._order += 1
        heappush(self._events, (end + path.back.delay_s, self._order, route, _BACK))

    def _back(self, route: int) -> None:
        """The route's oldest step is through. The head first sends the next, then the door hears of it."""
        batcher, recorder = self.batchers[route], self._recorder
        path = self._routes[route]
        way = None
        if path.lone and isinstance(batcher, CountedBatcher):
            way = coast(batcher, path, recorder, self.now_s, self._horizon_s())
            self.busy_s[path.stages[0]] += way.busy_s
            self._stage_free_s[path.stages[0]] = max(self._stage_free_s[path.stages[0]], way.back_s)
            if not way.arrived:
                self._order += 1
                heappush(self._events, (way.back_s, self._order, route, _BACK))
                return
            self.now_s = way.back_s
        now_s = self.now_s
        gaps = None if way is not None and not way.late else batcher.repeat(now_s)
        if gaps is not None:
            step = batcher.in_flight[-1]
            recorder.tokens += step.samples
            for seconds, count in gaps:
                recorder.gaps(seconds, count)
            self._send(route, step)
            return
        if self._judging:
            recorder.look(now_s)
        back = batcher.complete(now_s)
        recorder.tokens += back.tokens
        for seconds, count in back.gaps:
            recorder.gaps(seconds, count)
        for state in back.began:
            recorder.first_token(state.request, now_s)
            recorder.prompt_tokens += state.prompt_tokens
            self._front.started(route, state.prompt_tokens)
        for state in back.ended:
            self._finished_all += 1
            recorder.finish(state.request, state.end - state.prompt_tokens, now_s)
            self._front.ended(route)
            self._next_of_loop()
        self._form(route)
        if self._front.queue and (back.began or back.ended):
            self._admit()

    def _horizon_s(self) -> float:
        """When something else happens than the return of the step that is at hand."""
        arrivals, events = self._recorder.arrival_s, self._events
        soonest = min(self._end_s, self._recorder.next_sample_s)
        if self._arrived < len(arrivals) and arrivals[self._arrived] < soonest:
            soonest = arrivals[self._arrived]
        return min(soonest, events[0][0]) if events else soonest
