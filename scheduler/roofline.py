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

    attn_gemm_s_token: float
    attn_weights_s: float
    core_s_attended: float
    core_s_kv_read: float
    mlp_gemm_s_token: float
    mlp_weights_s: float
    head_gemm_s_row: float
    head_weights_s: float


def rank_work(model: ModelSpec, dtype: DType, device: DeviceType, part: RankSlice) -> RankWork:
    """Roofline of one rank: Williams et al. 2009; a multiply-add is two FLOPs."""
    figures = figures_of(device)
    peak = flops_of(device, dtype)
    gemm, stream = peak * figures.compute_share, device.bandwidth_bytes_s * figures.bandwidth_share
    core = peak * figures.attention_compute_share
    gather = device.bandwidth_bytes_s * figures.attention_bandwidth_share
    size = DTYPE_BYTES[dtype]
    q, kv = part.n_query_heads * model.head_dim, part.n_kv_heads * model.head_dim
    attention = model.hidden_size * (2 * q + 2 * kv)
    mlp = 3 * model.hidden_size * part.n_columns
    head = model.hidden_size * part.n_vocab
    return RankWork(
        attn_gemm_s_token=2 * attention / gemm,
        attn_weights_s=attention * size / stream,
        core_s_attended=4 * q / core,
        core_s_kv_read=2 * kv * size / gather,
        mlp_gemm_s_token=2 * mlp / gemm,
        mlp_weights_s=mlp * size / stream,
        head_gemm_s_row=2 * head / gemm,
        head_weights_s=head * size / stream,
    )
