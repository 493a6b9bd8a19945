"""Clusters: what is there (``Cluster`` and its parts), read from and written to files."""

from hexgen.cluster_file import load_cluster, parse_cluster
from hexgen.cluster_spec import Cluster, Device, DeviceType, Link, Node, NodeLink, RegionLink
from hexgen.cluster_writer import cluster_to_dict, dump_cluster

__all__ = [
    "Cluster",
    "Device",
    "DeviceType",
    "Link",
    "Node",
    "NodeLink",
    "RegionLink",
    "cluster_to_dict",
    "dump_cluster",
    "load_cluster",
    "parse_cluster",
]
