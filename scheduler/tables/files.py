"""Cost tables from files: published or measured, told apart by their keys, and checked at the door.

JSON or YAML. Every complaint names the file, the place in it and what to do.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TypeVar

from hexgen import units, yamlfile
from hexgen.cluster import Cluster
from hexgen.errors import SpecError
from hexgen.memory import plan_dtype
from hexgen.model import DTYPE_BYTES, DType, ModelSpec
from hexgen.plan import EngineOptions
from hexgen.scheduler.tables.measured import Curve, Grid, LayerShape, MeasuredEntry, MeasuredTable
from hexgen.scheduler.tables.published import PublishedTable, PublishedType
from hexgen.scheduler.tables.source import CostTable
from hexgen.yamlfile import Place, Section, list_of

log = logging.getLogger("hexgen.scheduler")
MAX_LAYERS = 10_000
MAX_ENTRIES = 10_000
MAX_POINTS = 1_000  # along one axis of a grid
_T = TypeVar("_T", int, float)

_PUBLISHED = ("source", "model", "layers", "activation_bytes_per_token", "layer_bytes", "types")
_PUBLISHED_TYPE = ("max_layers", "tokens_per_s_by_layers", "kv_token_layers_by_layers")
_MEASURED = ("version", "source", "model", "hop_s", "entries")
_ENTRY = (
    "device", "width", "dtype", "layer", "peak", "versions", "prefill", "decode", "step_s", "step", "embed",
    "sample", "batching", "passing", "kv_token_layers_by_layers",
)  # fmt: skip
_LAYER = ("hidden_size", "heads", "kv_heads", "head_dim", "intermediate_size")


def load_table(path: str | Path) -> CostTable:
    """The cost table in the file ``path``. Raises `SpecError`."""
    values = yamlfile.read_yaml(path)
    place = Place(str(path))
    if "types" in values:
        return _published(values, place)
    if "entries" in values:
        return _measured(values, place)
    raise SpecError(
        "is not a cost table",
        where=str(path),
        remedy="a published table has `types:`, a measured one `entries:`",
    )


def table_for(path: str | Path | None, cluster: Cluster, model: ModelSpec) -> CostTable | None:
    """The table at ``path`` (``--cost``), else the one that the cluster file names; None for neither.

    A table that is asked for must fit, which whoever plans with it checks. One that the cluster names may be of
    another model, or gone: then a warning says so, and the catalogue's figures are used.
    """
    if path is not None:
        return load_table(path)
    if cluster.cost_table is None:
        return None
    nodes = [node for node in cluster.nodes if node.count]
    try:
        table = load_table(cluster.cost_table)
        table.check(model, nodes, plan_dtype(EngineOptions(), model, [node.device for node in nodes]))
    except SpecError as error:
        log.warning("planned with the catalogue's figures: the cluster's cost_table %s", error)
        return None
    return table


# ---- published -------------------------------------------------------------------------------------------------


def _published(values: object, place: Place) -> PublishedTable:
    section = Section(values, place, _PUBLISHED)
    types = section.values["types"]
    if not isinstance(types, dict) or not types:
        yamlfile.wrong(types, place.key("types"), "figures by device type")
    return PublishedTable(
        where=place.file,
        title=section.get("source", yamlfile.text, "no source given"),
        model=section.require("model", yamlfile.text),
        layers=section.require("layers", yamlfile.integer(1, MAX_LAYERS)),
        activation_bytes=section.require("activation_bytes_per_token", yamlfile.number()),
        layer_bytes=section.require("layer_bytes", yamlfile.number()),
        types={
            yamlfile.name(name, place.key("types")): _published_type(value, place.key("types").key(name))
            for name, value in types.items()
        },
    )


def _published_type(value: object, place: Place) -> PublishedType:
    section = Section(value, place, _PUBLISHED_TYPE)
    rates = section.require("tokens_per_s_by_layers", _by_layers(yamlfile.number()))
    kv = section.require("kv_token_layers_by_layers", _by_layers(yamlfile.integer(0)))
    most = section.get("max_layers", yamlfile.integer(1, MAX_LAYERS), len(rates))
    if not len(rates) == len(kv) == most:
        raise SpecError(
            f"tokens/s for {len(rates)} numbers of layers, KV room for {len(kv)}, and max_layers is {most}",
            where=str(place),
            remedy="give both for every number of layers from 1 to max_layers",
        )
    return PublishedType(rates, kv)


def _by_layers(read: yamlfile.Reader[_T]) -> yamlfile.Reader[tuple[_T, ...]]:
    """A row by layers, from 1 without gaps, made to never grow.

    Measurements scatter: where a machine was found faster with more layers, it does fewer at least as fast, so
    each figure is the best of its own and those after it. (Helix's table for LLaMA-30B has 3,778 tokens/s for 2
    layers on an A100, and 4,200 for 3.)
    """

    def read_row(value: object, place: Place) -> tuple[_T, ...]:
        if not isinstance(value, dict) or not 0 < len(value) <= MAX_LAYERS:
            yamlfile.wrong(value, place, "figures by number of layers: {1: ..., 2: ...}")
        figures = {str(key): figure for key, figure in value.items()}
        missing = [n for n in range(1, len(figures) + 1) if str(n) not in figures]
        if missing:
            raise SpecError(
                f"has {len(figures)} figures, but none for {missing[0]} layers",
                where=str(place),
                remedy="number them from 1 without gaps",
            )
        row = [read(figures[str(n)], place.key(n)) for n in range(1, len(figures) + 1)]
        return tuple(accumulate(reversed(row), max))[::-1]

    return read_row


# ---- measured --------------------------------------------------------------------------------------------------


def _measured(values: object, place: Place) -> MeasuredTable:
    section = Section(values, place, _MEASURED)
    section.get("version", yamlfile.integer(1, 1), 1)
    section.get("model", yamlfile.text, "")  # for people: entries say what shape they are of
    return MeasuredTable(
        where=place.file,
        title=section.get("source", yamlfile.text, "no source given"),
        entries=section.require("entries", list_of(_entry, MAX_ENTRIES, least=1)),
        hop_s=section.optional("hop_s", yamlfile.number(allow_equal=True)),
    )


def _entry(value: object, place: Place) -> MeasuredEntry:
    section = Section(value, place, _ENTRY)
    versions = section.get("versions", _texts, {})
    return MeasuredEntry(
        device=section.require("device", yamlfile.name),
        width=section.get("width", yamlfile.integer(1, 1024), 1),
        dtype=section.require("dtype", _dtype),
        layer=section.require("layer", _layer),
        versions=versions,
        prefill=section.require("prefill", _grid("tokens")),
        decode=section.require("decode", _grid("sequences")),
        step_s=section.optional("step_s", yamlfile.number(allow_equal=True)),
        kv_token_layers=section.get("kv_token_layers_by_layers", _by_layers(yamlfile.integer(0)), ()),
        peak_flops=section.optional("peak", yamlfile.quantity(units.parse_flops)),
        step=section.optional("step", _curve("sequences")),
        embed=section.optional("embed", _curve("tokens")),
        sample=section.optional("sample", _curve("sequences")),
        batching=section.optional("batching", _curve("sequences")),
        passing=section.optional("passing", _curve("sequences")),
    )


def _layer(value: object, place: Place) -> LayerShape:
    section = Section(value, place, _LAYER)
    size = yamlfile.integer(1, 1 << 24)
    return LayerShape(*(section.require(key, size) for key in _LAYER))


def _texts(value: object, place: Place) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > 100:
        yamlfile.wrong(value, place, "library versions: {torch: 2.9.1}")
    return {str(key): str(text) for key, text in value.items()}


def _dtype(value: object, place: Place) -> DType:
    for dtype in DTYPE_BYTES:
        if value == dtype:
            return dtype
    yamlfile.wrong(value, place, f"one of {', '.join(DTYPE_BYTES)}")


def _grid(across: str) -> yamlfile.Reader[Grid]:
    """``{tokens: [...], context: [...], seconds: [[one row for each of tokens]]}``."""

    def read(value: object, place: Place) -> Grid:
        section = Section(value, place, (across, "context", "seconds"))
        first = section.require(across, _axis)
        context = section.require("context", _axis)
        seconds = section.require("seconds", list_of(_row, MAX_POINTS))
        if len(seconds) != len(first) or any(len(row) != len(context) for row in seconds):
            raise SpecError(
                f"needs {len(first)} rows of {len(context)}, one row for each of {across}",
                where=str(place.key("seconds")),
                remedy="give a figure for every pair of points",
            )
        return Grid(first, context, seconds)

    return read


def _curve(across: str) -> yamlfile.Reader[Curve]:
    """``{tokens: [...], seconds: [...]}``."""

    def read(value: object, place: Place) -> Curve:
        section = Section(value, place, (across, "seconds"))
        points = section.require(across, _axis)
        seconds = section.require("seconds", _row)
        if len(seconds) != len(points):
            raise SpecError(
                f"has {len(seconds)} figures for {len(points)} {across}",
                where=str(place.key("seconds")),
                remedy="give one for each",
            )
        return Curve(points, seconds)

    return read


def _axis(value: object, place: Place) -> tuple[float, ...]:
    points: Sequence[float] = list_of(yamlfile.number(allow_equal=True), MAX_POINTS, least=1)(value, place)
    if any(b <= a for a, b in pairwise(points)):
        raise SpecError("is not rising", where=str(place), remedy="sort the points and drop what stands twice")
    return tuple(points)


def _row(value: object, place: Place) -> tuple[float, ...]:
    return list_of(yamlfile.number(), MAX_POINTS, least=1)(value, place)
