"""Named constants of the cost model: how much of the datasheet a real kernel reaches, and what software adds.

One `KindFigures` for each kind of device. They are averages over published and own measurements, meant to be right
within a few tens of percent; measured tables replace them through the same `CostModel` interface.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from hexgen.catalogue import DEVICE_TYPES
from hexgen.cluster import DeviceType


@dataclass(frozen=True, slots=True)
class KindFigures:
    """Shares of peak are dimensionless; everything else is seconds."""

    projection_compute_share: float  # of dense FLOP/s: queries, keys, values and the output of attention
    mlp_compute_share: float  # the same of the MLP's three products, which are larger
    head_compute_share: float  # and of the output head's
    attention_compute_share: float  # attention is not one large product: softmax sits between two
    bandwidth_share: float  # of memory bandwidth that reading weights reaches
    attention_bandwidth_share: float  # KV pages are gathered, not streamed
    elementwise_bandwidth_share: float  # norms, residuals, rotation, activation: read and written once each
    embedding_bandwidth_share: float  # rows from all over the table
    link_share: float  # of a link's bandwidth that a collective or a send reaches
    layer_launch_s: float  # host time to launch one layer; hidden behind the device's own time when that is longer
    layer_overhead_s: float  # per layer, never hidden
    sequence_layer_s: float  # per sequence and layer: page tables, one attention call for each segment
    all_reduce_s: float  # software time of a collective beyond the link's own latency
    hop_s: float  # software time of a message between stages (header, then tensor) beyond the link's latency
    step_s: float  # per step and stage: header, batch inputs
    sample_row_s: float  # per row of logits: sampling, and its token on the way to the client
    batching_s: float  # per step, first stage: forming the batch

    @property
    def compute_share(self) -> float:
        """Of dense FLOP/s that the best of the matrix products reaches: for bounds."""
        return max(self.projection_compute_share, self.mlp_compute_share, self.head_compute_share)


# GPUs: 55-75 % of dense peak is what cuBLAS reaches on matrix products of a few hundred rows; 80 % of memory
# bandwidth is what weight streaming reaches (HexGen, section 4, and vLLM's own roofline notes use 0.7-0.9).
# An eager layer is about 20 launches of 4-5 us. Headers travel over gloo also between GPUs. Elementwise kernels
# stream nearly as well as weights do. Nothing tells the matrix products apart yet: measured tables do.
_GPU = KindFigures(
    projection_compute_share=0.60,
    mlp_compute_share=0.60,
    head_compute_share=0.60,
    attention_compute_share=0.35,
    bandwidth_share=0.80,
    attention_bandwidth_share=0.60,
    elementwise_bandwidth_share=0.75,
    embedding_bandwidth_share=0.50,
    link_share=0.80,
    layer_launch_s=90e-6,
    layer_overhead_s=0.0,
    sequence_layer_s=0.0,
    all_reduce_s=8e-6,
    hop_s=120e-6,
    step_s=250e-6,
    sample_row_s=4e-6,
    batching_s=200e-6,
)

# CPU workers: the catalogue's `cpu` figures are measured with large operands; products of a few rows reach half of
# that. The time of an operation of a small model is PyTorch's dispatch: about 25 operations a layer, and attention
# is called once for each sequence. gloo's latency on loopback sits in the `shm` link; what is added here is the
# wake-up of a thread that shares its cores with others. Fitted to the bundled model's steps, 1 to 16 sequences.
_CPU = KindFigures(
    projection_compute_share=0.50,
    mlp_compute_share=0.50,
    head_compute_share=0.50,
    attention_compute_share=0.30,
    bandwidth_share=0.75,
    attention_bandwidth_share=0.50,
    elementwise_bandwidth_share=0.75,
    embedding_bandwidth_share=0.50,
    link_share=0.80,
    layer_launch_s=0.0,
    layer_overhead_s=160e-6,
    sequence_layer_s=25e-6,
    all_reduce_s=40e-6,
    hop_s=150e-6,
    step_s=300e-6,
    sample_row_s=15e-6,
    batching_s=250e-6,
)

FIGURES: dict[str, KindFigures] = {"cuda": _GPU, "rocm": _GPU, "cpu": _CPU}

# The share of a route's KV room that is filled on average: lengths vary, and preemption recomputes what was
# thrown out, so a planner that counts on the last page promises what the engine cannot hold.
KV_FILL = 0.95

# A device without hardware for a format converts to float32 and back: it reaches this share of its float32 rate.
EMULATED_SHARE = 0.5


_SOFTWARE = (
    "layer_launch_s", "layer_overhead_s", "sequence_layer_s", "all_reduce_s", "hop_s", "step_s", "sample_row_s",
    "batching_s",
)  # fmt: skip


@lru_cache(maxsize=1024)
def figures_of(device: DeviceType) -> KindFigures:
    """The figures of the device's kind; a CPU worker with a part of a core runs its software as much slower."""
    figures = FIGURES.get(device.kind, _GPU)
    slowness = DEVICE_TYPES["cpu"].bandwidth_bytes_s / device.bandwidth_bytes_s if device.kind == "cpu" else 1.0
    if slowness <= 1:
        return figures
    return replace(figures, **{name: getattr(figures, name) * slowness for name in _SOFTWARE})


def flops_of(device: DeviceType, dtype: str) -> float:
    """Dense FLOP/s in ``dtype``, emulated where the device lacks it."""
    native = device.flops(dtype)
    return native if native > 0 else device.fp32_flops * EMULATED_SHARE
