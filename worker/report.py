"""What a rank says of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RankReport:
    """Bytes of tensors after loading, and mean seconds of a step since the start (0.0 before the first)."""

    stage: str
    rank: int
    device: str
    weights_bytes: int
    kv_bytes: int
    buffers_bytes: int  # the most that one step needs beside these
    bytes_read: int  # from the checkpoint
    steps: int
    compute_s: float  # layers, embedding, output head, with the stage's collectives in them
    wait_s: float  # idle, until the step's input was there
    transfer_s: float  # passing on to the stage's other ranks and to the next stage
    host_s: float  # everything else: batching, headers, page tables, sampling, answering

    @property
    def seconds(self) -> dict[str, float]:
        """Since the start, by kind: what the means of a step were made of."""
        n = max(1, self.steps)
        means = {"compute": self.compute_s, "wait": self.wait_s, "transfer": self.transfer_s, "host": self.host_s}
        return {kind: mean * n for kind, mean in means.items()}

    @property
    def tensor_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.buffers_bytes


class StepClock:
    """Adds up where the time of a rank's steps goes. One thread."""

    def __init__(self) -> None:
        self.steps = 0
        self.compute_s = 0.0
        self.wait_s = 0.0
        self.transfer_s = 0.0
        self.busy_s = 0.0

    def means(self) -> tuple[float, float, float, float]:
        """(compute, wait, transfer, host) seconds a step."""
        n = max(1, self.steps)
        host = max(0.0, self.busy_s - self.compute_s - self.transfer_s)
        return self.compute_s / n, self.wait_s / n, self.transfer_s / n, host / n
