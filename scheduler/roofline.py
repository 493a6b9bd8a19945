"""One rank's arithmetic as seconds per unit of load: the roofline (Williams et al. 2009) of each operation."""

from __future__ import annotations

from dataclasses import dataclass

from hexgen.cluster import DeviceType
from hexgen.model import DTYPE_BYTES, DType, ModelSpec
from hexgen.scheduler.figures import figures_of, flops_of
from hexgen.split import RankSlice


@dataclass(frozen=True, slots=True)
class RankWork:
    """One rank's arithmetic of one layer: seconds per unit of load."""

    projection_s_token: float
    projection_weights_s: float
    core_s_attended: float
    core_s_kv_read: float
    attention_elementwise_s_token: float
    mlp_s_token: float
    mlp_weights_s: float
    mlp_elementwise_s_token: float
    head_s_row: float
    head_weights_s: float
    embedding_s_token: float


def rank_work(model: ModelSpec, dtype: DType, device: DeviceType, part: RankSlice) -> RankWork:
    """Roofline of one rank: Williams et al. 2009; a multiply-add is two FLOPs."""
    figures = figures_of(device)
    peak, bandwidth = flops_of(device, dtype), device.bandwidth_bytes_s
    stream = bandwidth * figures.bandwidth_share
    elementwise = bandwidth * figures.elementwise_bandwidth_share
    size = DTYPE_BYTES[dtype]
    hidden, columns = model.hidden_size, part.n_columns
    q, kv = part.n_query_heads * model.head_dim, part.n_kv_heads * model.head_dim
    projection = hidden * (2 * q + 2 * kv)
    mlp = 3 * hidden * columns
    head = hidden * part.n_vocab
    # Elements that an operation between products reads and writes, a token: a residual is added (2 in, 1 out) and
    # normalised (1 in, 1 out); queries and keys are rotated (1 in, 1 out); gate and up make one (2 in, 1 out).
    residual_and_norm = 5 * hidden
    return RankWork(
        projection_s_token=2 * projection / (peak * figures.projection_compute_share),
        projection_weights_s=projection * size / stream,
        core_s_attended=4 * q / (peak * figures.attention_compute_share),
        core_s_kv_read=2 * kv * size / (bandwidth * figures.attention_bandwidth_share),
        attention_elementwise_s_token=(residual_and_norm + 2 * (q + kv)) * size / elementwise,
        mlp_s_token=2 * mlp / (peak * figures.mlp_compute_share),
        mlp_weights_s=mlp * size / stream,
        mlp_elementwise_s_token=(residual_and_norm + 3 * columns) * size / elementwise,
        head_s_row=2 * head / (peak * figures.head_compute_share),
        head_weights_s=head * size / stream,
        embedding_s_token=2 * hidden * size / (bandwidth * figures.embedding_bandwidth_share),
    )
