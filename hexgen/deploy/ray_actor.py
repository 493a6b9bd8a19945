"""The Ray actor of one device: hosts a rank of a stage and answers control calls while it runs.

Control alone goes through Ray. Tensors, tokens and requests travel over the rank's own connections.
"""

from __future__ import annotations

import gc
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

from hexgen.deploy.facts import available_memory, installed_version, usable_cores
from hexgen.deploy.ray_placement import Placement
from hexgen.deploy.ray_verify import Facts
from hexgen.errors import DeploymentError, HexgenError
from hexgen.worker.config import RankConfig

# A path that begins so is below the bundled models of the node's own installation.
BUNDLED_PREFIX = "bundled:"
# Calls that an actor answers at once: loading or stopping runs while progress, failure and report are asked.
CONTROL_THREADS = 6


class RankActor:
    """One device of the plan. Its methods run in threads of their own, beside the rank's."""

    def __init__(self, device: str, uses_gpu: bool) -> None:
        import ray

        from hexgen.worker.rank import StageRank

        utilities: Any = ray.util
        self._device = device
        self._uses_gpu = uses_gpu
        self._rank = StageRank(str(utilities.get_node_ip_address()))

    def look(self) -> Facts:
        import ray
        import torch

        utilities: Any = ray.util
        if self._uses_gpu and not torch.cuda.is_available():
            raise DeploymentError(
                f"Ray gave this worker a GPU, but torch {torch.__version__} cannot use it",
                where=f"device {self._device} on {socket.gethostname()}",
                remedy="install the CUDA (or ROCm) build of torch on that node and check `nvidia-smi` there",
            )
        gpu: Any = torch.cuda.get_device_properties(0) if self._uses_gpu else None
        return Facts(
            device=self._device,
            ray_node=str(ray.get_runtime_context().get_node_id()),
            address=str(utilities.get_node_ip_address()),
            hostname=socket.gethostname(),
            pid=os.getpid(),
            hexgen_version=installed_version(),
            torch_version=str(torch.__version__),
            torch_device="cuda:0" if self._uses_gpu else "cpu",
            device_name=gpu.name if gpu is not None else "cpu",
            device_uuid=str(getattr(gpu, "uuid", "")) or None if gpu is not None else None,
            memory_bytes=gpu.total_memory if gpu is not None else available_memory(),
            cores=usable_cores(),
        )

    def load(self, config: RankConfig) -> None:
        path = local_model_path(config.model_path)
        if not path.is_dir():
            raise DeploymentError(
                f"this node has no checkpoint at {path}",
                where=f"device {self._device} on {socket.gethostname()}",
                remedy="put the checkpoint at the same path on every node (a copy, or a shared file system)",
            )
        self._rank.load(replace(config, model_path=str(path)))

    def progress(self) -> tuple[int, int]:
        """Bytes read, bytes needed."""
        return self._rank.progress()

    def start(self) -> dict[int, int]:
        """Begin to serve; the port on which the coordinator reaches each route that this rank heads."""
        # What was imported and loaded stays: without it, a full collection takes milliseconds instead of tens.
        gc.collect()
        gc.freeze()
        return dict(self._rank.start())

    def failure(self) -> HexgenError | None:
        return self._rank.failure()

    def report(self) -> Any:
        return self._rank.report()

    def stop(self) -> None:
        self._rank.stop()


def local_model_path(reference: str) -> Path:
    """The folder that ``reference`` means on this node."""
    if reference.startswith(BUNDLED_PREFIX):
        import hexgen

        return Path(hexgen.__file__).parent / "bundled" / reference.removeprefix(BUNDLED_PREFIX)
    return Path(reference)


def create_actors(placement: Placement) -> dict[str, Any]:
    """One actor in each bundle, none of them loaded; handles by device id."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    actor_class: Any = ray.remote(RankActor)
    handles = {}
    for device, bundle in placement.bundles.items():
        demand = placement.demands[device]
        strategy: Any = PlacementGroupSchedulingStrategy(placement.group, placement_group_bundle_index=bundle)
        handles[device] = actor_class.options(
            num_cpus=demand.cpus_each,
            num_gpus=1 if demand.needs_gpu else 0,
            max_restarts=0,  # a rank that died has lost its KV pages: a deployment is started anew, not revived
            max_task_retries=0,
            max_concurrency=CONTROL_THREADS,
            scheduling_strategy=strategy,
        ).remote(device, demand.needs_gpu)
    return handles
