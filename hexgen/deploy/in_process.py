"""All ranks of a plan as threads of this process, over loopback: one machine, no Ray."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from hexgen.cluster import Cluster
from hexgen.deploy.assemble import assemble
from hexgen.deploy.base import RouteEndpoint
from hexgen.errors import DeploymentError, HexgenError
from hexgen.model import load_model
from hexgen.plan import Plan
from hexgen.validate import check_plan
from hexgen.worker.communicator import serve_store
from hexgen.worker.rank import StageRank
from hexgen.worker.report import RankReport

_HOST = "127.0.0.1"


class InProcessDeployment:
    """Starts ``plan`` in this process; see ``hexgen.deploy.base.Deployment``.

    Raises ``SpecError`` or ``InfeasibleError`` on a plan that is wrong or does not fit, ``CheckpointError`` on
    a bad checkpoint, ``DeploymentError`` where the plan wants GPUs that are not there. Whatever had begun is
    undone then.
    """

    def __init__(self, plan: Plan, cluster: Cluster, model_path: str | Path) -> None:
        model = load_model(model_path)
        check_plan(plan, cluster, model)
        self.secret = secrets.token_hex(32)
        store, port = serve_store(_HOST)
        self._store: object | None = store  # serves as long as somebody holds it
        configs = assemble(
            plan,
            cluster,
            model,
            str(model_path),
            deployment=secrets.token_hex(8),
            store_host=_HOST,
            store_port=port,
            addresses={d: (_HOST, _torch_device(cluster, d)) for s in plan.stages for d in s.devices},
            secret=self.secret,
        )
        self._ranks = {device: StageRank(_HOST) for device in configs}
        try:
            self._each([partial(self._ranks[device].load, config) for device, config in configs.items()])
            ports: dict[int, int] = {}
            for rank in self._ranks.values():
                ports |= rank.start()
        except BaseException:
            self.stop()
            raise
        self._endpoints = tuple(
            RouteEndpoint(number, route.weight, _HOST, ports[number]) for number, route in enumerate(plan.routes)
        )

    def endpoints(self) -> tuple[RouteEndpoint, ...]:
        return self._endpoints

    def reports(self) -> dict[str, RankReport]:
        return {device: rank.report() for device, rank in self._ranks.items()}

    def failure(self) -> HexgenError | None:
        return next((f for rank in self._ranks.values() if (f := rank.failure()) is not None), None)

    def stop(self) -> None:
        self._each([rank.stop for rank in self._ranks.values()])
        self._store = None

    def _each(self, calls: list[Callable[[], None]]) -> None:
        """Make all calls at the same time (they wait for one another); raise the first one's error.

        Where one fails, the others are stopped: they would wait for it in vain.
        """
        with ThreadPoolExecutor(len(calls), thread_name_prefix="hexgen-control") as pool:
            futures = [pool.submit(call) for call in calls]
            for future in futures:
                future.add_done_callback(lambda f: self._end_loading() if f.exception() is not None else None)
        errors = [error for future in futures if (error := future.exception()) is not None]
        # The first that failed by itself explains more than those that were stopped because of it.
        own = [e for e in errors if not isinstance(e, DeploymentError)]
        for error in own or errors:
            raise error

    def _end_loading(self) -> None:
        for rank in self._ranks.values():
            rank.cancel()


def _torch_device(cluster: Cluster, device_id: str) -> str:
    device = cluster.device(device_id)
    if device.type.kind == "cpu":
        return "cpu"
    if device.index >= torch.cuda.device_count():
        raise DeploymentError(
            f"needs a {device.type.name}; this machine has {torch.cuda.device_count()} GPUs",
            where=f"device {device_id}",
            remedy="plan over what is there (hexgen discover), or run it on a Ray cluster that has it",
        )
    return f"cuda:{device.index}"
