"""What the probes report: plain data, which travels between the nodes and the command."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str  # as the driver has it
    memory_bytes: int
    capability: str | None = None
    uuid: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    """What one node says of itself, unmeasured."""

    hostname: str
    boot_id: str  # equal on nodes that are one machine
    cores: int  # that this process may use
    memory_bytes: int  # available on the machine
    memory_limit_bytes: int | None = None  # of the control group that this node runs in
    memory_hidden: bool = False  # it may have a limit that cannot be read
    memory_room_bytes: int | None = None  # what it leaves beside Ray and this probe
    cpu_quota: float | None = None  # CPUs' worth of time, of the same control group
    lab_memory_bytes: int | None = None  # of each device, where this is a node of `hexgen lab`
    gpus: tuple[Gpu, ...] = ()
    topology: str | None = None  # the link among the GPUs by NVML, a name of `hexgen.catalogue.LINKS`
    topology_said: str = ""  # how that was found
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Speeds:
    """Sustained, of one device (a CPU device: all of its threads). Bytes/s and FLOP/s."""

    threads: int
    copy_bytes_s: float  # read and written
    stream_bytes_s: float  # a matrix-vector product: weights read
    flops: dict[str, float]  # by dtype
    sizes: str  # of the operands, for people
    share: float = 1.0  # of each thread's CPU that a quota leaves
    quota: float | None = None  # CPUs' worth of time, as the control group had it meanwhile
    disturbance: float = 1.0  # how much longer it took than it would have without other programs

    @property
    def bandwidth_bytes_s(self) -> float:
        return max(self.copy_bytes_s, self.stream_bytes_s)


@dataclass(frozen=True, slots=True)
class AllReduce:
    """Seconds of one all-reduce among the devices of a node."""

    ranks: int
    small_bytes: int
    small_s: float
    large_bytes: int
    large_s: float
    how: str


@dataclass(frozen=True, slots=True)
class Wire:
    """Between two nodes, over the engine's own edge: one way of a ping-pong, and a stream of hidden states."""

    one_way_s: float
    bandwidth_bytes_s: float  # the slower direction
    pings: int
    streamed_bytes: int  # in each direction


@dataclass(frozen=True, slots=True)
class Measured:
    """What one node measured by itself."""

    speeds: Speeds
    hop_s: float  # an edge from this node to itself: what software adds to a message
    all_reduce: AllReduce | None = None
    others: float = 0.0  # cores of the machine that other processes kept busy meanwhile
