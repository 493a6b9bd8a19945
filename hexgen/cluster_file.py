"""Cluster files, read: parsed strictly, every complaint with file and place."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from hexgen import units, yamlfile
from hexgen.catalogue import (
    DEFAULT_NETWORK,
    DEVICE_TYPES,
    canonical_name,
    default_link_name,
    lookup,
    lookup_link,
    scaled,
)
from hexgen.cluster_spec import Cluster, DeviceType, Link, Node, NodeLink, RegionLink
from hexgen.errors import SpecError
from hexgen.workload_file import parse_workload
from hexgen.yamlfile import Place, Section

MAX_DEVICES = 65_536
_MAX_ENTRIES = 65_536

_CLUSTER_KEYS = ("name", "devices", "nodes", "links", "model", "workload", "budget", "cost_table")
_NODE_KEYS = (
    "name", "repeat", "region", "device", "count", "link", "price", "address", "labels", "threads", "memory",
    "speed",
)  # fmt: skip
_DEVICE_KEYS = ("memory", "bandwidth", "fp16", "bf16", "fp32", "capability", "kind")
_LINK_KEYS = ("bandwidth", "latency")
_ADDRESS = re.compile(r"[A-Za-z0-9][A-Za-z0-9.:_-]{0,252}|::[A-Fa-f0-9:.]*")
_CAPABILITY = re.compile(r"[0-9]{1,2}\.[0-9]|gfx[0-9a-f]{3,5}")

_memory = yamlfile.quantity(units.parse_bytes)
_bandwidth = yamlfile.quantity(units.parse_bandwidth)
_bandwidth_or_none = yamlfile.quantity(units.parse_bandwidth, zero=True)
_flops = yamlfile.quantity(units.parse_flops, zero=True)
_latency = yamlfile.quantity(units.parse_time, zero=True)


def load_cluster(path: str | Path) -> Cluster:
    """The cluster in a YAML file; ``SpecError`` names file, place and remedy."""
    return parse_cluster(yamlfile.read_yaml(path), str(path), Path(path).parent)


def parse_cluster(
    value: Mapping[str, Any], where: str | Place = "cluster", base_dir: str | Path | None = None
) -> Cluster:
    """The cluster in ``value``. Files that it names (traces) are looked for beside ``base_dir``."""
    place = where if isinstance(where, Place) else Place(where)
    section = Section(value, place, _CLUSTER_KEYS)
    types = section.optional("devices", _device_types) or {}
    nodes = section.require("nodes", lambda v, p: _nodes(v, p, types))
    default, regions, pairs = section.get("links", lambda v, p: _links(v, p, nodes), (DEFAULT_NETWORK, (), ()))
    base = Path(base_dir) if base_dir is not None else None
    return Cluster(
        name=section.get("name", yamlfile.text, "cluster"),
        nodes=nodes,
        default_link=default,
        region_links=regions,
        node_links=pairs,
        device_types=tuple(types.values()),
        model=section.optional("model", yamlfile.text),
        workload=section.optional("workload", lambda v, p: parse_workload(v, p, base)),
        budget_usd_h=section.optional("budget", yamlfile.number()),
        cost_table=section.optional("cost_table", lambda v, p: _beside(v, p, base)),
    )


def _beside(value: object, place: Place, base: Path | None) -> str:
    """A file's path; a relative one is meant from where the cluster file is."""
    path = Path(yamlfile.text(value, place))
    return str(path) if base is None else str((base / path).absolute())


# ---- device types --------------------------------------------------------------------------------------------


def _device_types(value: object, place: Place) -> dict[str, DeviceType]:
    if not isinstance(value, dict):
        yamlfile.wrong(value, place, "a mapping of device types")
    types: dict[str, DeviceType] = {}
    for key, entry in value.items():
        name = yamlfile.name(key, place.key(key))
        types[name] = _device_type(name, Section(entry, place.key(key), _DEVICE_KEYS))
    return types


