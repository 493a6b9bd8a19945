"""One rank of one stage, from nothing to serving and back: what a Ray actor or a thread hosts."""

from __future__ import annotations

import logging
import os
import platform
import queue
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from hexgen.errors import DeploymentError, EngineError, HexgenError
from hexgen.memory import rank_buffers_bytes
from hexgen.worker.checkpoint import Checkpoint
from hexgen.worker.config import RankConfig
from hexgen.worker.connections import Connections, open_connections
from hexgen.worker.head import RouteHead
from hexgen.worker.report import RankReport
from hexgen.worker.stage import Event, FollowerLoop, LeaderLoop, Stopped, receive_into
from hexgen.worker.stage_model import StageModel
from hexgen.worker.step_runner import StepRunner

__all__ = ["RankReport", "StageRank"]

# A receiver thread must get the interpreter promptly while the loop's thread is busy in Python (default: 5 ms).
SWITCH_INTERVAL_S = 0.0005
_log = logging.getLogger(__name__)
_GOODBYE_S = 10.0  # how long an orderly end may take before connections are cut


@dataclass(slots=True)
class _Loaded:
    """Everything that ``load`` made and ``stop`` takes apart."""

    config: RankConfig
    connections: Connections
    model: StageModel
    runner: StepRunner
    heads: dict[int, RouteHead]

    def close(self) -> None:
        for head in self.heads.values():
            head.close()
        self.connections.close()


