"""A plan running on Ray: placed and looked at, then loaded, then started; watched; and ended without a trace."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from hexgen.cluster import Cluster
from hexgen.deploy.assemble import assemble
from hexgen.deploy.base import RouteEndpoint
from hexgen.deploy.ray_actor import create_actors
from hexgen.deploy.ray_calls import gather, root_cause, translate
from hexgen.deploy.ray_connect import RayConnection, connect_ray
from hexgen.deploy.ray_placement import cpus_needed, demands, live_nodes, match_nodes, place
from hexgen.deploy.ray_processes import Process, end_processes, identify
from hexgen.deploy.ray_verify import Facts, verify
from hexgen.errors import HexgenError
from hexgen.memory import plan_memory
from hexgen.model import ModelSpec
from hexgen.plan import Plan
from hexgen.worker.report import RankReport

LOOK_TIMEOUT_S = 180.0  # a worker process starts and imports torch, on a busy machine and a cold disk
LOAD_TIMEOUT_S = 3600.0  # hundreds of gigabytes over a network file system
START_TIMEOUT_S = 120.0
REPORT_TIMEOUT_S = 30.0
STOP_GRACE_S = 10.0
WATCH_INTERVAL_S = 1.0
# Ranks notice a dead peer before Ray does; for so long we wait for the cause to show itself.
CAUSE_GRACE_S = 2.0


@dataclass(frozen=True, slots=True)
class StageProgress:
    """Bytes of the checkpoint that a stage's ranks have read, of those they need (0: not known yet)."""

    stage: str
    done_bytes: int
    total_bytes: int


OnProgress = Callable[[Sequence[StageProgress]], None]


