"""Cluster files, written: so that parsing gives the same cluster back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hexgen import units, yamlfile
from hexgen.cluster_spec import Cluster, DeviceType, Link, Node, RegionLink
from hexgen.workload_file import workload_to_dict
from hexgen.yamlfile import Inline


def dump_cluster(cluster: Cluster, path: str | Path, comment: str = "") -> None:
    Path(path).write_text(yamlfile.write_yaml(cluster_to_dict(cluster), comment), encoding="utf-8")


def cluster_to_dict(cluster: Cluster) -> dict[str, Any]:
    """Plain values, as a cluster file has them; ``parse_cluster`` of it gives an equal cluster."""
    out: dict[str, Any] = {"name": cluster.name}
    if cluster.device_types:
        out["devices"] = {device.name: _device_to_dict(device) for device in cluster.device_types}
    out["nodes"] = [_node_to_dict(node) for node in cluster.nodes]
    links: dict[str, Any] = {"default": _link_to_dict(cluster.default_link)}
    if cluster.region_links:
        links["regions"] = [_region_link_to_dict(entry) for entry in cluster.region_links]
    if cluster.node_links:
        links["nodes"] = [
            Inline(between=list(entry.nodes), **_link_to_dict(entry.link)) for entry in cluster.node_links
        ]
    out["links"] = links
    if cluster.model is not None:
        out["model"] = cluster.model
    if cluster.workload is not None:
        out["workload"] = workload_to_dict(cluster.workload)
    if cluster.budget_usd_h is not None:
        out["budget"] = yamlfile.plain(cluster.budget_usd_h)
    if cluster.cost_table is not None:
        out["cost_table"] = cluster.cost_table
    return out


def _link_to_dict(link: Link) -> Inline:
    return Inline(
        bandwidth=units.exact_bandwidth(link.bandwidth_bytes_s), latency=units.exact_time(link.latency_s)
    )


def _region_link_to_dict(entry: RegionLink) -> Inline:
    a, b = entry.regions
    ends: dict[str, Any] = {"within": a} if a == b else {"between": [a, b]}
    return Inline(**ends, **_link_to_dict(entry.link))


def _device_to_dict(device: DeviceType) -> Inline:
    out = Inline(
        memory=units.exact_bytes(device.memory_bytes),
        bandwidth=units.exact_bandwidth(device.bandwidth_bytes_s),
        fp16=units.exact_flops(device.fp16_flops),
        bf16=units.exact_flops(device.bf16_flops),
        fp32=units.exact_flops(device.fp32_flops),
    )
    if device.capability is not None:
        out["capability"] = device.capability
    out["kind"] = device.kind
    return out


def _node_to_dict(node: Node) -> Inline:
    out = Inline(name=node.name)
    if node.region is not None:
        out["region"] = node.region
    out["device"] = node.base_device
    out["count"] = node.count
    out["link"] = node.link_name if node.link_name is not None else _link_to_dict(node.link)
    optional: dict[str, Any] = {
        "price": None if node.price_usd_h is None else yamlfile.plain(node.price_usd_h),
        "address": node.address,
        "labels": dict(node.labels) or None,
        "threads": node.threads,
        "memory": None if node.memory_bytes is None else units.exact_bytes(node.memory_bytes),
        "speed": None if node.speed == 1.0 else yamlfile.plain(node.speed),
    }
    out.update({key: value for key, value in optional.items() if value is not None})
    return out
