"""The actor that discovery puts on a node: answers what is there, and measures when it is asked to."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from hexgen.discover.records import Machine, Measured, Wire
from hexgen.model import DType, ModelSpec

CONTROL_THREADS = 4  # a call that hangs must not keep the next one waiting


class Probe:
    """One node's. The methods block; each is bounded by whoever calls it."""

    def __init__(self, host: str | None = None) -> None:
        if host is None:
            import ray

            utilities: Any = ray.util
            host = str(utilities.get_node_ip_address())
        self._host = host

    def look(self) -> Machine:
        from hexgen.discover.machine import look

        return look()

    def prepare(self) -> None:
        """Import what measuring needs: on a slow node that takes longer than many a measurement."""
        from hexgen.discover import calibrate, compute, wires  # noqa: F401

    def measure(self, threads: int, on_gpu: bool) -> Measured:
        """The devices of this node by themselves."""
        from hexgen.discover import compute, wires
        from hexgen.discover.machine import free_memory
        from hexgen.discover.timing import Others

        with Others() as others:
            if on_gpu:
                measured = Measured(compute.gpu_speeds(), wires.hop_s(self._host), compute.gpu_all_reduce())
            else:
                speeds = compute.cpu_speeds(threads, free_memory())
                measured = Measured(speeds, wires.hop_s(self._host), compute.cpu_all_reduce(self._host))
        return replace(measured, others=others.cores)

    def wire(self, store_host: str, store_port: int, name: str, side: int, limit_s: float) -> Wire | None:
        """This side of the measurement ``name`` with another node."""
        from hexgen.discover.wires import wire_side
        from hexgen.worker.communicator import connect_store

        store = connect_store(store_host, store_port)
        return wire_side(store, name, side, self._host, time.monotonic() + limit_s)

    def calibrate(self, model: ModelSpec, dtype: DType, on_gpu: bool, threads: int, limit_s: float) -> Any:
        """This model's layers on one device of this node: `hexgen.discover.calibrate.Calibration`."""
        from hexgen.discover.calibrate import calibrate

        return calibrate(model, dtype, "cuda:0" if on_gpu else "cpu", threads, limit_s, self._host)