class RayDeployment:
    """Starts in the constructor, which raises what went wrong after everything that had started has ended.

    ``model_path`` is a folder that every node has, or ``bundled:NAME`` for a model of the installation.
    Ends with ``stop()`` or the ``with`` block; the actors end too when this process is killed.
    """

    def __init__(
        self,
        plan: Plan,
        cluster: Cluster,
        model: ModelSpec,
        model_path: str,
        *,
        ray_address: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        self.plan = plan
        self.secret = secrets.token_hex(32)
        self.facts: dict[str, Facts] = {}
        self.remarks: tuple[str, ...] = ()
        self._actors: dict[str, Any] = {}
        self._endpoints: tuple[RouteEndpoint, ...] = ()
        self._failure: HexgenError | None = None
        self._stopping = threading.Event()
        self._stop_lock = threading.Lock()
        self._processes: list[Process] = []
        memory = plan_memory(plan, cluster, model)
        with ExitStack() as started:
            connection = connect_ray(ray_address, cpus=cpus_needed(plan, cluster))
            started.callback(connection.close)
            self._place(plan, cluster, connection, started)
            self.remarks = verify(self.facts, cluster, memory)
            from hexgen.worker.communicator import serve_store

            store, store_port = serve_store(connection.host)
            held = [store]
            started.callback(held.clear)
            configs = assemble(
                plan,
                cluster,
                model,
                model_path,
                deployment=secrets.token_hex(8),
                store_host=connection.host,
                store_port=store_port,
                addresses={device: (found.address, found.torch_device) for device, found in self.facts.items()},
                secret=self.secret,
            )
            self._load(configs, on_progress)
            self._start()
            self._watcher = threading.Thread(target=self._watch, name="hexgen-watch", daemon=True)
            self._watcher.start()
            started.callback(self._end_watcher)
            self._started = started.pop_all()

    # ---- as every deployment ----------------------------------------------------------------------------------

    def endpoints(self) -> tuple[RouteEndpoint, ...]:
        return self._endpoints

    def failure(self) -> HexgenError | None:
        """What ended the deployment from within; None while it runs."""
        return self._failure

    def reports(self) -> dict[str, RankReport]:
        """Each rank's own account of memory, bytes read and time, by device."""
        calls = {device: actor.report.remote() for device, actor in self._actors.items()}
        return gather(calls, "reporting", REPORT_TIMEOUT_S)

    def stop(self) -> None:
        """End every rank, then what carried them; bounded in time, and harmless when called again."""
        with self._stop_lock:
            if not self._stopping.is_set():
                self._stopping.set()
                self._started.close()

    def __enter__(self) -> RayDeployment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    # ---- starting ---------------------------------------------------------------------------------------------

    def _place(self, plan: Plan, cluster: Cluster, connection: RayConnection, started: ExitStack) -> None:
        """First phase: reserve, start an actor a device, and see what each has found."""
        wanted = demands(plan, cluster)
        placement = place(wanted, match_nodes(wanted, live_nodes()))
        started.callback(_quietly(placement.remove))
        started.callback(self._end_actors, connection.local is not None)
        self._actors = create_actors(placement)
        calls = {device: actor.look.remote() for device, actor in self._actors.items()}
        import_module("torch")  # takes seconds, which the workers need for the same
        self.facts = gather(calls, "starting the workers", LOOK_TIMEOUT_S)
        if connection.local is not None:
            self._processes = [p for p in (identify(found.pid) for found in self.facts.values()) if p is not None]

    def _load(self, configs: Mapping[str, Any], on_progress: OnProgress | None) -> None:
        """Second phase: all ranks read their slices and find each other, at the same time."""
        import ray

        calls = {device: self._actors[device].load.remote(config) for device, config in configs.items()}
        asked: dict[str, Any] = {}
        known = dict.fromkeys(configs, (0, 0))

        def ask() -> None:
            if on_progress is None:
                return
            for device in configs:
                if device not in asked:
                    asked[device] = self._actors[device].progress.remote()
            done, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=0)
            for device in [device for device, reference in asked.items() if reference in done]:
                with suppress(ray.exceptions.RayError):  # the load itself will say why
                    known[device] = ray.get(asked.pop(device))
            on_progress(self._by_stage(known))

        gather(calls, "loading", LOAD_TIMEOUT_S, ask)
        if on_progress is not None:
            calls = {device: self._actors[device].progress.remote() for device in configs}
            on_progress(self._by_stage(gather(calls, "loading", REPORT_TIMEOUT_S)))

    def _by_stage(self, known: Mapping[str, tuple[int, int]]) -> list[StageProgress]:
        """Sums over a stage's ranks; its total is 0, not known, until each of them has counted what it needs."""
        stages: list[StageProgress] = []
        for stage in self.plan.stages:
            done, total = zip(*(known[device] for device in stage.devices), strict=True)
            stages.append(StageProgress(stage.name, sum(done), sum(total) if all(total) else 0))
        return stages

    def _start(self) -> None:
        calls = {device: actor.start.remote() for device, actor in self._actors.items()}
        ports: dict[str, dict[int, int]] = gather(calls, "starting", START_TIMEOUT_S)
        found = [
            RouteEndpoint(route, self.plan.routes[route].weight, self.facts[device].address, port)
            for device, heads in ports.items()
            for route, port in heads.items()
        ]
        self._endpoints = tuple(sorted(found, key=lambda endpoint: endpoint.route))

    # ---- watching ---------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Ask every rank, once a second, whether it has failed; a dead actor answers by not being there."""
        errors: list[HexgenError] = []
        deadline: float | None = None
        while not self._stopping.wait(WATCH_INTERVAL_S):
            errors += self._ask_failures()
            if errors and deadline is None:
                deadline = time.monotonic() + CAUSE_GRACE_S
            if deadline is not None and time.monotonic() >= deadline:
                self._failure = root_cause(errors)
                return

    def _ask_failures(self) -> list[HexgenError]:
        import ray

        calls = {actor.failure.remote(): device for device, actor in self._actors.items()}
        done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=WATCH_INTERVAL_S)
        errors = []
        for reference in done:
            try:
                found = ray.get(reference)
            except ray.exceptions.RayError as error:
                found = translate(error, calls[reference], "running")
            if found is not None:
                errors.append(found)
        return errors

    # ---- ending -----------------------------------------------------------------------------------------------

    def _end_watcher(self) -> None:
        self._stopping.set()
        self._watcher.join(STOP_GRACE_S)

    def _end_actors(self, local: bool) -> None:
        """Ask all to stop, for a bounded time; then kill them, and on this machine see them gone."""
        import ray

        with suppress(ray.exceptions.RayError):
            calls = [actor.stop.remote() for actor in self._actors.values()]
            if calls:
                ray.wait(calls, num_returns=len(calls), timeout=STOP_GRACE_S)
        for actor in self._actors.values():
            with suppress(ray.exceptions.RayError, ValueError):
                ray.kill(actor, no_restart=True)
        if local:
            end_processes(self._processes, STOP_GRACE_S)


def _quietly(action: Callable[[], None]) -> Callable[[], None]:
    """Ray's own end of a group that it can no longer be asked about (its head is gone) needs no help."""

    def run() -> None:
        import ray

        with suppress(ray.exceptions.RayError):
            action()

    return run
