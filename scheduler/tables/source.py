"""Where figures come from: the contract between the cost model and tables of published or measured ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from hexgen.cluster import DeviceType, Link, Node
from hexgen.errors import SpecError
from hexgen.model import DType, ModelSpec
from hexgen.plan import EngineOptions

if TYPE_CHECKING:
    from hexgen.scheduler.cost import EdgeCost, GroupShape, StageProfile


class CostTable(Protocol):
    """Figures that replace the catalogue's. Without one, `CostModel` is the roofline."""

    @property
    def source(self) -> str:
        """What a prediction says it was made with."""
        ...

    @property
    def holds_kv(self) -> bool:
        """The table says how much KV fits, instead of `hexgen.memory`."""
        ...

    def check(self, model: ModelSpec, nodes: Sequence[Node], dtype: DType | None = None) -> None:
        """Raises `SpecError` where the table is of another model or lacks a device type; where ``dtype`` is given,
        also where it is of others than that."""
        ...

    def profile(
        self, number: int, shape: GroupShape, model: ModelSpec, dtype: DType, engine: EngineOptions
    ) -> StageProfile | None:
        """The stage that ``shape`` makes; None where the catalogue's figures are to be used."""
        ...

    def edge(self, link: Link) -> EdgeCost | None:
        """What a message of hidden states costs on ``link``; None: as the catalogue has it."""
        ...


def find_type(wanted: str, names: Sequence[str]) -> str | None:
    """The name in a table that means the device type ``wanted``: itself, or one that the other begins with.

    ``A100`` in a table is ``A100-40G-SXM`` in a cluster, and the other way round; ``L4`` is not ``L40``. Raises
    `SpecError` where a short name could be several.
    """
    if wanted in names:
        return wanted
    beginnings = [name for name in names if wanted.startswith(f"{name}-")]
    if beginnings:
        return max(beginnings, key=len)  # the most specific
    longer = [name for name in names if name.startswith(f"{wanted}-")]
    if len(longer) > 1:
        raise SpecError(
            f"device type {wanted!r} could be any of {', '.join(longer)} in the cost table",
            where="--cost",
            remedy="name the device type in full in the cluster file",
        )
    return longer[0] if longer else None


def meant_by(wanted: str, names: Sequence[str]) -> list[str]:
    """All names in a table that may mean ``wanted``, the likeliest first: as `find_type`, which takes only one."""
    if wanted in names:
        return [wanted]
    beginnings = {name for name in names if wanted.startswith(f"{name}-")}
    if beginnings:
        return [max(beginnings, key=len)]
    return sorted({name for name in names if name.startswith(f"{wanted}-")})


def equal_devices(shape: GroupShape) -> DeviceType | None:
    """The one type of an equally shared group; None where devices or shares differ."""
    first = shape.devices[0]
    shares = set(shape.shares or ())
    return first if len(shares) <= 1 and all(device == first for device in shape.devices) else None