def _device_type(name: str, section: Section) -> DeviceType:
    known = canonical_name(name)
    base = DEVICE_TYPES[known] if known is not None else None  # a correction names only what differs
    capability = section.optional("capability", _capability) or (base.capability if base else None)
    kind = section.optional("kind", _kind) or (base.kind if base else _kind_of(capability))
    if base is not None:
        fp16 = section.get("fp16", _flops, base.fp16_flops)
        changed = fp16 != base.fp16_flops
        bf16 = section.get("bf16", _flops, fp16 if changed and base.bf16_flops else base.bf16_flops)
        return _that_computes(
            section,
            DeviceType(
                name=name,
                memory_bytes=section.get("memory", _memory, base.memory_bytes),
                bandwidth_bytes_s=section.get("bandwidth", _bandwidth, base.bandwidth_bytes_s),
                fp16_flops=fp16,
                bf16_flops=bf16,
                fp32_flops=section.get("fp32", _flops, base.fp32_flops),
                capability=capability,
                kind=kind,
            ),
        )
    fp16 = section.require("fp16", _flops)
    # bfloat16 units came with Ampere (8.0). A quarter of the tensor rate is typical of fp32 on ordinary units.
    has_bf16 = capability is None or not capability[0].isdigit() or float(capability) >= 8.0
    return _that_computes(
        section,
        DeviceType(
            name=name,
            memory_bytes=section.require("memory", _memory),
            bandwidth_bytes_s=section.require("bandwidth", _bandwidth),
            fp16_flops=fp16,
            bf16_flops=section.get("bf16", _flops, fp16 if has_bf16 else 0.0),
            fp32_flops=section.get("fp32", _flops, fp16 / 4),
            capability=capability,
            kind=kind,
        ),
    )


def _that_computes(section: Section, device: DeviceType) -> DeviceType:
    if not max(device.fp16_flops, device.bf16_flops, device.fp32_flops) > 0:
        raise SpecError(
            "a device of no FLOP/s in any dtype computes nothing",
            where=str(section.place),
            remedy="give its fp16, or leave its nodes out",
        )
    return device


def _kind_of(capability: str | None) -> str:
    return "rocm" if capability is not None and capability.startswith("gfx") else "cuda"


def _capability(value: object, place: Place) -> str:
    shown = str(value) if isinstance(value, float) else value
    if not isinstance(shown, str) or not _CAPABILITY.fullmatch(shown):
        yamlfile.wrong(value, place, 'a compute capability, like "8.6" or gfx942')
    return shown


def _kind(value: object, place: Place) -> str:
    if value not in ("cuda", "rocm", "cpu"):
        yamlfile.wrong(value, place, "one of cuda, rocm, cpu")
    return str(value)


# ---- nodes ---------------------------------------------------------------------------------------------------


def _nodes(value: object, place: Place, types: Mapping[str, DeviceType]) -> tuple[Node, ...]:
    groups = yamlfile.list_of(lambda v, p: _node_group(v, p, types), _MAX_ENTRIES, least=1)(value, place)
    nodes: dict[str, Node] = {}
    devices = 0
    for i, group in enumerate(groups):
        for node in group:
            if node.name in nodes:
                raise SpecError(
                    f"the node name {node.name!r} stands twice",
                    where=str(place.index(i).key("name")),
                    remedy="give each node its own name; $i in the name of a repeated node is its number",
                )
            nodes[node.name] = node
            devices += node.count
            if devices > MAX_DEVICES:
                raise SpecError(f"more than {MAX_DEVICES} devices in all", where=str(place))
    return tuple(nodes.values())


def _node_group(value: object, place: Place, types: Mapping[str, DeviceType]) -> tuple[Node, ...]:
    section = Section(value, place, _NODE_KEYS)
    pattern = section.require("name", _pattern)
    repeat = section.optional("repeat", yamlfile.integer(1, MAX_DEVICES))
    address = section.optional("address", _pattern)
    written = section.require("device", yamlfile.text)
    base = types.get(written) or lookup(written, str(place.key("device")))
    threads = section.optional("threads", yamlfile.integer(1, 4096))
    if threads is not None and base.kind != "cpu":
        raise SpecError("threads are for cpu devices only", where=str(place.key("threads")), remedy="remove it")
    memory = section.optional("memory", _memory)
    speed = section.get("speed", yamlfile.number(), 1.0)
    link, link_name = section.get("link", _node_link, (None, None))
    if link is None:
        link_name = default_link_name(base)
        link = lookup_link(link_name)
    node = Node(
        name="",
        device=scaled(base, memory_bytes=memory, speed=speed, threads=threads),
        count=section.get("count", yamlfile.integer(1, MAX_DEVICES), 1),
        link=link,
        base_device=written,
        link_name=link_name,
        region=section.optional("region", yamlfile.name),
        price_usd_h=section.optional("price", yamlfile.number(allow_equal=True)),
        threads=threads,
        speed=speed,
        memory_bytes=memory,
        labels=section.get("labels", _labels, ()),
    )
    if repeat is not None and repeat > 1 and "$i" not in pattern:
        raise SpecError(
            f"{repeat} nodes cannot all be named {pattern!r}",
            where=str(place.key("name")),
            remedy=f"put the number into the name, like {pattern}-$i",
        )

    def numbered(i: int) -> Node:
        name = yamlfile.name(pattern.replace("$i", str(i)) if repeat else pattern, place.key("name"))
        own = _address(address.replace("$i", str(i)), place.key("address")) if address else None
        return dataclasses.replace(node, name=name, address=own)

    return tuple(numbered(i) for i in range(1, (repeat or 1) + 1))


