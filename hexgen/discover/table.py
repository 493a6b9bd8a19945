"""A calibration as a cost table: the file that `hexgen plan --cost` reads (`hexgen.scheduler.tables`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hexgen.cluster import DeviceType
from hexgen.discover.calibrate import Calibration
from hexgen.discover.kinds import significant
from hexgen.model import DType, ModelSpec
from hexgen.scheduler.figures import flops_of
from hexgen.scheduler.tables.measured import LayerShape, layer_shape
from hexgen.units import exact_flops
from hexgen.yamlfile import Inline, write_yaml

HEAD = """\
Measured by `hexgen discover --model`: seconds of one layer of this model on each device type, by the worker's own
code with random weights. `hexgen plan CLUSTER --cost THIS` uses it in place of the catalogue's roofline.
prefill: rows by tokens of prompt in a step, columns by how many positions each attends to on average.
decode:  rows by sequences that each put out a token, columns by the positions each attends to.
step, embed, sample: what a step takes beside its layers; embedding on the first stage, sampling on the last.
batching: forming batches and answering, on the first stage. passing: taking a step from another stage and passing
its outcome on, on each stage of a route of several. Both by the engine's loop with a model that computes nothing.
peak: the device's FLOP/s in the cluster file; a device of the same type with another takes times in proportion.
hop_s: what software adds to a message between stages, beside the link's latency."""


@dataclass(frozen=True, slots=True)
class Timed:
    """One device type's calibration, and where it was made."""

    device: DeviceType
    node: str
    calibration: Calibration


def table_text(model: ModelSpec, dtype: DType, timed: Sequence[Timed], hops_s: Sequence[float], name: str) -> str:
    """The file. ``hops_s``: of each node, of which the middle one counts; ``name``: the model's as given."""
    plain: dict[str, Any] = {
        "version": 1,
        "source": f"hexgen discover on {', '.join(entry.node for entry in timed)}",
        "model": name,
    }
    if hops_s:
        plain["hop_s"] = significant(sorted(hops_s)[len(hops_s) // 2])
    plain["entries"] = [_entry(layer_shape(model), dtype, entry) for entry in timed]
    return write_yaml(plain, HEAD)


def _entry(shape: LayerShape, dtype: DType, timed: Timed) -> dict[str, Any]:
    found = timed.calibration
    return {
        "device": timed.device.name,
        "width": 1,
        "dtype": dtype,
        "peak": exact_flops(flops_of(timed.device, dtype)),
        "layer": Inline({name: getattr(shape, name) for name in shape.__slots__}),
        "versions": Inline(found.versions),
        "prefill": _grid("tokens", found.prefill_tokens, found.contexts, found.prefill),
        "decode": _grid("sequences", found.decode_sequences, found.contexts, found.decode),
        "step": _curve("sequences", found.decode_sequences, found.step),
        "embed": _curve("tokens", found.prefill_tokens, found.embed),
        "sample": _curve("sequences", found.decode_sequences, found.sample),
        **_loops(found),
    }


def _loops(found: Calibration) -> dict[str, Any]:
    loops = found.loops
    if loops is None:
        return {}
    return {
        "batching": _curve("sequences", loops.sequences, loops.batching),
        "passing": _curve("sequences", loops.sequences, loops.passing),
    }


def _grid(
    across: str, points: Sequence[int], contexts: Sequence[int], seconds: Sequence[Sequence[float]]
) -> Mapping[str, Any]:
    rows = [[significant(value) for value in row] for row in seconds]
    return {across: list(points), "context": list(contexts), "seconds": rows}


def _curve(across: str, points: Sequence[int], seconds: Sequence[float]) -> Mapping[str, Any]:
    return Inline({across: list(points), "seconds": [max(1e-9, significant(value)) for value in seconds]})
