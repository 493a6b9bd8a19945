"""How fast a device copies, reads and multiplies, and how fast the devices of a node add up."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from hexgen.discover.cgroups import cpu_quota
from hexgen.discover.records import AllReduce, Speeds
from hexgen.discover.timing import Stopwatch, cpu_share, least_quarter
from hexgen.units import format_bytes
from hexgen.worker.communicator import Communicator, connect, connect_store, serve_store

_MIB = 1024 * 1024
CPU_BUFFER_BYTES = 64 * _MIB  # beyond most caches, small beside the memory of the least node
GPU_BUFFER_BYTES = 1024 * _MIB
CPU_SIDE, GPU_SIDE = 768, 8192  # of the square matrices
WINDOW_S = 0.4  # twice for each figure
SMALL_BYTES, LARGE_BYTES = 2048, 4 * _MIB
GPU_LARGE_BYTES = 256 * _MIB
ROUNDS = 50
JOIN_TIMEOUT_S = 60.0
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def cpu_speeds(threads: int, memory_bytes: int) -> Speeds:
    """Of this machine's CPU with ``threads`` threads. Takes some four seconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    share = cpu_share(threads)
    watch = Stopwatch(threads, share)
    try:
        size = max(4 * _MIB, min(CPU_BUFFER_BYTES, memory_bytes // 16))
        found = _speeds("cpu", size, CPU_SIDE, watch)
    finally:
        torch.set_num_threads(before)
    return replace(found, threads=threads, share=share, quota=cpu_quota(), disturbance=watch.disturbance)


def gpu_speeds() -> Speeds:
    """Of the slowest GPU that this process sees: the planner takes those of a node for equal."""
    found = []
    for number in range(torch.cuda.device_count()):
        free, _ = torch.cuda.mem_get_info(number)
        watch = Stopwatch(sync=partial(torch.cuda.synchronize, number))
        found.append(_speeds(f"cuda:{number}", min(GPU_BUFFER_BYTES, free // 8), GPU_SIDE, watch))
    slowest = min(found, key=lambda speeds: speeds.bandwidth_bytes_s)
    flops = {dtype: min(speeds.flops[dtype] for speeds in found) for dtype in slowest.flops}
    return replace(slowest, flops=flops)


def _speeds(device: str, size: int, side: int, watch: Stopwatch) -> Speeds:
    with torch.inference_mode():
        copy_s, stream_s, read = _memory_s(device, size, watch)
        flops = {name: _flops(device, dtype, side, watch) for name, dtype in _DTYPES.items()}
    sizes = f"{format_bytes(size)} copied and read, products of {side} x {side}"
    return Speeds(1, 2 * size / copy_s, read / stream_s, flops, sizes)


def _memory_s(device: str, size: int, watch: Stopwatch) -> tuple[float, float, int]:
    """Seconds to copy ``size`` bytes; seconds to read a matrix of about as many, and how many these are."""
    source = torch.zeros(size // 4, device=device)
    target = torch.empty_like(source)
    copy_s = watch.seconds(lambda: target.copy_(source), WINDOW_S)
    columns = 4096
    matrix = source[: source.numel() // columns * columns].view(-1, columns)
    vector = torch.ones(columns, device=device)
    return copy_s, watch.seconds(lambda: torch.mv(matrix, vector), WINDOW_S), matrix.nbytes


def _flops(device: str, dtype: torch.dtype, side: int, watch: Stopwatch) -> float:
    """Of a square product. CPUs have slow 16-bit formats, if any: a smaller one is enough to see that."""
    n = side if dtype is torch.float32 or device != "cpu" else side // 4
    a, b = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / watch.seconds(lambda: torch.mm(a, b, out=out), WINDOW_S)


# ---- all-reduce inside a node ----------------------------------------------------------------------------------


def cpu_all_reduce(host: str, ranks: int = 2) -> AllReduce:
    """Over the engine's own communicator, the ranks as threads of this process with sockets between them."""
    store, port = serve_store(host)
    barrier = threading.Barrier(ranks)

    def run(rank: int) -> tuple[float, float]:
        client = connect_store(host, port)
        communicator = connect(client, "all-reduce", rank, ranks, device=torch.device("cpu"), listen_host=host)
        try:
            small = _reduce_s(communicator, SMALL_BYTES, ROUNDS * 4, barrier)
            large = _reduce_s(communicator, LARGE_BYTES, ROUNDS // 5, barrier)
            return small, large
        finally:
            barrier.wait(JOIN_TIMEOUT_S)
            communicator.close()

    with ThreadPoolExecutor(ranks) as threads:
        found = [done.result(JOIN_TIMEOUT_S) for done in [threads.submit(run, rank) for rank in range(ranks)]]
    del store
    small_s, large_s = (max(values) for values in zip(*found, strict=True))
    how = f"{ranks} ranks as threads of one process, over loopback sockets and gloo"
    return AllReduce(ranks, SMALL_BYTES, small_s, LARGE_BYTES, large_s, how)


def _reduce_s(communicator: Communicator, size: int, rounds: int, barrier: threading.Barrier) -> float:
    tensor = torch.zeros(size // 4)
    communicator.all_reduce(tensor)
    barrier.wait(JOIN_TIMEOUT_S)
    spent = []
    for _ in range(rounds):
        started = time.perf_counter()
        communicator.all_reduce(tensor)
        spent.append(time.perf_counter() - started)
    return least_quarter(spent)  # those that waited least for a core


def gpu_all_reduce() -> AllReduce | None:
    """NCCL's among all GPUs that this process sees, from one process; None for a single one."""
    count = torch.cuda.device_count()
    if count < 2:
        return None
    nccl: Any = torch.cuda.nccl

    def seconds(size: int) -> float:
        parts = [torch.zeros(size // 4, device=f"cuda:{i}") for i in range(count)]

        def wait() -> None:
            for i in range(count):
                torch.cuda.synchronize(i)

        return Stopwatch(sync=wait).seconds(lambda: nccl.all_reduce(parts), WINDOW_S)

    small_s, large_s = seconds(SMALL_BYTES), seconds(GPU_LARGE_BYTES)
    return AllReduce(count, SMALL_BYTES, small_s, GPU_LARGE_BYTES, large_s, f"NCCL among {count} GPUs")
