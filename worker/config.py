"""What one rank of one stage is told when it loads: everything it needs, nothing about the rest of the cluster."""

from __future__ import annotations

from dataclasses import dataclass

from hexgen.model import DType, ModelSpec
from hexgen.plan import Layers
from hexgen.split import RankSlice


@dataclass(frozen=True, slots=True)
class RouteRole:
    """One route's passage through this stage."""

    route: int
    layers: Layers  # the part of the stage's layers that the route uses
    pages: int  # KV pages kept for the route; equal on every stage of it
    depth: int  # number of stages on the route: at most this many steps are in flight
    embeds: bool  # first on the path: embeds tokens, forms the batches, talks to the coordinator
    samples: bool  # last on the path: output head and sampling
    next: str | None  # stage it sends hidden states to
    last: str  # stage that samples (tokens come back from it to the first)
    first: str = ""  # stage that embeds; "" where nobody asks (the stage itself, on a route of one)


@dataclass(frozen=True, slots=True)
class EdgeSpec:
    """A communicator between the leaders (rank 0) of two stages. ``side`` 0 sends, 1 receives."""

    name: str  # unique in the deployment; both sides use it as the store's prefix
    peer: str  # the stage at the other end
    side: int
    kind: str  # "hidden" (step header and hidden states) or "tokens" (sampled tokens, last stage to first)


@dataclass(frozen=True, slots=True)
class RankConfig:
    deployment: str  # unique; prefixes every key in the store
    stage: str
    rank: int
    width: int
    device: str  # "cpu" or "cuda:0"
    dtype: DType
    threads: int  # intra-op threads of a CPU rank
    model: ModelSpec
    model_path: str
    layers: Layers  # what the stage holds
    slices: tuple[RankSlice, ...]  # of every rank of the stage, in rank order
    routes: tuple[RouteRole, ...]
    edges: tuple[EdgeSpec, ...]  # only the leader opens them
    page_size: int
    token_budget: int
    max_sequences: int
    max_context: int
    prefix_cache: bool
    store_host: str
    store_port: int
    listen_host: str  # this node's own address: every socket of this rank binds to it
    secret: str  # hex; the first frame on a coordinator connection must carry it
