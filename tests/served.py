"""A plan on the real engine behind the real servers, in threads of the test's own process."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from engine_client import cpu_cluster, make_plan

from hexgen.coordinator.admission import AdmissionLimits
from hexgen.coordinator.coordinator import Coordinator, CoordinatorLimits, ServedModel
from hexgen.coordinator.tokenizer import load_tokenizer
from hexgen.deploy.in_process import InProcessDeployment
from hexgen.model import load_model
from hexgen.server.serve import ServeOptions, serve

BUNDLED = Path(__file__).parent.parent / "hexgen" / "bundled" / "demo"
T = TypeVar("T")


class Loop:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = 60.0) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout_s)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@dataclass
class Served:
    http: str  # http://host:port
    grpc: str  # host:port
    coordinator: Coordinator
    loop: Loop
    stop: asyncio.Event
    done: Any = field(repr=False)

    def wait_idle(self, timeout_s: float = 30.0) -> None:
        """Until every request has ended and every page is back."""
        until(self.idle, timeout_s)

    def idle(self) -> bool:
        if self.coordinator.running or self.coordinator.waiting:
            return False
        for state in list(self.coordinator.route_states):
            stats = self.coordinator.route_stats(state.route)
            if stats is not None and (stats.running or stats.waiting or stats.free_pages != stats.total_pages):
                return False
            if state.outstanding or state.starting_pages:
                return False
        return True


def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the condition did not become true")
        time.sleep(0.01)


@contextmanager
def engine(
    checkpoint: Path = BUNDLED, stages: Any = (((0, 8), 1),), **options: Any
) -> Iterator[InProcessDeployment]:
    """A plan over CPU devices of one node; ``options`` are the engine's."""
    cluster = cpu_cluster(sum(width for _, width in stages))
    plan = make_plan(
        cluster, str(checkpoint), stages, **{"page_size": 16, "kv_tokens": 4096, "token_budget": 256, **options}
    )
    deployment = InProcessDeployment(plan, cluster, checkpoint)
    deployment.plan = plan  # type: ignore[attr-defined]
    try:
        yield deployment
    finally:
        deployment.stop()


@contextmanager
def served(
    deployment: InProcessDeployment,
    checkpoint: Path = BUNDLED,
    waiting: AdmissionLimits | None = None,
    **options: Any,
) -> Iterator[Served]:
    """HTTP and gRPC over ``deployment``; several may be open on one. ``options`` are those of ServeOptions."""
    loop = Loop()
    try:
        yield from _serve(loop, deployment, checkpoint, waiting, ServeOptions(port=0, grpc_port=0), options)
    finally:
        loop.close()


def _serve(
    loop: Loop,
    deployment: InProcessDeployment,
    checkpoint: Path,
    waiting: AdmissionLimits | None,
    defaults: ServeOptions,
    options: dict[str, Any],
) -> Iterator[Served]:
    model = load_model(checkpoint)

    async def start() -> Coordinator:
        coordinator = Coordinator(
            deployment.endpoints(),
            deployment.secret,
            ServedModel("tested", model.vocab_size, model.eos_token_ids, aliases=("tested-too",)),
            load_tokenizer(checkpoint),
            CoordinatorLimits(waiting or AdmissionLimits()),
            getattr(deployment, "plan", None),
            deployment.reports,
        )
        await coordinator.start()
        return coordinator

    coordinator = loop.run(start())
    ready = threading.Event()
    addresses: list[str] = []

    def on_ready(http: str, grpc: str) -> None:
        addresses.extend((http, grpc))
        ready.set()

    async def make_stop() -> asyncio.Event:
        return asyncio.Event()

    stop = loop.run(make_stop())
    done = asyncio.run_coroutine_threadsafe(
        serve(coordinator, replace(defaults, **options), stop, on_ready), loop.loop
    )
    try:
        while not ready.wait(0.05):
            if done.done():
                done.result()
        scheme = "https" if options.get("tls_cert") else "http"
        yield Served(f"{scheme}://{addresses[0]}", addresses[1], coordinator, loop, stop, done)
    finally:
        loop.loop.call_soon_threadsafe(stop.set)
        done.exception(60)
        loop.run(coordinator.close())