def _pattern(value: object, place: Place) -> str:
    return yamlfile.text(str(value) if isinstance(value, int) and not isinstance(value, bool) else value, place)


def _address(value: str, place: Place) -> str:
    if not _ADDRESS.fullmatch(value):
        yamlfile.wrong(value, place, "an IP address or host name")
    return value


def _labels(value: object, place: Place) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, dict) or len(value) > 64:
        yamlfile.wrong(value, place, "a mapping of at most 64 labels")
    return tuple(sorted((yamlfile.text(k, place), yamlfile.text(v, place.key(k))) for k, v in value.items()))


# ---- links ---------------------------------------------------------------------------------------------------


def _node_link(value: object, place: Place) -> tuple[Link | None, str | None]:
    if isinstance(value, str):
        return lookup_link(value, str(place)), value
    return _figures(Section(value, place, _LINK_KEYS)), None


def _figures(section: Section) -> Link:
    return Link(section.require("bandwidth", _bandwidth), section.require("latency", _latency))


def _between(section: Section) -> Link:
    """Between nodes a bandwidth of zero says that there is no way."""
    return Link(section.require("bandwidth", _bandwidth_or_none), section.require("latency", _latency))


def _links(
    value: object, place: Place, nodes: tuple[Node, ...]
) -> tuple[Link, tuple[RegionLink, ...], tuple[NodeLink, ...]]:
    section = Section(value, place, ("default", "regions", "nodes"))
    names = {node.name: None for node in nodes}
    regions = {node.region: None for node in nodes if node.region is not None}

    def region_link(entry: object, at: Place) -> RegionLink:
        fields = Section(entry, at, ("between", "within", *_LINK_KEYS))
        if ("between" in fields) == ("within" in fields):
            raise SpecError("needs either `between: [a, b]` or `within: a`", where=str(at))
        if "within" in fields:
            region = fields.require("within", lambda v, p: _one_of(v, p, regions, "region"))
            return RegionLink((region, region), _between(fields))
        return RegionLink(fields.require("between", lambda v, p: _pair(v, p, regions, "region")), _between(fields))

    def node_link(entry: object, at: Place) -> NodeLink:
        fields = Section(entry, at, ("between", *_LINK_KEYS))
        return NodeLink(fields.require("between", lambda v, p: _pair(v, p, names, "node")), _between(fields))

    region_links = section.get("regions", yamlfile.list_of(region_link, _MAX_ENTRIES), ())
    node_links = section.get("nodes", yamlfile.list_of(node_link, _MAX_ENTRIES), ())
    _refuse_repeats([entry.regions for entry in region_links], place.key("regions"))
    _refuse_repeats([entry.nodes for entry in node_links], place.key("nodes"))
    default = section.get("default", lambda v, p: _between(Section(v, p, _LINK_KEYS)), DEFAULT_NETWORK)
    return default, region_links, node_links


def _pair(value: object, place: Place, known: Collection[str], what: str) -> tuple[str, str]:
    pair = yamlfile.list_of(lambda v, p: _one_of(v, p, known, what), 2, least=2)(value, place)
    if pair[0] == pair[1]:
        raise SpecError(
            f"both are {pair[0]!r}",
            where=str(place),
            remedy="use `within:`" if what == "region" else "the link inside a node is the node's own `link`",
        )
    return pair[0], pair[1]


def _one_of(value: object, place: Place, known: Collection[str], what: str) -> str:
    name = yamlfile.name(value, place)
    if name not in known:
        close = difflib.get_close_matches(name, list(known), n=1)
        raise SpecError(
            f"no node is in the region {name!r}" if what == "region" else f"there is no node {name!r}",
            where=str(place),
            remedy=f"did you mean {close[0]!r}?" if close else f"known: {', '.join(list(known)[:10]) or 'none'}",
        )
    return name


def _refuse_repeats(pairs: list[tuple[str, str]], place: Place) -> None:
    seen: set[tuple[str, str]] = set()
    for i, (a, b) in enumerate(pairs):
        if (a, b) in seen:
            raise SpecError(f"the link between {a!r} and {b!r} stands twice", where=str(place.index(i)))
        seen.update({(a, b), (b, a)})