class StageRank:
    """The life of a rank: ``look``, ``load``, ``start``, then ``stop``, after which it may ``load`` again.

    Control calls may come from any thread, also while another one is loading: ``stop`` then ends the loading.
    """

    def __init__(self, listen_host: str = "127.0.0.1") -> None:
        self._listen_host = listen_host
        self._lock = threading.Lock()  # guards load, start and stop against each other
        self._stopping = threading.Event()
        self._loaded: _Loaded | None = None
        self._inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._loop: threading.Thread | None = None
        self._failure: HexgenError | None = None
        self._progress = (0, 0)

    def look(self) -> dict[str, Any]:
        """What is here: plain facts, for whoever places the stages."""
        gpus = []
        if torch.cuda.is_available():
            for i in range(torch.cuda.device_count()):
                p = torch.cuda.get_device_properties(i)
                gpus.append(
                    {
                        "name": p.name,
                        "memory_bytes": p.total_memory,
                        "capability": f"{p.major}.{p.minor}",
                        "uuid": str(p.uuid),
                    }
                )
        return {
            "listen_host": self._listen_host,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "gpus": gpus,
            "python": platform.python_version(),
            "torch": torch.__version__,
        }

    def load(self, config: RankConfig) -> None:
        """Connect to the other ranks and read this rank's weights; blocks until both are done.

        Raises ``CheckpointError`` on a bad checkpoint, ``DeploymentError`` where another rank does not come or
        ``stop`` was called meanwhile.
        """
        with self._lock:
            if self._loaded is not None:
                raise DeploymentError("this rank is loaded already", where=_where(config), remedy="stop it first")
            self._stopping.clear()
            self._failure = None
            self._inbox = queue.SimpleQueue()
            self._progress = (0, 0)
            sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_INTERVAL_S))
            checkpoint = Checkpoint(config.model_path)  # a broken one is found before anybody is kept waiting
            connections = None
            try:
                connections = open_connections(config, self._stopping.is_set)
                with torch.inference_mode():
                    model = StageModel(config, checkpoint, connections.communicator, self._note_progress)
                    runner = StepRunner(config, model, connections.communicator)
                heads = {
                    role.route: RouteHead(config, role, self._inbox.put)
                    for role in config.routes
                    if role.embeds and config.rank == 0
                }
            except BaseException:
                if connections is not None:
                    connections.shutdown()
                    connections.close()
                raise
            finally:
                checkpoint.close()
            self._loaded = _Loaded(config, connections, model, runner, heads)

    def progress(self) -> tuple[int, int]:
        """Bytes of weights read so far, and of all that this rank reads (0 before that is known)."""
        return self._progress

    def start(self) -> dict[int, int]:
        """Begin to serve. Returns the port of each route that begins on this rank."""
        with self._lock:
            loaded = self._loaded
            if loaded is None or self._loop is not None:
                raise DeploymentError("a rank starts once, after it has loaded")
            where = _where(loaded.config)
            connections = loaded.connections
            run: Callable[[], None]
            if connections.leader is not None:
                run = FollowerLoop(loaded.runner, connections.leader).run
            else:
                roles = {role.route: role for role in loaded.config.routes}
                run = LeaderLoop(
                    loaded.runner, roles, loaded.heads, connections.senders, connections.followers, self._inbox
                ).run
                for receiver in connections.receivers:
                    self._spawn(partial(receive_into, receiver, self._inbox), f"hexgen-{receiver.name}")
                if connections.followers is not None:
                    self._spawn(partial(connections.followers.watch, self._failed), "hexgen-watch")
                for head in loaded.heads.values():
                    head.open()
            self._loop = threading.Thread(
                target=self._run, args=(run, loaded), name=f"hexgen-{where}", daemon=True
            )
            self._loop.start()
            return {route: head.port for route, head in loaded.heads.items()}

    def failure(self) -> HexgenError | None:
        """Why the rank has ended by itself; None while it serves, and after an orderly end."""
        return self._failure

    @property
    def running(self) -> bool:
        return self._loop is not None and self._loop.is_alive()

    def report(self) -> RankReport:
        loaded = self._loaded
        if loaded is None:
            raise DeploymentError("a rank that is not loaded has nothing to report")
        config = loaded.config
        compute_s, wait_s, transfer_s, host_s = loaded.runner.clock.means()
        return RankReport(
            stage=config.stage,
            rank=config.rank,
            device=config.device,
            weights_bytes=loaded.model.weights_bytes,
            kv_bytes=loaded.runner.kv_bytes,
            buffers_bytes=rank_buffers_bytes(
                config.model,
                config.dtype,
                config.slices[config.rank],
                config.token_budget,
                config.max_sequences,
                any(role.samples for role in config.routes),
            ),
            bytes_read=loaded.model.bytes_read,
            steps=loaded.runner.clock.steps,
            compute_s=compute_s,
            wait_s=wait_s,
            transfer_s=transfer_s,
            host_s=host_s,
        )

    def cancel(self) -> None:
        """End a ``load`` that is under way on another thread, which then raises; does not wait for it."""
        self._stopping.set()

    def stop(self) -> None:
        """End in good order, together with the whole deployment: goodbyes travel along the edges. Idempotent.

        Blocks until every thread of the rank has ended and its tensors are free.
        """
        self._stopping.set()
        self._inbox.put(Stopped())  # a leader's loop ends by this, another rank's by its leader's goodbye
        with self._lock:
            loaded = self._loaded
            if loaded is None:
                return
            if self._loop is None:  # loaded, never started
                loaded.connections.shutdown()
                loaded.close()
            else:
                self._loop.join(_GOODBYE_S)
                if self._loop.is_alive():
                    loaded.connections.shutdown()
                    self._loop.join(_GOODBYE_S)
            self._loop = None
            self._threads = []
            self._loaded = None

    # ---- inside ------------------------------------------------------------------------------------------

    def _note_progress(self, done_bytes: int, total_bytes: int) -> None:
        self._progress = (done_bytes, total_bytes)
        if self._stopping.is_set():
            raise DeploymentError("stopped while it was loading")

    def _failed(self, error: EngineError) -> None:
        self._inbox.put(Stopped(error))

    def _spawn(self, target: Callable[[], None], name: str) -> None:
        def guarded() -> None:
            try:
                target()
            except EngineError as error:
                self._failed(error)

        thread = threading.Thread(target=guarded, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run(self, loop: Callable[[], None], loaded: _Loaded) -> None:
        """The loop's thread. However the loop ends, the rank's connections end with it, so that its peers
        notice.
        """
        config = loaded.config
        torch.set_num_threads(config.threads)
        if config.device.startswith("cuda"):
            torch.cuda.set_device(config.device)
        try:
            loop()
        except Exception as error:  # noqa: BLE001 - whatever it was, it is told through failure()
            if not self._stopping.is_set():
                if not isinstance(error, HexgenError):  # a bug: its traceback does not travel with the failure
                    _log.exception("%s has failed", _where(config))
                self._failure = _as_engine_error(error, _where(config))
        else:
            self._say_goodbye(loaded)
        loaded.connections.shutdown()
        for thread in self._threads:
            thread.join(_GOODBYE_S)
        loaded.close()

    def _say_goodbye(self, loaded: _Loaded) -> None:
        """Tell the neighbours, and wait for theirs: nobody's connection breaks in an orderly end."""
        self._stopping.set()
        for sender in loaded.connections.senders.values():
            sender.send_stop()
        if loaded.connections.followers is not None:
            loaded.connections.followers.stop()
        for thread in self._threads:
            thread.join(_GOODBYE_S)


def _where(config: RankConfig) -> str:
    return f"stage {config.stage}, rank {config.rank}"


def _as_engine_error(error: Exception, where: str) -> HexgenError:
    if isinstance(error, HexgenError):
        return EngineError(error.message, where=f"{where}, {error.where}" if error.where else where)
    lines = str(error).splitlines() or [""]
    failure = EngineError(f"{type(error).__name__}: {lines[0]}", where=where)
    failure.__cause__ = error
    return failure
